//! What only a device in another process can do: be read-only, have many queues, hang, and die under load.

use nbdblk_tests::raw::{Mode, Raw, cmd, errno};
use nbdblk_tests::{Dir, Export, Nbdblk, Qsd, nbdblk, nbdinfo, tool, write_runs};

use crate::requests::check_refuses_changes;
use crate::{Behind, MIB};

#[test]
fn a_read_only_export_is_served_read_only_without_being_told() {
    let dir = Dir::new();
    let image = dir.at("disk.raw");
    write_runs(&image, 8 * MIB, [(0, MIB)]);
    let qsd = Qsd::start(&dir, &image, Export { writable: false, ..Export::default() });
    let server = Nbdblk::unix(&dir, &[&qsd.spec()]);
    assert_eq!(nbdinfo(&server.uri())["exports"][0]["is_read_only"], true);
    check_refuses_changes(&server);
}

#[test]
fn the_second_client_is_served_while_the_first_is_busy() {
    let stand = Behind::VhostUser.stand(64 * MIB, &[(0, 64 * MIB)]);
    let mut first = Raw::enter(stand.server.address(), Mode::Simple, "");
    first.request_reads(&[(0, MIB as u32); 64]);
    let mut second = Raw::enter(stand.server.address(), Mode::Simple, "");
    let data = second.read(0, 4096);
    for _ in 0..64 {
        assert_eq!(first.answer().error, 0);
    }
    assert_eq!(first.read(0, 4096), data);
}

#[test]
fn many_queues_serve_many_clients() {
    let dir = Dir::new();
    let image = dir.at("disk.raw");
    write_runs(&image, 64 * MIB, []);
    for (offered, asked) in [(4, ""), (4, ",num-queues=4"), (4, ",num-queues=2"), (1, "")] {
        let qsd = Qsd::start(&dir, &image, Export { queues: offered, ..Export::default() });
        let server = Nbdblk::unix(&dir, &[&format!("{}{asked}", qsd.spec())]);
        std::thread::scope(|scope| {
            for n in 0..8_u64 {
                let address = server.address();
                scope.spawn(move || {
                    let mut raw = Raw::enter(address, Mode::Structured, "");
                    for i in 0..50 {
                        let at = n * 8 * MIB + i * 65536;
                        raw.write(at, &vec![n as u8 + 1; 65536]);
                        assert!(raw.read(at, 65536).iter().all(|byte| *byte == n as u8 + 1));
                    }
                });
            }
        });
        assert!(server.terminate().success(), "{offered} queues{asked}");
    }
}

#[test]
fn more_queues_than_the_device_has_is_an_error_at_start() {
    let dir = Dir::new();
    let image = dir.sparse("disk.raw", MIB);
    let qsd = Qsd::start(&dir, &image, Export::default());
    let spec = format!("{},num-queues=64", qsd.spec());
    let output = nbdblk().args(["serve", &spec, "--unix", &dir.text("nbd.sock")]).run();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(!dir.at("nbd.sock").exists());
}

/// The device dies under load: every client gets an error in bounded time, and the server lives on.
#[test]
fn a_device_killed_under_load_is_an_error_and_not_a_hang() {
    let stand = Behind::VhostUser.stand(64 * MIB, &[(0, 64 * MIB)]);
    let mut server = stand.server;
    let script = "
import sys
n = 0
try:
    while True:
        cookies = [h.aio_pread(nbd.Buffer(65536), (n * 64 + i) % 1024 * 65536) for i in range(64)]
        while h.aio_in_flight() > 0: h.poll(-1)
        for cookie in cookies: h.aio_command_completed(cookie)
        n += 1
        if n == 10: print('under load'); sys.stdout.flush()
except nbd.Error as error:
    print('ended by', error.errno)";
    let mut load = tool("nbdsh").args(["-u", &server.uri(), "-c", script]).spawn(stand.dir.at("load.log"));
    // Beside it a client with many requests under way, and one that is idle.
    let mut raw = Raw::enter(server.address(), Mode::Structured, "");
    let mut idle = Raw::enter(server.address(), Mode::Simple, "");
    load.await_text("under load");
    raw.request_reads(&[(MIB, 65536); 64]);
    stand.qsd.expect("vhost-user has a process").kill();

    load.await_text("ended by");
    assert!(!load.log().contains("ended by None"), "{}", load.log());
    let failed = (0..64).map(|_| raw.answer()).filter(|answer| answer.error != 0);
    failed.for_each(|answer| assert!([errno::EIO, errno::ESHUTDOWN].contains(&answer.error), "error {}", answer.error));
    for command in [cmd::READ, cmd::WRITE_ZEROES, cmd::TRIM, cmd::FLUSH] {
        let len = if command == cmd::FLUSH { 0 } else { 4096 };
        let answer = idle.call(0, command, 0, len, b"");
        assert!([errno::EIO, errno::ESHUTDOWN].contains(&answer.error), "command {command}: error {}", answer.error);
    }
    let answer = idle.call(0, cmd::WRITE, 0, 4096, &[0; 4096]);
    assert!([errno::EIO, errno::ESHUTDOWN].contains(&answer.error), "WRITE: error {}", answer.error);

    // A client that comes now is answered too: refused in the handshake or told EIO.
    let late = tool("nbdsh").args(["-u", &server.uri(), "-c", "h.pread(512, 0)"]).run();
    assert!(!late.status.success(), "{late:?}");
    assert!(server.is_alive());
    assert!(!server.log().is_empty(), "the server says what happened");
    assert!(server.log().lines().count() < 100, "the server says it once, not for every request:\n{}", server.log());
    assert!(server.terminate().success());
}

/// A device that stops answering cannot keep the server from ending.
#[test]
fn a_device_that_hangs_does_not_keep_the_server_from_ending() {
    let stand = Behind::VhostUser.stand(64 * MIB, &[(0, MIB)]);
    let qsd = stand.qsd.expect("vhost-user has a process");
    let mut raw = Raw::enter(stand.server.address(), Mode::Simple, "");
    raw.read(0, 512);
    qsd.freeze();
    for n in 0..16 {
        raw.send(&Mode::Simple.header(0, cmd::READ, n, n * 4096, 4096));
        raw.send(&Mode::Simple.request(0, cmd::WRITE, n, n * 4096, 4096, &[0; 4096]));
    }
    // Others are still greeted and told what there is.
    assert_eq!(Raw::enter(stand.server.address(), Mode::Structured, "").size, 64 * MIB);
    assert!(stand.server.terminate().success());
    qsd.thaw();
}

/// A device that stops answering is given up after a time that the user sets.
#[test]
fn a_device_that_hangs_is_given_up() {
    let dir = Dir::new();
    let image = dir.sparse("disk.raw", 64 * MIB);
    let qsd = Qsd::start(&dir, &image, Export::default());
    let mut server = Nbdblk::unix(&dir, &[&format!("{},request-timeout=1s", qsd.spec())]);
    let mut raw = Raw::enter(server.address(), Mode::Structured, "");
    raw.read(0, 512);
    qsd.freeze();
    raw.request_reads(&[(0, 65536); 64]);
    for _ in 0..64 {
        assert_eq!(raw.answer().error, errno::EIO);
    }
    assert_eq!(raw.call(0, cmd::WRITE, 0, 512, &[0; 512]).error, errno::EIO);
    qsd.thaw();
    assert!(server.is_alive());
    assert!(server.terminate().success());
}

/// A device that was slow for a while and comes back has lost nothing.
#[test]
fn a_device_that_pauses_goes_on_where_it_was() {
    let stand = Behind::VhostUser.stand(64 * MIB, &[(0, 64 * MIB)]);
    let qsd = stand.qsd.as_ref().expect("vhost-user has a process");
    let mut raw = Raw::enter(stand.server.address(), Mode::Structured, "");
    let whole = raw.read(0, 32 * MIB as u32);
    qsd.freeze();
    let reads: Vec<(u64, u32)> = (0..200).map(|n| (n * 65536, 65536)).collect();
    let first = raw.request_reads(&reads);
    std::thread::sleep(std::time::Duration::from_millis(500));
    qsd.thaw();
    for _ in 0..200 {
        let answer = raw.answer();
        let at = (answer.cookie - first) as usize * 65536;
        assert_eq!(answer.error, 0);
        assert!(answer.data == whole[at..at + 65536]);
    }
}

#[test]
fn a_null_device_behind_vhost_user_reads_zeroes() {
    let dir = Dir::new();
    let node = "driver=null-co,node-name=disk,size=1073741824,read-zeroes=on";
    let qsd = Qsd::start_node(&dir, node, Export { queues: 2, ..Export::default() });
    let server = Nbdblk::tcp(&dir, &[&qsd.spec()]);
    tool("nbdcopy").args(["--connections=4", &server.uri(), "null:"]).ok();
    assert_eq!(Raw::enter(server.address(), Mode::Plain, "").read(MIB, 512), [0; 512]);
}

#[test]
fn a_device_with_blocks_of_4096_bytes_takes_any_byte() {
    let dir = Dir::new();
    let image = dir.at("disk.raw");
    write_runs(&image, 8 * MIB, [(0, 8 * MIB)]);
    let node = format!("driver=raw,node-name=disk,discard=unmap,file.driver=file,file.filename={}", image.display());
    let qsd = Qsd::start_node_with(&dir, &node, Export::default(), ",logical-block-size=4096");
    let server = Nbdblk::unix(&dir, &[&qsd.spec()]);
    let mut raw = Raw::enter(server.address(), Mode::Structured, "");
    let mut expected = raw.read(0, 16384);
    for (at, len) in [(7, 100), (4000, 200), (4096, 4096), (1, 12000)] {
        raw.write(at as u64, &vec![0xab; len]);
        expected[at..at + len].fill(0xab);
        assert!(raw.read(0, 16384) == expected, "{len}@{at}");
        assert_eq!(raw.call(0, cmd::WRITE_ZEROES, at as u64 + 3, len as u32, b"").error, 0);
        expected[at + 3..at + 3 + len].fill(0);
        assert!(raw.read(0, 16384) == expected, "{len}@{at}");
    }
}
