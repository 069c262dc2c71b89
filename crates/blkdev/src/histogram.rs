//! [`Histogram`] of latencies, written by one thread and read by others; and [`Latency`], a copy of it.

use std::{ops::AddAssign, time::Duration};

use crate::{gauge::Gauge, stamp::TICK};

/// Logarithm of the buckets per doubling. The bounds of a bucket differ by an eighth at most.
const PARTS_LOG2: u32 = 3;
/// Everything below 2^6 ticks (1.024 µs) is in the first bucket.
const FIRST_LOG2: u32 = 6;
/// Everything from 2^33 ticks (137 s) on is in the last one.
const LAST_LOG2: u32 = 33;

/// Number of buckets of a [`Latency`].
pub const BUCKETS: usize = ((LAST_LOG2 - FIRST_LOG2) << PARTS_LOG2) as usize + 2;

/// The bucket of a time in ticks.
#[inline]
fn bucket(ticks: u64) -> usize {
    // The upper bits of a floating-point number are the doubling and, behind it, the part: few instructions, and exact.
    let upper = |ticks: f64| ticks.to_bits() >> (f64::MANTISSA_DIGITS - 1 - PARTS_LOG2);
    let (before, last) = (upper((1_u64 << FIRST_LOG2) as f64) - 1, upper((1_u64 << LAST_LOG2) as f64));
    // Signed, because that is one instruction. A time of 2^63 ticks and more would be in the last bucket, too.
    (upper(ticks as i64 as f64).clamp(before, last) - before) as usize
}

/// The end of a bucket, in ticks. `None`: the last one has none.
fn end(bucket: usize) -> Option<u64> {
    let place = bucket as u32;
    let (doubling, part) = (place >> PARTS_LOG2, u64::from(place & ((1 << PARTS_LOG2) - 1)));
    (bucket < BUCKETS - 1).then(|| ((1 << PARTS_LOG2) + part) << (FIRST_LOG2 + doubling - PARTS_LOG2))
}

/// Counts latencies. One thread writes.
#[derive(Debug)]
pub(crate) struct Histogram {
    buckets: [Gauge; BUCKETS],
    /// The sum of all times, in ticks.
    sum: Gauge,
}

impl Default for Histogram {
    fn default() -> Self {
        Self { buckets: std::array::from_fn(|_| Gauge::default()), sum: Gauge::default() }
    }
}

impl Histogram {
    #[inline]
    pub(crate) fn add(&self, ticks: u64) {
        self.buckets[bucket(ticks)].add(1);
        self.sum.add(ticks);
    }

    pub(crate) fn copy(&self) -> Latency {
        Latency { buckets: self.buckets.iter().map(Gauge::get).collect(), sum: self.sum.get() }
    }
}

/// A histogram of latencies from 1 µs to 137 s. Each doubling has eight buckets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Latency {
    buckets: Vec<u64>,
    /// In ticks.
    sum: u64,
}

impl Default for Latency {
    fn default() -> Self {
        Self { buckets: vec![0; BUCKETS], sum: 0 }
    }
}

impl Latency {
    /// Number of requests.
    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }

    /// The sum of all their times.
    pub fn sum(&self) -> Duration {
        duration(self.sum)
    }

    /// The quantile `q` (0 to 1): so many of the requests took at most this time. Exact within 7 per cent. `None`: there were no
    /// requests.
    pub fn quantile(&self, q: f64) -> Option<Duration> {
        let count = self.count();
        // The request with this number, in the order of their times.
        let rank = ((count as f64 * q).ceil() as u64).clamp(1, count.max(1));
        let mut seen = 0;
        let place = self.buckets.iter().position(|n| {
            seen += n;
            seen >= rank
        })?;
        let begin = place.checked_sub(1).and_then(end).unwrap_or(0);
        Some(duration(end(place).map_or(begin, |end| begin.midpoint(end))))
    }

    /// The buckets in order: the end of each (`None`: it has none) and the number of requests in it.
    pub fn buckets(&self) -> impl Iterator<Item = (Option<Duration>, u64)> {
        self.buckets.iter().enumerate().map(|(place, count)| (end(place).map(duration), *count))
    }

    /// The requests since `before`, an earlier copy of the same histogram.
    pub fn since(&self, before: &Self) -> Self {
        let buckets = self.buckets.iter().zip(&before.buckets).map(|(now, then)| now.saturating_sub(*then)).collect();
        Self { buckets, sum: self.sum.saturating_sub(before.sum) }
    }

    /// A histogram from the counts of all buckets, and the sum. `None`: the number of counts is not [`BUCKETS`].
    pub fn from_parts(buckets: Vec<u64>, sum: Duration) -> Option<Self> {
        let sum = u64::try_from(sum.as_nanos() / u128::from(TICK)).unwrap_or(u64::MAX);
        (buckets.len() == BUCKETS).then_some(Self { buckets, sum })
    }
}

impl AddAssign<&Self> for Latency {
    fn add_assign(&mut self, other: &Self) {
        self.buckets.iter_mut().zip(&other.buckets).for_each(|(sum, more)| *sum += more);
        self.sum += other.sum;
    }
}

fn duration(ticks: u64) -> Duration {
    Duration::from_nanos(ticks.saturating_mul(TICK))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ticks(time: Duration) -> u64 {
        time.as_nanos() as u64 / TICK
    }

    #[test]
    fn buckets_follow_each_other() {
        assert_eq!((bucket(0), bucket(63), bucket(64), bucket(u64::MAX)), (0, 0, 1, BUCKETS - 1));
        for place in 0..BUCKETS - 1 {
            let end = end(place).unwrap();
            assert_eq!((bucket(end - 1), bucket(end)), (place, place + 1), "{end}");
        }
        assert_eq!(end(BUCKETS - 1), None);
    }

    #[test]
    fn a_quantile_is_within_seven_per_cent() {
        let mut time = Duration::from_micros(2);
        while time < Duration::from_secs(100) {
            let histogram = Histogram::default();
            histogram.add(ticks(time));
            let found = histogram.copy().quantile(0.5).unwrap().as_secs_f64() / time.as_secs_f64();
            assert!((0.93..1.07).contains(&found), "{time:?}: {found}");
            time = time * 21 / 20;
        }
    }

    #[test]
    fn quantiles_count_requests() {
        let histogram = Histogram::default();
        assert_eq!(histogram.copy().quantile(0.5), None);
        (1..=100).for_each(|ms| histogram.add(ticks(Duration::from_millis(ms))));
        let copy = histogram.copy();
        let ms = |q| copy.quantile(q).unwrap().as_secs_f64() * 1e3;
        assert!((46.0..54.0).contains(&ms(0.5)) && (92.0..106.0).contains(&ms(0.99)), "{} {}", ms(0.5), ms(0.99));
        assert!(ms(0.0) < 1.1 && (93.0..107.0).contains(&ms(1.0)));
        assert_eq!((copy.count(), copy.sum().as_millis()), (100, 5050));
        assert_eq!(copy.since(&copy), Latency::default());
    }
}
