//! [`Stamp`]: the start time of a request in six bytes, so that it fits into a slot.

use std::time::{Duration, Instant};

/// The unit of time, in nanoseconds.
pub(crate) const TICK: u64 = 16;

/// A time in ticks since a clock has begun. It wraps after 52 days.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(Rust, packed(2))]
pub(crate) struct Stamp {
    low: u32,
    high: u16,
}

impl Stamp {
    /// A request that is not counted.
    pub(crate) const NONE: Self = Self::new(u64::MAX);

    #[inline]
    const fn new(ticks: u64) -> Self {
        Self { low: ticks as u32, high: (ticks >> 32) as u16 }
    }

    /// Whether the request is counted.
    #[inline]
    pub(crate) fn is_counted(self) -> bool {
        self.ticks() != Self::NONE.ticks()
    }

    #[inline]
    const fn ticks(self) -> u64 {
        self.low as u64 | (self.high as u64) << 32
    }
}

/// The time of the present turn. Ticks are computed only on demand ([`read`](Self::read)).
#[derive(Debug, Default)]
pub(crate) struct Clock {
    /// When it began, and now.
    span: Option<(Instant, Instant)>,
    ticks: u64,
}

impl Clock {
    #[inline]
    pub(crate) fn set(&mut self, now: Instant) {
        let begin = self.span.map_or(now, |(begin, _)| begin);
        self.span = Some((begin, now));
    }

    /// Computes the ticks, before [`stamp`](Self::stamp) or [`since`](Self::since) in a turn.
    #[inline]
    pub(crate) fn read(&mut self) {
        self.ticks = self.present();
    }

    fn present(&self) -> u64 {
        let passed = self.span.map_or(Duration::ZERO, |(begin, now)| now.saturating_duration_since(begin));
        (passed.as_secs() * 1_000_000_000 + u64::from(passed.subsec_nanos())) / TICK
    }

    #[inline]
    pub(crate) fn stamp(&self) -> Stamp {
        Stamp::new(self.ticks)
    }

    /// Ticks since `stamp`.
    #[inline]
    pub(crate) fn since(&self, stamp: Stamp) -> u64 {
        passed(stamp, self.ticks)
    }

    /// Time since `stamp`.
    pub(crate) fn age(&self, stamp: Stamp) -> Duration {
        Duration::from_nanos(passed(stamp, self.present()) * TICK)
    }
}

/// Ticks from a stamp on.
#[inline]
fn passed(stamp: Stamp, now: u64) -> u64 {
    now.wrapping_sub(stamp.ticks()) & ((1 << 48) - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_age_is_the_time_between_two_turns() {
        let (mut clock, begin) = (Clock::default(), Instant::now());
        clock.set(begin);
        clock.read();
        let stamp = clock.stamp();
        assert_eq!(clock.age(stamp), Duration::ZERO);
        for age in [Duration::from_micros(7), Duration::from_secs(40 * 86400)] {
            clock.set(begin + age);
            clock.read();
            assert_eq!(Duration::from_nanos(clock.since(stamp) * TICK), clock.age(stamp));
            assert!(age - clock.age(stamp) < Duration::from_nanos(TICK));
        }
        // The stamp of a later turn wraps.
        clock.set(begin + Duration::from_secs(51 * 86400));
        clock.read();
        let late = clock.stamp();
        clock.set(begin + Duration::from_secs(61 * 86400));
        assert_eq!(clock.age(late), Duration::from_secs(10 * 86400));
    }
}
