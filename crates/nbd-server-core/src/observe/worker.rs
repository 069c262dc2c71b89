//! [`WorkerGauges`]: what other threads may know of a worker.

use std::time::{Duration, Instant};

use super::gauge::Gauge;

/// A worker. It writes, others read.
#[derive(Debug)]
pub(crate) struct WorkerGauges {
    begin: Instant,
    pub(crate) turns: Gauge,
    pub(crate) polls: Gauge,
    pub(crate) sleeps: Gauge,
    /// Time spent asleep, in nanoseconds.
    slept: Gauge,
    /// Nanoseconds from the begin to the begin of the present sleep; 0: it is awake.
    asleep: Gauge,
}

impl WorkerGauges {
    pub(crate) fn new(begin: Instant) -> Self {
        Self {
            begin,
            turns: Gauge::default(),
            polls: Gauge::default(),
            sleeps: Gauge::default(),
            slept: Gauge::default(),
            asleep: Gauge::default(),
        }
    }

    fn nanoseconds(&self, now: Instant) -> u64 {
        now.saturating_duration_since(self.begin).as_nanos() as u64
    }

    /// It goes to sleep.
    pub(crate) fn sleep(&self, now: Instant) {
        self.sleeps.add(1);
        self.asleep.set(self.nanoseconds(now).max(1));
    }

    /// It is awake again.
    pub(crate) fn wake(&self, now: Instant) {
        self.slept.add(self.nanoseconds(now).saturating_sub(self.asleep.get()));
        self.asleep.set(0);
    }

    /// Time so far in which it did not sleep.
    pub(crate) fn busy(&self, now: Instant) -> Duration {
        let (asleep, now) = (self.asleep.get(), self.nanoseconds(now));
        let end = if asleep == 0 { now } else { asleep };
        Duration::from_nanos(end.saturating_sub(self.slept.get()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn busy_time_is_the_time_awake() {
        let begin = Instant::now();
        let at = |ms| begin + Duration::from_millis(ms);
        let gauges = WorkerGauges::new(begin);
        gauges.sleep(at(10));
        assert_eq!(gauges.busy(at(50)), Duration::from_millis(10));
        gauges.wake(at(100));
        assert_eq!(gauges.busy(at(105)), Duration::from_millis(15));
        assert_eq!(gauges.sleeps.get(), 1);
    }
}
