//! [`Spin`]: whether a worker without anything to do looks again for a moment before it sleeps.
//!
//! To wake a sleeping processor takes longer than to answer a small request, and costs more. So a device that answers soon
//! is waited for awake, and so is a client that has few requests at a time, and the next one soon after each reply. Which
//! they are is found out as hypervisors do for halted processors: a sleep that turns out to have been short makes the next
//! look longer, one that was long makes it shorter, down to none.

use std::time::Duration;

use crate::decaying_max::DecayingMax;

/// How long to look, for one worker.
#[derive(Debug)]
pub(crate) struct Spin {
    max: Duration,
    /// For now. Zero: not at all.
    time: Duration,
    /// The most requests at a time of late.
    recent: DecayingMax,
}

/// With more requests at a time those of clients gather during a sleep, and what that saves is more than what waking up
/// costs. What a device has finished gathers as well while it is looked at.
const SHALLOW: DecayingMax = DecayingMax::of(4);
/// A device that has more requests than that finishes one of them soon, or is slow.
const SOON: Duration = Duration::from_micros(20);
/// A shorter look finds nothing.
const MIN: Duration = Duration::from_micros(10);

impl Spin {
    /// Never longer than `max`.
    pub(crate) fn new(max: Duration) -> Self {
        Self { max, time: Duration::ZERO, recent: DecayingMax::default() }
    }

    /// Counts the requests of a turn: those that were under way at once.
    #[inline]
    pub(crate) fn count(&mut self, requests: usize) {
        self.recent.count(u32::try_from(requests).unwrap_or(u32::MAX));
    }

    /// How long to look after there was last something to do, for what a device has finished or for clients alone.
    #[inline]
    pub(crate) fn time(&self, awaits_device: bool) -> Duration {
        match awaits_device {
            _ if self.recent <= SHALLOW => self.time,
            true => self.time.min(SOON),
            false => Duration::ZERO,
        }
    }

    /// Learns that there was nothing to do for so long, with a sleep at its end.
    #[inline]
    pub(crate) fn slept(&mut self, idle: Duration) {
        self.time = if idle > self.max {
            Some(self.time / 2).filter(|&time| time >= MIN).unwrap_or_default()
        } else {
            (self.time * 2).max(MIN).min(self.max)
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAX: Duration = Duration::from_micros(100);

    #[test]
    fn looks_longer_after_short_sleeps_and_not_at_all_after_long_ones() {
        let mut spin = Spin::new(MAX);
        spin.count(1);
        assert_eq!(spin.time(false), Duration::ZERO, "nothing is known");
        (0..5).for_each(|_| spin.slept(MAX));
        assert_eq!(spin.time(false), MAX);
        (0..4).for_each(|_| spin.slept(2 * MAX));
        assert_eq!(spin.time(false), Duration::ZERO);
        spin.slept(MAX / 2);
        assert_eq!(spin.time(false), MIN);
    }

    #[test]
    fn leaves_many_requests_of_clients_to_gather() {
        let mut spin = Spin::new(MAX);
        (0..5).for_each(|_| spin.slept(MAX));
        spin.count(5);
        assert_eq!((spin.time(false), spin.time(true)), (Duration::ZERO, SOON), "but for devices");
        (0..1000).for_each(|_| spin.count(1));
        assert_eq!(spin.time(false), MAX, "that is long ago");
        spin.count(usize::MAX);
        assert_eq!(spin.time(false), Duration::ZERO);
    }

    #[test]
    fn never_looks_when_it_may_not() {
        let mut spin = Spin::new(Duration::ZERO);
        spin.slept(Duration::ZERO);
        spin.slept(Duration::from_nanos(1));
        assert_eq!(spin.time(false), Duration::ZERO);
    }
}
