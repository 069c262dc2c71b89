//! [`Gauge`] and [`Age`]: values that one thread writes and others read.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

#[derive(Debug, Default)]
pub(crate) struct Gauge(AtomicU64);

impl Gauge {
    #[inline]
    pub(crate) fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }

    /// Only the owner may call this.
    #[inline]
    pub(crate) fn add(&self, more: u64) {
        self.set(self.get().wrapping_add(more));
    }

    #[inline]
    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// An age in nanoseconds plus one; 0: none.
#[derive(Debug, Default)]
pub(crate) struct Age(Gauge);

impl Age {
    pub(crate) fn set(&self, age: Option<Duration>) {
        self.0.set(age.map_or(0, |age| u64::try_from(age.as_nanos()).unwrap_or(u64::MAX - 1) + 1));
    }

    pub(crate) fn get(&self) -> Option<Duration> {
        self.0.get().checked_sub(1).map(Duration::from_nanos)
    }
}
