//! All ways to listen, reports of readiness, and events that end the server.

use std::fs;
use std::io::{Read, Write};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::process::{Command, Stdio};
use std::time::Duration;

use nbdblk_tests::raw::{Mode, Raw};
use nbdblk_tests::{Cmd, Dir, Nbdblk, deadline, eventually, nbdblk, tool};
use nix::sys::signal::Signal;

/// The path of the program under test, for other programs to start.
fn program() -> String {
    nbdblk().path().to_str().expect("the target directory has a plain name").into()
}

fn check_size(uri: &str) {
    assert_eq!(tool("nbdinfo").args(["--size", uri]).ok().out.trim(), "1048576", "{uri}");
}

#[test]
fn it_listens_in_every_way_at_once() {
    let dir = Dir::new();
    let name = format!("@nbdblk-{}", std::process::id());
    let args = ["-U", "b.sock", "-U", &name, "-l", "tcp:[::1]:0", "-i", "127.0.0.1", "-p", "0", "--listen=tcp:0"];
    let server = Nbdblk::unix(&dir, &[&["memory=1M"], &args[..]].concat());
    // The URIs are written at once.
    let uris: Vec<String> = server.log().lines().map(str::to_owned).collect();
    assert_eq!(uris.len(), 6, "{uris:?}");
    let (files, rest): (Vec<_>, Vec<_>) = uris.iter().partition(|uri| uri.contains("?socket=/"));
    let (abstracts, ports): (Vec<_>, Vec<_>) = rest.into_iter().partition(|uri| uri.contains("?socket=@"));
    assert_eq!((files.len(), abstracts.len(), ports.len()), (2, 1, 3), "{uris:?}");
    files.iter().for_each(|uri| check_size(uri));
    ports.iter().for_each(|uri| check_size(uri));
    let options = format!("driver=nbd,server.type=unix,server.path={},server.abstract=on", &name[1..]);
    let info = tool("qemu-img").args(["info", "--image-opts", &options]).ok().out;
    assert!(info.contains("1048576 bytes"), "{info}");
    // Its name is in use, and the error of another server names it.
    let output = nbdblk().args(["serve", "memory=1M", "-U", &name]).run();
    assert!(output.status.code() == Some(1) && output.err.contains(&name), "{output:?}");
    assert!(server.terminate().success());
    assert!(!dir.at("b.sock").exists());
}

#[test]
fn a_family_of_addresses_can_be_excluded() {
    let dir = Dir::new();
    for (option, yes, no) in [("-4", "127.0.0.1", "::1"), ("-6", "::1", "127.0.0.1")] {
        let server = Nbdblk::tcp(&dir, &["memory=1M", option]);
        let port = server.printed_uri().rsplit(':').next().unwrap().to_owned();
        let connect = |host: &str| std::net::TcpStream::connect((host, port.parse::<u16>().unwrap()));
        assert!(connect(yes).is_ok() && connect(no).is_err(), "{option}");
    }
    let server = Nbdblk::tcp(&dir, &["memory=1M", "-i", "0.0.0.0", "-i", "::"]);
    assert_eq!(server.log().lines().count(), 1, "one port in both families: {}", server.log());
    let server = Nbdblk::tcp(&dir, &["memory=1M", "--bind", "::"]);
    check_size(&server.uri());
}

/// nbdkit's form, and ours. Clients can connect only if the kernel has a loopback for vsock (`modprobe vsock_loopback`).
#[test]
fn it_listens_on_vsock_where_there_is_one() {
    let dir = Dir::new();
    if !fs::exists("/dev/vsock").unwrap() {
        let output = nbdblk().args(["serve", "memory=1M", "--vsock"]).run();
        assert!(output.status.code() == Some(1) && output.err.contains("vsock"), "{output:?}");
        return;
    }
    let port = (std::process::id() | 1 << 20).to_string();
    let (uri, vsock) = (format!("nbd+vsock://1:{port}"), format!("--vsock={port}"));
    let server =
        Nbdblk::unix(&dir, &["memory=1M", &vsock, "b:memory=2M", "--allow=b:cid=1", "--allow=b:uid=4000000000"]);
    assert!(server.log().contains(&format!("\n{uri}\n")), "{}", server.log());
    if fs::exists("/sys/module/vsock_loopback").unwrap() {
        check_size(&uri);
        assert_eq!(tool("nbdinfo").args(["--size", &format!("{uri}/b")]).ok().out.trim(), "2097152");
        assert!(!tool("nbdinfo").args(["--size", &server.uri_of("b")]).run().status.success());
    }
    let output = nbdblk().args(["serve", "memory=1M", "-l", &format!("vsock:{port}")]).run();
    assert!(output.status.code() == Some(1) && output.err.contains(&port), "{output:?}");
    // The port is for vsock: the server does not listen on TCP.
    let port = 20000 + std::process::id() % 10000;
    let server = Nbdblk::unix(&dir, &["memory=1M", "--vsock", "-p", &port.to_string()]);
    assert!(server.log().contains(&format!("\nnbd+vsock://1:{port}\n")), "{}", server.log());
    assert_eq!(server.log().lines().count(), 2, "{}", server.log());
}

#[test]
fn conflicting_options_are_errors_before_the_server_listens() {
    let dir = Dir::new();
    for (args, words) in [
        (&["-s", "-U", "no.sock"][..], &["--single", "--unix"][..]),
        (&["-s", "-p", "0"], &["--single", "--port"]),
        (&["-s", "--run", "true"], &["--single", "--run"]),
        (&["-s", "--print-uri"], &["--single", "--print-uri"]),
        (&["-s", "--listen", "vsock:7"], &["--single", "--listen"]),
        (&["-4", "-6", "-U", "no.sock"], &["--ipv4-only", "--ipv6-only"]),
        (&["-U", "no.sock", "-l", "unix"], &["unix:PATH"]),
        (&["-U", "no.sock", "--ready-fd", "1"], &["--ready-fd", "1"]),
        (&["-U", "no.sock", "--ready-fd", "77"], &["--ready-fd 77", "fd=77"]),
        (&["-U", "no.sock", "-P", "nosuch/pid"], &["nosuch/pid"]),
        (&["-U", "no.sock", "--allow", "uid=root"], &["--allow", "number"]),
        (&["-U", "no.sock", "--allow", "nosuch:uid=0"], &["--allow", "nosuch"]),
        (&["-U", "no.sock", "--connections", "0"], &["--connections"]),
        (&["-U", "no.sock", "--handshake-timeout", "0"], &["--handshake-timeout"]),
    ] {
        let output = nbdblk().args(["serve", "memory=1M"]).args(args).within(dir.path()).run();
        assert_eq!(output.status.code(), Some(1), "{args:?}: {output:?}");
        assert_eq!(output.err.lines().count(), 1, "{args:?}: {output:?}");
        words.iter().for_each(|word| assert!(output.err.contains(word), "{args:?}: no {word} in {}", output.err));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "{args:?} leaves something behind");
    }
}

#[test]
fn one_client_on_standard_input_and_output() {
    // On one socket.
    let script = "h.connect_command([program, 'serve', 'memory=1M', '-s']); h.pwrite(b'x' * 512, 0)
assert h.pread(512, 0) == b'x' * 512; h.shutdown()";
    let script = format!("program = {:?}\n{script}", program());
    tool("nbdsh").args(["-c", &script]).ok();
    // On two pipes, with more data than fits into them.
    let script = "import os
h.connect_command(['sh', '-c', f'cat | {program} serve memory=8M --stdin | cat'])
data = os.urandom(4 << 20); h.pwrite(data, 12345); assert h.pread(len(data), 12345) == data; h.shutdown()";
    let script = format!("program = {:?}\n{script}", program());
    tool("nbdsh").args(["-c", &script]).ok();
    // The server ends with success when the client disconnects: after some options, in the middle of one, at once.
    for words in [&b"\0\0\0\x03IHAVEOPT\0\0\0\x02\0\0\0\0"[..], b"\0\0\0\x03IHAVE", b"", b"no client"] {
        let output = nbdblk().args(["serve", "memory=1M", "--single"]).input(words).run();
        assert!(output.status.success() && output.out.starts_with("NBDMAGIC"), "{words:?}: {output:?}");
        assert_eq!(output.err, "", "{words:?}");
    }
}

#[test]
fn sockets_that_systemd_would_pass() {
    let script = "h.connect_systemd_socket_activation([program, 'serve', 'disk:memory=1M', 'other:memory=2M'])
assert h.get_size() == 1 << 20";
    let script = format!("program = {:?}\n{script}", program());
    tool("nbdsh").args(["-c", &script]).ok();
    let args = ["--size", "--", "[", &program(), "serve", "memory=1M", "]"];
    assert_eq!(tool("nbdinfo").args(args).ok().out.trim(), "1048576");
    // Variables for another process have no effect.
    let dir = Dir::new();
    let serve = |args: &[&str]| nbdblk().args(["serve", "memory=1M"]).args(args).within(dir.path());
    let run = r#"test -z "$LISTEN_FDS$LISTEN_PID$NOTIFY_SOCKET" && nbdinfo --size "$uri""#;
    let inherited = |cmd: Cmd| cmd.env("LISTEN_PID", "1").env("LISTEN_FDS", "1");
    assert_eq!(inherited(serve(&["--run", run])).ok().out.trim(), "1048576");
    // Inherited sockets must be usable, and no other listener can be requested.
    for (shell, words) in [
        ("serve memory=1M", &["LISTEN_FDS", "Bad file descriptor"][..]),
        ("serve memory=1M 3</dev/null", &["LISTEN_FDS", "not a socket"]),
        ("serve memory=1M -U no.sock 3</dev/null", &["--unix", "LISTEN_FDS"]),
        ("serve memory=1M -s 3</dev/null", &["--single", "LISTEN_FDS"]),
    ] {
        let shell = format!("LISTEN_PID=$$ LISTEN_FDS=1 LISTEN_FDNAMES=nbd exec {} {shell}", program());
        let output = tool("sh").args(["-c", &shell]).within(dir.path()).run();
        assert_eq!(output.status.code(), Some(1), "{shell}: {output:?}");
        let said = output.err.to_lowercase().replace("non-socket", "not a socket");
        words.iter().for_each(|word| assert!(said.contains(&word.to_lowercase()), "{shell}: {output:?}"));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "{shell}: something is left behind");
    }
}

#[test]
fn readiness_and_stopping_are_reported() {
    let dir = Dir::new();
    let by_path = UnixDatagram::bind(dir.at("notify")).unwrap();
    let name = format!("nbdblk-notify-{}", std::process::id());
    let by_name = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
    for (manager, variable) in [(by_path, dir.text("notify")), (by_name, format!("@{name}"))] {
        manager.set_read_timeout(Some(deadline())).unwrap();
        let told = || {
            loop {
                let mut text = [0; 200];
                let len = manager.recv(&mut text).unwrap();
                let text = String::from_utf8_lossy(&text[..len]).into_owned();
                if !text.starts_with("FDSTORE") {
                    return text;
                }
            }
        };
        let serve = nbdblk().args(["serve", "memory=1M", "-f", "-U", "nbd.sock", "--pid-file", "pid"]);
        let server = serve.within(dir.path()).env("NOTIFY_SOCKET", variable).spawn(dir.at("log"));
        assert_eq!(told(), "READY=1");
        assert_eq!(fs::read_to_string(dir.at("pid")).unwrap(), format!("{}\n", server.pid()));
        check_size(&format!("nbd+unix://?socket={}", dir.text("nbd.sock")));
        server.signal(Signal::SIGTERM);
        assert_eq!(told(), "STOPPING=1");
        assert!(server.await_end().0.success());
        assert!(!dir.at("pid").exists());
    }
    // The descriptor gets a line and the end of the stream, while the server runs.
    let shell = format!("exec {} serve memory=1M -U fd.sock --ready-fd 9 9>&1 >fd.log 2>&1", program());
    let mut child = Command::new("setpriv")
        .args(["--pdeathsig", "KILL", "--", "sh", "-c", &shell])
        .current_dir(dir.path())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = String::new();
    child.stdout.take().unwrap().read_to_string(&mut said).unwrap();
    assert_eq!(said, "\n");
    check_size(&format!("nbd+unix://?socket={}", dir.text("fd.sock")));
    child.kill().unwrap();
    child.wait().unwrap();
    // A pid file that another process has replaced stays.
    let server = Nbdblk::unix(&dir, &["memory=1M", "-P", "pid"]);
    fs::remove_file(dir.at("pid")).unwrap();
    fs::write(dir.at("pid"), "1\n").unwrap();
    assert!(server.terminate().success());
    assert_eq!(fs::read_to_string(dir.at("pid")).unwrap(), "1\n");
}

#[test]
fn it_ends_with_its_parent() {
    let dir = Dir::new();
    let serve = format!("{} serve memory=1M --exit-with-parent -U nbd.sock", program());
    // The parent is a shell that waits for a line, and then ends. In a separate session, the server does not die with the
    // parent's process group, which the test kills.
    let shell = format!("setsid {serve} & echo $!; read word");
    let mut parent = tool("sh").args(["-c", &shell]).within(dir.path()).spawn(dir.at("log"));
    // The shell and the server write in any order.
    let number = |log: &str| log.lines().find_map(|line| line.parse::<u32>().ok());
    parent.await_that("both have written", |log| log.contains("serving at") && number(log).is_some());
    let pid = number(&parent.log()).unwrap();
    check_size(&format!("nbd+unix://?socket={}", dir.text("nbd.sock")));
    parent.type_line("go");
    assert!(parent.await_end().0.success());
    let proc = format!("/proc/{pid}/stat");
    // The process that adopts orphans may not reap them at once.
    let is_gone = || fs::read_to_string(&proc).map_or(true, |stat| stat.contains(") Z "));
    eventually("the server ends", is_gone);
    assert!(!dir.at("nbd.sock").exists());
    // The parent ends before the server begins.
    let shell = format!("(while kill -0 $$; do sleep 0.01; done; sleep 0.1; exec {serve}) >orphan.log 2>&1 &");
    tool("setsid").args(["-w", "sh", "-c", &shell]).within(dir.path()).ok();
    eventually("the orphan says why it ends", || {
        fs::read_to_string(dir.at("orphan.log")).is_ok_and(|log| log.contains("the parent has already ended"))
    });
    assert!(!dir.at("nbd.sock").exists());
}

#[test]
fn connections_are_counted_and_handshakes_end_in_time() {
    let dir = Dir::new();
    let server = Nbdblk::unix(&dir, &["memory=1M", "--connections", "2", "--handshake-timeout", "500ms"]);
    let mut served = [(); 2].map(|()| Raw::enter(server.address(), Mode::Simple, ""));
    served.iter_mut().for_each(|raw| _ = raw.read(0, 1));
    let nbdblk_tests::Address::Unix(path) = server.address() else { unreachable!("a unix server") };
    let connect = || std::os::unix::net::UnixStream::connect(path).unwrap();
    let mut greeting = [0; 18];
    assert!(connect().read_exact(&mut greeting).is_err(), "the third is rejected");
    drop(served);
    eventually("there is room again", || connect().read_exact(&mut greeting).is_ok());
    // More clients than the default soft limit of descriptors: the server raises it to the hard limit.
    let serve = format!("ulimit -Sn 64; exec {} serve memory=1M -U few.sock", program());
    let mut few = tool("sh").args(["-c", &serve]).within(dir.path()).spawn(dir.at("few.log"));
    few.await_text("serving at");
    let few_address = nbdblk_tests::Address::Unix(dir.at("few.sock"));
    let crowd: Vec<Raw> = (0..100).map(|_| Raw::enter(&few_address, Mode::Simple, "")).collect();
    assert_eq!(crowd.len(), 100);
    // A client that sends data all the time, but never enough.
    let mut loris = connect();
    loris.read_exact(&mut greeting).unwrap();
    let start = std::time::Instant::now();
    let words = [&b"\0\0\0\x03"[..], b"IHAVEOPT\0\0\0\x03\0\0\0\0"].concat();
    for byte in words.iter().cycle().take(4 + 16 * 200) {
        if loris.write_all(&[*byte]).is_err() {
            break;
        }
        std::thread::sleep(Duration::from_millis(10));
        assert!(start.elapsed() < deadline(), "it is never disconnected");
    }
    assert!(loris.write_all(b"x").is_err(), "it was not disconnected");
    check_size(&server.uri());
}

#[test]
fn access_to_a_socket_is_set_before_a_client_can_connect() {
    let dir = Dir::new();
    let stat = |name: &str| {
        let found = fs::metadata(dir.at(name)).unwrap();
        (found.mode() & 0o7777, found.uid(), found.gid())
    };
    let (uid, gid) = (nix::unistd::geteuid().as_raw(), nix::unistd::getegid().as_raw());
    let umask = |script: &str| tool("sh").args(["-c", &format!("umask 077; exec {} {script}", program())]);
    for (mode, expected) in [("0660", 0o660), ("777", 0o777), ("0o600", 0o600), ("0", 0)] {
        let mut server = umask(&format!("serve memory=1M -U a.sock -l unix:b.sock --socket-mode {mode}"))
            .within(dir.path())
            .spawn(dir.at("log"));
        server.await_text("serving at");
        assert_eq!((stat("a.sock"), stat("b.sock")), ((expected, uid, gid), (expected, uid, gid)), "{mode}");
        server.signal(Signal::SIGTERM);
        assert!(server.await_end().0.success());
    }
    // Names and numbers. Only root can change the owner.
    let root = uid == 0;
    let (owner, group) = if root { (1, 2) } else { (uid, gid) };
    let text = format!("unix = \"a.sock\"\nsocket-mode = 0o620\nsocket-owner = {owner}\nsocket-group = {group}\n");
    fs::write(dir.at("f.toml"), text + "[[export]]\ndevice = \"memory=1M\"\n").unwrap();
    let mut server = nbdblk().args(["serve", "--config", "f.toml"]).within(dir.path()).spawn(dir.at("log"));
    server.await_text("serving at");
    assert_eq!(stat("a.sock"), (0o620, owner, group));
    drop(server);
    if root {
        let args = ["serve", "memory=1M", "-U", "c.sock", "--socket-owner", "daemon", "--socket-group=daemon"];
        let mut server = nbdblk().args(args).within(dir.path()).spawn(dir.at("log"));
        server.await_text("serving at");
        assert!(stat("c.sock").1 != uid && stat("c.sock").2 != gid, "{:?}", stat("c.sock"));
    }
    for (args, words) in [
        (&["--socket-mode", "0888"][..], &["--socket-mode", "octal"][..]),
        (&["--socket-mode", "01777"], &["--socket-mode", "0777"]),
        (&["--socket-group", "no such group"], &["--socket-group", "no group of that name"]),
        (&["--socket-owner", "no such user"], &["--socket-owner", "no user of that name"]),
        (&["--socket-owner", "4294967295"], &["--socket-owner"]),
    ] {
        let output = nbdblk().args(["serve", "memory=1M", "-U", "no.sock"]).args(args).within(dir.path()).run();
        assert_eq!((output.status.code(), output.err.lines().count()), (Some(1), 1), "{args:?}: {output:?}");
        words.iter().for_each(|word| assert!(output.err.contains(word), "{args:?}: no {word} in {}", output.err));
        assert!(!dir.at("no.sock").exists(), "{args:?}");
    }
    let output = nbdblk().args(["serve", "memory=1M", "-p", "0", "--socket-mode", "0600"]).run();
    assert!(output.status.code() == Some(1) && output.err.contains("needs a Unix domain socket"), "{output:?}");
}

#[test]
fn hosts_and_paths_work_in_usual_forms_or_the_error_names_the_mistake() {
    let dir = Dir::new();
    let run = |args: &[&str]| {
        let run = ["--run", "nbdinfo --size \"$uri\""];
        nbdblk().args(["serve", "memory=1M"]).args(args).args(run).within(dir.path())
    };
    for args in [
        &["-i", "[::1]", "-p", "0"][..],
        &["-i", "localhost", "-i", "127.0.0.1", "-p", "0"],
        &["-i", "127.0.0.1", "-i", "0.0.0.0", "-p", "0"],
        &["-i", "::1", "-i", "::", "-i", "127.0.0.1", "-p", "0"],
        &["-i", "0.0.0.0", "-i", "::", "-p", "0"],
    ] {
        assert_eq!(run(args).ok().out.trim(), "1048576", "{args:?}");
    }
    // If its path would be too long, a private socket is in another directory.
    let deep = dir.at(&"d".repeat(120));
    fs::create_dir(&deep).unwrap();
    assert_eq!(run(&[]).env("TMPDIR", &deep).ok().out.trim(), "1048576");
    let long = deep.join("nbd.sock");
    let len = long.as_os_str().len().to_string();
    for (args, words) in [
        (&["-i", "127.0.0.1:10811"][..], &["--ip-addr", "use -p", "-p 10811"][..]),
        (&["-i", "[::1]:10811"], &["--ip-addr", "use -p", "-p 10811"]),
        (&["-i", "2001:db8::1", "-p", "0"], &["2001:db8::1", "Cannot assign"]),
        (&["-l", "tcp:::1"], &["--listen", "brackets"]),
        (&["-U", "@"], &["--unix", "@NAME"]),
        (&["-l", "unix:@"], &["--listen", "@NAME"]),
        (&["-U", long.to_str().unwrap()], &[&len, "107"]),
    ] {
        let output = run(args).run();
        assert_eq!((output.status.code(), output.err.lines().count()), (Some(1), 1), "{args:?}: {output:?}");
        words.iter().for_each(|word| assert!(output.err.contains(word), "{args:?}: no {word} in {}", output.err));
    }
    // Clients with another current directory could not use a relative path.
    let output = nbdblk().args(["serve", "memory=1M", "-U", "nbd.sock"]).within(&deep).run();
    assert!(output.status.code() == Some(1) && output.err.contains(&len) && output.err.contains("107"), "{output:?}");
    assert_eq!(fs::read_dir(&deep).unwrap().count(), 0);
}

#[test]
fn inherited_sockets_must_be_valid() {
    let dir = Dir::new();
    for (count, redirect, words) in [
        ("1000000000", "", &["LISTEN_FDS=1000000000"][..]),
        ("-1", "", &["LISTEN_FDS=-1"]),
        ("many", "", &["LISTEN_FDS=many"]),
        ("2", "3</dev/null", &["LISTEN_FDS"]),
        ("7", "", &["LISTEN_FDS", "Bad file descriptor"]),
    ] {
        let shell = format!("LISTEN_PID=$$ LISTEN_FDS={count} exec {} serve memory=1M {redirect}", program());
        let output = tool("sh").args(["-c", &shell]).within(dir.path()).run();
        assert_eq!((output.status.code(), output.err.lines().count()), (Some(1), 1), "{count}: {output:?}");
        words.iter().for_each(|word| assert!(output.err.contains(word), "{count}: {output:?}"));
    }
}
