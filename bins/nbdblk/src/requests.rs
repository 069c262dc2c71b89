//! The requests of the control socket, as far as they are more than a word.

use serde::{Deserialize, Serialize};

/// Asks what the server does.
pub(crate) const STATUS: &str = "status";

/// Ends clients. A [`Target`] as JSON follows.
pub(crate) const DISCONNECT: &str = "disconnect ";

/// The clients to disconnect.
#[derive(Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Target {
    Client(u64),
    /// All clients of an export.
    Export(String),
}
