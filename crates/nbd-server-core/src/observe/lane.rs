//! [`LaneGauges`]: the gauges of a lane.

use std::sync::{Arc, Mutex};

use blkdev::{Channel, Counters, Counts, Gauge, Operation};

use super::{
    age::Age,
    views::{MemoryView, QueueView},
};
use crate::threads::lock;

/// The gauges of a lane, the channel of one worker to one export. The worker writes, and other threads read.
#[derive(Debug)]
pub(crate) struct LaneGauges {
    pub(crate) counters: Arc<Counters>,
    /// Payload memory, in bytes.
    pub(crate) memory: u64,
    pub(crate) memory_used: Gauge,
    /// Connections with a request that waits for memory.
    pub(crate) waiting: Gauge,
    pub(crate) waits: Gauge,
    pub(crate) refused: Gauge,
    pub(crate) oldest: Age,
    /// 1: the device has stalled; 0: it has not.
    pub(crate) stalled: Gauge,
    /// See [`Channel::queue_state`].
    state: Mutex<String>,
}

impl LaneGauges {
    pub(crate) fn new(channel: &Channel) -> Arc<Self> {
        Arc::new(Self {
            counters: Arc::clone(channel.counters()),
            memory: channel.memory() as u64,
            memory_used: Gauge::default(),
            waiting: Gauge::default(),
            waits: Gauge::default(),
            refused: Gauge::default(),
            oldest: Age::default(),
            stalled: Gauge::default(),
            state: Mutex::new(channel.queue_state()),
        })
    }

    /// Publishes the state of the queue. It does not wait: while another thread reads the state before, that one stays.
    pub(crate) fn set_state(&self, state: String) {
        if let Ok(mut known) = self.state.try_lock() {
            *known = state;
        }
    }

    /// The lane, which belongs to the worker of this number, with a copy of its counters.
    pub(crate) fn view(&self, worker: usize, counts: &Counts) -> QueueView {
        QueueView {
            worker,
            in_flight: Operation::ALL.iter().map(|kind| counts.of(*kind).in_flight()).sum(),
            oldest: self.oldest.get(),
            is_stalled: self.stalled.get() > 0,
            memory: MemoryView {
                total: self.memory,
                used: self.memory_used.get(),
                waiting: self.waiting.get(),
                waits: self.waits.get(),
            },
            state: lock(&self.state).clone(),
        }
    }
}
