//! [`Crew`]: the verifying clients, their processes and what they report.

use std::io::{BufRead, BufReader};
use std::process::{ChildStdin, Command, Stdio};
use std::sync::mpsc::{self, Receiver, TryRecvError};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use nix::sys::signal::Signal;

use super::clock::{Millis, now};
use super::judge::{Client, Judge};
use super::noise::Noise;
use super::process::Process;
use super::report::{Job, Report};
use super::stage::{Export, Kind};

/// Time without a sign of life after which a client hangs.
const SILENCE: Millis = 15_000;
/// Longest time for the last comparison.
const FINISH: Millis = 60_000;

/// This program. The path stays valid when the file is replaced.
const SELF: &str = "/proc/self/exe";

/// Starts a part of this program as a process.
pub(crate) fn start(task: &str, work: &str) -> Result<Process> {
    let mut command = Command::new(SELF);
    Process::start(command.args([task, work]).stdin(Stdio::piped()).stdout(Stdio::piped()))
}

/// A verifying client: its region, and the process that works on it now.
#[derive(Debug)]
pub(crate) struct Member {
    pub(crate) export: &'static Export,
    pub(crate) job: Job,
    process: Option<Process>,
    /// Its end asks the client to finish.
    stdin: Option<ChildStdin>,
    reports: Receiver<Report>,
    heard: Millis,
    is_paused: bool,
    is_done: bool,
}

/// All verifying clients, and what they have done so far.
#[derive(Debug)]
pub(crate) struct Crew {
    pub(crate) members: Vec<Member>,
    pub(crate) compared: u64,
    pub(crate) acknowledged: u64,
}

impl Member {
    fn client(&self) -> Client<'static> {
        let is_slow = self.export.kind == Kind::Throttled;
        Client { export: self.export.name, region: self.job.region, is_slow }
    }

    fn spawn(&mut self) -> Result<()> {
        let mut process = start("torture-client", &serde_json::to_string(&self.job)?)?;
        let stdout = process.0.stdout.take().context("the output of a client is a pipe")?;
        self.stdin = process.0.stdin.take();
        let (sender, reports) = mpsc::channel();
        std::thread::spawn(move || {
            // The last line of a killed client may be cut off.
            let lines = BufReader::new(stdout).lines().map_while(Result::ok);
            for report in lines.filter_map(|line| serde_json::from_str(&line).ok()) {
                if sender.send(report).is_err() {
                    return;
                }
            }
        });
        (self.reports, self.process) = (reports, Some(process));
        (self.heard, self.is_paused, self.is_done) = (now(), false, false);
        Ok(())
    }
}

impl Crew {
    pub(crate) fn new(jobs: Vec<(&'static Export, Job)>) -> Self {
        let member = |(export, job)| Member {
            export,
            job,
            process: None,
            stdin: None,
            reports: mpsc::channel().1,
            heard: 0,
            is_paused: false,
            is_done: false,
        };
        Self { members: jobs.into_iter().map(member).collect(), compared: 0, acknowledged: 0 }
    }

    /// Starts all clients.
    pub(crate) fn start(&mut self) -> Result<()> {
        self.members.iter_mut().try_for_each(Member::spawn)
    }

    /// Takes the reports so far.
    ///
    /// # Errors
    /// A client has lost data, has waited too long, got an error that no fault explains, or hangs.
    pub(crate) fn listen(&mut self, judge: &mut Judge, noise: &Noise) -> Result<()> {
        for n in 0..self.members.len() {
            loop {
                match self.members[n].reports.try_recv() {
                    Ok(report) => self.take(n, report, judge, noise)?,
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => {
                        let member = &self.members[n];
                        let is_over = member.is_done || member.process.is_none();
                        ensure!(is_over, "{}: the process ended on its own", name(member));
                        break;
                    }
                }
            }
            let member = &self.members[n];
            let silence = now() - member.heard;
            if member.process.is_some() && !member.is_paused && !member.is_done && silence > SILENCE {
                let lost = noise.within((member.heard, now()));
                ensure!(silence < SILENCE + lost, "{}: no sign of life for {silence} ms", name(member));
            }
        }
        Ok(())
    }

    fn take(&mut self, n: usize, report: Report, judge: &mut Judge, noise: &Noise) -> Result<()> {
        let member = &mut self.members[n];
        member.heard = now();
        let client = member.client();
        let lost = |from, until| noise.within((from, until));
        let verdict = match report {
            Report::Tick { compared, acknowledged, longest, oldest } => {
                self.compared += compared;
                self.acknowledged += acknowledged;
                let mut waits = longest.into_iter().chain(oldest);
                waits.try_for_each(|wait| judge.wait(client, &wait, lost(wait.from, wait.until)))
            }
            Report::Slow(wait) => judge.wait(client, &wait, lost(wait.from, wait.until)),
            Report::Failed { wait, error, no_space } => {
                let lost = lost(wait.from, wait.until);
                let error = judge.error(client, &wait, &error, no_space, lost);
                error.and_then(|()| judge.wait(client, &wait, lost))
            }
            Report::Wrong(what) => Err(what),
            Report::Done => {
                member.is_done = true;
                Ok(())
            }
        };
        verdict.map_err(|what| anyhow!("{}: {what}", name(&self.members[n])))
    }

    /// Kills a client, and takes its last reports.
    pub(crate) fn kill(&mut self, n: usize, judge: &mut Judge, noise: &Noise) -> Result<()> {
        let Some(process) = self.members[n].process.take() else { return Ok(()) };
        process.signal(Signal::SIGKILL);
        drop(process);
        self.members[n].stdin = None;
        while let Ok(report) = self.members[n].reports.recv_timeout(Duration::from_secs(1)) {
            self.take(n, report, judge, noise)?;
        }
        Ok(())
    }

    /// Starts a client for the region of one that was killed.
    pub(crate) fn replace(&mut self, n: usize) -> Result<()> {
        self.members[n].spawn()
    }

    /// Stops a client with SIGSTOP. `None`: it is stopped already. The process of a region changes only by `kill`.
    pub(crate) fn pause(&mut self, n: usize) -> Option<u32> {
        let member = &mut self.members[n];
        let process = member.process.as_ref().filter(|_| !member.is_paused)?;
        process.signal(Signal::SIGSTOP);
        member.is_paused = true;
        Some(process.id())
    }

    /// Undoes `pause`, if it is still the same process.
    pub(crate) fn resume(&mut self, n: usize, id: u32) {
        let member = &mut self.members[n];
        if let Some(process) = member.process.as_ref().filter(|process| process.id() == id) {
            process.signal(Signal::SIGCONT);
            (member.is_paused, member.heard) = (false, now());
        }
    }

    /// Lets all clients compare their whole region once more, on new connections, and end. `each` is called while that goes on.
    pub(crate) fn finish(
        &mut self,
        judge: &mut Judge,
        noise: &Noise,
        mut each: impl FnMut() -> Result<()>,
    ) -> Result<()> {
        let start = now();
        self.members.iter_mut().for_each(|member| member.stdin = None);
        while let Some(member) = self.members.iter().find(|member| !member.is_done) {
            if now() - start > FINISH + noise.within((start, now())) {
                bail!("{}: it has not compared its region within {FINISH} ms", name(member));
            }
            self.listen(judge, noise)?;
            each()?;
            std::thread::sleep(Duration::from_millis(10));
        }
        for member in &mut self.members {
            let status = member.process.as_mut().map(|process| process.end_within(Duration::from_secs(10)));
            let status = status.transpose()?.flatten().with_context(|| format!("{}: it does not end", name(member)))?;
            ensure!(status.success(), "{}: it ended with {status}", name(member));
            member.process = None;
        }
        Ok(())
    }
}

fn name(member: &Member) -> String {
    format!("export {:?}, client of region {}", member.export.name, member.job.region)
}
