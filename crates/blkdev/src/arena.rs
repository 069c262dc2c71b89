//! [`Arena`] hands out runs of pages of a [`Mapping`]. A [`Buf`] owns such a run, and frees it when dropped.
#![allow(unsafe_code)]

use std::{
    ops::Range,
    ptr,
    sync::{
        Arc,
        atomic::{AtomicU8, AtomicU64, Ordering},
    },
};

use crate::mem::{Iova, Mapping};

/// Unit of allocation: 4096 bytes.
pub const PAGE: usize = 4096;

/// An allocator for a part of a [`Mapping`], with one owner.
///
/// Allocation always takes the lowest run that fits, so that a light load reuses the same, cache-warm pages.
#[derive(Debug)]
pub struct Arena {
    pool: Arc<Pool>,
    /// Words of `used` that [`alloc`](Self::alloc) leaves to [`alloc_reserved`](Self::alloc_reserved).
    reserved: usize,
    /// Pages below this were handed out since the last [`trim`](Self::trim); pages below `resident` since the one before.
    recent: usize,
    resident: usize,
    /// Pages below this are never returned to the system: their owner keeps them.
    floor: usize,
}

/// Pages for each word of the bitmap.
const WORD: usize = 64;

/// Shared by an `Arena` and its `Buf`s: a bit for each page, set while the page has an owner.
#[derive(Debug)]
struct Pool {
    mapping: Arc<Mapping>,
    /// First byte, as an offset in the mapping.
    start: usize,
    pages: usize,
    used: Box<[AtomicU64]>,
}

impl Arena {
    pub(crate) fn new(mapping: Arc<Mapping>, start: usize, len: usize) -> Self {
        let pages = (len / PAGE).min(u32::MAX as usize);
        mapping.enter();
        let used = (0..pages.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        Self { pool: Arc::new(Pool { mapping, start, pages, used }), reserved: 0, recent: 0, resident: 0, floor: 0 }
    }

    /// The memory that it is a part of.
    pub(crate) fn mapping(&self) -> &Arc<Mapping> {
        &self.pool.mapping
    }

    /// Whether other memory [takes the place](Mapping::retire) of this one.
    #[inline]
    pub(crate) fn is_retired(&self) -> bool {
        self.pool.mapping.successor().is_some()
    }

    /// Moves to the same part of the newest memory that takes the place of this one. Buffers stay where they are.
    pub(crate) fn move_on(&mut self) {
        let mut newest = &self.pool.mapping;
        while let Some(newer) = newest.successor() {
            newest = newer;
        }
        if !Arc::ptr_eq(newest, &self.pool.mapping) {
            // No other arena has this part: those of the old memory have theirs, and each moves there.
            let fresh = Self::new(Arc::clone(newest), self.pool.start, self.pool.pages * PAGE);
            *self = Self { reserved: self.reserved, ..fresh };
        }
    }

    /// Reserves the first `len` bytes for [`alloc_reserved`](Self::alloc_reserved), rounded up to 256 KiB.
    pub(crate) fn reserve(&mut self, len: usize) {
        self.reserved = len.div_ceil(WORD * PAGE).min(self.pool.used.len());
    }

    /// Returns a page-aligned buffer of `len` bytes with undefined content. `None`: no run of that length is free now; try again
    /// when a `Buf` was dropped. A length of 0 always succeeds.
    pub fn alloc(&mut self, len: usize) -> Option<Buf> {
        self.alloc_with_margins(0, len, 0)
    }

    /// As [`alloc`](Self::alloc), with additional room of `before` and `after` bytes for [`Buf::widen`].
    pub(crate) fn alloc_with_margins(&mut self, before: usize, len: usize, after: usize) -> Option<Buf> {
        let words = self.reserved..self.pool.used.len();
        self.alloc_in(words, before, len, after)
    }

    /// As [`alloc_with_margins`](Self::alloc_with_margins), from the reserved bytes.
    pub(crate) fn alloc_reserved(&mut self, before: usize, len: usize, after: usize) -> Option<Buf> {
        self.alloc_in(0..self.reserved, before, len, after)
    }

    #[inline(always)]
    fn alloc_in(&mut self, words: Range<usize>, before: usize, len: usize, after: usize) -> Option<Buf> {
        let whole = before + len + after;
        // So all parts fit into u32, as page numbers do (see `new`).
        if whole > u32::MAX as usize {
            return None;
        }
        let pages = whole.div_ceil(PAGE);
        let page = self.pool.take(words, pages)?;
        if page + pages > self.recent {
            self.recent = page + pages;
        }
        Some(Buf {
            pool: Arc::clone(&self.pool),
            page: page as u32,
            pages: pages as u32,
            start: before as u32,
            len: len as u32,
        })
    }

    /// Excludes the pages that were handed out so far from [`trim`](Self::trim): their owner keeps them.
    pub(crate) fn keep(&mut self) {
        self.floor = std::mem::take(&mut self.recent);
    }

    /// Returns a buffer of no bytes.
    pub(crate) fn empty(&self) -> Buf {
        Buf { pool: Arc::clone(&self.pool), page: 0, pages: 0, start: 0, len: 0 }
    }

    /// Free bytes, without the reserved ones. They need not be contiguous.
    pub fn free(&self) -> usize {
        let used = |word: &AtomicU64| word.load(Ordering::Relaxed).count_ones() as usize;
        let used: usize = self.pool.used[self.reserved..].iter().map(used).sum();
        (self.pool.pages - (self.reserved * WORD).min(self.pool.pages) - used) * PAGE
    }

    /// Returns the memory of free pages to the system, if they were not handed out since the last call. `false`: nothing is left
    /// to return. Not for memory that a device has pinned.
    pub(crate) fn trim(&mut self) -> bool {
        let from = std::mem::take(&mut self.recent).max(self.floor);
        let (mut page, mut kept) = (from, from);
        while page < self.resident {
            let word = self.pool.word_from(page);
            let left = (WORD - page % WORD).min(self.resident - page);
            let used = (word.trailing_ones() as usize).min(left);
            let free = ((word >> used.min(WORD - 1)).trailing_zeros() as usize).min(left - used);
            if used < left && free > 0 {
                // Nothing else can claim it in the meantime, because only this arena claims pages.
                let at = self.pool.start + (page + used) * PAGE;
                self.pool.mapping.discard(at..at + free * PAGE);
            }
            if used > 0 {
                // A later call returns it, when it is free.
                kept = page + used;
            }
            page += (used + free).max(1);
        }
        self.resident = kept;
        kept > self.floor
    }

    /// Free bytes, including the reserved ones.
    pub(crate) fn unused(&self) -> usize {
        let used = |word: &AtomicU64| word.load(Ordering::Relaxed).count_ones() as usize;
        (self.pool.pages - self.pool.used.iter().map(used).sum::<usize>()) * PAGE
    }

    /// Total bytes in whole pages, without the reserved ones.
    pub fn capacity(&self) -> usize {
        self.pool.pages.saturating_sub(self.reserved * WORD) * PAGE
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.mapping.leave();
    }
}

impl Pool {
    /// Claims the lowest run of `want` free pages. Only the `Arena` claims pages, through `&mut`; other threads only free them.
    /// So a bit seen clear stays clear until it is set here.
    #[inline]
    fn take(&self, words: Range<usize>, want: usize) -> Option<usize> {
        if want == 1 { self.take_one(words) } else { self.take_run(words, want) }
    }

    /// A single page, for small requests.
    #[inline]
    fn take_one(&self, words: Range<usize>) -> Option<usize> {
        let first = words.start;
        let (at, word, bits) = self.used[words].iter().enumerate().find_map(|(at, word)| {
            let bits = word.load(Ordering::Relaxed);
            (bits != u64::MAX).then_some((at, word, bits))
        })?;
        let free = bits.trailing_ones() as usize;
        let page = (first + at) * WORD + free;
        if page >= self.pages {
            return None;
        }
        // As in `take_run`.
        word.fetch_or(1 << free, Ordering::Acquire);
        Some(page)
    }

    fn take_run(&self, words: Range<usize>, want: usize) -> Option<usize> {
        let (mut page, end) = (words.start * WORD, self.pages.min(words.end * WORD));
        while page + want <= end {
            let word = self.word_from(page);
            let in_use = word.trailing_ones() as usize;
            if in_use > 0 {
                page += in_use;
                continue;
            }
            let mut run = 0;
            while run < want {
                let left = 64 - (page + run) % 64;
                let free = (self.word_from(page + run).trailing_zeros() as usize).min(left);
                run += free;
                if free < left {
                    break;
                }
            }
            if run >= want {
                self.each_word(page..page + want, |word, mask| {
                    // Acquire: pairs with the Release in `give_back`, so that the last owner's accesses are over.
                    word.fetch_or(mask, Ordering::Acquire);
                });
                return Some(page);
            }
            page += run;
        }
        None
    }

    fn give_back(&self, run: Range<usize>) {
        self.each_word(run, |word, mask| {
            let before = word.fetch_and(!mask, Ordering::Release);
            debug_assert_eq!(before & mask, mask, "a page is freed by its owner");
        });
    }

    /// The bits from `page` to the end of its word, lowest first, with zeroes above them.
    fn word_from(&self, page: usize) -> u64 {
        self.used.get(page / 64).map_or(0, |word| word.load(Ordering::Relaxed) >> (page % 64))
    }

    #[inline]
    fn each_word(&self, run: Range<usize>, mut act: impl FnMut(&AtomicU64, u64)) {
        let mut page = run.start;
        while page < run.end {
            let bits = (64 - page % 64).min(run.end - page);
            act(&self.used[page / 64], (u64::MAX >> (64 - bits)) << (page % 64));
            page += bits;
        }
    }
}

/// A contiguous piece of device-visible memory with one owner. Dropping it returns its pages to its arena.
///
/// The device may write here at any time, and so may the peer process of a shared mapping. So the content is only copied, never
/// borrowed.
#[derive(Debug)]
pub struct Buf {
    pool: Arc<Pool>,
    page: u32,
    /// Pages that this `Buf` owns and frees; 0 for a [loan](Self::lend) and after [`abandon`](Self::abandon).
    pages: u32,
    /// First byte of the content, relative to the first page.
    start: u32,
    len: u32,
}

impl Buf {
    /// Length in bytes.
    #[inline]
    pub fn len(&self) -> usize {
        self.len as usize
    }

    /// Whether the length is 0: allocated so, or after [`abandon`](Self::abandon).
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The I/O address of the first byte.
    #[inline]
    pub fn iova(&self) -> Iova {
        self.pool.mapping.iova().plus(self.offset() as u64)
    }

    /// The address of the first byte in this process, for a system call or a copy. The device may write here at any time.
    #[inline]
    pub fn as_ptr(&self) -> *mut u8 {
        self.pool.mapping.as_ptr().wrapping_add(self.offset())
    }

    /// The first byte's offset in the mapping's memfd.
    #[inline]
    pub fn offset(&self) -> usize {
        self.pool.start + self.page as usize * PAGE + self.start as usize
    }

    /// The mapping that contains it.
    pub fn mapping(&self) -> &Arc<Mapping> {
        &self.pool.mapping
    }

    /// Copies `bytes` into the buffer, starting at its byte `at`.
    ///
    /// # Panics
    /// If they do not fit.
    #[inline]
    pub fn copy_from(&mut self, at: usize, bytes: &[u8]) {
        self.check(at, bytes.len());
        // SAFETY: the range was checked to lie in this Buf's window, which lies in its own pages of a mapping that the Arc keeps
        // alive.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), self.as_ptr().add(at), bytes.len()) }
    }

    /// Copies the buffer's content, starting at its byte `at`, and fills `bytes`.
    ///
    /// # Panics
    /// If the buffer holds fewer bytes.
    #[inline]
    pub fn copy_to(&self, at: usize, bytes: &mut [u8]) {
        self.check(at, bytes.len());
        // SAFETY: as in `copy_from`.
        unsafe { ptr::copy_nonoverlapping(self.as_ptr().add(at), bytes.as_mut_ptr(), bytes.len()) }
    }

    /// Copies `len` bytes of `from`, starting at its byte `from_at`, to this buffer, starting at its byte `at`.
    ///
    /// # Panics
    /// If either buffer is too short.
    pub fn copy_buf(&mut self, at: usize, from: &Self, from_at: usize, len: usize) {
        self.check(at, len);
        from.check(from_at, len);
        // SAFETY: both ranges were checked; `ptr::copy` allows overlap, which occurs with a loan of this same Buf.
        unsafe { ptr::copy(from.as_ptr().add(from_at), self.as_ptr().add(at), len) }
    }

    /// Sets `len` bytes to zero, starting at byte `at`.
    ///
    /// # Panics
    /// If the buffer is too short.
    #[inline]
    pub fn zero(&mut self, at: usize, len: usize) {
        self.check(at, len);
        // SAFETY: as in `copy_from`.
        unsafe { ptr::write_bytes(self.as_ptr().add(at), 0, len) }
    }

    /// Whether `len` bytes from byte `at` on are all zero. Does not synchronise with concurrent writes of a device or peer.
    ///
    /// For most data this reads memory once, because its first word is not zero.
    ///
    /// # Panics
    /// If the buffer is too short.
    #[inline]
    pub fn is_zero(&self, at: usize, len: usize) -> bool {
        self.check(at, len);
        let (from, to) = (self.offset() + at, self.offset() + at + len);
        let first = from.next_multiple_of(8).min(to);
        let end = (to & !7).max(first);
        // Sample some words first: much data begins with zeroes.
        let middle = first + (end - first) / 16 * 8;
        if first < end && [first, middle, end - 8].into_iter().any(|at| self.word(at) != 0) {
            return false;
        }
        let byte = |at: usize| {
            // SAFETY: the byte was checked to lie in this Buf's window. A byte is always aligned. Atomic, because the device may
            // write here.
            unsafe { AtomicU8::from_ptr(self.pool.mapping.as_ptr().add(at)) }.load(Ordering::Relaxed)
        };
        let line = |at: usize| (at..end.min(at + 64)).step_by(8).fold(0, |all, at| all | self.word(at));
        (from..first).chain(end..to).all(|at| byte(at) == 0) && (first..end).step_by(64).all(|at| line(at) == 0)
    }

    /// The aligned word at an offset of the mapping. The caller has checked that it lies in this buffer.
    #[inline]
    fn word(&self, at: usize) -> u64 {
        debug_assert!(at.is_multiple_of(8) && at >= self.offset() && at + 8 <= self.offset() + self.len());
        // SAFETY: the word lies in the window of this Buf (see above), and is aligned because mappings are. Atomic, because the
        // device may write here.
        unsafe { AtomicU64::from_ptr(self.pool.mapping.as_ptr().add(at).cast()) }.load(Ordering::Relaxed)
    }

    /// Splits the buffer at a page boundary of its memory. This one keeps its first `at` bytes, the other one gets the rest. Each
    /// frees its own pages.
    ///
    /// # Panics
    /// If byte `at` is not the first of a page, or lies outside the buffer.
    pub fn split_off(&mut self, at: usize) -> Self {
        self.check(at, 0);
        let end = self.start as usize + at;
        assert!(end.is_multiple_of(PAGE) && end < self.pages as usize * PAGE, "a Buf is split between its own pages");
        let kept = (end / PAGE) as u32;
        let rest = Self {
            pool: Arc::clone(&self.pool),
            page: self.page + kept,
            pages: self.pages - kept,
            start: 0,
            len: self.len - at as u32,
        };
        (self.pages, self.len) = (kept, at as u32);
        rest
    }

    /// Returns a copy of the content. For tests and cold paths.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.len()];
        self.copy_to(0, &mut bytes);
        bytes
    }

    /// Leaks the memory on purpose: a device that cannot be stopped may still write to it, so it must never have another owner.
    /// Leaves an empty buffer.
    pub fn abandon(&mut self) {
        (self.pages, self.len) = (0, 0);
    }

    /// Whether it lies in memory of this arena.
    pub(crate) fn is_of(&self, arena: &Arena) -> bool {
        Arc::ptr_eq(&self.pool, &arena.pool)
    }

    /// Whether it is a part of another buffer, which frees the memory.
    #[inline]
    pub(crate) fn is_loan(&self) -> bool {
        self.pages == 0 && self.len > 0
    }

    /// Moves the memory to another buffer. Leaves an empty one.
    #[inline]
    pub(crate) fn take(&mut self) -> Self {
        let taken = Self { pool: Arc::clone(&self.pool), ..*self };
        (self.pages, self.len) = (0, 0);
        taken
    }

    /// Takes all free pages of the buffer's arena for good.
    #[cold]
    pub(crate) fn exhaust(&self) {
        for (n, word) in self.pool.used.iter().enumerate() {
            let pages = (self.pool.pages - n * WORD).min(WORD);
            word.fetch_or(u64::MAX >> (WORD - pages), Ordering::Relaxed);
        }
    }

    /// Moves both ends outwards, into margins that were allocated. `false`: there is no room, and nothing changes.
    pub(crate) fn widen(&mut self, before: usize, after: usize) -> bool {
        let room = self.pages as usize * PAGE;
        let Some(start) = (self.start as usize).checked_sub(before) else { return false };
        let len = before + self.len() + after;
        if start + len > room {
            return false;
        }
        // Both fit into u32, as `room` did when it was allocated.
        (self.start, self.len) = (start as u32, len as u32);
        true
    }

    /// Moves both ends inwards.
    pub(crate) fn narrow(&mut self, before: usize, after: usize) {
        assert!(before + after <= self.len(), "a window is narrowed within itself");
        self.start += before as u32;
        self.len -= (before + after) as u32;
    }

    /// Returns a part of this buffer that frees nothing when dropped. Only for [`Channel`](crate::Channel), which keeps `self`
    /// until the loan has come back, and abandons `self` if it never does.
    pub(crate) fn lend(&self, at: usize, len: usize) -> Self {
        self.check(at, len);
        Self { pool: Arc::clone(&self.pool), page: self.page, pages: 0, start: self.start + at as u32, len: len as u32 }
    }

    #[inline]
    fn check(&self, at: usize, len: usize) {
        assert!(at <= self.len() && len <= self.len() - at, "{len} bytes at {at} lie within a Buf of {}", self.len);
    }
}

impl Drop for Buf {
    #[inline]
    fn drop(&mut self) {
        if self.pages > 0 {
            let page = self.page as usize;
            self.pool.give_back(page..page + self.pages as usize);
        }
    }
}

impl Mapping {
    /// Divides the memory into `count` arenas of equal size, in whole pages.
    ///
    /// # Panics
    /// If called twice, or if there is a [`Window`](crate::window::Window): every byte has one owner.
    pub fn arenas(self: &Arc<Self>, count: usize) -> Vec<Arena> {
        // Buffers may outlive the arenas, so this claim has no end.
        self.claim(0..self.len());
        let each = self.len() / count.max(1) / PAGE * PAGE;
        (0..count).map(|n| Arena::new(Arc::clone(self), n * each, each)).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::os::{fd::AsFd, unix::fs::MetadataExt};

    use super::*;

    fn arena(pages: usize) -> Arena {
        let mapping = Mapping::new(pages * PAGE).unwrap();
        Arena::new(mapping, 0, pages * PAGE)
    }

    #[test]
    fn lowest_run_first_and_none_when_full() {
        let mut a = arena(130);
        let (one, all) = (a.alloc(1).unwrap(), a.alloc(129 * PAGE).unwrap());
        assert_eq!((one.offset(), all.offset(), a.free()), (0, PAGE, 0));
        assert!(a.alloc(1).is_none());
        drop(one);
        assert_eq!(a.alloc(PAGE).unwrap().offset(), 0);
        drop(all);
        assert_eq!(a.free(), 130 * PAGE);
    }

    #[test]
    fn reserved_memory_is_handed_out_separately() {
        let mut a = arena(3 * WORD);
        a.reserve(1);
        assert_eq!(a.free(), 2 * WORD * PAGE);
        let rest = a.alloc(2 * WORD * PAGE).unwrap();
        assert!(a.alloc(1).is_none() && a.alloc_reserved(0, WORD * PAGE + 1, 0).is_none());
        let aside = a.alloc_reserved(0, WORD * PAGE, 0).unwrap();
        assert_eq!((aside.offset(), rest.offset(), a.free()), (0, WORD * PAGE, 0));
    }

    #[test]
    fn trimming_returns_memory_that_was_not_used_recently_and_none_in_use() {
        let mapping = Mapping::new(512 * PAGE).unwrap();
        let mut a = Arena::new(Arc::clone(&mapping), 0, 512 * PAGE);
        let blocks = || std::fs::File::from(mapping.as_fd().try_clone_to_owned().unwrap()).metadata().unwrap().blocks();
        let mut bufs: Vec<Buf> = (0..100).map(|_| a.alloc(3 * PAGE).unwrap()).collect();
        for buf in &mut bufs {
            buf.copy_from(0, &[7; 3 * PAGE]);
        }
        let kept = bufs.swap_remove(50);
        drop(bufs);
        assert!(a.trim(), "all of it was used recently");
        assert!(kept.is_zero(0, 0) && kept.to_vec() == [7; 3 * PAGE]);
        assert!(a.trim(), "some is in use");
        assert_eq!(kept.to_vec(), [7; 3 * PAGE]);
        assert_eq!(blocks() * 512, 3 * PAGE as u64, "only memory in use is left");
        drop(kept);
        assert!(!a.trim());
        assert_eq!(blocks(), 0, "memory that was in use is returned later");
        let again = a.alloc(200 * PAGE).unwrap();
        assert!(again.is_zero(0, again.len()));
    }

    #[test]
    fn random_runs_never_overlap_and_all_come_back() {
        let mut a = arena(300);
        let mut seed = 1u64;
        let mut live: Vec<Buf> = Vec::new();
        for _ in 0..20_000 {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let draw = (seed >> 33) as usize;
            if draw.is_multiple_of(3) && !live.is_empty() {
                live.swap_remove(draw % live.len());
            } else if let Some(b) = a.alloc(draw % (70 * PAGE) + 1) {
                let end = b.offset() + b.len();
                assert!(end <= 300 * PAGE);
                assert!(live.iter().all(|o| end <= o.offset() || o.offset() + o.len() <= b.offset()));
                live.push(b);
            }
        }
        live.clear();
        assert_eq!(a.free(), a.capacity());
    }

    #[test]
    fn an_abandoned_run_is_never_handed_out_again() {
        let mut a = arena(2);
        let mut b = a.alloc(PAGE).unwrap();
        b.abandon();
        assert!(b.is_empty());
        drop(b);
        assert_eq!((a.free(), a.alloc(1).unwrap().offset()), (PAGE, PAGE));
    }

    #[test]
    fn windows_move_within_their_margins() {
        let mut a = arena(4);
        let mut b = a.alloc_with_margins(100, 50, 362).unwrap();
        b.copy_from(0, &[7; 50]);
        assert!(!b.widen(101, 0));
        assert!(b.widen(100, 362));
        assert_eq!((b.offset(), b.len()), (0, 512));
        b.narrow(100, 362);
        assert_eq!(b.to_vec(), [7; 50]);
        let mut loan = b.lend(10, 5);
        loan.zero(0, 5);
        drop(loan);
        assert_eq!(b.to_vec()[9..16], [7, 0, 0, 0, 0, 0, 7]);
    }

    #[test]
    fn zeroes_are_distinguished_from_data() {
        let mut a = arena(2);
        for (before, len) in [(0, 0), (0, 8), (1, 5), (3, 6), (5, 60), (0, 64), (7, 1000), (0, 4096)] {
            let mut b = a.alloc_with_margins(before, len, 100).unwrap();
            // The bytes around are not read.
            assert!(b.widen(before, 100));
            b.copy_from(0, &vec![0xff; before + len + 100]);
            b.narrow(before, 100);
            b.zero(0, len);
            assert!(b.is_zero(0, len), "{len} after {before}");
            for at in 0..len {
                b.copy_from(at, &[1]);
                assert!(!b.is_zero(0, len) && b.is_zero(0, at) && b.is_zero(at + 1, len - at - 1), "{at} of {len}");
                b.zero(at, 1);
            }
        }
    }

    #[test]
    fn each_part_of_a_buffer_gives_its_pages_back() {
        let mut a = arena(8);
        let mut b = a.alloc_with_margins(100, 5 * PAGE, 100).unwrap();
        let content: Vec<u8> = (0..5 * PAGE).map(|n| (n / 7) as u8).collect();
        b.copy_from(0, &content);
        let mut rest = b.split_off(PAGE - 100);
        let last = rest.split_off(3 * PAGE);
        assert_eq!([b.to_vec(), rest.to_vec(), last.to_vec()].concat(), content);
        assert_eq!(a.free(), 2 * PAGE);
        drop(rest);
        assert_eq!(a.free(), 5 * PAGE);
        drop((b, last));
        assert_eq!(a.free(), 8 * PAGE);
    }

    #[test]
    #[should_panic(expected = "lie within a Buf")]
    fn copies_are_checked() {
        arena(1).alloc(8).unwrap().copy_from(4, &[0; 5]);
    }
}
