//! nbdblk, started for a test and killed after it.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::sync::OnceLock;
use std::time::Duration;

use nix::sys::signal::Signal;

use crate::{Cmd, Daemon, Dir, cargo};

/// The program under test: `$NBDBLK_BIN`, or the release binary, which is built once.
pub fn nbdblk() -> Cmd {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    Cmd::new(PATH.get_or_init(|| match std::env::var_os("NBDBLK_BIN") {
        Some(path) => path.into(),
        None => build(),
    }))
}

fn build() -> PathBuf {
    let output = cargo()
        .args(["build", "--release", "-p", "nbdblk", "--features=tls-psk", "--message-format=json-render-diagnostics"])
        .output()
        .expect("cargo runs the tests, so it is there");
    assert!(output.status.success(), "building nbdblk failed:\n{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .filter_map(|message| message["executable"].as_str().map(PathBuf::from))
        .next_back()
        .expect("cargo names the executable it built")
}

/// The address of a server.
#[derive(Debug, Clone)]
pub enum Address {
    /// A unix socket.
    Unix(PathBuf),
    /// A TCP port.
    Tcp(SocketAddr),
}

/// A running `nbdblk serve`; killed when dropped.
#[derive(Debug)]
pub struct Nbdblk {
    daemon: Daemon,
    address: Address,
    printed: String,
}

impl Nbdblk {
    /// Serves on a unix socket in `dir`, which is also its current directory. `args` are exports and options.
    pub fn unix(dir: &Dir, args: &[&str]) -> Self {
        let socket = (0..).map(|n| dir.at(&format!("nbd{n}.sock"))).find(|path| !path.exists()).expect("numbers go on");
        let path = socket.to_str().expect("temporary directories have plain names").to_owned();
        let daemon = Self::start(dir, &[args, &["--unix", &path]].concat());
        assert!(socket.exists(), "the URI is printed before the socket is there");
        let printed = first_uri(&daemon.log());
        Self { daemon, address: Address::Unix(socket), printed }
    }

    /// Serves on a TCP port that the kernel chooses.
    pub fn tcp(dir: &Dir, args: &[&str]) -> Self {
        let daemon = Self::start(dir, &[args, &["--port", "0"]].concat());
        let printed = first_uri(&daemon.log());
        let port = printed.rsplit(':').next().and_then(|rest| rest.split(['/', '?']).next()?.parse().ok());
        let port: u16 = port.unwrap_or_else(|| panic!("no port in the printed URI {printed:?}"));
        Self { daemon, address: Address::Tcp(([127, 0, 0, 1], port).into()), printed }
    }

    fn start(dir: &Dir, args: &[&str]) -> Daemon {
        let log = (0..).map(|n| dir.at(&format!("nbdblk{n}.log"))).find(|path| !path.exists()).expect("numbers go on");
        let mut daemon = nbdblk().args(["serve", "--print-uri"]).args(args).within(dir.path()).spawn(log);
        daemon.await_that("it prints its URI", |log| find_uri(log).is_some());
        daemon
    }

    /// The address of the server.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// The first URI that the server printed.
    pub fn printed_uri(&self) -> &str {
        &self.printed
    }

    /// The URI of the default export.
    pub fn uri(&self) -> String {
        self.uri_of("")
    }

    /// The URI of an export.
    pub fn uri_of(&self, name: &str) -> String {
        match &self.address {
            Address::Unix(path) => format!("nbd+unix:///{name}?socket={}", path.display()),
            Address::Tcp(address) => format!("nbd://{address}/{name}"),
        }
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.daemon.pid()
    }

    /// Its output so far.
    pub fn log(&self) -> String {
        self.daemon.log()
    }

    /// Waits until its log contains `text`. Log lines may come shortly after a reply.
    ///
    /// # Panics
    /// If it does not appear within the deadline.
    pub fn await_log(&self, text: &str) {
        crate::eventually(&format!("{text:?} in the log"), || self.log().contains(text));
    }

    /// Whether it is still running.
    pub fn is_alive(&mut self) -> bool {
        self.daemon.is_alive()
    }

    /// Open file descriptors of the process.
    pub fn fds(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.pid())).expect("the server runs").count()
    }

    /// Resident memory of the process, in bytes.
    pub fn resident(&self) -> u64 {
        self.memory("VmRSS:")
    }

    /// Resident memory of the process in bytes, without the memory shared with devices (payload).
    pub fn resident_private(&self) -> u64 {
        self.memory("RssAnon:")
    }

    /// CPU time of its threads so far.
    pub fn cpu_time(&self) -> Duration {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid())).expect("the server runs");
        let (_, fields) = stat.rsplit_once(')').expect("the name is in brackets");
        // Fields 14 and 15, counted from the third, in hundredths of a second.
        let ticks = fields.split_whitespace().skip(11).take(2).map(|field| field.parse::<u64>().expect("a number"));
        Duration::from_millis(10 * ticks.sum::<u64>())
    }

    fn memory(&self, key: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).expect("the server runs");
        let line = status.lines().find_map(|line| line.strip_prefix(key)).expect("a live process has memory");
        line.trim().trim_end_matches(" kB").parse::<u64>().expect("it is a number") * 1024
    }

    /// Sends SIGTERM and waits for its end.
    ///
    /// # Panics
    /// If it does not end within the deadline.
    pub fn terminate(self) -> ExitStatus {
        self.daemon.signal(Signal::SIGTERM);
        let (status, log) = self.daemon.await_end();
        assert!(!log.contains("panicked"), "the server panicked:\n{log}");
        if !status.success() {
            eprintln!("the server ended with {status}:\n{log}");
        }
        status
    }
}

fn first_uri(log: &str) -> String {
    find_uri(log).expect("start waited for the URI").into()
}

/// The first URI in the server's output.
fn find_uri(log: &str) -> Option<&str> {
    // Only whole lines count.
    let (whole, _) = log.rsplit_once('\n')?;
    let schemes = ["nbd:", "nbd+unix:", "nbds:", "nbds+unix:"];
    whole.lines().find(|line| schemes.iter().any(|scheme| line.starts_with(scheme)))
}
