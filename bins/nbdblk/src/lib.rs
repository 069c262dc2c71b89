//! `nbdblk`: serves block devices as Network Block Devices. This crate handles arguments and the exit status; libraries do the
//! work.
//!
//! It is a library only so that fuzz targets reach its parsers, and the manual its options.

mod activation;
mod asker;
mod check;
mod child;
mod cli;
mod clock;
mod config;
mod control;
mod control_place;
mod disconnect;
mod drivers;
mod events;
mod exports;
mod files;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod info;
mod judge;
mod listen;
mod logger;
pub mod manual;
mod metrics;
mod observer;
mod parent;
mod patience;
mod place;
mod plan;
mod ready;
mod reload;
mod replace;
mod requests;
mod resume;
mod sandbox;
mod serve;
mod shortage;
mod single;
mod state;
mod status;
mod stored;
mod sys;
mod tls;
mod upgrade;
mod upgrades;
mod uri;

use std::{
    io::{self, Write},
    process::ExitCode,
};

use anyhow::Context;
use clap::{
    Parser,
    error::{ContextKind, ContextValue, ErrorKind},
};

use crate::{
    cli::{Cli, Command},
    logger::Detail,
};

/// The program.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    logger::start(Detail { verbose: cli.verbose, format: cli.log_format });
    let outcome = match cli.command {
        Command::Serve(args) => serve::run(*args),
        Command::Reload(args) => reload::run(&args),
        Command::Upgrade(args) => upgrade::run(&args),
        Command::Status(args) => status::run(&args),
        Command::Disconnect(args) => disconnect::run(&args),
        Command::Check(args) => check::run(&args),
        Command::Judge(args) => judge::run(&args),
        Command::Info(args) => info::run(&args),
        Command::Drivers(args) => drivers::run(&args),
    };
    let code = outcome.unwrap_or_else(|error| {
        complain(&whole(&error));
        ExitCode::FAILURE
    });
    logger::flush(logger::PATIENCE);
    code
}

/// Prints help or the version if requested. Otherwise the arguments are invalid: prints one line, and returns status 1.
fn usage(error: &clap::Error) -> ExitCode {
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => match print(&error.render().to_string()) {
            Ok(code) => code,
            Err(_) => ExitCode::FAILURE,
        },
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            complain(
                "no command: use nbdblk serve, status, reload, upgrade, disconnect, check, info or drivers; see nbdblk --help",
            );
            ExitCode::FAILURE
        }
        _ => {
            complain(&missing(error).unwrap_or_else(|| format!("{}; see nbdblk --help", one_line(error))));
            ExitCode::FAILURE
        }
    }
}

/// The text if an argument is missing without which the command has nothing to do: what it is, and an example.
fn missing(error: &clap::Error) -> Option<String> {
    let Some(ContextValue::Strings(names)) = error.get(ContextKind::InvalidArg) else { return None };
    let (command, what, example) = match names.first()?.as_str() {
        "<EXPORT>..." => ("serve", "a device, or a file with --config", "serve io_uring=disk.img"),
        "<DEVICE>" => ("info", "a device", "info io_uring=disk.img"),
        "<FILE>" => ("check", "a configuration file", "check /etc/nbdblk/nbdblk.toml"),
        _ => return None,
    };
    let is_missing = error.kind() == ErrorKind::MissingRequiredArgument;
    is_missing.then(|| format!("{command} needs {what}, for example: nbdblk {example}; see nbdblk {command} --help"))
}

/// The reason why the arguments are invalid, without the usage.
fn one_line(error: &clap::Error) -> String {
    let text = error.render().to_string();
    let lines = text.lines().take_while(|line| !line.starts_with("Usage:")).map(str::trim);
    let words: Vec<&str> = lines.filter(|line| !line.is_empty() && !line.starts_with("For more information")).collect();
    words.join("; ").replace(":; ", ": ").trim_start_matches("error: ").to_owned()
}

/// The text of an error and its causes, on one line.
fn whole(error: &anyhow::Error) -> String {
    blkdev::Context::report(error.as_ref())
}

/// One line on stderr, for an error.
fn complain(text: &str) {
    logger::say(log::Level::Error, text);
}

/// One line on stderr, for information.
fn report(text: &str) {
    logger::say(log::Level::Info, text);
}

/// Writes to stdout. A reader that closes its end early (`| head`) is not an error.
fn print(text: &str) -> anyhow::Result<ExitCode> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error).context("writing to stdout"),
        _ => Ok(ExitCode::SUCCESS),
    }
}
