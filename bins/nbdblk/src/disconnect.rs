//! `nbdblk disconnect`: makes a server disconnect clients.

use std::{process::ExitCode, time::Duration};

use serde::{Deserialize, Serialize};

use crate::{cli, control_place, reload};

/// Longest wait for the server.
const TIMEOUT: Duration = Duration::from_secs(10);

/// The word of the request. A [`Target`] as JSON follows.
pub(crate) const REQUEST: &str = "disconnect ";

/// The clients to disconnect.
#[derive(Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Target {
    Client(u64),
    /// All clients of an export.
    Export(String),
}

pub(crate) fn run(args: &cli::Disconnect) -> anyhow::Result<ExitCode> {
    let path = control_place::find(args.control.as_deref(), args.file.as_deref())?;
    let target = match args.target.parse() {
        Ok(id) if !args.export => Target::Client(id),
        _ => Target::Export(args.target.clone()),
    };
    let request = format!("{REQUEST}{}\n", serde_json::to_string(&target)?);
    crate::print(&format!("{}\n", reload::answer_of(&path, request.as_bytes(), TIMEOUT)?))
}
