//! [`WorkerGauges`]: the gauges of a worker.

use std::time::Duration;

use blkdev::Gauge;
use nix::{
    libc::clockid_t,
    time::{ClockId, clock_gettime},
    unistd::gettid,
};

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

    /// Processor time so far, as the kernel counts it. Needs no file, so that a program can confine the caller.
    pub(crate) fn busy(&self) -> Duration {
        let thread = self.thread.get() as clockid_t;
        if thread == 0 {
            return Duration::ZERO;
        }
        let time = clock_gettime(ClockId::from_raw((!thread << 3) | CPUCLOCK_PERTHREAD_MASK | CPUCLOCK_SCHED));
        time.map_or(Duration::ZERO, Duration::from)
    }
}

/// The kind of clock in the lowest bits of the number of a thread's clock (linux/posix-timers.h, `MAKE_THREAD_CPUCLOCK`).
const CPUCLOCK_PERTHREAD_MASK: clockid_t = 4;
const CPUCLOCK_SCHED: clockid_t = 2;

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
