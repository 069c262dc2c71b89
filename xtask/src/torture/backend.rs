//! [`BackEnd`]: a qemu-storage-daemon with one export over vhost-user.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;

use crate::shell;

use super::process::{Process, bound};
use super::stage::{Export, Kind, Stage};

/// Longest start.
const START: Duration = Duration::from_secs(20);

/// A back end, which may be dead; killed when this is dropped.
#[derive(Debug)]
pub(crate) struct BackEnd {
    pub(crate) export: &'static Export,
    process: Option<Process>,
    args: Vec<String>,
    pid_file: PathBuf,
    log: PathBuf,
}

impl BackEnd {
    pub(crate) fn start(export: &'static Export, stage: &Stage) -> Result<Self> {
        let name = export.name;
        let format = if export.kind == Kind::Qcow2 { "qcow2" } else { "raw" };
        let disk = |prefix: &str, node: &str| {
            let image = stage.image(export);
            format!(
                "{prefix}driver={format},{node}{prefix}discard=unmap,{prefix}file.driver=file,\
                 {prefix}file.locking=off,{prefix}file.discard=unmap,{prefix}file.filename={}",
                image.display()
            )
        };
        let mut args = Vec::new();
        let blockdev = if export.kind == Kind::Throttled {
            args.extend(["--object".into(), "throttle-group,id=limit,x-iops-total=300".into()]);
            format!("driver=throttle,throttle-group=limit,node-name=disk,{}", disk("file.", ""))
        } else {
            disk("", "node-name=disk,")
        };
        let socket = stage.socket(export);
        let options = "writable=on,num-queues=2";
        let served =
            format!("type=vhost-user-blk,id=e,node-name=disk,addr.type=unix,addr.path={},{options}", socket.display());
        args.extend(["--blockdev".into(), blockdev, "--export".into(), served]);
        let (pid_file, log) = (stage.at(&format!("{name}.pid")), stage.at(&format!("{name}.log")));
        let mut back_end = Self { export, process: None, args, pid_file, log };
        back_end.restart()?;
        Ok(back_end)
    }

    /// Starts it again, and waits until it listens.
    pub(crate) fn restart(&mut self) -> Result<()> {
        let _ = fs::remove_file(&self.pid_file);
        let program = shell::find("qemu-storage-daemon").context("qemu-storage-daemon is not installed")?;
        let log = File::options().append(true).create(true).open(&self.log)?;
        let mut command = bound(&program);
        command.args(&self.args).arg("--pidfile").arg(&self.pid_file);
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let process = self.process.insert(Process::start(&mut command)?);
        let start = Instant::now();
        // It writes this file when it listens.
        while !self.pid_file.exists() {
            if let Some(status) = process.ended()? {
                bail!("the back end of {} ended at its start with {status}", self.export.name);
            }
            ensure!(start.elapsed() < START, "the back end of {} does not start", self.export.name);
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    pub(crate) fn is_alive(&self) -> bool {
        self.process.is_some()
    }

    /// The process, for faults that end later.
    pub(crate) fn id(&self) -> Option<u32> {
        self.process.as_ref().map(Process::id)
    }

    pub(crate) fn kill(&mut self) {
        self.process = None;
    }

    pub(crate) fn pause(&self) {
        self.process.iter().for_each(|process| process.signal(Signal::SIGSTOP));
    }

    pub(crate) fn resume(&self) {
        self.process.iter().for_each(|process| process.signal(Signal::SIGCONT));
    }

    /// Makes it serve, after its front end has gone: continues it, or starts it again. Returns whether it had ended on its own:
    /// QEMU 10.0 may abort if its front end disconnects with requests in the ring (`vhost_user_server_inc_in_flight`).
    pub(crate) fn revive(&mut self) -> Result<bool> {
        self.resume();
        let had_ended = match &mut self.process {
            Some(process) => process.ended()?.is_some(),
            None => false,
        };
        if had_ended || self.process.is_none() {
            self.restart()?;
        }
        Ok(had_ended)
    }

    /// Fails if it has ended on its own. Starts it again if QEMU has aborted as [`revive`](Self::revive) says: its front end
    /// disconnects when it does not answer for too long.
    pub(crate) fn check(&mut self) -> Result<()> {
        if let Some(process) = &mut self.process
            && let Some(status) = process.ended()?
        {
            let log = fs::read_to_string(&self.log).unwrap_or_default();
            if log.contains("vhost_user_server_inc_in_flight") {
                return self.restart();
            }
            bail!("the back end of {} ended on its own with {status}: {log}", self.export.name);
        }
        Ok(())
    }
}
