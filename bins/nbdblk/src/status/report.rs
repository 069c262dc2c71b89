//! [`Report`]: the output of `nbdblk status --json`. docs/status.md describes it.

use std::{collections::BTreeMap, time::Duration};

use blkdev::{BUCKETS, Counts, Error, Latency, Operation, State};
use nbd_server_core::{ClientView, DeviceView, ExportView, MemoryView, Observation, QueueView, Removal, WorkerView};
use serde::{Deserialize, Serialize};

/// Version of the schema. It changes when a field is removed or gets another meaning; new fields may come at any time.
pub(crate) const VERSION: u32 = 1;

#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct Report {
    pub(crate) version: u32,
    pub(crate) program: String,
    pub(crate) pid: u32,
    pub(crate) uptime_seconds: f64,
    pub(crate) exports: Vec<Export>,
    pub(crate) workers: Vec<Worker>,
    pub(crate) clients: Vec<Client>,
    /// Since the start, including clients that have left.
    pub(crate) clients_served: u64,
}

#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct Export {
    pub(crate) name: String,
    pub(crate) state: DeviceState,
    /// How it was removed: "hide", "soft" or "hard".
    pub(crate) removal: Option<String>,
    pub(crate) clients: u64,
    pub(crate) device: Option<Device>,
    /// By operation: read, write, flush, trim, write_zeroes, block_status, cache.
    pub(crate) operations: BTreeMap<String, OperationReport>,
    pub(crate) refused: u64,
    pub(crate) split: u64,
    pub(crate) read_modify_writes: u64,
    pub(crate) emulated_fua: u64,
    pub(crate) emulated_zeroes: u64,
    pub(crate) stalls: u64,
    pub(crate) oldest_seconds: Option<f64>,
    pub(crate) memory: Memory,
    #[serde(default)]
    pub(crate) queues: Vec<Queue>,
}

/// A queue of a device.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct Queue {
    /// The number of its worker, from 0.
    pub(crate) worker: u64,
    pub(crate) stalled: bool,
    pub(crate) in_flight: u64,
    pub(crate) oldest_seconds: Option<f64>,
    pub(crate) memory: Memory,
    /// Positions in its rings, in the driver's words.
    pub(crate) state: String,
}

#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum DeviceState {
    Working,
    /// It completes nothing within its time-out.
    Stalled,
    Reconnecting,
    Dead,
    /// The export was removed, and its device is being closed.
    Closing,
}

#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct Device {
    pub(crate) driver: String,
    pub(crate) target: String,
    pub(crate) serial: String,
    pub(crate) size: u64,
    pub(crate) block_size: u32,
    pub(crate) read_only: bool,
    pub(crate) queues: u64,
    pub(crate) reconnects: u64,
    pub(crate) details: BTreeMap<String, String>,
}

#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct OperationReport {
    /// Requests that have ended.
    pub(crate) requests: u64,
    pub(crate) in_flight: u64,
    pub(crate) bytes: u64,
    /// By kind; kinds without an error are left out.
    pub(crate) errors: BTreeMap<String, u64>,
    pub(crate) latency: LatencyReport,
}

#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub(crate) struct LatencyReport {
    pub(crate) sum_seconds: f64,
    pub(crate) p50_seconds: Option<f64>,
    pub(crate) p90_seconds: Option<f64>,
    pub(crate) p99_seconds: Option<f64>,
    pub(crate) p999_seconds: Option<f64>,
    /// Numbers of buckets, and the requests in them; empty buckets are left out. The last bucket has no end.
    pub(crate) buckets: Vec<(usize, u64)>,
}

#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub(crate) struct Memory {
    pub(crate) total: u64,
    pub(crate) used: u64,
    /// Clients with a request that waits for memory.
    pub(crate) waiting: u64,
    pub(crate) waits: u64,
}

#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct Worker {
    pub(crate) alive: bool,
    pub(crate) clients: u64,
    pub(crate) turns: u64,
    pub(crate) polls: u64,
    pub(crate) sleeps: u64,
    pub(crate) busy_seconds: f64,
    #[serde(default)]
    pub(crate) memory: Memory,
}

#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct Client {
    pub(crate) id: u64,
    pub(crate) peer: String,
    pub(crate) export: String,
    /// "plain text", or the version of TLS and its record layer.
    pub(crate) security: String,
    /// Form of replies: "simple", "structured" or "extended".
    pub(crate) protocol: String,
    pub(crate) connected_seconds: f64,
    pub(crate) in_flight: u64,
    pub(crate) oldest_seconds: Option<f64>,
    pub(crate) requests: u64,
    pub(crate) failed: u64,
    pub(crate) refused: u64,
    pub(crate) bytes_read: u64,
    pub(crate) bytes_written: u64,
}

/// The name of an operation in the NBD protocol.
pub(crate) fn operation(operation: Operation) -> &'static str {
    match operation {
        Operation::Read => "read",
        Operation::Write => "write",
        Operation::Flush => "flush",
        Operation::Zero => "write_zeroes",
        Operation::Discard => "trim",
        Operation::Status => "block_status",
        Operation::Prefetch => "cache",
    }
}

/// The name of a kind of error.
pub(crate) fn error(error: Error) -> &'static str {
    match error {
        Error::Io => "io",
        Error::Invalid => "invalid",
        Error::OutOfRange => "out_of_range",
        Error::NoSpace => "no_space",
        Error::ReadOnly => "read_only",
        Error::NotSupported => "not_supported",
        Error::Gone => "gone",
        Error::Cancelled => "cancelled",
    }
}

impl Report {
    pub(crate) fn new(seen: &Observation, uptime: Duration) -> Self {
        Self {
            version: VERSION,
            program: concat!("nbdblk ", env!("CARGO_PKG_VERSION")).into(),
            pid: std::process::id(),
            uptime_seconds: uptime.as_secs_f64(),
            exports: seen.exports.iter().map(Export::new).collect(),
            workers: seen.workers.iter().map(Worker::new).collect(),
            clients: seen.clients.iter().map(Client::new).collect(),
            clients_served: seen.clients_served,
        }
    }
}

impl DeviceState {
    pub(crate) fn of(device: Option<&DeviceView>) -> Self {
        match device {
            None => Self::Closing,
            Some(device) => match device.state {
                State::Working if device.is_stalled => Self::Stalled,
                State::Working => Self::Working,
                State::Reconnecting => Self::Reconnecting,
                _ => Self::Dead,
            },
        }
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Working => "working",
            Self::Stalled => "stalled",
            Self::Reconnecting => "reconnecting",
            Self::Dead => "dead",
            Self::Closing => "closing",
        }
    }
}

impl Export {
    fn new(seen: &ExportView) -> Self {
        let Counts { split, merged, flushed, zeroed, stalls, .. } = seen.counts;
        let operations = Operation::ALL.map(|kind| (operation(kind).into(), OperationReport::new(&seen.counts, kind)));
        let removal = seen.removal.map(|removal| match removal {
            Removal::Hide => "hide",
            Removal::Soft => "soft",
            Removal::Hard => "hard",
        });
        Self {
            name: seen.name.clone(),
            state: DeviceState::of(seen.device.as_ref()),
            removal: removal.map(str::to_owned),
            clients: seen.clients as u64,
            device: seen.device.as_ref().map(Device::new),
            operations: operations.into(),
            refused: seen.refused,
            split,
            read_modify_writes: merged,
            emulated_fua: flushed,
            emulated_zeroes: zeroed,
            stalls,
            oldest_seconds: seen.oldest.map(|age| age.as_secs_f64()),
            memory: Memory::new(&seen.memory),
            queues: seen.queues.iter().map(Queue::new).collect(),
        }
    }
}

impl Queue {
    fn new(seen: &QueueView) -> Self {
        Self {
            worker: seen.worker as u64,
            stalled: seen.is_stalled,
            in_flight: seen.in_flight,
            oldest_seconds: seen.oldest.map(|age| age.as_secs_f64()),
            memory: Memory::new(&seen.memory),
            state: seen.state.clone(),
        }
    }
}

impl Device {
    fn new(seen: &DeviceView) -> Self {
        let details = seen.details.iter().map(|(name, value)| ((*name).to_owned(), value.clone())).collect();
        Self {
            driver: seen.info.driver.into(),
            target: seen.info.target.clone(),
            serial: seen.info.serial.clone(),
            size: seen.capacity,
            block_size: seen.info.block_size,
            read_only: seen.info.caps.read_only,
            queues: seen.queues as u64,
            reconnects: seen.reconnects,
            details,
        }
    }
}

impl OperationReport {
    fn new(counts: &Counts, kind: Operation) -> Self {
        let counts = counts.of(kind);
        let errors = Error::ALL.iter().zip(counts.errors).filter(|(_, count)| *count > 0);
        Self {
            requests: counts.ended(),
            in_flight: counts.in_flight(),
            bytes: counts.bytes,
            errors: errors.map(|(kind, count)| (error(*kind).into(), count)).collect(),
            latency: LatencyReport::new(&counts.latency),
        }
    }
}

impl LatencyReport {
    fn new(latency: &Latency) -> Self {
        let quantile = |q| latency.quantile(q).map(|time| time.as_secs_f64());
        Self {
            sum_seconds: latency.sum().as_secs_f64(),
            p50_seconds: quantile(0.5),
            p90_seconds: quantile(0.9),
            p99_seconds: quantile(0.99),
            p999_seconds: quantile(0.999),
            buckets: latency.buckets().map(|(_, count)| count).enumerate().filter(|(_, count)| *count > 0).collect(),
        }
    }

    /// The histogram. The difference of two is that of the time between them.
    pub(crate) fn histogram(&self) -> Latency {
        let mut buckets = vec![0; BUCKETS];
        for (place, count) in &self.buckets {
            if let Some(bucket) = buckets.get_mut(*place) {
                *bucket = *count;
            }
        }
        let sum = Duration::try_from_secs_f64(self.sum_seconds).unwrap_or_default();
        Latency::from_parts(buckets, sum).unwrap_or_default()
    }
}

impl Memory {
    fn new(seen: &MemoryView) -> Self {
        Self { total: seen.total, used: seen.used, waiting: seen.waiting, waits: seen.waits }
    }
}

impl Worker {
    fn new(seen: &WorkerView) -> Self {
        Self {
            alive: seen.is_alive,
            clients: seen.connections as u64,
            turns: seen.turns,
            polls: seen.polls,
            sleeps: seen.sleeps,
            busy_seconds: seen.busy.as_secs_f64(),
            memory: Memory::new(&seen.memory),
        }
    }
}

impl Client {
    fn new(seen: &ClientView) -> Self {
        Self {
            id: seen.id,
            peer: seen.peer.to_string(),
            export: seen.export.clone(),
            security: seen.security.clone(),
            protocol: seen.protocol.into(),
            connected_seconds: seen.connected.as_secs_f64(),
            in_flight: seen.in_flight,
            oldest_seconds: seen.oldest.map(|age| age.as_secs_f64()),
            requests: seen.traffic.requests,
            failed: seen.traffic.failed,
            refused: seen.traffic.refused,
            bytes_read: seen.traffic.read,
            bytes_written: seen.traffic.written,
        }
    }
}
