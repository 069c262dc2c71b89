//! `nbdblk status`: gets the status of a server over its control socket, and prints it.

pub(crate) mod report;
mod table;

use std::{
    io::{self, IsTerminal},
    path::Path,
    process::ExitCode,
    thread,
    time::Duration,
};

use anyhow::{Context, bail, ensure};

use self::report::{Report, VERSION};
use crate::{cli, control_place, reload, requests::STATUS};

/// Time between two reports, from which rates are computed.
const INTERVAL: Duration = Duration::from_secs(1);

/// Longest wait for the server.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Escape sequences: move to the upper left corner, and erase the rest of the terminal.
const HOME: &str = "\x1b[H\x1b[J";

/// Prints the status of a server.
pub(crate) fn run(args: &cli::Status) -> anyhow::Result<ExitCode> {
    let path = control_place::find(args.control.as_deref(), args.file.as_deref())?;
    if args.json {
        return crate::print(&format!("{}\n", ask(&path)?));
    }
    let lists = |report: &Report| {
        let clients = args.clients.then(|| table::clients(report));
        let queues = args.queues.then(|| table::queues(report));
        clients.into_iter().chain(queues).collect::<Vec<_>>()
    };
    if (args.clients || args.queues) && !args.watch {
        return crate::print(&lists(&look(&path)?).join("\n"));
    }
    let mut before = look(&path)?;
    loop {
        thread::sleep(args.interval.unwrap_or(INTERVAL));
        let now = look(&path)?;
        let mut text = table::exports(&path, &now, &before, args.watch);
        for list in lists(&now) {
            text = format!("{text}\n{list}");
        }
        if !args.watch {
            return crate::print(&text);
        }
        let home = if io::stdout().is_terminal() { HOME } else { "" };
        crate::print(&format!("{home}{text}"))?;
        before = now;
    }
}

fn ask(path: &Path) -> anyhow::Result<String> {
    reload::answer_of(path, format!("{STATUS}\n").as_bytes(), TIMEOUT)
}

fn look(path: &Path) -> anyhow::Result<Report> {
    let text = ask(path)?;
    let version = serde_json::from_str::<serde_json::Value>(&text).ok().and_then(|report| report["version"].as_u64());
    let Some(version) = version else { bail!("the server at {} sent no status", path.display()) };
    ensure!(
        version == u64::from(VERSION),
        "the server at {} sends version {version} of its status, and this program knows version {VERSION}: use the nbdblk of the \
         server, or --json",
        path.display()
    );
    serde_json::from_str(&text).with_context(|| format!("the status of the server at {}", path.display()))
}
