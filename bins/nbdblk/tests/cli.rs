//! The binary from outside, without NBD clients: exit statuses, errors of one line, output, sockets, signals.

use std::{
    fs,
    io::{BufRead, BufReader, Read},
    net::TcpStream,
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::{Pid, mkdtemp},
};
use serde_json::Value;

fn nbdblk(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nbdblk"));
    command.args(args).stdin(Stdio::null());
    command
}

fn output(args: &[&str]) -> Output {
    nbdblk(args).output().expect("nbdblk runs")
}

/// Status 0, nothing on stderr; what it printed.
fn good(args: &[&str]) -> String {
    let Output { status, stdout, stderr } = output(args);
    assert_eq!((status.code(), String::from_utf8_lossy(&stderr).as_ref()), (Some(0), ""), "{args:?}");
    String::from_utf8(stdout).unwrap()
}

fn json(args: &[&str]) -> Value {
    serde_json::from_str(&good(args)).unwrap_or_else(|error| panic!("{args:?}: {error}"))
}

/// Status 1, and one line on stderr that says all of `words`.
fn bad(args: &[&str], words: &[&str]) {
    let Output { status, stdout, stderr } = output(args);
    let stderr = String::from_utf8(stderr).unwrap();
    assert_eq!(status.code(), Some(1), "{args:?}: {stderr}");
    assert!(stdout.is_empty(), "{args:?}");
    assert!(stderr.starts_with("nbdblk: ") && stderr.ends_with('\n'), "{args:?}: {stderr}");
    assert_eq!(stderr.lines().count(), 1, "{args:?}: {stderr}");
    for word in words {
        assert!(stderr.contains(word), "{args:?}: {word} in {stderr}");
    }
}

/// A directory for one test, removed when it has passed.
struct Directory(PathBuf);

impl Directory {
    fn new() -> Self {
        Self(mkdtemp(&std::env::temp_dir().join("nbdblk-cli-XXXXXX")).expect("a directory can be made"))
    }

    fn file(&self, name: &str) -> String {
        self.0.join(name).to_str().expect("the path is UTF-8").into()
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            fs::remove_dir_all(&self.0).expect("the directory can be removed");
        }
    }
}

/// A server that prints its URIs.
struct Server {
    child: Child,
    stdout: BufReader<std::process::ChildStdout>,
}

impl Server {
    /// Starts one, and waits for `lines` URIs or lines of its command.
    fn start(args: &[&str], lines: usize) -> (Self, Vec<String>) {
        let mut child = nbdblk(args).arg("--print-uri").stdout(Stdio::piped()).spawn().expect("nbdblk runs");
        let mut stdout = BufReader::new(child.stdout.take().expect("stdout is a pipe"));
        let uris = (0..lines).map(|_| {
            let mut line = String::new();
            stdout.read_line(&mut line).expect("stdout can be read");
            assert!(line.ends_with('\n'), "{args:?}: a line is missing");
            line.trim_end().to_owned()
        });
        let uris = uris.collect();
        (Self { child, stdout }, uris)
    }

    /// Sends a signal and waits for the end: the status, and how long it took.
    fn stop(mut self, signal: Signal) -> (Option<i32>, Duration) {
        let start = Instant::now();
        kill(Pid::from_raw(self.child.id() as i32), signal).expect("the server runs");
        let status = self.child.wait().expect("the server ends");
        let mut rest = String::new();
        self.stdout.read_to_string(&mut rest).expect("stdout can be read");
        assert_eq!(rest, "");
        (status.code(), start.elapsed())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Ended already unless the test failed.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn help_and_version_are_no_errors() {
    assert!(good(&["--version"]).starts_with("nbdblk "));
    assert!(good(&["-V"]).starts_with("nbdblk "));
    assert!(good(&["--help"]).contains("nbdblk serve io_uring="));
    let help = good(&["serve", "--help"]);
    for word in ["nbdsh", "nbdcopy", "qemu-system", "--run", "$uri", "--memory", "SIGTERM"] {
        assert!(help.contains(word), "{word}");
    }
}

#[test]
fn wrong_usage_is_one_line_and_status_1() {
    bad(&[], &["nbdblk serve"]);
    bad(&["serv"], &["nbdblk: unrecognized subcommand 'serv'; tip: a similar subcommand exists: 'serve'; "]);
    let serve = "nbdblk: serve needs a device, or a file with --config, for example: nbdblk serve io_uring=disk.img; see nbdblk serve --help\n";
    bad(&["serve"], &[serve]);
    bad(&["serve", "--unix", "/tmp/nbd.sock", "-v"], &[serve]);
    bad(&["serve", "memory=1M", "--prot", "1"], &["'--prot'", "'--port'"]);
    bad(&["serve", "memory=1M", "--port", "65536"], &["65536"]);
    bad(&["serve", "memory=1M", "--threads", "0"], &["--threads"]);
    bad(&["serve", "memory=1M", "--memory", "lots"], &["--memory", "64K"]);
    bad(&["serve", "memory=1M", "--memory", "64K"], &["--memory", "at least 1M"]);
    bad(&["info"], &["info needs a device, for example: nbdblk info io_uring=disk.img; see nbdblk info --help"]);
    bad(&["info", "--json"], &["info needs a device"]);
    bad(&["check"], &["check needs a configuration file, for example: nbdblk check /etc/nbdblk/nbdblk.toml"]);
    bad(&["serve", "memory=1M", "--threads"], &["a value is required for '--threads <N>'"]);
}

#[test]
fn a_wrong_word_is_one_line_and_status_1() {
    for command in ["serve", "info"] {
        bad(&[command, "disk.img"], &["unknown driver \"disk.img\"", "io_uring"]);
        bad(&[command, "io_urnig=x"], &["did you mean io_uring?"]);
        bad(&[command, "io_uring"], &["needs a path"]);
        bad(&[command, "memory=lots"], &["size=lots"]);
        bad(&[command, "io_uring=x,diretc=true"], &["did you mean direct?"]);
        bad(&[command, "io_uring=x,direct=yes"], &["direct=yes", "\"true\" or \"false\""]);
        bad(&[command, "io_uring=/nonexistent/disk"], &["/nonexistent/disk"]);
        bad(&[command, "vhost-user=/nonexistent/socket"], &["/nonexistent/socket"]);
    }
    bad(&["drivers", "io_urin"], &["did you mean io_uring?"]);
}

#[test]
fn names_of_exports_are_unique() {
    bad(&["serve", "memory=1M", "memory=1M"], &["memory=1M needs a name, NAME:memory=1M"]);
    bad(&["serve", "a:memory=1M", "memory=2M"], &["memory=2M needs a name"]);
    bad(&["serve", "a:memory=1M", "b:memory=1M", "a:null=1M"], &["two exports with the name \"a\""]);
    bad(&["serve", &format!("{}:memory=1M", "x".repeat(4097))], &["4096", "4097"]);
}

#[test]
fn the_drivers_are_listed() {
    let list = good(&["drivers"]);
    let all = json(&["drivers", "--json"]);
    for driver in all.as_array().expect("a list") {
        let name = driver["name"].as_str().expect("a name");
        assert!(list.contains(&format!("\n{name}=")) || list.starts_with(&format!("{name}=")), "{name} in {list}");
        assert_eq!(json(&["drivers", name, "--json"]), *driver);
        let text = good(&["drivers", name]);
        for property in driver["properties"].as_array().expect("properties") {
            let name = property["name"].as_str().expect("a name");
            assert!(text.contains(&format!("\n    {name} (")), "{name} in {text}");
        }
    }
    let vhost_user = json(&["drivers", "virtio-blk-vhost-user", "--json"]);
    let properties = vhost_user["properties"].as_array().expect("properties");
    let queue_size = properties.iter().find(|property| property["name"] == "queue-size").expect("queue-size");
    assert_eq!(
        (&queue_size["type"], &queue_size["default"], &queue_size["access"]),
        (&"i32".into(), &"256".into(), &"connected".into())
    );
}

#[test]
fn info_tells_what_a_file_is() {
    let directory = Directory::new();
    let path = directory.file("a,b:c.img");
    fs::File::create(&path).and_then(|file| file.set_len(3 << 20)).expect("a file can be made");
    let spec = format!("io_uring={}", path.replace(',', ",,"));
    let text = good(&["info", &spec]);
    assert!(text.contains("size        3145728 bytes, 3 MiB\n"), "{text}");
    assert!(text.contains(&format!("    path = {path}\n")), "{text}");
    let info = json(&["info", "--json", &spec]);
    assert_eq!(info["size"], 3 << 20);
    assert_eq!(info["caps"]["read_only"], false);
    assert_eq!(info["properties"]["capacity"], 3 << 20);
    assert_eq!(info["properties"]["num-entries"], 128);
    assert_eq!(info["properties"]["read-only"], false);
    let info = json(&["info", "--json", "-r", &spec]);
    assert_eq!(info["caps"]["read_only"], true);
    assert_eq!(info["properties"]["read-only"], true);
}

#[test]
fn a_reader_that_leaves_is_no_error() {
    let mut child = nbdblk(&["drivers"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("nbdblk runs");
    drop(child.stdout.take());
    let Output { status, stderr, .. } = child.wait_with_output().expect("nbdblk ends");
    assert_eq!((status.code(), stderr.as_slice()), (Some(0), b"".as_slice()));
}

#[test]
fn the_uri_is_printed_when_the_socket_listens_and_a_signal_is_a_clean_end() {
    let directory = Directory::new();
    let socket = directory.file("s p.sock");
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGQUIT] {
        let (server, uris) = Server::start(&["serve", "a:memory=1M", "b/c:null=1G", "-U", &socket], 2);
        let query = format!("?socket={}", socket.replace(' ', "%20"));
        assert_eq!(uris, [format!("nbd+unix:///a{query}"), format!("nbd+unix:///b/c{query}")]);
        UnixStream::connect(&socket).expect("the socket listens");
        let (status, time) = server.stop(signal);
        assert_eq!(status, Some(0), "{signal}");
        assert!(time < Duration::from_secs(5), "{signal}: {time:?}");
        assert!(!Path::new(&socket).exists(), "the socket is removed");
    }
}

#[test]
fn port_0_is_a_free_port_on_both_loopback_addresses() {
    let (server, uris) = Server::start(&["serve", "memory=1M", "-p", "0"], 1);
    let port: u16 = uris[0].strip_prefix("nbd://localhost:").and_then(|port| port.parse().ok()).expect(&uris[0]);
    TcpStream::connect(("127.0.0.1", port)).expect("it listens on 127.0.0.1");
    if std::net::TcpListener::bind("[::1]:0").is_ok() {
        TcpStream::connect(("::1", port)).expect("it listens on ::1");
    }
    let taken = port.to_string();
    bad(&["serve", "memory=1M", "-p", &taken], &["listening on localhost", &taken]);
    bad(&["serve", "memory=1M", "-p", &taken, "-i", "127.0.0.1"], &["listening on 127.0.0.1", &taken]);
    assert_eq!(server.stop(Signal::SIGTERM).0, Some(0));
}

#[test]
fn only_a_dead_socket_is_replaced() {
    let directory = Directory::new();
    let socket = directory.file("socket");

    fs::write(&socket, "precious").expect("a file can be written");
    bad(&["serve", "memory=1M", "-U", &socket], &[&socket, "not a socket"]);
    assert_eq!(fs::read_to_string(&socket).expect("it is still there"), "precious");
    fs::remove_file(&socket).expect("it can be removed");

    let (server, _) = Server::start(&["serve", "memory=1M", "-U", &socket], 1);
    bad(&["serve", "memory=1M", "-U", &socket], &[&socket, "another server"]);
    assert_eq!(server.stop(Signal::SIGKILL).0, None);
    assert!(Path::new(&socket).exists(), "nobody has removed it");

    let (server, _) = Server::start(&["serve", "memory=1M", "-U", &socket], 1);
    UnixStream::connect(&socket).expect("the socket listens");
    // Whoever takes the place of our socket keeps it.
    fs::remove_file(&socket).expect("it can be removed");
    let listener = UnixListener::bind(&socket).expect("a socket can be bound");
    assert_eq!(server.stop(Signal::SIGTERM).0, Some(0));
    UnixStream::connect(&socket).expect("the other socket is still there");
    drop(listener);
    bad(&["serve", "memory=1M", "-U", "/nonexistent/socket"], &["listening on /nonexistent/socket"]);
}

#[test]
fn nothing_listens_before_the_devices_are_open() {
    let directory = Directory::new();
    let socket = directory.file("socket");
    bad(&["serve", "memory=1M", "b:io_uring=/nonexistent/disk", "-U", &socket], &["/nonexistent/disk"]);
    assert!(!Path::new(&socket).exists());
}

#[test]
fn a_wrong_file_is_one_line_with_its_place_and_nothing_listens() {
    let directory = Directory::new();
    let (file, socket) = (directory.file("nbdblk.toml"), directory.file("socket"));
    let refuse = |text: &str, place: &str, words: &[&str]| {
        fs::write(&file, text).expect("a file can be written");
        let place = format!("nbdblk: {file}:{place}: ");
        bad(&["serve", "--config", &file, "-U", &socket], &[&[place.as_str()], words].concat());
        assert!(!Path::new(&socket).exists());
    };
    let export = "[[export]]\ndevice = \"memory=1M\"\n";
    refuse(&format!("prot = 1\n{export}"), "1:1", &["unknown setting", "port", "(in \"prot = 1\")"]);
    refuse(&format!("port = 1x\n{export}"), "1:8", &["(in \"port = 1x\")"]);
    refuse(
        &format!("{export}[[export]]\nname = \"b\"\ndevice = \"io_uring=/nonexistent/disk\""),
        "5:10",
        &["/nonexistent/disk"],
    );
    refuse(
        &format!("unix = \"/nonexistent\"\n{export}"),
        "1:1",
        &["unix is given on the command line as well, with --unix"],
    );
    refuse(&format!("ipv4-only = true\nipv6-only = true\n{export}"), "1:1", &["cannot be used with"]);
    // Errors that only the options together have name the settings as the file does.
    refuse(&format!("tls-only = \"x\"\n{export}"), "1:1", &[": tls-only: there is no export with the name \"x\""]);
    refuse(&format!("allow = \"x:uid=0\"\n{export}"), "1:1", &[": allow: there is no export with the name \"x\""]);
    let verify = format!("threads = 1\ntls-verify-peer = true\n{export}");
    refuse(&verify, "2:1", &[": tls-verify-peer needs TLS: tls on, or tls require (in"]);
    fs::write(&file, format!("threads = 1\nsocket-mode = \"0600\"\n{export}")).expect("a file can be written");
    bad(&["serve", "--config", &file, "-p", "0"], &[&format!("{file}:2:1: socket-mode needs a Unix domain socket")]);
    bad(&["serve", "--config", "/nonexistent/file"], &["reading /nonexistent/file"]);
    bad(&["serve", "--config", &file, "memory=1M"], &["cannot be used with"]);
    bad(&["reload", "--control", "/nonexistent/socket"], &["cannot reach the server at /nonexistent/socket"]);
    fs::write(&file, export).expect("a file can be written");
    bad(&["reload", &file], &["names no control socket", "and no service", "runs; use --control"]);
    let misplaced = format!("{export}metrics = \"tcp:9810\"\n");
    refuse(&misplaced, "3:1", &["it is a setting of the server, so write it before the first [[export]]"]);
}

#[test]
fn the_command_of_run_knows_the_server_and_gives_the_status() {
    let run = |args: &[&str], command: &str| {
        let args = [&["serve", "x y:memory=1M"], args, &["--run", command]].concat();
        let Output { status, stdout, stderr } = output(&args);
        (status.code(), String::from_utf8(stdout).unwrap(), String::from_utf8(stderr).unwrap())
    };
    let (status, stdout, stderr) =
        run(&[], r#"test -S "$unixsocket" && echo "$uri|$nbd|$port|$exportname|$unixsocket"; exit 7"#);
    assert_eq!((status, stderr.as_str()), (Some(7), ""), "{stdout}");
    let fields: Vec<&str> = stdout.trim_end().split('|').collect();
    let [uri, nbd, "", "x y", socket] = fields[..] else { panic!("{fields:?}") };
    assert_eq!((uri, nbd), (format!("nbd+unix:///x%20y?socket={socket}").as_str(), uri));
    assert!(!Path::new(socket).exists() && !Path::new(socket).parent().unwrap().exists(), "{socket} is removed");

    let (status, stdout, _) = run(&["-p", "0"], r#"echo "$uri $port/$unixsocket""#);
    let (uri, port) = stdout.trim_end().split_once(' ').expect(&stdout);
    assert_eq!((status, uri), (Some(0), format!("nbd://localhost:{port}x%20y").as_str()));

    let (status, _, stderr) = run(&[], "kill -9 $$");
    assert_eq!(status, Some(128 + 9));
    assert!(stderr.contains("SIGKILL"), "{stderr}");
}

#[test]
fn the_command_of_run_gets_its_own_signals() {
    // SIGINT is the command's business; SIGTERM is passed on to it, and not blocked or ignored there.
    let (server, _) =
        Server::start(&["serve", "memory=1M", "--run", "trap 'exit 5' TERM; echo; while :; do sleep 0.05; done"], 2);
    kill(Pid::from_raw(server.child.id() as i32), Signal::SIGINT).expect("the server runs");
    assert_eq!(server.stop(Signal::SIGTERM).0, Some(5));
    let Output { status, .. } = output(&["serve", "memory=1M", "--run", "kill -PIPE $$; exit 0"]);
    assert_eq!(status.code(), Some(128 + Signal::SIGPIPE as i32));
}

#[test]
fn a_second_signal_ends_it_at_once() {
    let (server, _) = Server::start(&["serve", "memory=1M", "--run", "trap '' TERM; echo; exec sleep 3"], 2);
    kill(Pid::from_raw(server.child.id() as i32), Signal::SIGTERM).expect("the server runs");
    // Standard signals do not queue: the first has to be read before the second is sent.
    let start = Instant::now();
    let mut server = server;
    while server.child.try_wait().expect("the server can be asked").is_none() {
        let _ = kill(Pid::from_raw(server.child.id() as i32), Signal::SIGTERM);
        std::thread::yield_now();
    }
    assert!(start.elapsed() < Duration::from_secs(2));
    assert_eq!(server.child.wait().expect("it has ended").code(), Some(128 + Signal::SIGTERM as i32));
}

#[test]
fn verbose_tells_what_is_opened() {
    let Output { status, stderr, .. } = output(&["serve", "-v", "memory=1M", "--run", "exit 0"]);
    let stderr = String::from_utf8(stderr).unwrap();
    assert_eq!(status.code(), Some(0), "{stderr}");
    assert!(stderr.lines().all(|line| line.starts_with("nbdblk: ")), "{stderr}");
    assert!(stderr.contains("nbdblk: export \"\": capacity = 1048576\n"), "{stderr}");
}
