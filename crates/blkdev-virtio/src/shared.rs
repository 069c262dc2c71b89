//! [`Shared`]: a window of ring memory that the device may write at any time, behind bounds-checked atomic access.
#![allow(unsafe_code)]

use std::{
    ptr,
    sync::{
        Arc,
        atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering},
    },
};

use blkdev::{Iova, Mapping};

/// A range of a [`Mapping`] that one virtqueue owns in this process. All values in it are little-endian (virtio 1.2, 2.7.1).
///
/// Offsets are bytes from the start of the range and must be aligned to the value's size. Alignment and bounds are checked: a
/// wrong offset panics, and never accesses other memory.
#[derive(Debug)]
pub(crate) struct Shared {
    mapping: Arc<Mapping>,
    base: *mut u8,
    start: usize,
    len: usize,
}

// SAFETY: the pointer refers to memory that the Arc keeps mapped, and every access through it is atomic.
unsafe impl Send for Shared {}

macro_rules! load {
    ($($load:ident, $value:ty, $atomic:ty;)*) => {$(
        #[inline]
        pub(crate) fn $load(&self, at: usize, order: Ordering) -> $value {
            // SAFETY: `at` returns an aligned address within memory that `self.mapping` keeps mapped. The reference from
            // `from_ptr` lives for this access only and is to an atomic, and all threads of this process use atomics.
            <$value>::from_le(unsafe { <$atomic>::from_ptr(self.at(at)) }.load(order))
        }
    )*};
}

macro_rules! store {
    ($($store:ident, $value:ty, $atomic:ty;)*) => {$(
        #[inline]
        pub(crate) fn $store(&self, at: usize, value: $value, order: Ordering) {
            // SAFETY: as for the load.
            unsafe { <$atomic>::from_ptr(self.at(at)) }.store(value.to_le(), order);
        }
    )*};
}

impl Shared {
    /// The `len` bytes of `mapping` from `start` on, cleared to zero.
    pub(crate) fn zeroed(mapping: &Arc<Mapping>, start: usize, len: usize) -> Self {
        let window = Self::window(mapping, start, len);
        // SAFETY: `window` checked that the range lies within the mapping. No device knows of a ring here yet, so nothing else
        // accesses it.
        unsafe { ptr::write_bytes(window.base, 0, len) };
        window
    }

    /// As [`zeroed`](Self::zeroed), for a range in use: it keeps its content.
    pub(crate) fn window(mapping: &Arc<Mapping>, start: usize, len: usize) -> Self {
        assert!(
            start.is_multiple_of(64) && start <= mapping.len() && len <= mapping.len() - start,
            "the window lies in its mapping"
        );
        Self { base: mapping.as_ptr().wrapping_add(start), mapping: Arc::clone(mapping), start, len }
    }

    pub(crate) fn iova(&self, at: usize) -> Iova {
        assert!(at < self.len, "the address lies in the window");
        self.mapping.iova().plus((self.start + at) as u64)
    }

    #[inline]
    fn at<T>(&self, at: usize) -> *mut T {
        assert!(
            at.is_multiple_of(size_of::<T>()) && at <= self.len && size_of::<T>() <= self.len - at,
            "ring access at {at} lies in a window of {}",
            self.len
        );
        self.base.wrapping_add(at).cast()
    }

    load! { load8, u8, AtomicU8; load16, u16, AtomicU16; load32, u32, AtomicU32; load64, u64, AtomicU64; }
    store! { store8, u8, AtomicU8; store16, u16, AtomicU16; store32, u32, AtomicU32; store64, u64, AtomicU64; }
}
