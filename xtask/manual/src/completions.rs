//! Completions for shells.

use std::path::Path;

use anyhow::Result;
use clap::Command;
use clap_complete::{Shell, aot::generate_to};
use nbdblk::manual::command_line;

/// Writes the completions for bash, zsh and fish.
pub(crate) fn write(dir: &Path) -> Result<()> {
    std::fs::create_dir_all(dir)?;
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        generate_to(shell, &mut public(), "nbdblk", dir)?;
    }
    let bash = dir.join("nbdblk.bash");
    std::fs::write(&bash, with_files(&std::fs::read_to_string(&bash)?))?;
    Ok(())
}

/// The completion for bash, with file names where an argument is not an option. clap_complete offers only options there, and bash
/// falls back to file names only if nothing is offered.
fn with_files(text: &str) -> String {
    // The command itself takes no file.
    let (command, subcommands) = text.split_at(text.find("        nbdblk__subcmd__").unwrap_or(text.len()));
    let subcommands = subcommands
        .replace("if [[ ${cur} == -* || ${COMP_CWORD} -eq 2 ]]", "if [[ ${cur} == -* ]]")
        .replace("esac\n            COMPREPLY=( $(compgen -W \"${opts}\" -- \"${cur}\") )\n", "esac\n");
    format!("{command}{subcommands}")
}

/// The command line without hidden subcommands, which clap_complete would complete.
fn public() -> Command {
    let all = command_line();
    let shown: Vec<Command> = all.get_subcommands().filter(|command| !command.is_hide_set()).cloned().collect();
    let arguments: Vec<clap::Arg> = all.get_arguments().cloned().collect();
    let named = Command::new("nbdblk").version(env!("CARGO_PKG_VERSION"));
    named.disable_help_subcommand(true).disable_version_flag(true).args(arguments).subcommands(shown)
}
