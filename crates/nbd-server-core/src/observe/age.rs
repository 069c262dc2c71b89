//! [`Age`]: the age of something that may not exist, as a gauge.

use std::time::Duration;

use blkdev::Gauge;

/// An age in nanoseconds plus one; 0: none.
#[derive(Debug, Default)]
pub(crate) struct Age(Gauge);

impl Age {
    pub(crate) fn set(&self, age: Option<Duration>) {
        self.0.set(age.map_or(0, |age| u64::try_from(age.as_nanos()).unwrap_or(u64::MAX - 1).saturating_add(1)));
    }

    pub(crate) fn get(&self) -> Option<Duration> {
        self.0.get().checked_sub(1).map(Duration::from_nanos)
    }
}
