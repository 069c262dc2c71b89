//! The nbdkit plugin as its users meet it: real nbdkit, its filters and its TLS, real clients, real devices.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nbdblk_tests::checker::Durability;
use nbdblk_tests::raw::{Mode, Raw, cmd};
use nbdblk_tests::{
    Address, Daemon, Dir, Export, Nbdkit, Qsd, assert_equal, daemonised, eventually, nbdinfo, nbdkit, nbdsh,
    nbdsh_unconnected, panicking_plugin, plugin, restarts, tool, under_load, write_runs,
};

const MIB: u64 = 1 << 20;

/// An image with data and holes.
fn image(dir: &Dir, size: u64) -> PathBuf {
    let path = dir.at("disk.img");
    write_runs(&path, size, (0..size / (4 * MIB)).map(|n| (n * 4 * MIB + n * 512, MIB)));
    path
}

fn text(path: &Path) -> &str {
    path.to_str().expect("temporary directories have plain names")
}

/// The image behind qemu-storage-daemon, on `vhost.sock` in `dir`.
fn vhost_user(dir: &Dir, size: u64, export: Export) -> Qsd {
    Qsd::start(dir, &image(dir, size), export)
}

/// Runs nbdkit with words that it must refuse at its start; answers what it says.
fn refused(words: &[&str]) -> String {
    let dir = Dir::new();
    // Daemonising, as users do: whoever started it must hear of it nevertheless.
    let output = nbdkit(&dir, &["-U", "s"]).args(words).run();
    assert_eq!(output.status.code(), Some(1), "{words:?}: {}", output.err);
    output.err
}

/// Copies an image in and out and compares.
fn round_trip(uri: &str, dir: &Dir, size: u64) {
    let (source, copy) = (dir.at("source.img"), dir.at("copy.img"));
    write_runs(&source, size, [(0, size / 3), (size / 2 + 4096, size / 4)]);
    tool("nbdcopy").args(["--flush", text(&source), uri]).ok();
    tool("nbdcopy").args([uri, text(&copy)]).ok();
    assert_equal(&source, &copy);
}

#[test]
fn what_the_device_did_is_printed_at_exit() {
    let dir = Dir::new();
    let path = format!("path={}", image(&dir, 10 * MIB).display());
    let client = "nbdsh -u \"$uri\" -c 'h.pread(8192, 0)' -c 'h.pwrite(bytes(512), 0)' -c 'h.flush()'";
    let run = |flag: &[&str]| {
        let options = [&["-U", "-", "-v"], flag, &["--run", client]].concat();
        nbdkit(&dir, &options).args(["io_uring", &path]).ok().err
    };
    let log = run(&[]);
    for line in [
        "read: 1 requests, 8192 bytes, 0 errors",
        "write: 1 requests, 512 bytes, 0 errors",
        "flush: 1 requests, 0 bytes",
    ] {
        assert!(log.contains(&format!("statistics: {line}")), "{line} in {log}");
    }
    assert!(!log.contains("p99"), "{log}");
    let log = run(&["-D", "nbdblk.stats=1"]);
    assert!(log.contains("statistics: read: 1 requests, 8192 bytes, 0 errors, p50 "), "{log}");
}

#[test]
fn size_and_first_sector_of_a_file() {
    let dir = Dir::new();
    let path = image(&dir, 10 * MIB);
    let first: Vec<u8> = std::fs::read(&path).unwrap()[..512].into();
    let server = Nbdkit::start(&dir, &["io_uring", &format!("path={}", path.display())]);
    let out = nbdsh(&server.uri(), "print(h.get_size(), h.pread(512, 0).hex())");
    let hex: String = first.iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(out.trim(), format!("{} {hex}", 10 * MIB));
    assert!(server.terminate().success());
}

#[test]
fn the_command_lines_of_the_stock_manual() {
    let dir = Dir::new();
    let _qsd = vhost_user(&dir, 8 * MIB, Export::default());
    let qcow2 = Dir::new();
    tool("qemu-img").args(["create", "-q", "-f", "qcow2", &qcow2.text("disk.qcow2"), "8M"]).ok();
    let _qcow2 = Qsd::start(&qcow2, &qcow2.at("disk.qcow2"), Export { format: "qcow2", ..Export::default() });
    let rows: &[(&Dir, &[&str])] = &[
        (&dir, &["io_uring", "path=disk.img"]),
        (&dir, &["driver=io_uring", "path=disk.img"]),
        (&dir, &["driver=io_uring", "path=disk.img", "num-queues=1"]),
        (&dir, &["io_uring", "path=disk.img", "num-entries=64", "get=capacity"]),
        (&dir, &["virtio-blk-vhost-user", "path=vhost.sock"]),
        (&qcow2, &["virtio-blk-vhost-user", "path=vhost.sock"]),
        // And what is ours.
        (&dir, &["vhost-user", "path=vhost.sock", "queue_size=64"]),
        (&dir, &["vhost-user=vhost.sock"]),
        (&dir, &["io_uring=disk.img", "payload-memory=8M", "pin-threads=true"]),
        (&dir, &["memory", "size=8M"]),
    ];
    for (dir, words) in rows {
        let server = Nbdkit::start(dir, words);
        assert_eq!(nbdsh(&server.uri(), "print(h.get_size())").trim(), "8388608", "{words:?}");
        assert!(server.terminate().success(), "{words:?}");
    }
}

#[test]
fn properties_are_printed_as_the_stock_plugin_prints_them() {
    let dir = Dir::new();
    image(&dir, 8 * MIB);
    let server = Nbdkit::start_with(
        &dir,
        &["-v"],
        &["io_uring", "path=disk.img", "get=capacity", "get=num_queues", "num-queues=3"],
    );
    for line in ["get capacity = 8388608\n", "get num_queues = 3\n"] {
        assert!(server.log().contains(line), "no {line:?} in\n{}", server.log());
    }
    nbdsh(&server.uri(), "h.pread(1, 0)");
    eventually("they are printed for a connection, too", || {
        server.log().matches("get capacity = 8388608").count() >= 2
    });
}

#[test]
fn what_is_wrong_shows_when_nbdkit_starts() {
    let rows: &[(&[&str], &str)] = &[
        (&[], "you must supply the driver=<DRIVER> parameter after the plugin name on the command line"),
        (&["io_uring", "driver=io_uring"], "'driver' property set more than once"),
        (&["io_uring", "disk.raw"], "write path=disk.raw"),
        (&["/dev/null"], "write io_uring path=/dev/null"),
        (
            &["io_uring", "path=x", "read-only=true"],
            "do not set the libblkio \"read-only\" parameter, use the nbdkit -r flag if read-only is required",
        ),
        (&["nosuch"], "Unknown driver name"),
        (&["io_uring", "path=x", "nosuch=1"], "nosuch=1: Unknown property name"),
        (&["io_uring", "path=x", "num-queues=1x"], "num-queues=1x: Value must be a signed 32-bit integer"),
        (&["io_uring", "path=x", "direct=yes"], "direct=yes: Value must be \"true\" or \"false\""),
        (&["io_uring", "path=x", "capacity=1"], "capacity=1: Property is read-only"),
        (&["io_uring", "path=/nonexistent/file"], "/nonexistent/file: No such file or directory"),
        (&["io_uring"], "io_uring needs a path"),
        (&["virtio-blk-vhost-user", "path=/nonexistent/socket"], "/nonexistent/socket"),
        (&["memory", "size=1M", "get=nosuch"], "get=nosuch: Unknown property name"),
        (&["memory", "size=1M", "pin-threads=maybe"], "pin-threads=maybe: value must be true or false"),
        (&["memory", "size=1M", "payload-memory=1K"], "payload-memory=1K: value must be a size from 8M to 4G"),
    ];
    for (words, line) in rows {
        let said = refused(words);
        assert!(said.contains(line), "{words:?}: no {line:?} in {said}");
    }
}

#[test]
fn every_driver_of_libblkio_is_there_or_said_to_be_missing() {
    let known = nbdkit(&Dir::new(), &["--dump-plugin"]).ok().out;
    let line = known.lines().find_map(|line| line.strip_prefix("nbdblk_drivers=")).expect("drivers are dumped");
    for driver in ["nvme-io_uring", "virtio-blk-vfio-pci", "virtio-blk-vhost-vdpa"] {
        if line.split(',').any(|name| name == driver) {
            continue;
        }
        let said = refused(&[driver, "path=/dev/null"]);
        assert!(
            said.contains(&format!("driver={driver}: a driver of libblkio that this plugin does not have yet")),
            "{said}"
        );
    }
    for line in [
        "name=nbdblk",
        "api_version=2",
        "max_thread_model=parallel",
        "thread_model=parallel",
        "magic_config_key=driver",
    ] {
        assert!(known.lines().any(|found| found == line), "no {line} in\n{known}");
    }
}

/// A vhost-user back end in front of `vhost.sock` that serves one front end, at `once.sock`, and ends.
fn serves_once(dir: &Dir) -> Daemon {
    let script = r#"
import os, socket, threading
door = socket.socket(socket.AF_UNIX); door.bind("once.sock"); door.listen(1)
front, _ = door.accept()
os.unlink("once.sock"); door.close()
back = socket.socket(socket.AF_UNIX); back.connect("vhost.sock")
def pump(a, b):
    try:
        while True:
            # A header, whose last word is the length of what follows.
            head, fds, _, _ = socket.recv_fds(a, 12, 16, socket.MSG_WAITALL)
            if len(head) < 12: break
            size = int.from_bytes(head[8:], "little")
            socket.send_fds(b, [head + (a.recv(size, socket.MSG_WAITALL) if size else b"")], fds)
            for fd in fds: os.close(fd)
    except OSError: pass
    os._exit(0)
threading.Thread(target=pump, args=(back, front)).start()
pump(front, back)
"#;
    let mut proxy = tool("python3").within(dir.path()).args(["-c", script]).spawn(dir.at("proxy.log"));
    let socket = dir.at("once.sock");
    proxy.await_that("that it listens", |_| socket.exists());
    proxy
}

mod opened_once {
    use super::*;

    #[test]
    fn where_nbdkit_does_not_fork() {
        let dir = Dir::new();
        let _qsd = vhost_user(&dir, 8 * MIB, Export::default());
        // -f.
        let proxy = serves_once(&dir);
        let server = Nbdkit::start(&dir, &["virtio-blk-vhost-user", "path=once.sock"]);
        assert_eq!(nbdsh(&server.uri(), "print(h.get_size())").trim(), "8388608");
        assert!(server.terminate().success());
        assert!(proxy.await_end().0.success(), "nothing holds the device any more");

        // -s.
        let proxy = serves_once(&dir);
        let words =
            format!("['nbdkit', '-s', '{}', 'vhost-user', 'path={}']", plugin().display(), dir.text("once.sock"));
        let script = format!("h.connect_command({words})\nprint(h.get_size(), len(h.pread(4096, 0)))\nh.shutdown()");
        assert_eq!(nbdsh_unconnected("nbd://", &script).trim(), "8388608 4096");
        assert!(proxy.await_end().0.success());
    }

    #[test]
    fn with_run() {
        let dir = Dir::new();
        let _qsd = vhost_user(&dir, 8 * MIB, Export::default());
        let proxy = serves_once(&dir);
        let run = ["-U", "-", "--run", "nbdinfo --size nbd+unix:///?socket=$unixsocket"];
        let out = nbdkit(&dir, &run).args(["virtio-blk-vhost-user", "path=once.sock"]).ok().out;
        assert_eq!(out.trim(), "8388608");
        assert!(proxy.await_end().0.success());
        // What is wrong still shows before the command runs, or ends it.
        let run = |words: &[&str]| nbdkit(&dir, &run).args(words).run();
        for words in [["virtio-blk-vhost-user", "path=once.sock"], ["io_uring", "path=once.img"]] {
            let output = run(&words);
            assert!(!output.status.success() && output.err.contains(&words[1][5..]), "{output:?}");
        }
        let listener = std::os::unix::net::UnixListener::bind(dir.at("other.sock")).unwrap();
        std::thread::spawn(move || drop(listener.accept()));
        let output = run(&["virtio-blk-vhost-user", "path=other.sock"]);
        assert!(!output.status.success() && output.err.contains("other.sock"), "{output:?}");
    }

    /// A real fork opens again: threads and rings do not live through it.
    #[test]
    fn and_again_after_a_fork() {
        let dir = Dir::new();
        let qsd = vhost_user(&dir, 8 * MIB, Export::default());
        let (socket, pid) = (dir.at("s"), dir.at("pid"));
        let words = ["virtio-blk-vhost-user", "path=vhost.sock"];
        let _nbdkit = daemonised(&dir, &["-U", text(&socket), "-P", text(&pid)], &words);
        eventually("nbdkit has its pid file", || pid.exists());
        round_trip(&format!("nbd+unix:///?socket={}", socket.display()), &dir, 8 * MIB);
        let pid = std::fs::read_to_string(pid).unwrap();
        tool("kill").args([pid.trim()]).ok();
        eventually("nbdkit ends", || !Path::new(&format!("/proc/{}", pid.trim())).exists());
        drop(qsd);
    }
}

#[test]
fn a_silent_device_does_not_keep_nbdkit_from_ending() {
    let dir = Dir::new();
    let qsd = vhost_user(&dir, 8 * MIB, Export::default());
    let server = Nbdkit::start(&dir, &["vhost-user", "path=vhost.sock", "request-timeout=10000s"]);
    let (uri, asking) = (server.uri(), dir.at("asking"));
    nbdsh(&uri, "h.pread(512, 0)");
    qsd.freeze();
    let script = format!(
        "open({asking:?}, 'w').close()\ntry: h.pread(512, 0); print('read')\nexcept nbd.Error: print('failed')"
    );
    let client = std::thread::spawn(move || nbdsh(&uri, &script));
    eventually("the client asks", || asking.exists());
    std::thread::sleep(Duration::from_secs(1));
    assert!(!client.is_finished(), "the device does not answer");
    assert!(server.terminate().success());
    assert_eq!(client.join().unwrap(), "failed\n");
    qsd.thaw();
}

/// A program that is open for writing cannot be run.
#[test]
fn when_nbdkit_has_ended_the_file_is_closed() {
    let dir = Dir::new();
    tool("cp").args(["/bin/true", &dir.text("program")]).ok();
    let words = ["io_uring", "path=program"];
    for _ in 0..4 {
        nbdkit(&dir, &["-U", "-", "--run", "true"]).args(words).ok();
        tool(&dir.text("program")).ok();
        assert!(Nbdkit::start(&dir, &words).terminate().success());
        tool(&dir.text("program")).ok();
        // It fails to start when the device is open already.
        let output = nbdkit(&dir, &["-f", "-U", "no/such/directory"]).args(words).run();
        assert!(!output.status.success());
        tool(&dir.text("program")).ok();
    }
}

#[test]
fn a_path_need_not_be_utf8() {
    use std::os::unix::ffi::OsStrExt;

    let dir = Dir::new();
    image(&dir, 8 * MIB);
    let odd = dir.path().join(std::ffi::OsStr::from_bytes(b"odd\xff"));
    std::fs::create_dir(&odd).unwrap();
    std::fs::rename(dir.at("disk.img"), odd.join(std::ffi::OsStr::from_bytes(b"disk\xfe.img"))).unwrap();
    // In the file's name, and in that of the directory that nbdkit is started in.
    let script =
        "cd odd* && nbdkit -U - --run 'nbdinfo --size nbd+unix:///?socket=$unixsocket' \"$1\" io_uring path=disk*.img";
    let script = script.replace("path=disk*.img", "path=\"$(echo disk*.img)\"");
    let out = tool("sh").within(dir.path()).args(["-c", &script, "sh", text(plugin())]).ok().out;
    assert_eq!(out.trim(), "8388608");
}

#[test]
fn a_client_of_a_dead_device_is_refused() {
    let dir = Dir::new();
    let qsd = vhost_user(&dir, 8 * MIB, Export::default());
    let mut server = Nbdkit::start(&dir, &["virtio-blk-vhost-user", "path=vhost.sock", "reconnect=0"]);
    nbdsh(&server.uri(), "h.pread(512, 0)");
    qsd.kill();
    let script = "try:\n  h.connect_uri(uri)\n  print('accepted')\nexcept nbd.Error: print('refused')\n";
    eventually("new clients are refused, though nobody has asked for anything", || {
        nbdsh_unconnected(&server.uri(), script) == "refused\n"
    });
    assert!(server.log().contains("vhost.sock: the device is dead"), "{}", server.log());
    assert!(server.is_alive());
    assert!(server.terminate().success());
}

/// The back end is killed again and again while clients verify what they write, and no client notices.
#[test]
fn no_write_is_lost_when_the_back_end_is_killed() {
    let dir = Dir::in_memory();
    let image = dir.at("disk.img");
    tool("qemu-img").args(["create", "-q", "-f", "qcow2", text(&image), "64M"]).ok();
    let export = Export { format: "qcow2", queues: 2, writable: true };
    let mut qsd = Some(Qsd::start(&dir, &image, export));
    let mut server = Nbdkit::start(&dir, &["virtio-blk-vhost-user", "path=vhost.sock"]);
    let address = Address::Unix(server.socket().to_owned());
    under_load(&address, &[Durability::None, Durability::Often, Durability::None], 4096, || {
        for _ in 0..restarts(4) {
            std::thread::sleep(Duration::from_millis(200));
            qsd.take().expect("it runs").kill();
            qsd = Some(Qsd::start(&dir, &image, export));
        }
    });
    assert!(server.is_alive());
    assert!(server.terminate().success());
}

/// With `unflushed=fail` a client from before the loss gets errors, and a new one is served.
#[test]
fn a_loss_ends_present_clients_if_asked() {
    let dir = Dir::in_memory();
    let qsd = vhost_user(&dir, 8 * MIB, Export::default());
    let server = Nbdkit::start(&dir, &["virtio-blk-vhost-user", "path=vhost.sock", "unflushed=fail"]);
    let address = Address::Unix(server.socket().to_owned());
    let mut old = Raw::enter(&address, Mode::Simple, "");
    old.write(0, &[7; 512]);
    qsd.kill();
    let _qsd = Qsd::start(&dir, &dir.at("disk.img"), Export::default());
    eventually("the device is back", || {
        nbdsh_unconnected(
            &server.uri(),
            "try:\n  h.connect_uri(uri)\n  h.pread(512, 0)\n  print('ok')\nexcept nbd.Error: pass",
        ) == "ok\n"
    });
    for _ in 0..2 {
        assert_ne!(old.call(0, cmd::READ, 0, 512, b"").error, 0);
    }
}

/// What trips the stock plugin up (each row was seen to fail there).
mod stock_fails {
    use super::*;

    #[test]
    fn properties_other_than_the_path() {
        let dir = Dir::new();
        image(&dir, 8 * MIB);
        let server =
            Nbdkit::start(&dir, &["io_uring", "path=disk.img", "num-queues=1", "direct=false", "num-entries=32"]);
        assert_eq!(nbdsh(&server.uri(), "print(len(h.pread(4096, 0)))").trim(), "4096");
    }

    #[test]
    fn a_relative_path_when_daemonised() {
        let dir = Dir::new();
        image(&dir, 8 * MIB);
        let (socket, pid) = (dir.at("s"), dir.at("pid"));
        let _nbdkit = daemonised(&dir, &["-U", text(&socket), "-P", text(&pid)], &["io_uring", "path=disk.img"]);
        eventually("nbdkit has its pid file", || pid.exists());
        let uri = format!("nbd+unix:///?socket={}", socket.display());
        round_trip(&uri, &dir, 8 * MIB);
        let pid = std::fs::read_to_string(pid).unwrap();
        tool("kill").args([pid.trim()]).ok();
        eventually("nbdkit ends", || !Path::new(&format!("/proc/{}", pid.trim())).exists());
    }

    #[test]
    fn trim_of_a_file_with_and_without_fua() {
        let dir = Dir::new();
        let path = image(&dir, 8 * MIB);
        let server = Nbdkit::start(&dir, &["io_uring", &format!("path={}", path.display())]);
        nbdsh(&server.uri(), "h.trim(1 << 20, 0)\nh.trim(1 << 20, 4 << 20, nbd.CMD_FLAG_FUA)");
        assert!(nbdblk_tests::allocated(&path) < MIB, "the data of both ranges is gone");
    }

    #[test]
    fn zero_and_trim_longer_than_the_device_takes() {
        let dir = Dir::new();
        let _qsd = vhost_user(&dir, 64 * MIB, Export::default());
        let server = Nbdkit::start(&dir, &["virtio-blk-vhost-user", "path=vhost.sock"]);
        let script = "h.zero(17 << 20, 0)\nassert h.pread(17 << 20, 0) == bytes(17 << 20)\n\
                      h.zero(40 << 20, 0, nbd.CMD_FLAG_FUA)\nassert h.pread(40 << 20, 0) == bytes(40 << 20)\n\
                      h.trim(64 << 20, 0)\nh.trim(17 << 20, 512, nbd.CMD_FLAG_FUA)\n";
        nbdsh(&server.uri(), script);
    }

    #[test]
    fn an_unaligned_write_keeps_its_neighbours() {
        let dir = Dir::new();
        let _qsd = vhost_user(&dir, 8 * MIB, Export::default());
        let server = Nbdkit::start(&dir, &["virtio-blk-vhost-user", "path=vhost.sock"]);
        let script = "h.set_strict_mode(0)\nold = h.pread(1024, 0)\nh.pwrite(b'x' * 100, 7)\n\
                      assert h.pread(1024, 0) == old[:7] + b'x' * 100 + old[107:]\n\
                      assert h.pread(3, 5) == old[5:7] + b'x'\n";
        nbdsh(&server.uri(), script);
    }

    #[test]
    fn a_second_client_while_the_first_is_there() {
        let dir = Dir::new();
        let _qsd = vhost_user(&dir, 8 * MIB, Export::default());
        let server = Nbdkit::start(&dir, &["virtio-blk-vhost-user", "path=vhost.sock"]);
        let script = "hs = [nbd.NBD() for _ in range(8)]\nfor h in hs: h.connect_uri(uri)\n\
                      for i, h in enumerate(hs): h.pwrite(bytes([i + 1]) * 65536, i << 16)\n\
                      hs[0].flush()\nfor i in range(8): assert hs[7 - i].pread(65536, i << 16) == bytes([i + 1]) * 65536\n";
        nbdsh_unconnected(&server.uri(), script);
        assert_eq!(nbdinfo(&server.uri())["exports"][0]["can_multi_conn"], true);
    }

    #[test]
    fn a_read_only_device_without_r() {
        let dir = Dir::new();
        let _qsd = vhost_user(&dir, 8 * MIB, Export { writable: false, ..Export::default() });
        let server = Nbdkit::start(&dir, &["virtio-blk-vhost-user", "path=vhost.sock"]);
        nbdsh(&server.uri(), "assert h.is_read_only()\nh.pread(4096, 0)");
    }

    #[test]
    fn a_back_end_that_dies() {
        let dir = Dir::new();
        let qsd = vhost_user(&dir, 8 * MIB, Export::default());
        let mut server = Nbdkit::start(&dir, &["virtio-blk-vhost-user", "path=vhost.sock", "reconnect=0"]);
        let (uri, reading) = (server.uri(), dir.at("reading"));
        // Under load until the first error, and then once more.
        let script = format!(
            "h.pread(65536, 0)\nopen({reading:?}, 'w').close()\ntry:\n  while True: h.pread(65536, 0)\n\
             except nbd.Error as e: print(e.errno)\n\
             try: h.pread(512, 0)\nexcept nbd.Error as e: print(e.errno)\n"
        );
        let client = std::thread::spawn(move || nbdsh(&uri, &script));
        eventually("the client reads", || reading.exists());
        let start = Instant::now();
        qsd.kill();
        assert_eq!(client.join().unwrap(), "EIO\nEIO\n");
        // The socket tells of a death; the request's time-out of 30 s is for back ends that hang.
        assert!(start.elapsed() < Duration::from_secs(25), "the error came after {:?}", start.elapsed());
        assert!(server.is_alive());
        assert!(server.terminate().success());
    }

    #[test]
    fn a_back_end_that_hangs() {
        let dir = Dir::new();
        let qsd = vhost_user(&dir, 8 * MIB, Export::default());
        let server = Nbdkit::start(&dir, &["vhost-user", "path=vhost.sock", "request-timeout=1s", "reconnect=0"]);
        let uri = server.uri();
        nbdsh(&uri, "h.pread(512, 0)");
        qsd.freeze();
        let out = nbdsh(&uri, "try: h.pread(512, 0)\nexcept nbd.Error as e: print(e.errno)");
        assert_eq!(out, "EIO\n");
        assert!(server.terminate().success());
        qsd.thaw();
    }
}

#[test]
fn what_clients_are_told() {
    let dir = Dir::new();
    let _qsd = vhost_user(&dir, 8 * MIB, Export { queues: 2, ..Export::default() });
    let check = |words: &[&str], expected: &[(&str, serde_json::Value)]| {
        let server = Nbdkit::start(&dir, words);
        let info = nbdinfo(&server.uri());
        for (key, value) in expected {
            assert_eq!(info["exports"][0][key], *value, "{words:?}: {key} in {info}");
        }
    };
    let all = [
        ("is_read_only", true.into()),
        ("can_multi_conn", true.into()),
        ("can_flush", true.into()),
        ("block_size_maximum", (64 * MIB).into()),
    ];
    check(&["-r", "io_uring", "path=disk.img"], &all);
    check(
        &["io_uring", "path=disk.img"],
        &[
            ("description", format!("io_uring {}", dir.at("disk.img").display()).into()),
            ("is_read_only", false.into()),
            ("can_trim", true.into()),
            ("can_zero", true.into()),
            ("can_fast_zero", true.into()),
            ("can_fua", true.into()),
            ("can_cache", true.into()),
            ("block_size_minimum", 1.into()),
        ],
    );
    check(
        &["vhost-user", "path=vhost.sock"],
        &[("is_read_only", false.into()), ("can_fua", true.into()), ("block_size_minimum", 512.into())],
    );
    let map = |words: &[&str]| {
        let server = Nbdkit::start(&dir, words);
        tool("nbdinfo").args(["--map", &server.uri()]).ok().out
    };
    let holes = map(&["io_uring", "path=disk.img"]);
    assert!(holes.contains("hole,zero") && holes.contains("data"), "{holes}");
    assert!(!map(&["vhost-user", "path=vhost.sock"]).contains("hole"), "vhost-user cannot tell");
}

#[test]
fn r_opens_the_device_for_reading() {
    let dir = Dir::new();
    image(&dir, 8 * MIB);
    for options in [&["-rv"][..], &["--readonly", "-v"], &["-v", "--read-only"]] {
        let server = Nbdkit::start_with(&dir, options, &["io_uring", "path=disk.img", "get=read-only"]);
        assert!(server.log().contains("get read-only = true\n"), "{options:?}: {}", server.log());
        nbdsh(&server.uri(), "assert h.is_read_only()");
    }
}

#[test]
fn filters_in_front() {
    let dir = Dir::new();
    let _qsd = vhost_user(&dir, 32 * MIB, Export { queues: 2, ..Export::default() });
    let rows: &[(&str, &[&str])] = &[
        ("cow", &[]),
        ("readahead", &[]),
        ("rate", &["rate=4G"]),
        ("ip", &["allow=all"]),
        ("log", &["logfile=log"]),
        ("stats", &["statsfile=stats"]),
        ("delay", &["rdelay=1ms", "wdelay=1ms"]),
    ];
    for (filter, words) in rows {
        let server = Nbdkit::start_with(
            &dir,
            &[&format!("--filter={filter}")],
            &[&["vhost-user", "path=vhost.sock"], *words].concat(),
        );
        let part = Dir::new();
        round_trip(&server.uri(), &part, 32 * MIB);
        assert!(server.terminate().success(), "{filter}");
    }
    // Several at a time.
    let server = Nbdkit::start_with(
        &dir,
        &["--filter=log", "--filter=cow", "--filter=readahead"],
        &["vhost-user", "path=vhost.sock", "logfile=log"],
    );
    round_trip(&server.uri(), &Dir::new(), 32 * MIB);
}

#[test]
fn checkwrite_in_front_sees_the_same_data() {
    let dir = Dir::new();
    let path = image(&dir, 32 * MIB);
    let server = Nbdkit::start_with(&dir, &["--filter=checkwrite"], &["io_uring", "path=disk.img"]);
    tool("nbdcopy").args([text(&path), &server.uri()]).ok();
    let out =
        nbdsh(&server.uri(), "try: h.pwrite(b'no' * 256, 0); print('written')\nexcept nbd.Error: print('differs')");
    assert_eq!(out, "differs\n");
}

#[test]
fn a_partition_of_the_device() {
    let dir = Dir::new();
    let path = dir.at("disk.img");
    // A partition table with one entry, sectors 2048 to 18431.
    let mut disk = vec![0; 9 * MIB as usize];
    disk[446..462].copy_from_slice(&[0, 0, 0, 0, 0x83, 0, 0, 0, 0, 8, 0, 0, 0, 0x40, 0, 0]);
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    std::fs::write(&path, disk).unwrap();
    let server = Nbdkit::start_with(&dir, &["--filter=partition"], &["io_uring", "path=disk.img", "partition=1"]);
    assert_eq!(nbdsh(&server.uri(), "print(h.get_size())").trim(), "8388608");
    round_trip(&server.uri(), &dir, 8 * MIB);
    assert_eq!(
        std::fs::read(&path).unwrap()[MIB as usize..][..4096],
        std::fs::read(dir.at("source.img")).unwrap()[..4096]
    );
}

#[test]
fn tls_by_nbdkit() {
    let dir = Dir::new();
    image(&dir, 16 * MIB);
    tool("psktool").args(["-u", "alice", "-p", &dir.text("keys.psk")]).ok();
    let server = Nbdkit::start_with(&dir, &["--tls=require", "--tls-psk=keys.psk"], &["io_uring", "path=disk.img"]);
    let socket = server.socket().display();
    let uri = format!("nbds+unix://alice@/?socket={socket}&tls-psk-file={}", dir.text("keys.psk"));
    round_trip(&uri, &dir, 16 * MIB);
    let plain = tool("nbdinfo").args([format!("nbd+unix:///?socket={socket}")]).run();
    assert!(!plain.status.success(), "who does not encrypt is refused");
}

#[test]
fn eight_connections_at_once_each_with_many_requests() {
    let dir = Dir::new();
    let _qsd = vhost_user(&dir, 256 * MIB, Export { queues: 2, ..Export::default() });
    for words in [
        &["vhost-user", "path=vhost.sock"][..],
        &["vhost-user", "path=vhost.sock", "num-queues=1", "payload-memory=8M"],
        &["io_uring", "path=disk.img", "payload-memory=8M"],
    ] {
        let server = Nbdkit::start(&dir, words);
        let uri = format!("--uri={}", server.uri());
        let args =
            ["--name=x", "--ioengine=nbd", &uri, "--rw=randwrite", "--bsrange=4k-512k", "--iodepth=32", "--size=32M"];
        let more = ["--numjobs=8", "--offset_increment=32M", "--verify=crc32c", "--verify_fatal=1", "--minimal"];
        tool("fio").within(dir.path()).args(args).args(more).ok();
        assert!(server.terminate().success(), "{words:?}");
    }
}

#[test]
fn requests_larger_than_the_memory_for_them() {
    let dir = Dir::new();
    let _qsd = vhost_user(&dir, 64 * MIB, Export::default());
    let server = Nbdkit::start(&dir, &["vhost-user", "path=vhost.sock", "payload-memory=8M"]);
    let script = "import random\nd = random.Random(1).randbytes(32 << 20)\nh.pwrite(d, 512, nbd.CMD_FLAG_FUA)\n\
                  assert h.pread(32 << 20, 512) == d\nassert h.pread(1 << 20, 513) == d[1:(1 << 20) + 1]\n";
    nbdsh(&server.uri(), &format!("h.set_strict_mode(0)\n{script}"));
}

#[test]
fn errors_keep_their_errno() {
    let dir = Dir::new();
    image(&dir, 8 * MIB);
    let server = Nbdkit::start(&dir, &["memory", "size=1M"]);
    let script = "h.set_strict_mode(0)\n\
                  def t(f):\n  try: f(); print('ok')\n  except nbd.Error as e: print(e.errno)\n\
                  t(lambda: h.pread(512, 1 << 20))\nt(lambda: h.pwrite(b'x' * 512, 1 << 20))\n";
    assert_eq!(nbdsh(&server.uri(), script), "EINVAL\nENOSPC\n");
}

#[test]
fn a_panic_costs_one_request() {
    let dir = Dir::new();
    let plugin = panicking_plugin();
    let mut server = Nbdkit::start_plugin(&dir, &plugin, &[], &["memory", "size=8M", "panic-at=4096"]);
    let script = "try: h.pread(512, 4096)\nexcept nbd.Error as e: print(e.errno)\n\
                  for i in range(64): assert h.pread(4096, 0) == bytes(4096)\n\
                  h.pwrite(b'y' * 4096, 4096)\nassert h.pread(4095, 4097) == b'y' * 4095\nprint('served')";
    assert_eq!(nbdsh(&server.uri(), script), "EIO\nserved\n");
    assert!(server.is_alive());
    assert!(server.log().contains("panic in pread: told to panic at 4096"), "{}", server.log());
    assert!(server.terminate().success());
}
