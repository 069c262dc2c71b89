//! `nbdblk disconnect`: makes a server disconnect clients.

use std::{process::ExitCode, time::Duration};

use crate::{
    cli, control_place, reload,
    requests::{DISCONNECT, Target},
};

/// Longest wait for the server.
const TIMEOUT: Duration = Duration::from_secs(10);

pub(crate) fn run(args: &cli::Disconnect) -> anyhow::Result<ExitCode> {
    let path = control_place::find(args.control.as_deref(), args.file.as_deref())?;
    let target = match args.target.parse() {
        Ok(id) if !args.export => Target::Client(id),
        _ => Target::Export(args.target.clone()),
    };
    let request = format!("{DISCONNECT}{}\n", serde_json::to_string(&target)?);
    crate::print(&format!("{}\n", reload::answer_of(&path, request.as_bytes(), TIMEOUT)?))
}
