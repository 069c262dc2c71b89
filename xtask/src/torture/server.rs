//! [`Server`]: the `nbdblk serve` under torture.

use std::fs::{self, File};
use std::io::{PipeReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::signal::Signal;

use super::place;
use super::process::{Process, bound};
use super::stage::Stage;

/// Payload memory of each worker and export: little, so that it runs out.
const MEMORY: &str = "4M";
/// Longest start.
const START: Duration = Duration::from_secs(20);
/// Longest time from SIGTERM to the end.
pub(crate) const STOP: Duration = Duration::from_secs(5);
/// Longest reload. That of an export whose back end hangs may take as long as its time-outs.
const RELOAD: &str = "20s";
/// Size of the pipe of the log: the smallest that there is.
const PIPE: i32 = 4096;

/// A running server; killed when this is dropped.
#[derive(Debug)]
pub(crate) struct Server {
    program: PathBuf,
    process: Process,
    /// The log is not read.
    pub(crate) is_unread: Arc<AtomicBool>,
    pub(crate) log: PathBuf,
}

/// What the server uses.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Use {
    pub(crate) descriptors: usize,
    /// Bytes that it shares with no device: all but the payload memory of back ends.
    pub(crate) memory: u64,
}

impl Server {
    pub(crate) fn start(program: &Path, stage: &Stage, number: usize) -> Result<Self> {
        let log = stage.at(&format!("server-{number}.log"));
        let (reader, writer) = std::io::pipe()?;
        fcntl(&writer, FcntlArg::F_SETPIPE_SZ(PIPE)).context("the size of a pipe")?;
        let mut command = bound(program);
        command.args(["serve", "-v", "--print-uri", "--threads", "2", "--memory", MEMORY, "--config"]);
        command.arg(stage.at("nbdblk.toml")).arg("--unix").arg(place::socket(stage.path()));
        command.args(["--port", "0", "--ip-addr", "127.0.0.1"]);
        command.stdin(Stdio::null()).stdout(File::create(stage.at("uris"))?).stderr(writer);
        let process = Process::start(&mut command)?;
        drop(command);
        let is_unread = Arc::new(AtomicBool::new(false));
        drain(reader, File::create(&log)?, Arc::clone(&is_unread));
        let mut server = Self { program: program.into(), process, is_unread, log };
        server.await_port(stage)?;
        Ok(server)
    }

    /// Waits for the URIs, and keeps the port for the clients.
    fn await_port(&mut self, stage: &Stage) -> Result<()> {
        let start = Instant::now();
        loop {
            let uris = fs::read_to_string(stage.at("uris"))?;
            let port = uris.lines().find_map(|line| line.strip_prefix("nbd://localhost:"));
            if let Some((port, _)) = port.and_then(|rest| rest.split_once('/')) {
                return fs::write(place::port(stage.path()), port).context("writing the port");
            }
            if let Some(status) = self.process.ended()? {
                bail!("the server ended at its start with {status}: {}", self.last_lines());
            }
            ensure!(start.elapsed() < START, "the server has not started within {} s", START.as_secs());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// The end of the log.
    fn last_lines(&self) -> String {
        // The thread that reads it may be behind.
        std::thread::sleep(Duration::from_millis(200));
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = log.lines().rev().take(3).collect();
        lines.into_iter().rev().collect::<Vec<_>>().join(" / ")
    }

    /// Fails if it has ended, or if a thread of it has panicked.
    pub(crate) fn check(&mut self) -> Result<()> {
        if let Some(status) = self.process.ended()? {
            bail!("the server ended on its own with {status}: {}", self.last_lines());
        }
        Ok(())
    }

    /// Fails if a thread of it has panicked.
    pub(crate) fn check_log(&self) -> Result<()> {
        let log = fs::read(&self.log).context("reading the log")?;
        ensure!(!String::from_utf8_lossy(&log).contains("panicked"), "a thread of the server has panicked");
        Ok(())
    }

    pub(crate) fn usage(&self) -> Result<Use> {
        let proc = PathBuf::from(format!("/proc/{}", self.process.id()));
        let status = fs::read_to_string(proc.join("status")).context("the memory of the server")?;
        let kib =
            status.lines().find_map(|line| line.strip_prefix("RssAnon:")?.split_whitespace().next()?.parse().ok());
        let memory = kib.map(|kib: u64| kib << 10).context("no RssAnon in a status of /proc")?;
        Ok(Use { descriptors: fs::read_dir(proc.join("fd"))?.count(), memory })
    }

    /// The open files of the server, for a failure.
    pub(crate) fn open_files(&self) -> String {
        let entries = fs::read_dir(format!("/proc/{}/fd", self.process.id())).into_iter().flatten().flatten();
        let names = entries.filter_map(|entry| fs::read_link(entry.path()).ok());
        let mut names: Vec<String> = names.map(|name| name.display().to_string()).collect();
        names.sort();
        names.join("\n")
    }

    /// `nbdblk reload`: the changes, or the error.
    pub(crate) fn reload(&self, stage: &Stage) -> Result<Result<String, String>> {
        let mut command = Command::new(&self.program);
        command.args(["reload", "--timeout", RELOAD, "--control"]).arg(stage.at("control.sock"));
        let output = command.stdin(Stdio::null()).output().context("starting nbdblk reload")?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
        Ok(if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) })
    }

    /// SIGTERM. Returns the time to the end, which must be in good order.
    pub(crate) fn stop(&mut self) -> Result<Duration> {
        let start = Instant::now();
        self.process.signal(Signal::SIGTERM);
        // Longer than it may take, so that a failure shows how long it takes.
        let Some(status) = self.process.end_within(12 * STOP)? else {
            bail!("the server has not ended within {} s after SIGTERM", (12 * STOP).as_secs());
        };
        ensure!(status.success(), "the server ended with {status} after SIGTERM: {}", self.last_lines());
        Ok(start.elapsed())
    }

    pub(crate) fn crash(&mut self) -> Result<()> {
        self.process.signal(Signal::SIGKILL);
        self.process.end_within(STOP)?.context("a killed server does not end")?;
        Ok(())
    }
}

/// Copies the log into a file in a thread, except while it is to be unread.
fn drain(mut reader: PipeReader, mut file: File, is_unread: Arc<AtomicBool>) {
    std::thread::spawn(move || {
        let mut part = [0; 4096];
        loop {
            while is_unread.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(20));
            }
            match reader.read(&mut part) {
                Ok(0) | Err(_) => return,
                Ok(len) => drop(file.write_all(&part[..len])),
            }
        }
    });
}
