//! [`Window`]: a range of queue memory that the device may write at any time, behind bounds-checked atomic access.
#![allow(unsafe_code)]

use std::{
    ptr, slice,
    sync::{
        Arc,
        atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering},
    },
};

use crate::mem::{Iova, Mapping};

/// A range of a [`Mapping`] that a driver shares with its device: rings, requests, data structures. All values in it are
/// little-endian.
///
/// Offsets are bytes from the start of the range and must be aligned to the value's size. Alignment and bounds are checked: a
/// wrong offset panics, and never accesses other memory. While the window exists, it owns the range in this process.
#[derive(Debug)]
pub struct Window {
    mapping: Arc<Mapping>,
    base: *mut u8,
    start: usize,
    len: usize,
}

// SAFETY: the pointer refers to memory that the Arc keeps mapped, and every access through it is atomic.
unsafe impl Send for Window {}

macro_rules! load {
    ($($load:ident, $value:ty, $atomic:ty;)*) => {$(
        /// Loads the value at byte `at`.
        ///
        /// # Panics
        /// If `at` is not aligned to the value, or the value is not in the window.
        #[inline]
        pub fn $load(&self, at: usize, order: Ordering) -> $value {
            // SAFETY: `at` returns an aligned address within memory that `self.mapping` keeps mapped. The reference from
            // `from_ptr` lives for this access only and is to an atomic, and all threads of this process use atomics.
            <$value>::from_le(unsafe { <$atomic>::from_ptr(self.at(at)) }.load(order))
        }
    )*};
}

macro_rules! store {
    ($($store:ident, $value:ty, $atomic:ty;)*) => {$(
        /// Stores a value at byte `at`.
        ///
        /// # Panics
        /// If `at` is not aligned to the value, or the value is not in the window.
        #[inline]
        pub fn $store(&self, at: usize, value: $value, order: Ordering) {
            // SAFETY: as for the load.
            unsafe { <$atomic>::from_ptr(self.at(at)) }.store(value.to_le(), order);
        }
    )*};
}

impl Window {
    /// The `len` bytes of `mapping` from `start` on, cleared to zero: no device may use them yet.
    ///
    /// # Panics
    /// As [`new`](Self::new).
    pub fn zeroed(mapping: &Arc<Mapping>, start: usize, len: usize) -> Self {
        let window = Self::new(mapping, start, len);
        // SAFETY: `new` checked that the range lies within the mapping, and claimed it: nothing else in this process accesses it.
        unsafe { ptr::write_bytes(window.base, 0, len) };
        window
    }

    /// As [`zeroed`](Self::zeroed), for a range in use: it keeps its content.
    ///
    /// # Panics
    /// If `start` is no multiple of 64, the range is not in the mapping, or a part of it has another owner: a window, or arenas.
    pub fn new(mapping: &Arc<Mapping>, start: usize, len: usize) -> Self {
        assert!(
            start.is_multiple_of(64) && start <= mapping.len() && len <= mapping.len() - start,
            "the window lies in its mapping"
        );
        mapping.claim(start..start + len);
        Self { base: mapping.as_ptr().wrapping_add(start), mapping: Arc::clone(mapping), start, len }
    }

    /// The memory that the window lies in.
    pub fn mapping(&self) -> &Arc<Mapping> {
        &self.mapping
    }

    /// The address of byte `at`, as the device sees it.
    ///
    /// # Panics
    /// If `at` is not in the window.
    #[inline]
    pub fn iova(&self, at: usize) -> Iova {
        assert!(at < self.len, "the address lies in the window");
        self.mapping.iova().plus((self.start + at) as u64)
    }

    #[inline]
    fn at<T>(&self, at: usize) -> *mut T {
        assert!(
            at.is_multiple_of(size_of::<T>()) && at <= self.len && size_of::<T>() <= self.len - at,
            "access at {at} lies in a window of {}",
            self.len
        );
        self.base.wrapping_add(at).cast()
    }

    load! { load8, u8, AtomicU8; load16, u16, AtomicU16; load32, u32, AtomicU32; load64, u64, AtomicU64; }
    store! { store8, u8, AtomicU8; store16, u16, AtomicU16; store32, u32, AtomicU32; store64, u64, AtomicU64; }

    /// Stores zeroes in `count` words of 64 bits from byte `at` on.
    ///
    /// # Panics
    /// If `at` is not aligned to 8 bytes, or the words are not in the window.
    pub fn clear(&self, at: usize, count: usize) {
        for word in self.words(at, count) {
            word.store(0, Ordering::Relaxed);
        }
    }

    /// The `count` words of 64 bits from byte `at` on.
    fn words(&self, at: usize, count: usize) -> &[AtomicU64] {
        let is_inside = at <= self.len && count <= (self.len - at) / 8;
        assert!(at.is_multiple_of(8) && is_inside, "{count} words at {at} lie in a window of {}", self.len);
        // SAFETY: an aligned range within memory that `self.mapping` keeps mapped. The reference is to atomics, and all threads
        // of this process use atomics.
        unsafe { slice::from_raw_parts(self.base.wrapping_add(at).cast(), count) }
    }

    /// A copy of `N` bytes from byte `at` on.
    ///
    /// # Panics
    /// If the bytes are not in the window, or they are 8 or more and `at` is not aligned to 8 bytes.
    pub fn read<const N: usize>(&self, at: usize) -> [u8; N] {
        let mut bytes = [0; N];
        let (words, rest) = bytes.as_chunks_mut::<8>();
        let rest_at = at + 8 * words.len();
        if !words.is_empty() {
            for (word, from) in words.iter_mut().zip(self.words(at, N / 8)) {
                // In memory, the bytes are in order.
                *word = from.load(Ordering::Relaxed).to_ne_bytes();
            }
        }
        for (n, byte) in rest.iter_mut().enumerate() {
            *byte = self.load8(rest_at + n, Ordering::Relaxed);
        }
        bytes
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        self.mapping.release(self.start..self.start + self.len);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_little_endian() {
        let window = Window::zeroed(&Mapping::new(1).unwrap(), 0, 4096);
        window.store64(64, 0x0807_0605_0403_0201, Ordering::Relaxed);
        assert_eq!(window.load64(64, Ordering::Acquire), 0x0807_0605_0403_0201);
        assert_eq!(window.load32(68, Ordering::Relaxed), 0x0807_0605);
        assert_eq!(window.load16(66, Ordering::Relaxed), 0x0403);
        assert_eq!(window.read(64), [1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(window.read(64), [1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0]);
        assert_eq!(window.read(67), [4, 5, 6]);
        window.clear(64, 1);
        assert_eq!(window.read(64), [0; 8]);
    }

    #[test]
    fn a_window_begins_at_its_start_and_keeps_content_unless_it_is_cleared() {
        let mapping = Mapping::new(1).unwrap();
        let all = Window::zeroed(&mapping, 0, mapping.len());
        all.store32(128, 7, Ordering::Relaxed);
        assert_eq!(all.iova(128), mapping.iova().plus(128));
        drop(all);
        let part = Window::new(&mapping, 128, 64);
        assert_eq!((part.load32(0, Ordering::Relaxed), part.iova(4)), (7, mapping.iova().plus(132)));
        drop(part);
        assert_eq!(Window::zeroed(&mapping, 128, 64).load32(0, Ordering::Relaxed), 0);
    }

    fn refuses<R>(act: impl FnOnce() -> R) -> bool {
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(act)).is_err()
    }

    #[test]
    fn accesses_are_checked() {
        let mapping = Mapping::new(1).unwrap();
        let window = Window::zeroed(&mapping, 64, 64);
        for (at, good) in [(0, true), (56, true), (60, false), (64, false), (4, false), (usize::MAX - 7, false)] {
            assert_eq!(refuses(|| window.load64(at, Ordering::Relaxed)), !good, "{at}");
            assert_eq!(refuses(|| window.store64(at, 0, Ordering::Relaxed)), !good, "{at}");
        }
        assert!(refuses(|| window.clear(0, 9)) && refuses(|| window.clear(4, 1)) && refuses(|| window.read::<9>(56)));
        assert!(refuses(|| window.read::<2>(63)) && refuses(|| window.iova(64)));
        for (start, len) in [(128, 2 << 20), (4 << 20, 0), (32, 64)] {
            assert!(refuses(|| Window::new(&mapping, start, len)), "{len} bytes at {start}");
        }
    }

    #[test]
    fn every_byte_has_one_owner() {
        let mapping = Mapping::new(1).unwrap();
        let (one, two) = (Window::zeroed(&mapping, 0, 128), Window::zeroed(&mapping, 128, 64));
        assert!(refuses(|| Window::new(&mapping, 64, 128)) && refuses(|| mapping.arenas(1)));
        drop(one);
        assert!(refuses(|| Window::new(&mapping, 64, 128)), "the second still owns its part");
        drop(two);
        drop(Window::new(&mapping, 64, 128));
        let arenas = mapping.arenas(1);
        drop(arenas);
        assert!(refuses(|| Window::new(&mapping, 0, 64)), "arenas own their memory forever");
    }
}
