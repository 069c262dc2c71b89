//! [`Observation`] and its parts: plain data.

use std::{ops::AddAssign, time::Duration};

use blkdev::{Counts, Info, State};
use nbd_proto::Mode;

use crate::{peer::Peer, removal::Removal};

/// The name of a form of replies.
pub(crate) fn protocol(mode: Mode) -> &'static str {
    match mode {
        Mode::Simple => "simple",
        Mode::Structured => "structured",
        Mode::Extended => "extended",
    }
}

/// The state and the counters of a server. There may be more fields later.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct Observation {
    /// The exports in order, then removed exports that are still in use.
    pub exports: Vec<ExportView>,
    /// The worker threads.
    pub workers: Vec<WorkerView>,
    /// The connections in the transmission phase, the oldest first.
    pub clients: Vec<ClientView>,
    /// Connections that have reached the transmission phase since the server started.
    pub clients_served: u64,
}

/// An export. Its counters begin when its device is opened.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ExportView {
    /// The export's name.
    pub name: String,
    /// Number of connections to it.
    pub clients: usize,
    /// How it was removed, if it is still in use.
    pub removal: Option<Removal>,
    /// `None`: it was removed, and its device is being closed.
    pub device: Option<DeviceView>,
    /// The counters of the channels of all workers together.
    pub counts: Counts,
    /// Requests that were refused before they reached the device: invalid requests, and requests to a device that does not answer.
    pub refused: u64,
    /// Age of the oldest request that has not ended.
    pub oldest: Option<Duration>,
    /// Its payload memory.
    pub memory: MemoryView,
    /// The open queues of its device, one for each worker that serves it.
    pub queues: Vec<QueueView>,
}

/// A queue of a device.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct QueueView {
    /// The number of its worker: its place in [`Observation::workers`].
    pub worker: usize,
    /// Requests that have not ended.
    pub in_flight: u64,
    /// Age of the oldest of them.
    pub oldest: Option<Duration>,
    /// It has stalled: requests fail until the device answers again.
    pub is_stalled: bool,
    /// The payload memory of its requests.
    pub memory: MemoryView,
    /// Its state for display, such as the positions in its rings, as of the last patrol of the worker. May be empty.
    pub state: String,
}

/// The device of an export.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct DeviceView {
    /// Its limits and capabilities.
    pub info: Info,
    /// Present size, in bytes.
    pub capacity: u64,
    /// Whether it works.
    pub state: State,
    /// A queue of the device has stalled: requests fail until it answers again.
    pub is_stalled: bool,
    /// Its open queues, one for each worker that serves it.
    pub queues: usize,
    /// How often it was opened again after it had died.
    pub reconnects: u64,
    /// Driver-specific properties for display: names and values.
    pub details: Vec<(&'static str, String)>,
}

/// Payload memory: of an export, a worker, or a queue, which belongs to both.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct MemoryView {
    /// Total size, in bytes.
    pub total: u64,
    /// Memory that requests and unsent replies hold, in bytes.
    pub used: u64,
    /// Connections with a request that waits for memory.
    pub waiting: u64,
    /// How often a request had to wait for memory.
    pub waits: u64,
}

impl AddAssign for MemoryView {
    fn add_assign(&mut self, other: Self) {
        let Self { total, used, waiting, waits } = other;
        self.total += total;
        self.used += used;
        self.waiting += waiting;
        self.waits += waits;
    }
}

/// A worker thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct WorkerView {
    /// Whether its thread runs.
    pub is_alive: bool,
    /// Number of its connections.
    pub connections: usize,
    /// Turns so far.
    pub turns: u64,
    /// Busy-polls so far.
    pub polls: u64,
    /// Sleeps so far.
    pub sleeps: u64,
    /// Processor time so far.
    pub busy: Duration,
    /// The payload memory of its queues.
    pub memory: MemoryView,
}

/// A connection in the transmission phase.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ClientView {
    /// Unique in this server.
    pub id: u64,
    /// Where it comes from.
    pub peer: Peer,
    /// The export's name.
    pub export: String,
    /// Plain text, or the version of TLS and its record layer.
    pub security: String,
    /// Form of replies: simple, structured or extended.
    pub protocol: &'static str,
    /// Time since its handshake ended.
    pub connected: Duration,
    /// Requests at the device.
    pub in_flight: u64,
    /// Age of the oldest request at the device.
    pub oldest: Option<Duration>,
    /// Its requests and bytes.
    pub traffic: Traffic,
}

/// The requests and bytes of a connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Traffic {
    /// Requests that have ended.
    pub requests: u64,
    /// Requests that have failed, including refused requests.
    pub failed: u64,
    /// Requests that were refused before they reached the device.
    pub refused: u64,
    /// Bytes of successful READs.
    pub read: u64,
    /// Bytes of successful WRITEs.
    pub written: u64,
}
