//! [`Process`]: a program that the torture has started. It dies with the torture, and its signals are its own.

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::shell;

/// A command that dies with the thread that starts it. (This is the main thread.)
pub(crate) fn bound(program: &Path) -> Command {
    let mut command = shell::command("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]).arg(program);
    command
}

/// A program; killed when this is dropped.
#[derive(Debug)]
pub(crate) struct Process(pub(crate) Child);

impl Process {
    /// Starts it in a process group of its own, so that an interrupt from the keyboard does not reach it.
    pub(crate) fn start(command: &mut Command) -> Result<Self> {
        command.process_group(0);
        Ok(Self(command.spawn().with_context(|| format!("starting {}", shell::show(command)))?))
    }

    pub(crate) fn id(&self) -> u32 {
        self.0.id()
    }

    /// Sends a signal. A process that has ended takes none, and that is seen elsewhere.
    pub(crate) fn signal(&self, signal: Signal) {
        let _ = kill(Pid::from_raw(self.id().cast_signed()), signal);
    }

    /// The status of a process that has ended.
    pub(crate) fn ended(&mut self) -> Result<Option<ExitStatus>> {
        self.0.try_wait().context("waiting for a process")
    }

    /// Waits for the end, at most for this time.
    pub(crate) fn end_within(&mut self, limit: Duration) -> Result<Option<ExitStatus>> {
        let start = Instant::now();
        loop {
            let ended = self.ended()?;
            if ended.is_some() || start.elapsed() > limit {
                return Ok(ended);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
