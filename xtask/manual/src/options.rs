//! Sections about the arguments and options of a command.

use anyhow::{Context, Result};
use clap::{Arg, ArgAction, Command};
use nbdblk::manual::command_line;

use crate::text;

/// The section of each command that users see.
pub(crate) fn sections() -> Vec<String> {
    let all = command_line();
    let shown = all.get_subcommands().filter(|command| !command.is_hide_set());
    let names = shown.map(|command| format!("options of {}", command.get_name()));
    names.chain(["options of nbdblk".into()]).collect()
}

/// Arguments and options of `nbdblk COMMAND`; of `nbdblk`: those of all commands.
pub(crate) fn of(command: &str) -> Result<String> {
    let mut all = command_line();
    all.build();
    let globals: Vec<Arg> = all.get_arguments().filter(|option| is_shown(option)).cloned().collect();
    if command == "nbdblk" {
        return Ok(globals.iter().map(entry).collect::<Vec<_>>().join("\n"));
    }
    let found: &Command = all.find_subcommand(command).with_context(|| format!("there is no command {command}"))?;
    let is_own = |option: &&Arg| is_shown(option) && !globals.iter().any(|global| global.get_id() == option.get_id());
    Ok(found.get_arguments().filter(is_own).map(entry).collect::<Vec<_>>().join("\n"))
}

fn is_shown(option: &Arg) -> bool {
    !option.is_hide_set()
}

/// An option with its names, its value and its description.
fn entry(option: &Arg) -> String {
    let values = values(option);
    let help = match option.get_action() {
        // The text of clap is about the two texts.
        ArgAction::Help => "Print help; -h prints a summary".into(),
        _ => option.get_long_help().or(option.get_help()).map(ToString::to_string).unwrap_or_default(),
    };
    let mut paragraphs: Vec<String> =
        help.split("\n\n").filter(|part| !part.trim().is_empty()).map(|part| text::paragraph(part, &values)).collect();
    let choices = option.get_possible_values();
    if option.get_action().takes_values() && !choices.is_empty() {
        let names: Vec<String> = choices.iter().map(|choice| format!("**{}**", choice.get_name())).collect();
        paragraphs.push(format!("Values: {}.", names.join(", ")));
    }
    if let Some(aliases) = option.get_visible_aliases().filter(|aliases| !aliases.is_empty()) {
        let names: Vec<String> = aliases.iter().map(|name| format!("**--{name}**")).collect();
        paragraphs.push(format!("Also: {}.", names.join(", ")));
    }
    text::entry(&tag(option), &paragraphs)
}

/// The names of the values.
pub(crate) fn values(option: &Arg) -> Vec<String> {
    if !option.get_action().takes_values() {
        return Vec::new();
    }
    let names = option.get_value_names().unwrap_or_default().iter();
    // `ID|EXPORT` names two.
    names.flat_map(|name| name.split('|').map(String::from).collect::<Vec<_>>()).collect()
}

/// `**-p**, **--port** *PORT*`, or `*EXPORT*...`.
fn tag(option: &Arg) -> String {
    let value = values(option).iter().map(|name| format!("*{name}*")).collect::<Vec<_>>().join("|");
    if option.is_positional() {
        let dots = if option.get_num_args().is_some_and(|count| count.max_values() > 1) { "..." } else { "" };
        return format!("{value}{dots}");
    }
    let short = option.get_short().map(|name| format!("**-{name}**"));
    let long = option.get_long().map(|name| format!("**--{name}**"));
    let names = short.into_iter().chain(long).collect::<Vec<_>>().join(", ");
    let takes_value = matches!(option.get_action(), ArgAction::Set | ArgAction::Append);
    match option.get_num_args() {
        _ if !takes_value => names,
        Some(count) if count.min_values() == 0 => format!("{names}[={value}]"),
        _ => format!("{names} {value}"),
    }
}
