//! Properties of a device in another process: read-only exports, many queues, hangs, and death under load.

use nbdblk_tests::raw::{Mode, Raw, cmd, errno};
use nbdblk_tests::{Address, Daemon, Dir, Export, Nbdblk, Qsd, eventually, nbdblk, nbdinfo, tool, write_runs};
use nix::sys::signal::Signal;

use crate::requests::check_refuses_changes;
use crate::{Behind, MIB};

#[test]
fn a_read_only_export_is_served_read_only_without_an_option() {
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
    let dir = Dir::new();
    let image = dir.at("disk.raw");
    write_runs(&image, 64 * MIB, [(0, 64 * MIB)]);
    let qsd = Qsd::start(&dir, &image, Export::default());
    let mut server = Nbdblk::unix(&dir, &[&format!("{},reconnect=0", qsd.spec()), "--handshake-timeout=1s"]);
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
    let mut load = tool("nbdsh").args(["-u", &server.uri(), "-c", script]).spawn(dir.at("load.log"));
    // In addition, a client with many requests in flight, and an idle one.
    let mut raw = Raw::enter(server.address(), Mode::Structured, "");
    let mut idle = Raw::enter(server.address(), Mode::Simple, "");
    load.await_text("under load");
    raw.request_reads(&[(MIB, 65536); 64]);
    qsd.kill();

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

    // A client that connects now is also served: refused in the handshake, or it gets EIO.
    let late = tool("nbdsh").args(["-u", &server.uri(), "-c", "h.pread(512, 0)"]).run();
    assert!(!late.status.success(), "{late:?}");
    assert!(server.is_alive());
    eventually("the server says what happened", || !server.log().is_empty());
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
    // Other clients can still do their handshake.
    assert_eq!(Raw::enter(stand.server.address(), Mode::Structured, "").size, 64 * MIB);
    assert!(stand.server.terminate().success());
    qsd.thaw();
}

/// A device that stops answering is declared dead after a time that the user sets.
#[test]
fn a_device_that_hangs_is_declared_dead() {
    let dir = Dir::new();
    let image = dir.sparse("disk.raw", 64 * MIB);
    let qsd = Qsd::start(&dir, &image, Export::default());
    let mut server = Nbdblk::unix(&dir, &[&format!("{},request-timeout=1s,reconnect=0", qsd.spec())]);
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

/// A device that pauses and continues loses nothing.
#[test]
fn a_device_that_pauses_continues_without_loss() {
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

/// Forwards the messages, and keeps the descriptors that the front end shares. On SIGUSR1, or when it first sees a call eventfd,
/// it attacks as a hostile back end could.
const MEDDLER: &str = r#"
import fcntl, os, signal, socket, struct, sys, threading

listen, back_end, attack = sys.argv[1:]
kept = {"memory": [], "kick": [], "call": []}
kinds = {5: "memory", 37: "memory", 12: "kick", 13: "call"}

def block_and_fill(fd):
    fcntl.fcntl(fd, fcntl.F_SETFL, os.O_NONBLOCK)
    acts = [lambda: os.read(fd, 8), lambda: os.write(fd, struct.pack("Q", 2**64 - 2))]
    for act in acts[:1] if "empty" in attack else acts:
        try: act()
        except BlockingIOError: pass
    fcntl.fcntl(fd, fcntl.F_SETFL, 0)

def meddle(*_):
    if attack == "truncate":
        for fd in kept["memory"]:
            try: os.ftruncate(fd, 0)
            except PermissionError: print("refused", flush=True)
    for kind in ("kick", "call"):
        if kind in attack:
            for fd in kept[kind]: block_and_fill(fd)
    print("done", flush=True)
    if "leave" in attack: os._exit(0)

signal.signal(signal.SIGUSR1, meddle)
server = socket.socket(socket.AF_UNIX)
server.bind(listen)
server.listen()
print("listening", flush=True)

def answers(front, back):
    while data := back.recv(65536): front.sendall(data)
    os._exit(0)

front, _ = server.accept()
back = socket.socket(socket.AF_UNIX)
back.connect(back_end)
threading.Thread(target=answers, args=(front, back), daemon=True).start()
while True:
    # A message at a time, so that descriptors stay with theirs.
    header, fds, _, _ = socket.recv_fds(front, 12, 32)
    if len(header) < 12: os._exit(0)
    kind, _, length = struct.unpack("III", header)
    payload = front.recv(length, socket.MSG_WAITALL) if length else b""
    socket.send_fds(back, [header + payload], fds)
    kept.setdefault(kinds.get(kind), []).extend(fds)
    if "open" in attack and kept["call"]: meddle()
"#;

/// Starts the [`MEDDLER`] between a front end and the back end behind `qsd`. Its socket is `meddler.sock`.
fn meddler(dir: &Dir, attack: &str) -> (Daemon, String) {
    let socket = dir.text("meddler.sock");
    let args = ["-c", MEDDLER, &socket, &dir.text("vhost.sock"), attack];
    let mut meddler = tool("python3").args(args).spawn(dir.at("meddler.log"));
    meddler.await_text("listening");
    (meddler, format!("vhost-user={socket}"))
}

#[test]
fn a_back_end_that_truncates_the_memory_is_refused() {
    let dir = Dir::new();
    let image = dir.at("disk.raw");
    write_runs(&image, 8 * MIB, [(0, 8 * MIB)]);
    let _qsd = Qsd::start(&dir, &image, Export::default());
    let (mut meddler, spec) = meddler(&dir, "truncate");
    let mut server = Nbdblk::unix(&dir, &[&spec]);
    let mut raw = Raw::enter(server.address(), Mode::Structured, "");
    let before = raw.read(0, MIB as u32);
    meddler.signal(Signal::SIGUSR1);
    meddler.await_text("done");
    assert!(meddler.log().matches("refused").count() >= 2, "{}", meddler.log());
    assert!(raw.read(0, MIB as u32) == before);
    assert!(server.is_alive());
    assert!(server.terminate().success());
}

#[test]
fn a_back_end_that_makes_a_kick_block_costs_only_its_export() {
    let dir = Dir::new();
    let image = dir.at("disk.raw");
    write_runs(&image, 8 * MIB, [(0, 8 * MIB)]);
    let qsd = Qsd::start(&dir, &image, Export::default());
    let (mut meddler, spec) = meddler(&dir, "kick call");
    // On one worker, so that the other export shares it.
    let other = format!("other:io_uring={}", image.display());
    let mut server = Nbdblk::unix(&dir, &[&format!("bad:{spec}"), &other, "--threads", "1"]);
    let mut bad = Raw::enter(server.address(), Mode::Structured, "bad");
    let mut good = Raw::enter(server.address(), Mode::Structured, "other");
    bad.read(0, 4096);
    // qemu would empty the eventfds.
    qsd.freeze();
    meddler.signal(Signal::SIGUSR1);
    meddler.await_text("done");
    bad.request_reads(&[(0, 4096); 16]);
    for _ in 0..16 {
        assert_eq!(bad.answer().error, errno::EIO);
    }
    assert!(good.read(0, 4096).iter().any(|byte| *byte != 0));
    server.await_log("block");
    assert!(server.is_alive());
    assert!(server.terminate().success());
    qsd.thaw();
}

#[test]
fn a_back_end_that_fills_its_calls_and_leaves_is_noticed() {
    let dir = Dir::new();
    let image = dir.sparse("disk.raw", 8 * MIB);
    let qsd = Qsd::start(&dir, &image, Export::default());
    let (meddler, spec) = meddler(&dir, "call leave");
    let mut server = Nbdblk::unix(&dir, &[&spec]);
    let mut raw = Raw::enter(server.address(), Mode::Structured, "");
    raw.read(0, 4096);
    qsd.freeze();
    meddler.signal(Signal::SIGUSR1);
    eventually("the server says that the back end has gone", || server.log().contains("closed the connection"));
    assert_eq!(raw.call(0, cmd::READ, 0, 4096, b"").error, errno::EIO);
    assert!(server.is_alive());
    assert!(server.terminate().success());
    qsd.thaw();
}

#[test]
fn a_back_end_that_attacks_while_it_is_opened_cannot_hang_anything() {
    for attack in ["empty call open", "call kick open", "call kick open leave"] {
        let dir = Dir::new();
        let image = dir.sparse("disk.raw", 8 * MIB);
        let _qsd = Qsd::start(&dir, &image, Export::default());
        let (_meddler, spec) = meddler(&dir, attack);
        // While qemu runs, it may succeed; with the connection closed, it cannot. In both cases it ends within its own time
        // limits.
        let output = nbdblk().args(["info", &format!("{spec},request-timeout=2s,connect-timeout=2s")]).run();
        assert!(!attack.contains("leave") || output.status.code() == Some(1), "{output:?}");
    }
}

#[test]
fn another_servers_socket_is_no_back_end() {
    let dir = Dir::new();
    let server = Nbdblk::unix(&dir, &["memory=1M"]);
    let Address::Unix(path) = server.address() else { unreachable!("it was asked for a unix socket") };
    let output = nbdblk().args(["info", &format!("vhost-user={}", path.display())]).run();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(output.err.contains("not a vhost-user back end"), "{output:?}");
}

/// SIGTERM ends the server while it waits for a device that cannot be opened.
#[test]
fn a_signal_ends_the_opening_of_a_device() {
    let dir = Dir::new();
    let path = dir.at("hung.sock");
    let listener = std::os::unix::net::UnixListener::bind(&path).expect("a socket");
    // Full backlog: connect(2) waits. Otherwise: no answer to the first message.
    for full in [false, true] {
        let mut waiting = Vec::new();
        if full {
            nix::sys::socket::listen(&listener, nix::sys::socket::Backlog::new(0).expect("0 fits")).expect("a backlog");
            waiting.push(std::os::unix::net::UnixStream::connect(&path).expect("room for one"));
        }
        let spec = format!("vhost-user={},connect-timeout=100s", path.display());
        let mut server = nbdblk().args(["serve", &spec, "--port", "0"]).spawn(dir.at(&format!("hung{full}.log")));
        std::thread::sleep(std::time::Duration::from_millis(300));
        assert!(server.is_alive(), "{}", server.log());
        let begin = std::time::Instant::now();
        server.signal(Signal::SIGTERM);
        server.await_end();
        assert!(begin.elapsed() < std::time::Duration::from_secs(60), "long before the time limit");
        while !full && waiting.is_empty() {
            waiting.push(listener.accept().expect("the connection of the server that has ended").0);
        }
    }
}
