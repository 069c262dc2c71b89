//! What a client process is to do, and what it reports: one line of JSON each.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::clock::Millis;

/// The work of a verifying client.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Job {
    /// The directory with the sockets and the journals.
    pub(crate) dir: PathBuf,
    pub(crate) export: String,
    /// The number of its region, which only it writes.
    pub(crate) region: u32,
    /// The first byte of the region.
    pub(crate) at: u64,
    /// Blocks of the region.
    pub(crate) blocks: u32,
    /// Most requests in flight.
    pub(crate) depth: usize,
    /// Connect over TCP, not over the Unix domain socket.
    pub(crate) tcp: bool,
    /// The back end has a cache: a crash may take what was not flushed.
    pub(crate) cached: bool,
    /// A fault may take the content of the region.
    pub(crate) lossy: bool,
    pub(crate) seed: u64,
}

/// The work of ill-behaved clients.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct BadClients {
    pub(crate) dir: PathBuf,
    pub(crate) export: String,
    pub(crate) kind: Behaviour,
    /// Connections.
    pub(crate) count: usize,
    /// Where they may write.
    pub(crate) at: u64,
    pub(crate) size: u64,
    pub(crate) seed: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Behaviour {
    ReadSlowly,
    WriteSlowly,
    UseMemory,
    Vanish,
}

/// What a verifying client reports.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Report {
    /// It is alive.
    Tick {
        /// Blocks that it has compared, and requests that were acknowledged, since the last one.
        compared: u64,
        acknowledged: u64,
        /// The longest wait that ended since the last one.
        longest: Option<Wait>,
        /// What it waits for now, for longest.
        oldest: Option<Wait>,
    },
    /// A request, or the way to a connection, took long.
    Slow(Wait),
    /// A request or a connection failed.
    Failed { wait: Wait, error: String, no_space: bool },
    /// The data is wrong, or the server broke the protocol.
    Wrong(String),
    /// It has compared its whole region, and ends.
    Done,
}

/// A wait of a client.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Wait {
    pub(crate) what: String,
    pub(crate) from: Millis,
    pub(crate) until: Millis,
    /// The part in which the client itself did not run.
    pub(crate) own: Millis,
}
