//! [`LaneGauges`]: the gauges of a lane.

use std::sync::Arc;

use blkdev::{Channel, Counters, Gauge};

use super::age::Age;

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
        })
    }
}
