//! [`WorkerGauges`]: the gauges of a worker.

use std::{fs, time::Duration};

use blkdev::Gauge;
use nix::unistd::gettid;

/// The gauges of a worker. The worker writes, and other threads read.
#[derive(Debug, Default)]
pub(crate) struct WorkerGauges {
    /// The id of its thread; 0: it has not begun.
    thread: Gauge,
    pub(crate) turns: Gauge,
    pub(crate) polls: Gauge,
    pub(crate) sleeps: Gauge,
}

impl WorkerGauges {
    /// The worker runs in the calling thread.
    pub(crate) fn begin(&self) {
        self.thread.set(gettid().as_raw() as u64);
    }

    /// Processor time so far, as the kernel counts it.
    pub(crate) fn busy(&self) -> Duration {
        let text = fs::read_to_string(format!("/proc/self/task/{}/schedstat", self.thread.get()));
        let nanoseconds = text.ok().and_then(|text| text.split(' ').next()?.parse().ok());
        Duration::from_nanos(nanoseconds.unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use std::hint::black_box;

    use super::*;

    #[test]
    fn the_kernel_counts_the_time_of_a_thread() {
        let gauges = WorkerGauges::default();
        assert_eq!(gauges.busy(), Duration::ZERO);
        gauges.begin();
        let before = gauges.busy();
        while gauges.busy() == before {
            black_box((0..100_000u64).sum::<u64>());
        }
    }
}
