//! [`Request`]: a request of a client of the control socket. It is one line.

use std::{ffi::OsString, os::unix::ffi::OsStringExt, path::PathBuf};

use serde::{Deserialize, Serialize};

/// Asks for the [report](crate::status::report::Report).
pub(crate) const STATUS: &str = "status";

/// Disconnects clients. A [`Target`] as JSON follows.
pub(crate) const DISCONNECT: &str = "disconnect ";

/// A request to a server.
#[derive(Debug)]
pub(crate) enum Request {
    /// Read the file again.
    Reload,
    /// Replace the program, by another one if it is named.
    Upgrade(Option<PathBuf>),
    Status,
    Disconnect(Target),
}

/// The clients to disconnect.
#[derive(Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Target {
    Client(u64),
    /// All clients of an export.
    Export(String),
}

impl Request {
    /// Parses a line. `is_whole`: its end was received, so that an argument is complete.
    pub(crate) fn parse(line: &[u8], is_whole: bool) -> Option<Self> {
        let argument = |word: &str| line.strip_prefix(word.as_bytes()).filter(|_| is_whole);
        if let Some(target) = argument(DISCONNECT) {
            return serde_json::from_slice(target).ok().map(Self::Disconnect);
        }
        if let Some(path) = argument("upgrade ").filter(|path| path.starts_with(b"/")) {
            return Some(Self::Upgrade(Some(OsString::from_vec(path.into()).into())));
        }
        match line {
            b"reload" => Some(Self::Reload),
            b"upgrade" => Some(Self::Upgrade(None)),
            _ => (line == STATUS.as_bytes()).then_some(Self::Status),
        }
    }
}
