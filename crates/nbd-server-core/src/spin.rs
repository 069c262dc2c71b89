//! [`Spin`]: whether an idle worker busy-polls for a moment before it sleeps.
//!
//! Waking a sleeping CPU costs more than answering a small request. So a worker busy-polls if a device answers soon, or if a
//! client sends few requests at a time, each soon after the last reply. The window adapts, as in KVM's halt polling: a sleep that
//! turns out to have been short makes the next window longer, and a long one makes it shorter, down to none.

use std::time::Duration;

use crate::decaying_max::DecayingMax;

/// The polling window of one worker.
#[derive(Debug)]
pub(crate) struct Spin {
    max: Duration,
    /// The present window. Zero: no busy-polling.
    time: Duration,
    /// The largest recent number of requests in one turn.
    recent: DecayingMax,
}

/// With more requests at a time, requests from clients gather during a sleep, which saves more than the wake-up costs.
/// Completions of a device gather even while the worker busy-polls.
const SHALLOW: DecayingMax = DecayingMax::of(4);
/// A device with more requests than that either completes one of them soon, or is slow.
const SOON: Duration = Duration::from_micros(20);
/// A shorter window finds nothing.
const MIN: Duration = Duration::from_micros(10);

impl Spin {
    /// The window never exceeds `max`.
    pub(crate) fn new(max: Duration) -> Self {
        Self { max, time: Duration::ZERO, recent: DecayingMax::default() }
    }

    /// Counts the requests of a turn: the number that were in flight at the same time.
    #[inline]
    pub(crate) fn count(&mut self, requests: usize) {
        self.recent.count(u32::try_from(requests).unwrap_or(u32::MAX));
    }

    /// The window, measured from the last work. `awaits_device`: a device has requests in flight; otherwise only clients can wake
    /// the worker.
    #[inline]
    pub(crate) fn time(&self, awaits_device: bool) -> Duration {
        match awaits_device {
            _ if self.recent <= SHALLOW => self.time,
            true => self.time.min(SOON),
            false => Duration::ZERO,
        }
    }

    /// Reports an idle period that ended with a sleep, and its total length.
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
    fn polls_longer_after_short_sleeps_and_not_at_all_after_long_ones() {
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
    fn does_not_poll_while_many_client_requests_gather() {
        let mut spin = Spin::new(MAX);
        (0..5).for_each(|_| spin.slept(MAX));
        spin.count(5);
        assert_eq!((spin.time(false), spin.time(true)), (Duration::ZERO, SOON), "but for devices");
        (0..1000).for_each(|_| spin.count(1));
        assert_eq!(spin.time(false), MAX, "the large count was long ago");
        spin.count(usize::MAX);
        assert_eq!(spin.time(false), Duration::ZERO);
    }

    #[test]
    fn never_polls_when_disabled() {
        let mut spin = Spin::new(Duration::ZERO);
        spin.slept(Duration::ZERO);
        spin.slept(Duration::from_nanos(1));
        assert_eq!(spin.time(false), Duration::ZERO);
    }
}
