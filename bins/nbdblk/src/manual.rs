//! What manual pages and shell completions are made from: the command line, and the settings of a configuration file.

use clap::{Arg, Command, CommandFactory};

use crate::{cli::Cli, config};

/// The settings of an export, by name. Their meanings are in nbdblk.toml(5).
pub const EXPORT_SETTINGS: &[&str] = &config::EXPORT_WORDS;

/// The command line with all subcommands.
pub fn command_line() -> Command {
    Cli::command()
}

/// The options of `nbdblk serve` that a file can set.
pub fn file_settings() -> Vec<Arg> {
    config::settings()
}

/// What a file may have as the value of an option: `true or false`.
pub fn value_kind(option: &Arg) -> String {
    config::value_kind(option)
}
