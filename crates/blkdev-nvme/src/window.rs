//! [`Window`]: a window of queue memory that the device may write at any time, behind bounds-checked atomic access.
#![allow(unsafe_code)]

use std::sync::{
    Arc,
    atomic::{AtomicU8, AtomicU64, Ordering},
};

use blkdev::Mapping;

/// Memory from which a controller reads commands, and to which it writes completions and data structures. Little-endian.
///
/// Offsets are bytes from its start and must be aligned to the value's size. Alignment and bounds are checked.
#[derive(Debug)]
pub(crate) struct Window {
    mapping: Arc<Mapping>,
}

impl Window {
    /// A whole new mapping, which no device knows yet: it is zero.
    pub(crate) fn new(mapping: &Arc<Mapping>) -> Self {
        Self { mapping: Arc::clone(mapping) }
    }

    pub(crate) fn mapping(&self) -> &Arc<Mapping> {
        &self.mapping
    }

    /// The address of byte `at`, as the device sees it behind an IOMMU.
    #[inline]
    pub(crate) fn iova(&self, at: usize) -> u64 {
        assert!(at < self.mapping.len(), "the address lies in the window");
        self.mapping.iova().get() + at as u64
    }

    #[inline]
    fn at<T>(&self, at: usize) -> *mut T {
        let len = self.mapping.len();
        assert!(
            at.is_multiple_of(size_of::<T>()) && at <= len && size_of::<T>() <= len - at,
            "queue access at {at} lies in the window of {len}"
        );
        self.mapping.as_ptr().wrapping_add(at).cast()
    }

    #[inline]
    pub(crate) fn load64(&self, at: usize, order: Ordering) -> u64 {
        // SAFETY: `at` returns an aligned address within memory that `self.mapping` keeps mapped. The reference from `from_ptr`
        // lives for this access only and is to an atomic, and all threads of this process use atomics.
        u64::from_le(unsafe { AtomicU64::from_ptr(self.at(at)) }.load(order))
    }

    #[inline]
    pub(crate) fn store64(&self, at: usize, value: u64) {
        // SAFETY: as for the load. The doorbell write makes it visible to the device.
        unsafe { AtomicU64::from_ptr(self.at(at)) }.store(value.to_le(), Ordering::Relaxed);
    }

    /// A copy of `N` bytes.
    pub(crate) fn read<const N: usize>(&self, at: usize) -> [u8; N] {
        // SAFETY: as for `load64`.
        std::array::from_fn(|n| unsafe { AtomicU8::from_ptr(self.at(at + n)) }.load(Ordering::Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_little_endian() {
        let window = Window::new(&Mapping::new(1).unwrap());
        window.store64(64, 0x0807_0605_0403_0201);
        assert_eq!(window.load64(64, Ordering::Acquire), 0x0807_0605_0403_0201);
        assert_eq!(window.read(64), [1, 2, 3, 4, 5, 6, 7, 8]);
    }

    #[test]
    #[should_panic(expected = "lies in the window")]
    fn accesses_are_checked() {
        Window::new(&Mapping::new(1).unwrap()).load64(2 << 20, Ordering::Relaxed);
    }
}
