//! `nbdblk check`: checks a file of `nbdblk serve --config` without opening anything.

use std::process::ExitCode;

use crate::{cli, listen::Sockets, plan::Plan};

pub(crate) fn run(args: &cli::Check) -> anyhow::Result<ExitCode> {
    let words = ["nbdblk".into(), "serve".into(), "--config".into(), args.file.clone().into_os_string()];
    let (plan, serve, _) = Plan::from_file_with(&args.file, &words)?;
    // Sockets of a service manager may come in addition to those of the file.
    Sockets::check(&serve, true).map_err(|error| plan.blame("unix", error))?;
    let names: Vec<String> = plan.specs.iter().map(|export| format!("{:?}", export.name)).collect();
    let count = names.len();
    let noun = if count == 1 { "export" } else { "exports" };
    crate::print(&format!("{} is valid: {count} {noun}, {}\n", args.file.display(), names.join(", ")))
}
