//! The server replaces its program while it serves real clients: none of them notices more than a pause.

use std::fs;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use nbdblk_tests::raw::{Mode, Raw, cmd, errno, opt};
use nbdblk_tests::{
    Address, Daemon, Dir, Export, Nbdblk, Output, Pki, Qsd, Rng, Version, deadline, eventually, nbdblk, nbdinfo, tool,
};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::{Behind, KIB, MIB};

const CONTROL: [&str; 2] = ["--control", "control.sock"];

/// `nbdblk upgrade`, with more arguments.
fn ask(dir: &Dir, more: &[&str]) -> Output {
    nbdblk().args(["upgrade"]).args(CONTROL).args(more).within(dir.path()).run()
}

/// Replaces the program by itself.
#[track_caller]
fn upgrade(dir: &Dir) -> String {
    let Output { status, out, err } = ask(dir, &[]);
    assert!(status.success() && out.contains(" was replaced by "), "{out}{err}");
    out
}

/// The upgrade fails with one line, which contains all these words.
#[track_caller]
fn refused(dir: &Dir, more: &[&str], words: &[&str]) {
    let Output { status, out, err } = ask(dir, more);
    assert_eq!((status.code(), out.as_str(), err.lines().count()), (Some(1), "", 1), "{err}");
    for word in words {
        assert!(err.contains(word), "{word} in {err}");
    }
}

/// A server of an image with random content, under a control socket.
fn stand(args: &[&str]) -> (Dir, Nbdblk) {
    let dir = Dir::new();
    fs::write(dir.at("disk.raw"), Rng(7).bytes(16 * MIB as usize)).unwrap();
    let server = Nbdblk::unix(&dir, &[&["io_uring=disk.raw"], &CONTROL[..], args].concat());
    (dir, server)
}

/// fio verifies what it writes to an export. It runs for a few seconds.
fn fio(dir: &Dir, name: &str, uri: &str) -> Daemon {
    let fio = tool("fio")
        .args([&format!("--name={name}"), "--ioengine=nbd", "--thread", "--rw=randrw", "--bsrange=4k-64k"])
        .args(["--size=16m", "--iodepth=16", "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0"])
        .args(["--loops=1000", "--time_based", "--runtime=4", &format!("--uri={uri}")]);
    fio.within(dir.path()).spawn(dir.at(&format!("{name}.log")))
}

/// Two exports, Unix and TCP, and a number of upgrades at random moments: 12, or `NBDBLK_UPGRADES`.
#[test]
fn many_upgrades_under_load_lose_nothing() {
    let count: u32 = std::env::var("NBDBLK_UPGRADES").map_or(12, |count| count.parse().expect("a number"));
    let dir = Dir::new();
    let qsd = Qsd::start(&dir, &dir.sparse("vhost.raw", 16 * MIB), Export::default());
    dir.sparse("disk.raw", 16 * MIB);
    let other = format!("vhost:{}", qsd.spec());
    let server = Nbdblk::unix(&dir, &[&["file:io_uring=disk.raw", &other, "--port", "0"], &CONTROL[..]].concat());
    let tcp = format!("nbd://127.0.0.1:{}", port(&server));
    let loads = [
        ("file-unix", server.uri_of("file")),
        ("vhost-tcp", format!("{tcp}/vhost")),
        ("file-tcp", format!("{tcp}/file")),
        ("vhost-unix", server.uri_of("vhost")),
    ];
    // Clients of the same export write the same blocks, so only two at a time.
    let start = |n: usize| [0, 1].map(|k| fio(&dir, loads[n % 2 * 2 + k].0, &loads[n % 2 * 2 + k].1));
    let mut idle = ["file", "vhost"].map(|name| Raw::enter(server.address(), Mode::Structured, name));
    let (mut rng, mut rounds, mut base) = (Rng(u64::from(count)), 0, None);
    let mut running = start(rounds);
    for n in 0..count {
        std::thread::sleep(Duration::from_millis(rng.below(300)));
        upgrade(&dir);
        for client in &mut idle {
            assert_eq!(client.call(0, cmd::FLUSH, 0, 0, b"").error, 0);
            client.read(rng.below(15 * MIB), 512);
        }
        if running.iter_mut().any(|fio| !fio.is_alive()) {
            await_fio(running);
            if n == count / 2 || base.is_none() {
                base = Some((server.fds(), server.resident_private()));
            }
            rounds += 1;
            running = start(rounds);
        }
    }
    await_fio(running);
    upgrade(&dir);
    let (fds, memory) = base.unwrap_or_else(|| {
        let base = (server.fds(), server.resident_private());
        upgrade(&dir);
        base
    });
    eventually("no descriptor is left over", || server.fds() <= fds);
    let grown = server.resident_private().saturating_sub(memory);
    assert!(grown < 8 * MIB, "{grown} bytes more than before");
    assert!(server.terminate().success());
    assert!(!dir.at("control.sock").exists());
}

/// The TCP port of a server that listens on a Unix domain socket as well.
fn port(server: &Nbdblk) -> u16 {
    let log = server.log();
    let tcp = log.lines().find_map(|line| line.strip_prefix("nbd://localhost")).expect("the URI is printed");
    let digits: String = tcp.trim_start_matches(':').chars().take_while(char::is_ascii_digit).collect();
    digits.parse().unwrap_or(10809)
}

fn await_fio(running: [Daemon; 2]) {
    for fio in running {
        let (status, log) = fio.await_end();
        assert!(status.success(), "{log}");
    }
}

/// Bytes of a request, or of its payload, come before and after the upgrade.
#[test]
fn half_a_request_goes_on() {
    for behind in Behind::BOTH {
        let dir = Dir::new();
        let image = dir.at("disk.raw");
        fs::write(&image, Rng(7).bytes(16 * MIB as usize)).unwrap();
        let (_qsd, spec) = behind.device(&dir, &image);
        let server = Nbdblk::unix(&dir, &[&[spec.as_str(), "--port", "0"], &CONTROL[..]].concat());
        let tcp = Address::Tcp(([127, 0, 0, 1], port(&server)).into());
        let data = Rng(1).bytes(300_000);
        let mut clients = Vec::new();
        for (n, mode) in Mode::ALL.into_iter().enumerate() {
            let head = mode.header(0, cmd::WRITE, 0, 0, 0).len();
            for (k, sent) in [1, head - 1, head, head + 1, head + 200_000].into_iter().enumerate() {
                let address = if (n + k) % 2 == 0 { server.address() } else { &tcp };
                let mut client = Raw::enter(address, mode, "");
                let at = (n * 5 + k) as u64 * 512 * KIB;
                let cookie = client.expect_answer(cmd::WRITE, at, data.len() as u64);
                let bytes = mode.request(0, cmd::WRITE, cookie, at, data.len() as u64, &data);
                client.send(&bytes[..sent]);
                clients.push((client, cookie, at, bytes[sent..].to_vec()));
            }
        }
        // A refused WRITE: its payload leaves the stream, and then comes the error.
        let mut refused = Raw::enter(server.address(), Mode::Extended, "");
        let beyond = refused.expect_answer(cmd::WRITE, 16 * MIB, 4096);
        let bytes = Mode::Extended.request(0, cmd::WRITE, beyond, 16 * MIB, 4096, &[1; 4096]);
        refused.send(&bytes[..1000]);

        upgrade(&dir);
        upgrade(&dir);
        for (client, cookie, at, rest) in &mut clients {
            client.send(rest);
            assert_eq!(client.answer_to(*cookie).error, 0);
            assert!(client.read(*at, data.len() as u32) == data, "{behind:?}: the data at {at}");
        }
        refused.send(&bytes[1000..]);
        assert_eq!(refused.answer_to(beyond).error, errno::ENOSPC);
        assert_eq!(refused.read(0, 300_000), data);
        assert!(server.terminate().success());
    }
}

#[test]
fn handshakes_go_on() {
    let (dir, server) = stand(&[]);
    let enter = || Raw::greeted(server.address());
    let silent = Raw::connect(server.address());
    let greeted = enter();
    let mut half = enter();
    let list = nbdblk_tests::raw::option_bytes(opt::LIST, b"");
    half.send(&list[..7]);
    let mut chosen = enter();
    chosen.negotiate(Mode::Structured);
    chosen.negotiate_context("");
    let mut unread = enter();
    unread.option(opt::LIST, b"");

    upgrade(&dir);
    let mut silent = silent;
    silent.send(&3_u32.to_be_bytes());
    for mut client in [silent.entered(Mode::Simple, ""), greeted.entered(Mode::Extended, "")] {
        client.write(0, b"goes on");
    }
    half.send(&list[7..]);
    assert_eq!(half.replies(opt::LIST).len(), 2);
    half.go("");
    assert_eq!(half.read(0, 7), b"goes on");
    chosen.go("");
    assert_eq!(chosen.call(0, cmd::BLOCK_STATUS, 0, 4096, b"").error, 0, "the context is still selected");
    assert_eq!(unread.replies(opt::LIST).len(), 2);
    unread.go("");
    assert_eq!(unread.read(0, 7), b"goes on");
    assert!(server.terminate().success());
}

/// Replies that do not fit the sockets, and requests that were not begun because of that.
#[test]
fn replies_that_are_not_read_go_on() {
    for mode in Mode::ALL {
        let (dir, server) = stand(&["--memory", "4M", "-t", "1"]);
        let content = fs::read(dir.at("disk.raw")).unwrap();
        let mut client = Raw::enter(server.address(), mode, "");
        let reads: Vec<(u64, u32)> = (0..200).map(|n| (n * 70_001, 300_000)).collect();
        let first = client.request_reads(&reads);
        let mut other = Raw::enter(server.address(), mode, "");
        for _ in 0..3 {
            assert_eq!(other.read(5, 3), content[5..8]);
            upgrade(&dir);
        }
        for _ in &reads {
            let answer = client.answer();
            let (at, len) = reads[(answer.cookie - first) as usize];
            assert_eq!(answer.error, 0);
            assert!(answer.data == content[at as usize..at as usize + len as usize], "{mode:?}: READ {len}@{at}");
        }
        // A client that says goodbye gets all its replies first.
        let cookie = client.request(0, cmd::READ, 0, 4 * MIB as u32 - 1, b"");
        client.request(0, cmd::DISC, 0, 0, b"");
        upgrade(&dir);
        assert_eq!(client.answer_to(cookie).data.len(), 4 * MIB as usize - 1);
        assert!(client.await_close().is_empty());
        assert!(server.terminate().success());
    }
}

#[test]
fn a_program_that_is_unfit_changes_nothing() {
    let dir = Dir::new();
    dir.sparse("disk.raw", MIB);
    let write = |text: &str| fs::write(dir.at("nbdblk.toml"), format!("control = \"control.sock\"\n{text}")).unwrap();
    let good = "[[export]]\nname = \"x\"\ndevice = \"io_uring=disk.raw\"\n";
    write(good);
    let server = Nbdblk::unix(&dir, &["--config", "nbdblk.toml"]);
    let mut client = Raw::enter(server.address(), Mode::Structured, "x");
    let fds = server.fds();
    let script = |name: &str, mode: u32, text: &str| {
        fs::write(dir.at(name), text).unwrap();
        fs::set_permissions(dir.at(name), fs::Permissions::from_mode(mode)).unwrap();
        dir.text(name)
    };
    let older = script("older", 0o755, "#!/bin/sh\necho \"nbdblk: unrecognized subcommand 'judge'\" >&2; exit 1\n");
    let other = script("other", 0o755, "#!/bin/sh\nexit 0\n");
    let fatal = script("fatal", 0o755, "#!/bin/sh\nkill -SEGV $$\n");
    let programs: [(&str, &[&str]); 6] = [
        ("missing", &["cannot run", "No such file"]),
        ("disk.raw", &["cannot run", "ermission denied"]),
        (&older, &["older cannot replace the server: unrecognized subcommand"]),
        (&other, &["other cannot replace the server: it is not nbdblk"]),
        (&fatal, &["it was ended by signal 11"]),
        (dir.path().to_str().unwrap(), &["cannot run"]),
    ];
    for (program, words) in programs {
        refused(&dir, &["--program", program], words);
        client.write(0, b"still");
    }
    for (text, words) in [
        ("[[export]]\nname = 7\n", &["nbdblk.toml:3:8", "cannot replace the server"][..]),
        ("[[export]]\nname = \"y\"\ndevice = \"io_uring=disk.raw\"\n", &["\"x\" has clients", "reload first"]),
        (&format!("memory = \"1M\"\n{good}"), &["--memory", "clients may send"]),
        (&format!("tls = \"require\"\ntls-certificates = \"none\"\n{good}"), &["nbdblk.toml:2:1", "none"]),
    ] {
        write(text);
        refused(&dir, &[], words);
        client.write(0, b"still");
    }
    write(good);
    // A newer state than the program understands, and arguments that are not a server's.
    let judge = |version: &str, args: &[&str]| {
        nbdblk().args(["judge", "--version", version, "--", "nbdblk"]).args(args).within(dir.path()).run()
    };
    assert!(judge("1", &["serve", "null=1M"]).status.success());
    assert!(judge("3", &["serve", "null=1M"]).err.contains("up to version 2, and this is version 3"));
    assert_eq!(judge("1", &["serve", "nosuch=1"]).status.code(), Some(1));
    assert_eq!(judge("1", &["drivers"]).status.code(), Some(1));
    // A program that is removed between its judgement and its execution.
    let text = format!(
        "#!/bin/sh\n'{}' \"$@\"; s=$?\ncase \"$*\" in *--state*) rm \"$0\";; esac; exit $s\n",
        nbdblk().path().display()
    );
    let fleeting = script("fleeting", 0o755, &text);
    refused(&dir, &["--program", &fleeting], &["executing ", "fleeting", "No such file"]);
    client.write(0, b"still");
    eventually("nothing is left over", || server.fds() <= fds);
    upgrade(&dir);
    assert_eq!(client.read(0, 5), b"still");
    assert!(server.terminate().success());
}

#[test]
fn what_cannot_be_passed_on_is_refused() {
    // The content of a RAM disk is in the process.
    let dir = Dir::new();
    let args = [&["null=1M", "ram:memory=1M"], &CONTROL[..]].concat();
    let server = Nbdblk::unix(&dir, &args);
    let mut client = Raw::enter(server.address(), Mode::Simple, "ram");
    client.write(0, b"kept");
    refused(&dir, &[], &["\"ram\"", "would be lost"]);
    assert_eq!(client.read(0, 4), b"kept");
    assert!(server.terminate().success());
    // The client of --single.
    let mut single = nbdblk()
        .args(["serve", "null=1M", "--single"])
        .args(CONTROL)
        .within(dir.path())
        .stdout(fs::File::create(dir.at("out")).unwrap())
        .spawn(dir.at("log"));
    eventually("it listens", || dir.at("control.sock").exists());
    refused(&dir, &[], &["--single cannot be passed on"]);
    assert!(single.is_alive());
    single.signal(Signal::SIGTERM);
    assert!(single.await_end().0.success());
}

#[test]
fn a_device_that_does_not_answer_stops_the_upgrade() {
    let dir = Dir::new();
    let qsd = Qsd::start(&dir, &dir.sparse("vhost.raw", MIB), Export::default());
    dir.sparse("disk.raw", MIB);
    let other = format!("vhost:{}", qsd.spec());
    let server = Nbdblk::unix(&dir, &[&["file:io_uring=disk.raw", &other], &CONTROL[..]].concat());
    let mut stalled = Raw::enter(server.address(), Mode::Structured, "vhost");
    let mut served = Raw::enter(server.address(), Mode::Structured, "file");
    qsd.freeze();
    let cookie = stalled.request(0, cmd::READ, 0, 4096, b"");
    served.write(0, b"before");
    refused(&dir, &[], &["cannot pause", "vhost.sock", "did not complete its requests in time"]);
    assert_eq!(served.read(0, 6), b"before");
    qsd.thaw();
    assert_eq!(stalled.answer_to(cookie).data, [0; 4096]);
    upgrade(&dir);
    assert_eq!(stalled.read(0, 6), [0; 6]);
    assert!(server.terminate().success());
}

/// Many exports, some of the same file, and one whose back end does not answer.
#[test]
fn a_device_that_opens_slowly_ends_only_its_own_clients() {
    let dir = Dir::new();
    let qsd = Qsd::start(&dir, &dir.sparse("vhost.raw", MIB), Export::default());
    let mut args = vec![format!("vhost:{}", qsd.spec())];
    for n in 0..40 {
        dir.sparse(&format!("{}.raw", n % 20), MIB);
        args.push(format!("file{n}:io_uring={}.raw", n % 20));
    }
    let args: Vec<&str> = args.iter().map(String::as_str).chain(CONTROL).collect();
    let server = Nbdblk::unix(&dir, &args);
    let vhost = Raw::enter(server.address(), Mode::Structured, "vhost");
    let mut clients: Vec<Raw> =
        (0..40).map(|n| Raw::enter(server.address(), Mode::Structured, &format!("file{n}"))).collect();
    upgrade(&dir);
    qsd.freeze();
    clients[0].write(0, b"both");
    upgrade(&dir);
    vhost.await_close();
    for client in &mut clients {
        client.read(0, 512);
    }
    assert_eq!(clients[20].read(0, 4), b"both");
    server.await_log("its clients are disconnected: export \"vhost\"");
    assert!(server.terminate().success());
}

/// A device that is gone after the execution: its clients end, and the others go on.
#[test]
fn a_device_that_cannot_be_opened_again_ends_only_its_own_clients() {
    let dir = Dir::new();
    dir.sparse("one.raw", MIB);
    dir.sparse("two.raw", MIB);
    let server = Nbdblk::unix(&dir, &[&["one:io_uring=one.raw", "two:io_uring=two.raw"], &CONTROL[..]].concat());
    let [mut one, two] = ["one", "two"].map(|name| Raw::enter(server.address(), Mode::Structured, name));
    one.write(0, b"here");
    fs::remove_file(dir.at("two.raw")).unwrap();
    upgrade(&dir);
    assert!(two.await_close().is_empty());
    assert_eq!(one.read(0, 4), b"here");
    server.await_log("its clients are disconnected: export \"two\"");
    assert_eq!(nbdinfo(&server.uri_of("one"))["exports"][0]["export-size"], MIB);
    assert!(server.terminate().success());
}

/// Clients under TLS cannot be passed on: what they have sent gets ESHUTDOWN, and the connection ends. Other clients go on.
#[test]
fn clients_under_tls_end_at_the_boundary_of_a_request() {
    let dir = Dir::new();
    let pki = Pki::new(&dir, "pki");
    dir.sparse("disk.raw", MIB);
    let args = ["io_uring=disk.raw", "--tls", "on", "--tls-certificates", "pki"];
    let server = Nbdblk::unix(&dir, &[&args, &CONTROL[..]].concat());
    let mut plain = Raw::enter(server.address(), Mode::Structured, "");
    plain.write(0, b"plain");
    let secure = |version| Raw::greeted(server.address()).start_tls(&pki, version).entered(Mode::Structured, "");
    let clients = [secure(Version::Tls12), secure(Version::Tls13)];
    // In the handshake of TLS.
    let mut shaking = Raw::greeted(server.address());
    shaking.ask(opt::STARTTLS, b"");
    assert!(upgrade(&dir).contains("3 were disconnected"));
    for client in clients {
        assert!(client.await_close().is_empty());
    }
    shaking.await_close();
    assert_eq!(plain.read(0, 5), b"plain");
    let mut again = secure(Version::Tls13);
    assert_eq!(again.read(0, 5), b"plain");
    assert!(server.terminate().success());
}

/// SIGUSR2, the pid file, the command of --run, and another program.
#[test]
fn the_process_stays_the_same() {
    let dir = Dir::new();
    dir.sparse("disk.raw", MIB);
    let copy = dir.at("copy");
    fs::copy(nbdblk().path(), &copy).unwrap();
    let server = Nbdblk::unix(&dir, &[&["io_uring=disk.raw", "-P", "pid"], &CONTROL[..]].concat());
    let program = || fs::read_link(format!("/proc/{}/exe", server.pid())).unwrap();
    let before = program();
    let mut client = Raw::enter(server.address(), Mode::Structured, "");
    client.write(0, b"one");
    let output = ask(&dir, &["--program", "copy"]);
    assert!(output.status.success(), "{}", output.err);
    assert_eq!(program(), copy.canonicalize().unwrap());
    assert_ne!(before, program());
    // The next upgrade keeps to it, also when the file is replaced.
    fs::copy(&copy, dir.at("newer")).unwrap();
    fs::rename(dir.at("newer"), &copy).unwrap();
    kill(Pid::from_raw(server.pid() as i32), Signal::SIGUSR2).unwrap();
    eventually("the second upgrade", || server.log().matches(" was replaced by ").count() == 2);
    assert_eq!(program(), copy.canonicalize().unwrap());
    assert_eq!(client.read(0, 3), b"one");
    assert_eq!(fs::read_to_string(dir.at("pid")).unwrap(), format!("{}\n", server.pid()));
    assert!(server.terminate().success());
    assert!(!dir.at("pid").exists() && !dir.at("nbd0.sock").exists());

    let command = "kill -USR2 $PPID; until grep -q 'was replaced' log; do sleep 0.05; done
        nbdinfo --size \"$uri\" && kill -USR2 $PPID; exit 7";
    let args = ["serve", "io_uring=disk.raw", "--run", command];
    let (status, log) = nbdblk().args(args).within(dir.path()).spawn(dir.at("log")).await_end();
    assert!(status.code() == Some(7) && log.contains("1048576"), "{status}: {log}");
}

/// A signal during an upgrade is not lost, whichever program gets it.
#[test]
fn a_server_that_is_stopped_during_an_upgrade_stops() {
    for n in 0..8 {
        let (_dir, server) = stand(&[]);
        let mut client = Raw::enter(server.address(), Mode::Structured, "");
        client.read(0, 512);
        kill(Pid::from_raw(server.pid() as i32), Signal::SIGUSR2).unwrap();
        std::thread::sleep(Duration::from_millis(4 * n));
        assert!(server.terminate().success());
    }
}

/// A service manager in Python: it prints each message that it gets, with its number, and keeps sockets for the next server.
const MANAGER: &str = r#"
import os, shlex, signal, socket, subprocess, sys, threading
notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
notify.bind("notify")
kept, count = {}, 0
def hear():
    global count
    while True:
        text, fds, _, _ = socket.recv_fds(notify, 4096, 4)
        lines = text.decode().split("\n")
        name = lines[-1].removeprefix("FDNAME=")
        if lines[0] == "FDSTORE=1":
            kept[name] = fds[0]
        elif lines[0] == "FDSTOREREMOVE=1":
            os.close(kept.pop(name))
        else:
            count += 1
            print(f"told {count}: {' '.join(lines)}; kept: {' '.join(sorted(kept))}", flush=True)
threading.Thread(target=hear, daemon=True).start()
def start(words):
    fds = [os.dup2(fd, 100 + n) for n, fd in enumerate(kept.values())]
    def pass_on():
        for n, fd in enumerate(fds):
            os.dup2(fd, 3 + n)
    env = dict(os.environ, NOTIFY_SOCKET=os.path.abspath("notify"), LISTEN_FDS=str(len(kept)), LISTEN_FDNAMES=":".join(kept))
    run = "LISTEN_PID=$$ exec setpriv --pdeathsig KILL -- " + words
    server = subprocess.Popen(["sh", "-c", run], env=env, preexec_fn=pass_on, close_fds=False)
    [os.close(fd) for fd in fds]
    return server
for line in sys.stdin:
    word, _, rest = line.strip().partition(" ")
    if word == "start":
        server = start(rest)
    elif word == "listen":
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(rest)
        listener.listen()
        kept["nbd"] = os.dup(listener.fileno())
    else:
        server.send_signal(getattr(signal, word))
        print(f"ended: {server.wait()}", flush=True)
"#;

/// A running manager.
struct Manager {
    daemon: Daemon,
    told: u32,
}

impl Manager {
    fn new(dir: &Dir) -> Self {
        let daemon = tool("python3").args(["-c", MANAGER]).within(dir.path()).spawn(dir.at("manager.log"));
        eventually("the manager listens", || dir.at("notify").exists());
        Self { daemon, told: 0 }
    }

    fn start(&mut self, args: &str) {
        self.daemon.type_line(&format!("start {} serve {args}", nbdblk().path().display()));
    }

    /// Waits for the next message, which begins with these words. Returns the names of the sockets that are kept.
    #[track_caller]
    fn expect(&mut self, words: &str) -> Vec<String> {
        self.told += 1;
        let start = format!("told {}: ", self.told);
        self.daemon.await_that(&start, |log| log.lines().any(|line| line.starts_with(&start)));
        let log = self.daemon.log();
        let line = log.lines().find_map(|line| line.strip_prefix(&start)).expect("just seen");
        assert!(line.starts_with(words), "{line}");
        let (_, names) = line.split_once("; kept: ").expect("each line has the names");
        names.split_whitespace().map(str::to_owned).collect()
    }

    /// Sends a signal to the server, and waits for its end.
    fn end(&mut self, signal: &str, status: i32) {
        let ended = format!("ended: {status}\n");
        let before = self.daemon.log().matches(&ended).count();
        self.daemon.type_line(signal);
        self.daemon.await_that(&ended, |log| log.matches(&ended).count() > before);
    }
}

#[test]
fn the_manager_keeps_the_sockets_of_a_crashed_server() {
    let dir = Dir::new();
    dir.sparse("disk.raw", MIB);
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let args = format!("io_uring=disk.raw -U nbd.sock -i 127.0.0.1 -p {port} --control control.sock");
    let mut manager = Manager::new(&dir);
    manager.start(&args);
    assert_eq!(manager.expect("READY=1").len(), 2);
    upgrade(&dir);
    manager.expect("RELOADING=1 MONOTONIC_USEC=");
    assert_eq!(manager.expect("READY=1").len(), 2);
    refused(&dir, &["--program", "/bin/false"], &["exit status: 1"]);
    manager.expect("RELOADING=1 ");
    manager.expect("READY=1");
    manager.end("SIGKILL", -9);
    // Clients of both sockets wait.
    let mut waiting = UnixStream::connect(dir.at("nbd.sock")).unwrap();
    waiting.set_read_timeout(Some(deadline())).unwrap();
    let tcp = Address::Tcp(([127, 0, 0, 1], port).into());
    let other = std::thread::spawn(move || Raw::enter(&tcp, Mode::Structured, "").read(0, 512));
    manager.start(&args);
    assert_eq!(manager.expect("READY=1").len(), 2);
    let mut greeting = [0; 18];
    waiting.read_exact(&mut greeting).unwrap();
    assert_eq!(&greeting[..16], b"NBDMAGICIHAVEOPT");
    assert_eq!(other.join().unwrap(), [0; 512]);
    // A server with other arguments does not need them any more.
    manager.end("SIGKILL", -9);
    manager.start("io_uring=disk.raw -U other.sock");
    let kept = manager.expect("READY=1");
    assert!(kept.len() == 1 && kept[0].starts_with("nbdblk.unix."), "{kept:?}");
    manager.end("SIGTERM", 0);
    manager.expect("STOPPING=1");
    assert!(!dir.at("other.sock").exists());
}

/// Sockets from the manager are passed on as well.
#[test]
fn sockets_that_were_passed_go_on() {
    let dir = Dir::new();
    dir.sparse("disk.raw", MIB);
    let mut manager = Manager::new(&dir);
    manager.daemon.type_line("listen nbd.sock");
    manager.start("io_uring=disk.raw --control control.sock");
    assert_eq!(manager.expect("READY=1"), ["nbd"]);
    let address = Address::Unix(dir.at("nbd.sock"));
    let mut client = Raw::enter(&address, Mode::Extended, "");
    for n in 0..3_u8 {
        upgrade(&dir);
        client.write(0, &[n; 512]);
        assert_eq!(Raw::enter(&address, Mode::Structured, "").read(0, 512), [n; 512]);
    }
    manager.end("SIGTERM", 0);
    assert!(dir.at("nbd.sock").exists(), "it belongs to the manager");
}
