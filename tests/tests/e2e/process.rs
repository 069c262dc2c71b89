//! The process and its environment: limits, signals, unread pipes, files that are not regular, silent peers.

use std::fs;
use std::io::Read;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;

use nbdblk_tests::raw::{Mode, Raw, cmd};
use nbdblk_tests::{Address, Cmd, Daemon, Dir, Export, Pki, Qsd, eventually, full_pipe, nbdblk, tool};
use nix::sys::signal::Signal;
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket};
use nix::unistd::{Uid, mkfifo};

use crate::MIB;
use crate::cli::check_refused;

/// A shell command that starts the program under test as `"$N"`.
fn sh(dir: &Dir, script: &str) -> Cmd {
    tool("sh").args(["-c", script]).env("N", nbdblk().path()).within(dir.path())
}

fn fifo(path: &Path) {
    mkfifo(path, nix::sys::stat::Mode::S_IRWXU).expect("a FIFO can be made in the directory of the test");
}

fn is_served(dir: &Dir, socket: &str) {
    let uri = format!("nbd+unix://?socket={}", dir.text(socket));
    assert_eq!(tool("nbdinfo").args(["--size", &uri]).ok().out.trim(), "1048576");
}

/// SIGTERM ends it with this status.
#[track_caller]
fn ends(server: Daemon, status: i32) {
    server.signal(Signal::SIGTERM);
    let (ended, log) = server.await_end();
    assert_eq!(ended.code(), Some(status), "{ended}: {log}");
}

/// The directory must contain only these files.
#[track_caller]
fn check_left(dir: &Dir, names: &[&str]) {
    let mut left: Vec<_> =
        fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    left.sort();
    assert_eq!(left, names);
}

#[test]
fn a_write_beyond_the_limit_of_file_sizes_finds_no_space() {
    let dir = Dir::new();
    dir.sparse("disk.raw", 4 * MIB);
    // In units of 512 bytes: 1 MiB.
    let mut server =
        sh(&dir, "ulimit -S -f 2048; exec \"$N\" serve io_uring=disk.raw -U nbd.sock").spawn(dir.at("log"));
    server.await_text("serving at");
    let mut client = Raw::enter(&Address::Unix(dir.at("nbd.sock")), Mode::Structured, "");
    const ENOSPC: u32 = 28;
    assert_eq!(client.call(0, cmd::WRITE, 2 * MIB, 4096, &[1; 4096]).error, ENOSPC);
    client.write(0, b"below");
    assert_eq!(client.read(0, 5), b"below");
    drop(client);
    ends(server, 0);
    // Memory that is shared with another process is a file too, and must fit the limit.
    let qsd = Qsd::start(&dir, &dir.at("disk.raw"), Export::default());
    let serve =
        |memory: &str| format!("ulimit -f 8192; exec \"$N\" serve {} --memory {memory} -t 1 --run true", qsd.spec());
    sh(&dir, &serve("2M")).ok();
    if sh(&dir, "ulimit -f 1; ulimit -f 2").run().status.success() {
        // Limits do not bind a user that may raise them.
        sh(&dir, &serve("64M")).ok();
    } else {
        let output = sh(&dir, &serve("64M")).run();
        assert!(output.status.code() == Some(1) && output.err.contains("ulimit -f"), "{output:?}");
    }
    // The command of --run must have the signal as under a shell.
    let output = nbdblk().args(["serve", "memory=1M", "--run", "kill -XFSZ $$; exit 0"]).run();
    assert_eq!(output.status.code(), Some(128 + Signal::SIGXFSZ as i32), "{output:?}");
}

#[test]
fn an_unread_stderr_delays_nothing() {
    let dir = Dir::new();
    let (reader, writer) = full_pipe();
    let args = ["serve", "memory=1M", "-vv", "-U", "nbd.sock", "--connections", "1"];
    let server = nbdblk().args(args).within(dir.path()).stderr(writer).spawn(dir.at("log"));
    let path = dir.at("nbd.sock");
    eventually("it listens", || UnixStream::connect(&path).is_ok());
    let mut greeting = [0; 18];
    eventually("there is room", || UnixStream::connect(&path).unwrap().read_exact(&mut greeting).is_ok());
    eventually("there is room again", || UnixStream::connect(&path).unwrap().read_exact(&mut greeting).is_ok());
    let mut rejected = 0;
    while rejected < 700 {
        // The first one may be served or not; then there may be room or not.
        let _one = UnixStream::connect(&path).unwrap();
        for _ in 0..20 {
            rejected += u32::from(UnixStream::connect(&path).unwrap().read_exact(&mut greeting).is_err());
        }
    }
    eventually("a new client is served", || UnixStream::connect(&path).unwrap().read_exact(&mut greeting).is_ok());
    ends(server, 0);
    drop(reader);
}

#[test]
fn repeated_warnings_are_few_lines() {
    let dir = Dir::new();
    let args = ["serve", "memory=1M", "-U", "nbd.sock", "--connections", "1"];
    let mut server = nbdblk().args(args).within(dir.path()).spawn(dir.at("log"));
    server.await_text("serving at");
    let mut served = Raw::enter(&Address::Unix(dir.at("nbd.sock")), Mode::Structured, "");
    served.write(0, b"here");
    for _ in 0..700 {
        let mut greeting = [0; 18];
        assert!(UnixStream::connect(dir.at("nbd.sock")).unwrap().read_exact(&mut greeting).is_err());
    }
    server.signal(Signal::SIGTERM);
    let (status, log) = server.await_end();
    assert!(status.success(), "{log}");
    let lines = log.lines().filter(|line| line.contains("rejected")).count();
    assert!((1..50).contains(&lines), "{lines} lines for 700 clients: {log}");
}

#[test]
fn lines_for_the_journal_have_a_priority() {
    let dir = Dir::new();
    // stat(1) names the file that is the shell's stderr.
    let script = "JOURNAL_STREAM=$(stat -Lc %d:%i /dev/stderr) exec \"$N\" serve -v memory=1M --run 'exit 3'";
    let output = sh(&dir, script).run();
    assert_eq!(output.status.code(), Some(3), "{output:?}");
    assert!(output.err.lines().count() > 1, "{output:?}");
    assert!(output.err.lines().all(|line| line.starts_with("<6>nbdblk: ")), "{output:?}");
    let output = sh(&dir, "JOURNAL_STREAM=$(stat -Lc %d:%i /dev/stderr) exec \"$N\" info nosuch=1").run();
    assert!(output.err.starts_with("<3>nbdblk: "), "{output:?}");
    let output = sh(&dir, "JOURNAL_STREAM=1:1 exec \"$N\" info nosuch=1").run();
    assert!(output.err.starts_with("nbdblk: "), "{output:?}");
}

#[test]
fn a_hangup_stops_it_and_other_signals_do_not() {
    let dir = Dir::new();
    let start = |script: &str| {
        let mut server = sh(&dir, script).spawn(dir.at("log"));
        server.await_text("serving at");
        server
    };
    let server = start("exec \"$N\" serve memory=1M -U nbd.sock -P pid");
    server.signal(Signal::SIGHUP);
    let (status, log) = server.await_end();
    assert_eq!(status.code(), Some(0), "{log}");
    check_left(&dir, &["log"]);
    // The command of --run gets SIGTERM, and the private directory is removed.
    let script = "exec \"$N\" serve memory=1M --run 'trap \"exit 5\" TERM; echo \"at $unixsocket.\"; while :; do sleep 0.05; done'";
    let mut server = sh(&dir, script).spawn(dir.at("log"));
    server.await_text("/socket.");
    let socket = server.log().trim().trim_start_matches("at ").trim_end_matches('.').to_owned();
    assert!(Path::new(&socket).exists(), "{socket}");
    server.signal(Signal::SIGHUP);
    let (status, log) = server.await_end();
    assert_eq!(status.code(), Some(5), "{log}");
    assert!(!Path::new(&socket).parent().unwrap().exists(), "{socket} is left");
    // nohup ignores it; signals without a meaning here are ignored too.
    let server = start("trap '' HUP; exec \"$N\" serve memory=1M -U nbd.sock");
    for signal in ["HUP", "USR1", "USR2", "ALRM", "VTALRM", "PROF", "IO", "PWR", "PIPE", "XFSZ", "16", "34", "64"] {
        tool("sh").args(["-c", &format!("kill -{signal} {}", server.pid())]).ok();
        is_served(&dir, "nbd.sock");
    }
    ends(server, 0);
}

#[test]
fn errors_of_resources_name_the_limit() {
    let dir = Dir::new();
    let check = |script: &str, words: &[&str]| {
        let output = sh(&dir, script).run();
        assert_eq!((output.status.code(), output.err.lines().count()), (Some(1), 1), "{script}: {output:?}");
        words.iter().for_each(|word| assert!(output.err.contains(word), "{script}: no {word} in {}", output.err));
        check_left(&dir, &[]);
    };
    check("exec \"$N\" serve memory=1M -U s --memory 1E", &["--memory", "64T"]);
    check("exec \"$N\" serve memory=1M x:memory=1M -U s -t 4 --memory 60T", &["\"\"", "--memory", "ulimit -v"]);
    check("ulimit -n 10; exec \"$N\" serve memory=1M -U s -t 8", &["Too many open files", "ulimit -n", "--threads"]);
    check(
        "ulimit -v 200000; exec \"$N\" serve memory=1M -U s -t 2 --memory 1G",
        &["export \"\"", "--memory", "ulimit -v"],
    );
    check("exec \"$N\" serve memory=1M -U s -t 100000", &["--threads", "1024"]);
    check("exec \"$N\" serve memory=1M -U s --handshake-timeout 18446744073709551", &["--handshake-timeout", "86400s"]);
    check("exec \"$N\" serve vhost-user=x,request-timeout=18446744073709551 -U s", &["request-timeout", "604800s"]);
    if Uid::effective().is_root() {
        // Limits of processes do not bind root.
        let script =
            "chmod 777 .; exec prlimit --nproc=3 setpriv --reuid 54321 --clear-groups \"$N\" serve memory=1M -U s -t 8";
        check(script, &["ulimit -u", "--threads"]);
    }
}

/// A listening socket with a full backlog.
fn full_listener(path: &Path) -> (OwnedFd, Vec<UnixStream>) {
    let listener = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).unwrap();
    bind(listener.as_raw_fd(), &UnixAddr::new(path).unwrap()).unwrap();
    listen(&listener, Backlog::new(0).unwrap()).unwrap();
    // A backlog of 0 has room for one.
    (listener, vec![UnixStream::connect(path).unwrap()])
}

#[test]
fn a_server_that_does_not_accept_delays_no_command() {
    let dir = Dir::new();
    let _full = full_listener(&dir.at("full.sock"));
    let output = nbdblk().args(["serve", "memory=1M", "-U", "full.sock"]).within(dir.path()).run();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(output.err.contains("full.sock: another server listens there already"), "{output:?}");
    let output = nbdblk().args(["reload", "--control", "full.sock", "--timeout", "500ms"]).within(dir.path()).run();
    assert!(output.status.code() == Some(1) && output.err.contains("has not answered within 500ms"), "{output:?}");
    // A stopped server has room for clients, and never answers.
    let server = configured(&dir, MEMORY);
    server.signal(Signal::SIGSTOP);
    let output = nbdblk().args(["reload", "nbdblk.toml", "--timeout", "1s"]).within(dir.path()).run();
    assert!(output.status.code() == Some(1) && output.err.contains("has not answered within 1s"), "{output:?}");
    server.signal(Signal::SIGCONT);
    let output = nbdblk().args(["reload", "nbdblk.toml"]).within(dir.path()).ok();
    assert_eq!(output.out, "nothing has changed\n");
    ends(server, 0);
}

/// A control socket's file and an export.
const MEMORY: &str = "control = \"control.sock\"\nunix = \"nbd.sock\"\n[[export]]\ndevice = \"memory=1M\"\n";

fn configured(dir: &Dir, text: &str) -> Daemon {
    fs::write(dir.at("nbdblk.toml"), text).unwrap();
    let mut server =
        nbdblk().args(["serve", "--config", "nbdblk.toml"]).within(dir.path()).spawn(dir.at("configured.log"));
    server.await_text("serving at");
    server
}

#[test]
fn a_signal_while_a_device_is_opened_is_no_success() {
    let dir = Dir::new();
    let _mute = UnixListener::bind(dir.at("mute.sock")).unwrap();
    let args =
        ["serve", "-v", "memory=1M", "x:vhost-user=mute.sock,connect-timeout=10000s", "-U", "nbd.sock", "-P", "pid"];
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        let mut server = nbdblk().args(args).within(dir.path()).spawn(dir.at("log"));
        // The first device is open; the second never will be.
        server.await_text("capacity");
        server.signal(signal);
        let (status, log) = server.await_end();
        assert_eq!(status.code(), Some(128 + signal as i32), "{log}");
        assert!(log.contains("nothing was served"), "{log}");
        check_left(&dir, &["log", "mute.sock"]);
    }
}

#[test]
fn only_regular_files_are_read() {
    let dir = Dir::new();
    fifo(&dir.at("fifo"));
    std::os::unix::fs::symlink("fifo", dir.at("link")).unwrap();
    check_refused(&dir, &["--config", "fifo"], &["fifo", "not a regular file"]);
    check_refused(&dir, &["--config", "/dev/zero"], &["/dev/zero", "not a regular file"]);
    check_refused(&dir, &["memory=1M", "--pidfile", "fifo"], &["fifo", "not a regular file"]);
    check_refused(&dir, &["memory=1M", "--pidfile", "link"], &["link", "not a regular file"]);
    check_refused(&dir, &["memory=1M", "--pidfile", "/dev/null"], &["/dev/null", "not a regular file"]);
    check_refused(&dir, &["memory=1M", "--tls-psk", "fifo"], &["fifo", "not a regular file"]);
    check_refused(&dir, &["--config", "nosuch"], &["nosuch", "No such file"]);
    // The configuration becomes a FIFO: that is an error, and signals still work.
    let pki = Pki::new(&dir, "pki");
    let tls = format!("tls-certificates = {:?}\n{MEMORY}", pki.dir());
    let mut server = configured(&dir, &tls);
    fs::remove_file(dir.at("nbdblk.toml")).unwrap();
    fifo(&dir.at("nbdblk.toml"));
    server.signal(Signal::SIGHUP);
    server.await_text("reading nbdblk.toml: it is not a regular file");
    fs::remove_file(dir.at("nbdblk.toml")).unwrap();
    fs::write(dir.at("nbdblk.toml"), &tls).unwrap();
    let key = Path::new(pki.dir()).join("server-key.pem");
    fs::remove_file(&key).unwrap();
    fifo(&key);
    server.signal(Signal::SIGHUP);
    server.await_text("server-key.pem: it is not a regular file");
    is_served(&dir, "nbd.sock");
    ends(server, 0);
}

#[test]
fn a_hung_reload_delays_no_signal_and_no_client() {
    let dir = Dir::new();
    let mute = UnixListener::bind(dir.at("mute.sock")).unwrap();
    let mut server = configured(&dir, MEMORY);
    let hangs = format!("{MEMORY}[[export]]\nname = \"x\"\ndevice = \"vhost-user=mute.sock,connect-timeout=10000s\"\n");
    fs::write(dir.at("nbdblk.toml"), hangs).unwrap();
    server.signal(Signal::SIGHUP);
    // The reload has connected to the device's socket, and waits for an answer.
    let (_connected, _) = mute.accept().unwrap();
    is_served(&dir, "nbd.sock");
    let asks = nbdblk().args(["reload", "nbdblk.toml", "--timeout", "500ms"]).within(dir.path());
    let output = asks.run();
    assert!(output.err.contains("has not answered within 500ms"), "{output:?}");
    assert!(server.is_alive());
    ends(server, 0);
    check_left(&dir, &["configured.log", "mute.sock", "nbdblk.toml"]);
}

#[test]
fn silent_clients_of_the_control_socket_do_not_delay_others() {
    let dir = Dir::new();
    let server = configured(&dir, MEMORY);
    // Each of them may be silent for 5 s.
    let silent: Vec<_> = (0..200).map(|_| UnixStream::connect(dir.at("control.sock")).unwrap()).collect();
    let start = std::time::Instant::now();
    let output = nbdblk().args(["reload", "nbdblk.toml"]).within(dir.path()).ok();
    assert_eq!(output.out, "nothing has changed\n");
    assert!(start.elapsed() < Duration::from_secs(60));
    // The server keeps only some of them.
    let fds = fs::read_dir(format!("/proc/{}/fd", server.pid())).unwrap().count();
    assert!(fds < 150, "{fds} descriptors");
    drop(silent);
    ends(server, 0);
}

#[test]
fn readers_that_do_not_read_delay_nothing() {
    let dir = Dir::new();
    // A service manager with a full queue.
    let manager = UnixDatagram::bind(dir.at("notify")).unwrap();
    let filler = UnixDatagram::unbound().unwrap();
    filler.set_nonblocking(true).unwrap();
    while filler.send_to(b"x", dir.at("notify")).is_ok() {}
    let server = nbdblk()
        .args(["serve", "memory=1M", "-U", "nbd.sock"])
        .within(dir.path())
        .env("NOTIFY_SOCKET", dir.text("notify"))
        .spawn(dir.at("log"));
    eventually("it listens", || dir.at("nbd.sock").exists());
    is_served(&dir, "nbd.sock");
    ends(server, 0);
    drop(manager);
    // A standard output that is a full pipe.
    let (_reader, writer) = full_pipe();
    let args = ["serve", "memory=1M", "-U", "nbd.sock", "--print-uri", "-P", "pid"];
    let server = nbdblk().args(args).within(dir.path()).stdout(writer).spawn(dir.at("log"));
    eventually("it has written its pid file", || dir.at("pid").exists());
    is_served(&dir, "nbd.sock");
    ends(server, 0);
    // The descriptor of --ready-fd: a full pipe, and one without a reader.
    let (_reader, writer) = full_pipe();
    let server = sh(&dir, "exec 9>&1 >ready.log; exec \"$N\" serve memory=1M -U nbd.sock --ready-fd 9 -P pid");
    let server = server.stdout(writer).spawn(dir.at("log"));
    eventually("it has written its pid file", || dir.at("pid").exists());
    is_served(&dir, "nbd.sock");
    ends(server, 0);
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let server = sh(&dir, "exec 9>&1 >ready.log; exec \"$N\" serve memory=1M -U nbd.sock --ready-fd 9 -P pid");
    let mut server = server.stdout(writer).spawn(dir.at("log"));
    server.await_text("serving at");
    ends(server, 0);
    check_left(&dir, &["log", "notify", "ready.log"]);
}

#[test]
fn closed_standard_streams_are_survived() {
    let dir = Dir::new();
    let server =
        sh(&dir, "exec \"$N\" serve memory=1M -U nbd.sock -P pid --print-uri <&- >&- 2>&-").spawn(dir.at("log"));
    eventually("it has written its pid file", || dir.at("pid").exists());
    is_served(&dir, "nbd.sock");
    ends(server, 0);
    check_left(&dir, &["log"]);
}

#[test]
fn a_pid_file_that_cannot_be_written_leaves_nothing_behind() {
    let dir = Dir::new();
    let output = sh(&dir, "ulimit -f 0; exec \"$N\" serve null=1M -U nbd.sock -P pid --memory 1M").run();
    assert!(output.err.contains("pid file pid") && output.err.contains("File too large"), "{output:?}");
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    check_left(&dir, &[]);
    // The longest possible name.
    let name = "p".repeat(255);
    let mut server =
        nbdblk().args(["serve", "memory=1M", "-U", "nbd.sock", "-P", &name]).within(dir.path()).spawn(dir.at("log"));
    server.await_text("serving at");
    assert_eq!(fs::read_to_string(dir.at(&name)).unwrap(), format!("{}\n", server.pid()));
    ends(server, 0);
    check_left(&dir, &["log"]);
}
