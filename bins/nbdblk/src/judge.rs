//! `nbdblk judge`: the hidden command with which a running server asks a program whether it could replace the server.
//!
//! The server starts the new program with its own arguments. The program reads the configuration, but opens no device and no
//! socket. An older program does not have this command, and so refuses.

use std::{
    ffi::OsString,
    fs::File,
    io::{self, Read},
    os::{fd::AsFd, unix::process::ExitStatusExt},
    path::Path,
    process::{Command, ExitCode, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, anyhow, bail, ensure};
use clap::Parser;

use crate::{
    activation, cli,
    cli::Cli,
    listen::Sockets,
    plan::Plan,
    ready::NOTIFY_SOCKET,
    state::{State, StateFile, VERSION, check_version},
    tls::Security,
};

/// The last words of a program that can replace the server.
const YES: &str = "can replace the server";

/// How often the server looks whether the program has ended.
const MOMENT: Duration = Duration::from_millis(1);

/// Judges, as the new program. With `--state`, standard input has the state.
pub(crate) fn run(args: &cli::Judge) -> anyhow::Result<ExitCode> {
    check_version(args.version)?;
    let serve = match Cli::try_parse_from(&args.args) {
        Ok(Cli { command: cli::Command::Serve(serve), .. }) => *serve,
        Ok(_) => bail!("these are not the arguments of a server"),
        Err(error) => bail!("the arguments of the server: {}", crate::one_line(&error)),
    };
    let (plan, serve) = match serve.config.clone() {
        Some(path) => Plan::from_file_with(&path, &args.args).map(|(plan, serve, _)| (plan, serve))?,
        None => (Plan::from_words(&serve)?, serve),
    };
    // The sockets are passed on.
    Sockets::check(&serve, true).map_err(|error| plan.blame("unix", error))?;
    Security::load(&serve.tls).map_err(|error| plan.blame("tls", error))?;
    if args.state {
        let file = File::from(io::stdin().as_fd().try_clone_to_owned()?);
        let (_, state) = StateFile::open(file)?;
        check_clients(&state, &plan, serve.memory)?;
    }
    crate::print(&format!("nbdblk {} {YES}\n", env!("CARGO_PKG_VERSION")))
}

/// Fails if clients could not be served with the configuration.
fn check_clients(state: &State, plan: &Plan, memory: Option<usize>) -> anyhow::Result<()> {
    let (exports, longest) = state.needs();
    for name in exports {
        let is_there = plan.specs.iter().any(|spec| spec.name == name);
        ensure!(is_there, "the export \"{name}\" has clients, and is not in the configuration any more: reload first");
    }
    let memory = memory.unwrap_or(usize::MAX);
    ensure!(longest as usize <= memory, "--memory {memory} is less than clients may send at a time, {longest} bytes");
    Ok(())
}

/// Asks a program, as the server. It has to answer within `limit`.
///
/// # Errors
/// It cannot replace the server, or it cannot be run.
pub(crate) fn ask(program: &Path, args: &[OsString], state: Option<&File>, limit: Duration) -> anyhow::Result<()> {
    let mut command = Command::new(program);
    command.args(["judge", "--version"]).arg(VERSION.to_string());
    if state.is_some() {
        command.arg("--state");
    }
    command.arg("--").args(args).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.stdin(state.map_or(Ok(Stdio::null()), |state| state.try_clone().map(Stdio::from))?);
    for name in activation::VARIABLES.iter().chain(&[NOTIFY_SOCKET]) {
        command.env_remove(name);
    }
    let shown = program.display();
    let mut child = command.spawn().with_context(|| format!("cannot run {shown}"))?;
    let deadline = Instant::now() + limit;
    let status = loop {
        match child.try_wait()? {
            Some(status) => break status,
            None if Instant::now() < deadline => thread::sleep(MOMENT),
            None => {
                let _ = child.kill();
                bail!("{shown} has not judged the state of the server within {} s", limit.as_secs());
            }
        }
    };
    let (mut out, mut err) = (String::new(), String::new());
    for (pipe, text) in [(child.stdout.take().map(piped), &mut out), (child.stderr.take().map(piped), &mut err)] {
        if let Some(pipe) = pipe {
            pipe.take(TEXT_MAX).read_to_string(text)?;
        }
    }
    if status.success() && out.trim_end().ends_with(YES) {
        return Ok(());
    }
    let reason = match err.trim().trim_start_matches("nbdblk: ").replace('\n', "; ") {
        reason if !reason.is_empty() => reason,
        _ if status.success() => "it is not nbdblk".into(),
        _ => status.signal().map_or_else(|| status.to_string(), |signal| format!("it was ended by signal {signal}")),
    };
    Err(anyhow!("{shown} cannot replace the server: {reason}"))
}

/// Longest text of a program, in bytes.
const TEXT_MAX: u64 = 64 << 10;

fn piped(pipe: impl Read + 'static) -> Box<dyn Read> {
    Box::new(pipe)
}
