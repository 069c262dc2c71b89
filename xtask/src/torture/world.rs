//! [`World`]: all that takes part in a run. What is dropped first stands first.

use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use super::backend::BackEnd;
use super::clock::{Millis, now};
use super::crew::Crew;
use super::judge::{Errors, Judge, Scope};
use super::noise::Noise;
use super::server::{STOP, Server, Use};
use super::stage::{Kind, Stage};

/// SIGINT or SIGTERM has come.
pub(crate) static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Longest time until descriptors and memory are back after the last client: idle memory is returned within some seconds.
const RETURN: Millis = 15_000;
/// Memory that may be in use without a leak: the content of the export in memory (8 MiB), and what the allocator keeps: for each of
/// a dozen threads, up to twice the longest vector that it has freed (256 KiB of input, for a client that waits for memory).
const SLACK: u64 = 14 << 20;
/// Interval of progress lines.
const PROGRESS: Millis = 5_000;

/// A run.
#[derive(Debug)]
pub(crate) struct World {
    pub(crate) crew: Crew,
    pub(crate) server: Server,
    pub(crate) back_ends: Vec<BackEnd>,
    pub(crate) noise: Noise,
    pub(crate) stage: Stage,
    pub(crate) judge: Judge,
    /// Exports of the configuration in addition to those of the stage.
    pub(crate) more: String,
    pub(crate) faults: usize,
    /// What has happened, for a failure.
    pub(crate) events: Vec<String>,
    program: PathBuf,
    servers: usize,
    begin: Millis,
    next_line: Millis,
    /// What a server uses before its first client.
    unused: Use,
}

impl World {
    /// Starts everything but the clients.
    pub(crate) fn start(program: PathBuf, stage: Stage, seed: u64) -> Result<Self> {
        let noise = Noise::watch(stage.path())?;
        let exports = stage.exports().filter(|export| export.kind.has_back_end());
        let back_ends = exports.map(|export| BackEnd::start(export, &stage)).collect::<Result<Vec<_>>>()?;
        let server = Server::start(&program, &stage, 0)?;
        let crew = Crew::new(stage.jobs(seed));
        let begin = now();
        let mut world = Self {
            crew,
            server,
            back_ends,
            noise,
            stage,
            judge: Judge::default(),
            more: String::new(),
            faults: 0,
            events: Vec::new(),
            program,
            servers: 1,
            begin,
            next_line: begin + PROGRESS,
            unused: Use { descriptors: 0, memory: 0 },
        };
        // Threads of the start may still end.
        std::thread::sleep(Duration::from_millis(500));
        world.unused = world.server.usage()?;
        Ok(world)
    }

    /// Time since the begin.
    pub(crate) fn elapsed(&self) -> Millis {
        now() - self.begin
    }

    pub(crate) fn note(&mut self, what: &str) {
        self.events.push(format!("{:8} ms: {what}", self.elapsed()));
    }

    /// Takes reports, looks after all processes, and prints a line of progress now and then.
    pub(crate) fn pump(&mut self) -> Result<()> {
        if INTERRUPTED.load(Ordering::Relaxed) {
            bail!("interrupted");
        }
        self.crew.listen(&mut self.judge, &self.noise)?;
        self.server.check()?;
        self.back_ends.iter_mut().try_for_each(BackEnd::check)?;
        if now() >= self.next_line {
            self.next_line = now() + PROGRESS;
            println!("  {}", self.summary());
        }
        Ok(())
    }

    /// How slow the machine was in the last minutes.
    pub(crate) fn machine(&self) -> String {
        self.noise.describe((self.begin.max(now().saturating_sub(300_000)), now()))
    }

    pub(crate) fn summary(&self) -> String {
        format!(
            "{:3} s: {} faults, {} requests acknowledged, {} blocks compared, longest unexplained wait {} ms ({})",
            self.elapsed() / 1000,
            self.faults,
            self.crew.acknowledged,
            self.crew.compared,
            self.judge.longest.0,
            self.judge.longest.1
        )
    }

    /// SIGTERM or SIGKILL of the server, and a new one.
    pub(crate) fn restart(&mut self, in_good_order: bool) -> Result<()> {
        let window = self.judge.open(Scope::All, Errors::Any, now());
        if in_good_order {
            self.stop()?;
        } else {
            self.server.crash()?;
        }
        self.server.check_log()?;
        self.revive()?;
        // The content of the export in memory is gone, and its clients cannot know that.
        let is_volatile = |n: &usize| self.crew.members[*n].export.kind == Kind::Memory;
        let volatile: Vec<usize> = (0..self.crew.members.len()).filter(is_volatile).collect();
        for n in &volatile {
            self.crew.kill(*n, &mut self.judge, &self.noise)?;
            let journal = self.stage.at(&format!("journal-{}", self.crew.members[*n].job.region));
            fs::remove_file(journal).context("removing a journal")?;
        }
        self.server = self.start_server()?;
        volatile.iter().try_for_each(|n| self.crew.replace(*n))?;
        self.judge.close(window, now());
        Ok(())
    }

    /// Makes all back ends serve. Returns whether one had ended on its own.
    fn revive(&mut self) -> Result<bool> {
        let mut any = false;
        for n in 0..self.back_ends.len() {
            if self.back_ends[n].revive()? {
                any = true;
                let text = format!("the back end of {} ended after its front end", self.back_ends[n].export.name);
                println!("  {text}; it was started again");
                self.note(&text);
            }
        }
        Ok(any)
    }

    /// A server starts only with all of its back ends. One of them may end while it starts: then once more.
    fn start_server(&mut self) -> Result<Server> {
        loop {
            let started = Server::start(&self.program, &self.stage, self.servers);
            self.servers += 1;
            match started {
                Err(error) if !self.revive()? => return Err(error),
                Err(_) => {}
                Ok(server) => return Ok(server),
            }
        }
    }

    /// SIGTERM, and the end of the server in good time.
    pub(crate) fn stop(&mut self) -> Result<()> {
        let start = now();
        let took = self.server.stop()?;
        let lost = Duration::from_millis(self.noise.within((start, now())));
        self.note(&format!("the server ended {} ms after SIGTERM", took.as_millis()));
        ensure!(took <= STOP + lost, "the server ended only {took:?} after SIGTERM; the machine lost {lost:?}");
        Ok(())
    }

    /// All clients compare everything once more and leave. Then the server must use no more than before.
    pub(crate) fn calm(&mut self) -> Result<()> {
        let each = || {
            ensure!(!INTERRUPTED.load(Ordering::Relaxed), "interrupted");
            self.back_ends.iter_mut().try_for_each(BackEnd::check)
        };
        self.crew.finish(&mut self.judge, &self.noise, each)?;
        self.server.check_log()?;
        let (start, before) = (now(), self.unused);
        loop {
            self.pump()?;
            let Use { descriptors, memory } = self.server.usage()?;
            // After a hang, a back end may still access memory. The server keeps its pidfd until the process ends.
            if descriptors <= before.descriptors + self.back_ends.len() && memory <= before.memory + SLACK {
                self.note(&format!("without clients: {descriptors} descriptors, {} KiB", memory >> 10));
                return Ok(());
            }
            if now() - start > RETURN + self.noise.within((start, now())) {
                bail!(
                    "{RETURN} ms after the last client, the server has {descriptors} descriptors (before the first: {}) \
                     and {} KiB of memory (before: {}, and {} for the export in memory); open are:\n{}",
                    before.descriptors,
                    memory >> 10,
                    before.memory >> 10,
                    SLACK >> 10,
                    self.server.open_files()
                );
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}
