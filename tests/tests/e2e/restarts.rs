//! The device behind the server dies and comes back, and no client notices.

use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use nbdblk_tests::checker::{BLOCK, Checker, Durability};
use nbdblk_tests::raw::{Mode, Raw, cmd, errno, info_query, opt};
use nbdblk_tests::{
    Address, Dir, Export, Nbdblk, Qsd, Rng, eventually, nbdblk, restarts, tool, under_load, write_runs,
};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::MIB;

const SIZE: u64 = 64 * MIB;

fn image(dir: &Dir, format: &str) -> PathBuf {
    let image = dir.at("disk.img");
    let _ = std::fs::remove_file(&image);
    tool("qemu-img").args(["create", "-q", "-f", format]).args([&image]).args([SIZE.to_string()]).ok();
    image
}

fn export(format: &'static str) -> Export {
    Export { format, queues: 2, ..Export::default() }
}

/// Kills the back end at random moments while four clients verify what they write.
fn kill_under_load(format: &'static str, properties: &str, durability: Durability) {
    kill_and_upgrade_under_load(format, properties, durability, false);
}

/// As [`kill_under_load`], and replaces the program of the server in between.
fn kill_and_upgrade_under_load(format: &'static str, properties: &str, durability: Durability, upgrade: bool) {
    let dir = Dir::in_memory();
    let image = image(&dir, format);
    let first = Qsd::start(&dir, &image, export(format));
    let spec = format!("{}{properties}", first.spec());
    let mut server = Nbdblk::unix(&dir, &[&spec, "--control", "control.sock"]);
    let mut qsd = Some(first);
    let mut rng = Rng(7);
    under_load(server.address(), &[durability; 4], SIZE as usize / BLOCK / 4, || {
        for _ in 0..restarts(6) {
            thread::sleep(Duration::from_millis(50 + rng.below(400)));
            qsd.take().expect("it runs").kill();
            // Sometimes it is away for a while.
            thread::sleep(Duration::from_millis(rng.below(2) * rng.below(300)));
            qsd = Some(Qsd::start(&dir, &image, export(format)));
            if upgrade {
                nbdblk().args(["upgrade", "--control", "control.sock"]).within(dir.path()).ok();
            }
        }
    });
    assert!(server.is_alive());
    assert!(server.terminate().success());
    drop(qsd);
    // What was allocated when the process was killed may be unused. Nothing else may be wrong.
    let check = tool("qemu-img").args(["check", "-f", format, "--output=json"]).args([&image]).run();
    assert!(format == "raw" || [Some(0), Some(3)].contains(&check.status.code()), "{check:?}");
}

#[test]
fn no_write_is_lost_when_a_back_end_with_qcow2_is_killed() {
    kill_under_load("qcow2", "", Durability::Often);
}

/// The new program knows nothing of writes that were not flushed, so the old one flushes them.
#[test]
fn no_write_is_lost_when_back_end_and_server_are_replaced() {
    kill_and_upgrade_under_load("qcow2", "", Durability::None, true);
}

#[test]
fn no_write_is_lost_although_no_client_flushes() {
    kill_under_load("qcow2", "", Durability::None);
}

/// So little that the server flushes on its own all the time.
#[test]
fn no_write_is_lost_with_little_memory_for_unflushed_writes() {
    kill_under_load("qcow2", ",unflushed-memory=256K", Durability::None);
}

#[test]
fn a_back_end_with_a_raw_file_is_trusted_if_asked() {
    kill_under_load("raw", ",unflushed=trust", Durability::None);
}

/// What the server does on its own is what saves the data: without it, the same back end loses writes.
#[test]
fn qcow2_loses_writes_if_it_is_trusted() {
    let dir = Dir::in_memory();
    let image = image(&dir, "qcow2");
    let qsd = Qsd::start(&dir, &image, export("qcow2"));
    let server = Nbdblk::unix(&dir, &[&format!("{},unflushed=trust", qsd.spec())]);
    let mut raw = Raw::enter(server.address(), Mode::Structured, "");
    for n in 0..40 {
        raw.write(n * MIB, &[7; 65536]);
    }
    qsd.kill();
    let _qsd = Qsd::start(&dir, &image, export("qcow2"));
    let lost = (0..40).filter(|n| raw.read(n * MIB, 65536) != [7; 65536]).count();
    assert!(lost > 0, "if this back end keeps all writes, the tests above show nothing");
}

/// With `unflushed=fail`, clients of the time before are told of the loss, and new ones are served.
#[test]
fn a_loss_ends_present_clients_if_asked() {
    let dir = Dir::in_memory();
    let image = image(&dir, "qcow2");
    let qsd = Qsd::start(&dir, &image, export("qcow2"));
    let server = Nbdblk::unix(&dir, &[&format!("{},unflushed=fail", qsd.spec())]);
    let (mut busy, idle) =
        (Raw::enter(server.address(), Mode::Simple, ""), Raw::enter(server.address(), Mode::Simple, ""));
    busy.write(0, &[7; 65536]);
    qsd.kill();
    server.await_log("were not flushed and may be lost");
    let request = Mode::Simple.request(0, cmd::READ, 1, 0, 512, b"");
    // The connection may be closed already.
    let _ = busy.try_send(&request);
    let _ = busy.await_end();
    let _ = idle.await_end();
    let _qsd = Qsd::start(&dir, &image, export("qcow2"));
    server.await_log("back after");
    let mut new = Raw::enter(server.address(), Mode::Simple, "");
    new.write(0, &[8; 512]);
    assert_eq!(new.read(0, 512), [8; 512]);
}

/// Without unflushed changes nothing is lost, so clients go on.
#[test]
fn nothing_is_lost_after_a_flush() {
    let dir = Dir::in_memory();
    let image = image(&dir, "qcow2");
    let qsd = Qsd::start(&dir, &image, export("qcow2"));
    let server = Nbdblk::unix(&dir, &[&format!("{},unflushed=fail", qsd.spec())]);
    let mut raw = Raw::enter(server.address(), Mode::Simple, "");
    raw.write(0, &[7; 65536]);
    assert_eq!(raw.call(0, cmd::FLUSH, 0, 0, b"").error, 0);
    qsd.kill();
    let _qsd = Qsd::start(&dir, &image, export("qcow2"));
    assert_eq!(raw.read(0, 65536), [7; 65536]);
}

#[test]
fn requests_fail_after_the_window_and_succeed_when_the_device_is_back() {
    let dir = Dir::in_memory();
    let image = image(&dir, "raw");
    let qsd = Qsd::start(&dir, &image, export("raw"));
    let mut server = Nbdblk::unix(&dir, &[&format!("{},reconnect=200ms", qsd.spec())]);
    let mut raw = Raw::enter(server.address(), Mode::Simple, "");
    raw.write(0, &[7; 512]);
    qsd.kill();
    let reads: Vec<_> = (0..64).map(|n| (n * 4096, 4096)).collect();
    raw.request_reads(&reads);
    for _ in 0..64 {
        assert_eq!(raw.answer().error, errno::EIO);
    }
    assert_eq!(raw.call(0, cmd::WRITE, 0, 512, &[1; 512]).error, errno::EIO);
    server.await_log("requests fail until it is");
    let _qsd = Qsd::start(&dir, &image, export("raw"));
    server.await_log("back after");
    assert_eq!(raw.read(0, 512), [7; 512], "a write that failed while the device was away was not carried out");
    assert!(server.is_alive());
}

#[test]
fn a_device_that_came_back_different_is_refused() {
    let dir = Dir::in_memory();
    let image = image(&dir, "raw");
    let qsd = Qsd::start(&dir, &image, export("raw"));
    let server = Nbdblk::unix(&dir, &[&qsd.spec()]);
    let mut raw = Raw::enter(server.address(), Mode::Simple, "");
    raw.write(0, &[7; 512]);
    qsd.kill();
    let small = dir.sparse("small.img", MIB);
    let qsd = Qsd::start(&dir, &small, export("raw"));
    server.await_log("it came back with 1048576 bytes, but clients rely on 67108864");
    qsd.kill();
    let qsd = Qsd::start(&dir, &image, Export { writable: false, ..export("raw") });
    server.await_log("it came back read-only");
    qsd.kill();
    let node = format!("driver=raw,node-name=disk,file.driver=file,file.filename={}", image.display());
    let qsd = Qsd::start_node_with(&dir, &node, export("raw"), ",logical-block-size=4096");
    server.await_log("it came back with blocks of 4096 bytes instead of 512");
    qsd.kill();
    // A larger one is welcome.
    tool("qemu-img").args(["resize", "-q", "-f", "raw"]).args([&image]).args(["128M"]).ok();
    let _qsd = Qsd::start(&dir, &image, export("raw"));
    assert_eq!(raw.read(0, 512), [7; 512]);
    assert_eq!(Raw::enter(server.address(), Mode::Simple, "").size, 128 * MIB);
}

/// A back end that hangs for longer than the time-out is disconnected, and reached again when it goes on.
#[test]
fn clients_go_on_after_a_hang() {
    let dir = Dir::in_memory();
    let image = dir.at("disk.raw");
    write_runs(&image, SIZE, [(0, SIZE)]);
    let qsd = Qsd::start(&dir, &image, export("raw"));
    let server = Nbdblk::unix(&dir, &[&format!("{},request-timeout=500ms,connect-timeout=500ms", qsd.spec())]);
    let mut raw = Raw::enter(server.address(), Mode::Structured, "");
    let before = raw.read(0, 4 * MIB as u32);
    let mut checker = Checker::new(Raw::enter(server.address(), Mode::Simple, ""), 4096, 1024, Durability::Often);
    write_zeroes(&mut raw, 4096 * BLOCK as u64, 1024 * BLOCK as u32);
    checker.round();
    qsd.freeze();
    let reads: Vec<_> = (0..64).map(|n| (n * 65536, 65536)).collect();
    let first = raw.request_reads(&reads);
    server.await_log("reconnecting");
    qsd.thaw();
    for _ in 0..64 {
        let answer = raw.answer();
        let at = (answer.cookie - first) as usize * 65536;
        assert_eq!(answer.error, 0);
        assert!(answer.data == before[at..at + 65536], "at {at}");
    }
    checker.round();
    checker.verify_all();
    assert!(server.terminate().success());
}

fn write_zeroes(raw: &mut Raw, at: u64, len: u32) {
    assert_eq!(raw.call(0, cmd::WRITE_ZEROES, at, len, b"").error, 0);
}

/// Clients of a server that is stopped wait, also new ones.
#[test]
fn clients_wait_for_a_server_that_is_stopped() {
    let dir = Dir::in_memory();
    write_runs(&dir.at("disk.raw"), MIB, [(0, MIB)]);
    let server = Nbdblk::unix(&dir, &["io_uring=disk.raw"]);
    let mut present = Raw::enter(server.address(), Mode::Structured, "");
    let before = present.read(0, 65536);
    let signal = |signal| kill(Pid::from_raw(server.pid().cast_signed()), signal).expect("the server runs");
    signal(Signal::SIGSTOP);
    let cookie = present.request(0, cmd::READ, 0, 65536, b"");
    thread::scope(|scope| {
        let new = scope.spawn(|| Raw::enter(server.address(), Mode::Structured, "").read(0, 65536));
        thread::sleep(Duration::from_millis(300));
        assert!(!new.is_finished());
        signal(Signal::SIGCONT);
        assert!(new.join().expect("it is served") == before);
    });
    assert!(present.answer_to(cookie).data == before);
    assert!(server.terminate().success());
}

/// Memory of kept writes is returned when a request needs it, although nothing is in flight.
#[test]
fn kept_writes_leave_memory_for_large_requests() {
    let dir = Dir::in_memory();
    let image = image(&dir, "qcow2");
    let qsd = Qsd::start(&dir, &image, export("qcow2"));
    let server = Nbdblk::unix(&dir, &[&format!("{},unflushed-memory=1G", qsd.spec()), "--memory=8M", "--threads=1"]);
    let mut raw = Raw::enter(server.address(), Mode::Structured, "");
    for n in 0..4096 {
        raw.write(n * 8192, &[n as u8; 4096]);
    }
    let large = raw.read(0, 6 * MIB as u32);
    assert!(large.chunks(8192).enumerate().all(|(n, pair)| pair[..4096] == [n as u8; 4096]));
    raw.write(0, &vec![9; 6 * MIB as usize]);
    qsd.kill();
    let _qsd = Qsd::start(&dir, &image, export("qcow2"));
    assert!(raw.read(0, 6 * MIB as u32).iter().all(|byte| *byte == 9));
}

/// A server that waits for its device ends when told to.
#[test]
fn a_server_without_its_device_ends_when_told_to() {
    let dir = Dir::in_memory();
    let image = image(&dir, "raw");
    let qsd = Qsd::start(&dir, &image, export("raw"));
    let server = Nbdblk::unix(&dir, &[&qsd.spec()]);
    let mut raw = Raw::enter(server.address(), Mode::Simple, "");
    raw.write(0, &[7; 512]);
    qsd.kill();
    raw.request_reads(&[(0, 4096); 64]);
    eventually("the server notices", || server.log().contains("reconnecting"));
    assert!(server.terminate().success());
}

/// A client that connects while the device is away is served when the device is back. Other exports do not wait.
#[test]
fn a_new_client_waits_for_the_device() {
    let dir = Dir::in_memory();
    let image = image(&dir, "raw");
    let qsd = Qsd::start(&dir, &image, export("raw"));
    let server = Nbdblk::unix(&dir, &[&format!("a:{}", qsd.spec()), "b:memory=1M"]);
    qsd.kill();
    eventually("the server notices", || server.log().contains("reconnecting"));
    thread::scope(|scope| {
        let waiting = scope.spawn(|| Raw::enter(server.address(), Mode::Structured, "a").size);
        assert_eq!(Raw::enter(server.address(), Mode::Structured, "b").size, MIB);
        assert!(!waiting.is_finished());
        let _qsd = Qsd::start(&dir, &image, export("raw"));
        assert_eq!(waiting.join().expect("it is served"), SIZE);
    });
}

#[test]
fn a_new_client_gets_an_error_if_the_device_stays_away() {
    let dir = Dir::in_memory();
    let image = image(&dir, "raw");
    let qsd = Qsd::start(&dir, &image, export("raw"));
    let server = Nbdblk::unix(&dir, &[&qsd.spec(), "--handshake-timeout=1s"]);
    qsd.kill();
    eventually("the server notices", || server.log().contains("reconnecting"));
    let mut late = Raw::greeted(server.address());
    let answers = late.ask(opt::GO, &info_query("", &[]));
    let text = String::from_utf8_lossy(&answers[0].1);
    assert!(answers.len() == 1 && text.contains("does not answer; try again later"), "{answers:?}");
}

/// A configuration with one export, and its control socket.
fn configure(dir: &Dir, device: &str) -> String {
    let file = format!("control = \"control.sock\"\n[[export]]\nname = \"x\"\ndevice = \"{device}\"\n");
    std::fs::write(dir.at("nbdblk.toml"), file).unwrap();
    dir.text("nbdblk.toml")
}

fn reload(dir: &Dir) -> String {
    let output = nbdblk().args(["reload", "nbdblk.toml"]).within(dir.path()).run();
    assert!(output.status.success(), "{output:?}");
    output.out.trim().to_owned()
}

#[test]
fn reload_opens_a_dead_device_again_although_it_is_the_only_one() {
    let dir = Dir::in_memory();
    let image = image(&dir, "raw");
    let qsd = Qsd::start(&dir, &image, export("raw"));
    let file = configure(&dir, &format!("{},reconnect=0", qsd.spec()));
    let server = Nbdblk::unix(&dir, &["--config", &file]);
    assert_eq!(reload(&dir), "nothing has changed");
    qsd.kill();
    server.await_log("the device is declared dead");
    let _qsd = Qsd::start(&dir, &image, export("raw"));
    assert_eq!(reload(&dir), "reopened: \"x\" (it was dead)");
    assert_eq!(Raw::enter(server.address(), Mode::Structured, "x").size, SIZE);
}

#[test]
fn reload_reports_a_new_size() {
    let dir = Dir::in_memory();
    let image = dir.sparse("disk.raw", MIB);
    let file = configure(&dir, "io_uring=disk.raw");
    let server = Nbdblk::unix(&dir, &["--config", &file]);
    let old = Raw::enter(server.address(), Mode::Structured, "x");
    for (before, after) in [(MIB, 3 * MIB), (3 * MIB, 2 * MIB)] {
        std::fs::File::options().write(true).open(&image).unwrap().set_len(after).unwrap();
        // A new client gets the new size even without a reload.
        assert_eq!(Raw::enter(server.address(), Mode::Structured, "x").size, after);
        assert_eq!(reload(&dir), format!("resized: \"x\" (from {before} to {after} bytes)"));
    }
    assert_eq!(old.size, MIB, "a client keeps the size that it has got");
}

#[test]
fn the_start_waits_for_a_device_if_asked() {
    let dir = Dir::in_memory();
    let image = image(&dir, "raw");
    let spec = format!("vhost-user={}", dir.text("vhost.sock"));
    let socket = dir.text("nbd.sock");
    let mut waiting =
        nbdblk().args(["serve", &spec, "--wait=60s", "--print-uri", "--unix", &socket]).spawn(dir.at("wait.log"));
    waiting.await_text("waiting up to 60s for its device");
    assert!(!dir.at("nbd.sock").exists(), "it listens when the device is open");
    let _qsd = Qsd::start(&dir, &image, export("raw"));
    waiting.await_text("nbd+unix://");
    assert_eq!(Raw::enter(&Address::Unix(dir.at("nbd.sock")), Mode::Structured, "").size, SIZE);
}

#[test]
fn a_wait_ends_with_a_signal_or_with_its_time() {
    let dir = Dir::in_memory();
    let spec = format!("vhost-user={}", dir.text("vhost.sock"));
    let socket = dir.text("nbd.sock");
    let mut waiting = nbdblk().args(["serve", &spec, "--wait=600s", "--unix", &socket]).spawn(dir.at("wait.log"));
    waiting.await_text("waiting up to 600s");
    waiting.signal(Signal::SIGTERM);
    waiting.await_end();
    let late = nbdblk().args(["serve", &spec, "--wait=300ms", "--unix", &socket]).run();
    assert_eq!(late.status.code(), Some(1));
    assert!(late.err.contains("not there after 300ms") && late.err.contains("no such socket"), "{late:?}");
    // An error that does not pass.
    std::fs::write(dir.at("file"), "no socket").unwrap();
    let wrong = nbdblk().args(["serve", &format!("vhost-user={}", dir.text("file")), "--wait=600s"]).run();
    assert_eq!(wrong.status.code(), Some(1));
    assert!(wrong.err.contains("it is not a socket") && !wrong.err.contains("waiting"), "{wrong:?}");
}
