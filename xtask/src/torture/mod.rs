//! `cargo xtask torture`: random combinations of faults on a live server with verifying clients, from a seed.
//!
//! ```text
//!   Plan      which fault when: follows from the seed alone
//!   World     a server (Server), its back ends (BackEnd), its verifying clients (Crew, each a process of its own: client.rs)
//!   faults    begin and end each fault
//!   Journal   what was acknowledged: a file, so that a client that is killed forgets nothing
//!   Judge     which waits and errors the faults explain, with what the machine itself loses (Noise, Others)
//! ```

mod backend;
mod bad_clients;
mod client;
mod clock;
mod crew;
mod faults;
mod journal;
mod judge;

mod noise;
mod others;
mod pattern;
mod place;
mod plan;
mod process;
mod report;
mod rng;
mod server;
mod stage;
mod world;

use std::fs;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{SigSet, Signal};

use crate::{setup, shell};

use clock::{Millis, now};
use faults::Active;
use plan::{Fault, Plan, Planned, ROUND};
use stage::Stage;
use world::{INTERRUPTED, World};

pub(crate) use bad_clients::run as bad_clients;
pub(crate) use client::run as client;

/// Length of a run.
const SECONDS: u64 = 60;
/// Time that a round needs at least.
const ROUND_MIN: Millis = ROUND + 2_000;

const HELP: &str = "\
usage: cargo xtask torture [--seconds N] [--seed S]

Starts a release server with exports over io_uring, vhost-user and in memory, and clients that verify all that was acknowledged.
Meanwhile, it injects random faults: kill -9 and SIGSTOP of clients and back ends, a log that is not read, slow and greedy
clients, reloads, truncated images, a full file system, SIGTERM and kill -9 of the server.

  --seconds N  length of the run (60)
  --seed S     faults of an earlier run; it prints its seed

It fails if acknowledged data is lost, if a healthy client waits more than 2 s longer than its device takes or gets an error, if
memory or descriptors do not come back, or if SIGTERM takes more than 5 s.";

/// Parses the arguments, and runs.
pub(crate) fn run(words: &[&str]) -> Result<()> {
    let (mut seconds, mut seed) = (SECONDS, None);
    let mut words = words.iter();
    while let Some(word) = words.next() {
        let mut number = || -> Result<u64> {
            let value = words.next().with_context(|| format!("{word} needs a number\n\n{HELP}"))?;
            value.parse().with_context(|| format!("{word} {value}: not a number"))
        };
        match *word {
            "--seconds" => seconds = number()?,
            "--seed" => seed = Some(number()?),
            "--help" | "-h" => {
                println!("{HELP}");
                return Ok(());
            }
            _ => bail!("unknown argument {word}\n\n{HELP}"),
        }
    }
    let clock =
        || SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_nanos() as u64 % 1_000_000_000);
    torture(seconds, seed.unwrap_or_else(clock))
}

fn torture(seconds: u64, seed: u64) -> Result<()> {
    setup::run(setup::Extent::Basic)?;
    // As for the tests, another program can be named.
    let program = std::env::var_os("NBDBLK_BIN").map_or_else(shell::build_nbdblk, |path| Ok(path.into()))?;
    watch_signals()?;
    println!("torture: seed {seed}, {seconds} s");
    let stage = Stage::build()?;
    let mut world = World::start(program, stage, seed).with_context(|| format!("seed {seed}: starting"))?;
    match rounds(&mut world, Plan::new(seed), seconds * 1000) {
        Ok(()) => {
            println!("torture: passed; seed {seed}; {}", world.summary().trim_start());
            println!("torture: the machine: {}", world.machine());
            Ok(())
        }
        Err(error) => {
            world.note(&format!("{error:#}"));
            let kept = keep(&world, seed).unwrap_or_else(|error| format!("nowhere: {error:#}"));
            let (seconds, machine) = (world.elapsed() / 1000, world.machine());
            bail!(
                "torture: seed {seed}, after {seconds} s: {error:#}\nthe machine: {machine}\n\
                 the logs and the faults so far are in {kept}"
            )
        }
    }
}

/// Sets a flag when SIGINT or SIGTERM comes: then all children end, and the directory is removed.
fn watch_signals() -> Result<()> {
    let signals: SigSet = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP].into_iter().collect();
    signals.thread_block().context("blocking signals")?;
    std::thread::spawn(move || {
        let _ = signals.wait();
        INTERRUPTED.store(true, Ordering::Relaxed);
    });
    Ok(())
}

fn rounds(world: &mut World, mut plan: Plan, limit: Millis) -> Result<()> {
    for n in 1.. {
        world.note(&format!("round {n}"));
        world.crew.start()?;
        round(world, &plan.next_round())?;
        world.calm()?;
        if world.elapsed() + ROUND_MIN > limit {
            break;
        }
    }
    world.stop()
}

/// Begins and ends the faults of a round when their time has come.
fn round(world: &mut World, planned: &[Planned]) -> Result<()> {
    let start = now();
    let mut planned = planned.iter().peekable();
    let mut active: Vec<(Millis, Fault, Active)> = Vec::new();
    loop {
        while let Some(next) = planned.next_if(|next| start + next.at <= now()) {
            world.note(&format!("{:?} begins, for {} ms", next.fault, next.lasts));
            let begun = faults::begin(world, next).with_context(|| format!("{:?}", next.fault))?;
            active.extend(begun.map(|active| (now() + next.lasts, next.fault, active)));
            world.pump()?;
        }
        let is_over = |(until, ..): &mut (Millis, Fault, Active)| *until <= now();
        for (_, fault, over) in active.extract_if(.., is_over).collect::<Vec<_>>() {
            world.note(&format!("{fault:?} ends"));
            faults::end(world, over).with_context(|| format!("the end of {fault:?}"))?;
        }
        world.pump()?;
        if planned.peek().is_none() && active.is_empty() && now() >= start + ROUND {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Keeps the logs of a run that failed.
fn keep(world: &World, seed: u64) -> Result<String> {
    let dir: PathBuf = shell::target_dir()?.join(format!("torture-{seed}"));
    fs::create_dir_all(&dir)?;
    // The threads that copy logs may be behind.
    std::thread::sleep(Duration::from_millis(300));
    for entry in fs::read_dir(world.stage.path())?.flatten() {
        let path = entry.path();
        let name = entry.file_name();
        if path.extension().is_some_and(|end| end == "log" || end == "toml") || is_journal(&name.to_string_lossy()) {
            fs::copy(&path, dir.join(name))?;
        }
    }
    fs::write(dir.join("faults"), world.events.join("\n") + "\n")?;
    Ok(dir.display().to_string())
}

fn is_journal(name: &str) -> bool {
    name.starts_with("journal-")
}
