//! [`Gauge`]: a number that one thread writes and others read.

use std::sync::atomic::{AtomicU64, Ordering};

/// A number that one thread writes and others read without a lock. Reads of several gauges are not one consistent view.
#[derive(Debug, Default)]
pub struct Gauge(AtomicU64);

impl Gauge {
    /// Stores a value.
    #[inline]
    pub fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }

    /// Adds to the value. Only one thread may write: an addition of another thread would be lost.
    #[inline]
    pub fn add(&self, more: u64) {
        self.set(self.get().wrapping_add(more));
    }

    /// The present value.
    #[inline]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}
