//! [`Stamp`]: when a request began, in six bytes, so that it fits into a slot.

use std::time::{Duration, Instant};

/// The unit of time, in nanoseconds.
pub(crate) const TICK: u64 = 16;

/// A time in ticks since a clock has begun. It wraps after 52 days.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stamp([u16; 3]);

impl Stamp {
    /// A request that is not counted.
    pub(crate) const NONE: Self = Self([u16::MAX; 3]);

    #[inline]
    fn new(ticks: u64) -> Self {
        Self([ticks as u16, (ticks >> 16) as u16, (ticks >> 32) as u16])
    }

    #[inline]
    fn ticks(self) -> u64 {
        u64::from(self.0[0]) | u64::from(self.0[1]) << 16 | u64::from(self.0[2]) << 32
    }
}

/// The time of the present turn.
#[derive(Debug, Default)]
pub(crate) struct Clock {
    begin: Option<Instant>,
    ticks: u64,
}

impl Clock {
    #[inline]
    pub(crate) fn set(&mut self, now: Instant) {
        let passed = now.saturating_duration_since(*self.begin.get_or_insert(now));
        self.ticks = (passed.as_secs() * 1_000_000_000 + u64::from(passed.subsec_nanos())) / TICK;
    }

    #[inline]
    pub(crate) fn stamp(&self) -> Stamp {
        Stamp::new(self.ticks)
    }

    /// Ticks since `stamp`.
    #[inline]
    pub(crate) fn since(&self, stamp: Stamp) -> u64 {
        self.ticks.wrapping_sub(stamp.ticks()) & ((1 << 48) - 1)
    }

    /// Time since `stamp`.
    pub(crate) fn age(&self, stamp: Stamp) -> Duration {
        Duration::from_nanos(self.since(stamp) * TICK)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_age_is_the_time_between_two_turns() {
        let (mut clock, begin) = (Clock::default(), Instant::now());
        clock.set(begin);
        let stamp = clock.stamp();
        assert_eq!(clock.age(stamp), Duration::ZERO);
        for age in [Duration::from_micros(7), Duration::from_secs(40 * 86400)] {
            clock.set(begin + age);
            assert!(age - clock.age(stamp) < Duration::from_nanos(TICK));
        }
        // The stamp of a later turn wraps.
        clock.set(begin + Duration::from_secs(51 * 86400));
        let late = clock.stamp();
        clock.set(begin + Duration::from_secs(61 * 86400));
        assert_eq!(clock.age(late), Duration::from_secs(10 * 86400));
    }
}
