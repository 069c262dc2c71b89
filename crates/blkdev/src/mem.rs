//! [`Mapping`]: shared memory that is mapped once and registered with devices once. [`Pages`]: private memory.
#![allow(unsafe_code)]

#[cfg(feature = "fuzz")]
use std::cell::RefCell;
use std::{
    io,
    ops::{Deref, DerefMut, Range},
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    ptr::NonNull,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

#[cfg(feature = "fuzz")]
use crate::fuzz::{clock::Clock, spare::Spares};

/// An I/O address: an address as the device sees it. Only a [`Mapping`] or a [`Buf`](crate::Buf) creates one, so it always lies
/// in one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Iova(u64);

impl Iova {
    /// Returns the address, for a descriptor.
    pub fn get(self) -> u64 {
        self.0
    }

    /// Returns the address `bytes` further on. The caller must stay within the `Mapping` or `Buf` that `self` came from.
    #[must_use]
    pub fn plus(self, bytes: u64) -> Self {
        Self(self.0 + bytes)
    }
}

/// A memfd that is mapped shared while this lives. Aligned to 2 MiB; in huge pages if the system has some.
///
/// The kernel and other processes may write to it at any time, so this code never creates a Rust reference into it.
#[derive(Debug)]
pub struct Mapping {
    base: NonNull<u8>,
    len: usize,
    fd: OwnedFd,
    shareable: bool,
    /// The ranges that have an owner.
    claims: Mutex<Vec<Range<usize>>>,
    /// Number of arenas that are left, or whose buffers are.
    users: AtomicUsize,
    /// See [`retire`](Self::retire).
    successor: OnceLock<Arc<Self>>,
    /// End of the memory that may have been written since it was last [cleared](Self::clear).
    #[cfg(feature = "fuzz")]
    touched: AtomicUsize,
}

/// Devices and the IOMMU need large, aligned pieces (SPDK registers memory in steps of 2 MiB).
const ALIGN: usize = 2 << 20;

/// The size of the memory cannot change. A peer can add other seals: then the memory is not returned to the system while it is idle,
/// or not before the peer ends. Nothing can forbid writes while this process maps the memory.
const SEALS: libc::c_int = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW;

/// Mappings are placed below 2^38 if there is room. Then the virtual address is also the I/O address, even behind an IOMMU of 39
/// bits. The process's address space is the allocator of I/O addresses, and there is no table.
const LOWEST: usize = 1 << 32;
const HIGHEST: usize = 1 << 38;

impl Mapping {
    /// Maps `len` bytes, rounded up to 2 MiB, zeroed.
    ///
    /// # Errors
    /// No memory, address space or file descriptor is left.
    pub fn new(len: usize) -> io::Result<Arc<Self>> {
        let len = len.max(1).checked_next_multiple_of(ALIGN).ok_or(io::ErrorKind::OutOfMemory)?;
        if exceeds_file_size(len) {
            return Self::unshareable(len).map(Arc::new);
        }
        // Huge pages are reserved by the administrator, or absent. If there are too few, mmap fails at once.
        fresh(len, || Self::with(len, libc::MFD_HUGETLB).or_else(|_| Self::with(len, 0)))
    }

    /// As [`new`](Self::new), for a device behind another process, and never in reserved huge pages. Such a process could punch a
    /// hole into the file and so free a huge page; then the next access here would raise SIGBUS if no huge page is left.
    /// Transparent huge pages do not have this problem.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn shared(len: usize) -> io::Result<Arc<Self>> {
        let len = len.max(1).checked_next_multiple_of(ALIGN).ok_or(io::ErrorKind::OutOfMemory)?;
        if exceeds_file_size(len) {
            return Self::unshareable(len).map(Arc::new);
        }
        fresh(len, || Self::with(len, 0))
    }

    fn with(len: usize, flags: libc::c_uint) -> io::Result<Self> {
        // SAFETY: the name is a NUL-terminated constant; the new descriptor has no other owner.
        let fd = unsafe {
            let fd = libc::memfd_create(c"blkdev".as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING | flags);
            if fd < 0 {
                return Err(io::Error::last_os_error());
            }
            OwnedFd::from_raw_fd(fd)
        };
        let size = libc::off_t::try_from(len).map_err(|_| io::ErrorKind::OutOfMemory)?;
        // SAFETY: plain system call on a descriptor that we own.
        if unsafe { libc::ftruncate(fd.as_raw_fd(), size) } < 0 {
            return Err(io::Error::last_os_error());
        }
        // A peer process gets this descriptor. If it could truncate the file, the next access here would raise SIGBUS.
        // SAFETY: plain system call on a descriptor that we own.
        if unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_ADD_SEALS, SEALS) } < 0 {
            return Err(io::Error::last_os_error());
        }
        let base = map(Some(&fd), len)?;
        if flags & libc::MFD_HUGETLB == 0 {
            // SAFETY: the range was mapped above, and the advice changes no content. A failure costs only speed.
            unsafe { libc::madvise(base.as_ptr().cast(), len, libc::MADV_HUGEPAGE) };
        }
        Ok(Self {
            base,
            len,
            fd,
            shareable: true,
            claims: Mutex::default(),
            users: AtomicUsize::new(0),
            successor: OnceLock::new(),
            #[cfg(feature = "fuzz")]
            touched: AtomicUsize::new(0),
        })
    }

    /// Memory that is shared only between this process and the kernel, with a memfd that stays empty.
    fn unshareable(len: usize) -> io::Result<Self> {
        // SAFETY: the name is a NUL-terminated constant; the new descriptor has no other owner.
        let fd = unsafe {
            let fd = libc::memfd_create(c"blkdev".as_ptr(), libc::MFD_CLOEXEC);
            if fd < 0 {
                return Err(io::Error::last_os_error());
            }
            OwnedFd::from_raw_fd(fd)
        };
        let base = map(None, len)?;
        // SAFETY: the range was mapped above, and the advice changes no content. A failure costs only speed.
        unsafe { libc::madvise(base.as_ptr().cast(), len, libc::MADV_HUGEPAGE) };
        Ok(Self {
            base,
            len,
            fd,
            shareable: false,
            claims: Mutex::default(),
            users: AtomicUsize::new(0),
            successor: OnceLock::new(),
            #[cfg(feature = "fuzz")]
            touched: AtomicUsize::new(0),
        })
    }

    /// Whether another process can map it. It cannot if the file would exceed the process's limit (`ulimit -f`): then the memfd
    /// is empty.
    pub fn is_shareable(&self) -> bool {
        self.shareable
    }

    /// Makes all memory resident, in as few physical pieces as the kernel finds: for a device that pins it anyway.
    ///
    /// An IOMMU and its TLB work in large pieces. vhost keeps one entry for each physically contiguous piece, 2048 by default.
    /// Memory that is not available in large pieces stays in small ones.
    pub fn consolidate(&self) {
        let advise = |at: usize, len: usize, advice| {
            // SAFETY: a range of this mapping. The advice changes the place of the content, not the content.
            unsafe { libc::madvise(self.base.as_ptr().wrapping_add(at).cast(), len, advice) == 0 }
        };
        // Kernels before 5.14 refuse the first, kernels before 6.1 the second.
        advise(0, self.len, libc::MADV_POPULATE_WRITE);
        if !advise(0, self.len, libc::MADV_COLLAPSE) {
            // Advise each piece separately, so that one failure does not affect the others.
            for at in (0..self.len).step_by(ALIGN) {
                advise(at, ALIGN, libc::MADV_COLLAPSE);
            }
        }
    }

    /// Returns the memory of a range to the system; then it reads as zeroes. A device that has pinned its pages keeps the old
    /// ones.
    pub(crate) fn discard(&self, range: Range<usize>) {
        assert!(range.start <= range.end && range.end <= self.len, "a range lies in its mapping");
        // SAFETY: a range of this mapping that is free in its arena now. After a failure (huge pages that it covers in part),
        // everything stays unchanged.
        unsafe { libc::madvise(self.base.as_ptr().add(range.start).cast(), range.len(), libc::MADV_REMOVE) };
    }

    /// Makes everything read as zeroes. Nothing uses the memory.
    #[cfg(feature = "fuzz")]
    fn clear(&self) {
        let touched = self.touched.swap(0, Ordering::Relaxed);
        if touched > CLEARED_MAX {
            return self.discard(0..self.len);
        }
        // SAFETY: a range of this mapping, which has no other user.
        unsafe { self.base.as_ptr().write_bytes(0, touched) };
    }

    /// Notes that an owner or a device of a fuzz target may write to the memory before `end`.
    #[cfg(feature = "fuzz")]
    pub(crate) fn touch(&self, end: usize) {
        self.touched.fetch_max(end, Ordering::Relaxed);
    }

    /// Claims a range for an owner that accesses it.
    ///
    /// # Panics
    /// If a part of it has an owner.
    pub(crate) fn claim(&self, range: Range<usize>) {
        #[cfg(feature = "fuzz")]
        self.touch(range.end);
        let mut claims = self.claims();
        let is_free = claims.iter().all(|claim| range.end <= claim.start || claim.end <= range.start);
        if is_free {
            claims.push(range);
        }
        drop(claims);
        assert!(is_free, "every byte of a mapping has one owner");
    }

    /// Takes back the claim of a range.
    pub(crate) fn release(&self, range: Range<usize>) {
        self.claims().retain(|claim| *claim != range);
    }

    /// An arena has a part of it, until [`leave`](Self::leave).
    pub(crate) fn enter(&self) {
        self.users.fetch_add(1, Ordering::Relaxed);
    }

    /// The arena and its buffers are gone.
    pub(crate) fn leave(&self) {
        self.users.fetch_sub(1, Ordering::Release);
    }

    /// Whether an arena or its buffers are left.
    pub(crate) fn is_in_use(&self) -> bool {
        self.users.load(Ordering::Acquire) > 0
    }

    /// Gives this memory up in favour of `successor`, which is as long: a process that this one no longer talks to may still
    /// access it. Owners of [arenas](Self::arenas) move there. Only the first call has an effect.
    pub(crate) fn retire(&self, successor: Arc<Self>) {
        assert_eq!(self.len, successor.len, "the same ranges exist in both");
        successor.claim(0..successor.len);
        let _ = self.successor.set(successor);
    }

    /// The memory that takes the place of this one.
    #[inline]
    pub(crate) fn successor(&self) -> Option<&Arc<Self>> {
        self.successor.get()
    }

    fn claims(&self) -> MutexGuard<'_, Vec<Range<usize>>> {
        self.claims.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The first byte. Use it only for raw, volatile or atomic access: the device writes here.
    pub fn as_ptr(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    /// Length in bytes, a multiple of 2 MiB.
    #[expect(clippy::len_without_is_empty, reason = "never empty")]
    pub fn len(&self) -> usize {
        self.len
    }

    /// The I/O address of the first byte; byte `n` is at `iova() + n`.
    pub fn iova(&self) -> Iova {
        Iova(self.base.as_ptr() as u64)
    }
}

/// The memfd; the mapping starts at its byte 0, unless it is not [shareable](Mapping::is_shareable).
impl AsFd for Mapping {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// A mapping of `len` zeroed bytes, made by `make`.
fn fresh(len: usize, make: impl FnOnce() -> io::Result<Mapping>) -> io::Result<Arc<Mapping>> {
    #[cfg(feature = "fuzz")]
    if Clock::entered().is_some() && len <= SPARE_MAX {
        let renew = |spare: &Mapping| {
            spare.clear();
            spare.claims().clear();
        };
        return SPARES.with_borrow_mut(|spares| {
            spares.get(|spare| spare.len == len && spare.successor().is_none(), renew, make)
        });
    }
    let _ = len;
    make().map(Arc::new)
}

/// Most bytes to clear for the next run of a fuzz target. To return more to the system takes less time, with the page faults that
/// follow.
#[cfg(feature = "fuzz")]
const CLEARED_MAX: usize = 512 << 10;

/// Longest mapping that a fuzz target keeps for its next run, in bytes.
#[cfg(feature = "fuzz")]
const SPARE_MAX: usize = 32 << 20;

#[cfg(feature = "fuzz")]
thread_local! {
    static SPARES: RefCell<Spares<Mapping>> = const { RefCell::new(Spares::new()) };
}

/// Whether the limit for file sizes (RLIMIT_FSIZE) is below `len`. Checked in advance, because exceeding it raises a signal.
fn exceeds_file_size(len: usize) -> bool {
    let mut limit = libc::rlimit { rlim_cur: libc::RLIM_INFINITY, rlim_max: libc::RLIM_INFINITY };
    // SAFETY: the kernel writes one `rlimit` to a valid one.
    unsafe { libc::getrlimit(libc::RLIMIT_FSIZE, &raw mut limit) };
    limit.rlim_cur < len as u64
}

/// Maps `fd`, or memory without a file, at a 2 MiB boundary, low in the address space if there is room.
fn map(fd: Option<&OwnedFd>, len: usize) -> io::Result<NonNull<u8>> {
    let shared = libc::MAP_SHARED | if fd.is_none() { libc::MAP_ANONYMOUS } else { 0 };
    let fd = fd.map_or(-1, AsRawFd::as_raw_fd);
    // A fuzzer's AddressSanitizer occupies all low addresses, and a search for room there takes 60 ms.
    let mut hint = if cfg!(fuzzing) { HIGHEST } else { LOWEST };
    while hint + len <= HIGHEST {
        // SAFETY: NOREPLACE never touches an existing mapping.
        match unsafe { mmap(hint, len, shared | libc::MAP_FIXED_NOREPLACE, fd) } {
            Ok(base) => return Ok(base),
            // Occupied: continue after a mapping that probably has about our size.
            Err(e) if e.raw_os_error() == Some(libc::EEXIST) => hint += len,
            Err(e) => return Err(e),
        }
    }
    // Anywhere: reserve more than needed, then map over the aligned part of the reservation, and unmap the rest.
    // SAFETY: an anonymous reservation at an address that the kernel chooses. MAP_FIXED then replaces only a part of it; the
    // unmapped parts are its two ends, whose addresses were never handed out.
    unsafe {
        let start =
            mmap(0, len + ALIGN, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE, -1)?.as_ptr() as usize;
        let aligned = start.next_multiple_of(ALIGN);
        let base = mmap(aligned, len, shared | libc::MAP_FIXED, fd);
        let (head, tail) = (aligned - start, start + ALIGN - aligned);
        if head > 0 {
            libc::munmap(start as *mut _, head);
        }
        if tail > 0 {
            libc::munmap((aligned + len) as *mut _, tail);
        }
        base
    }
}

/// # Safety
/// With `MAP_FIXED`, the caller must own the range that is replaced.
unsafe fn mmap(hint: usize, len: usize, flags: libc::c_int, fd: libc::c_int) -> io::Result<NonNull<u8>> {
    // SAFETY: the caller is responsible for the memory at `hint`; new memory is harmless.
    let at = unsafe { libc::mmap(hint as *mut _, len, libc::PROT_READ | libc::PROT_WRITE, flags, fd, 0) };
    if at == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    NonNull::new(at.cast()).ok_or_else(|| io::Error::new(io::ErrorKind::OutOfMemory, "mmap returned address 0"))
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: it was mapped in `with`, and every holder of an address into it holds an `Arc` of this.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len) };
    }
}

// SAFETY: the pointer is only an address. This type never reads or writes through it. The memory belongs to the owner of each
// part (an `Arena`'s `Buf`, a driver's ring), not to a thread.
unsafe impl Send for Mapping {}
// SAFETY: as above; all methods that take `&self` only return addresses, and `claims` has a lock.
unsafe impl Sync for Mapping {}

/// Private memory that reads as zeroes. A page uses memory only after it was written.
#[derive(Debug)]
pub(crate) struct Pages {
    base: NonNull<u8>,
    len: usize,
}

impl Pages {
    /// # Errors
    /// No memory or address space is left.
    pub(crate) fn new(len: usize) -> io::Result<Self> {
        // SAFETY: an anonymous mapping at an address that the kernel chooses.
        let base = unsafe { mmap(0, len, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1)? };
        Ok(Self { base, len })
    }

    /// Makes a range read as zeroes, and returns its whole pages to the system.
    pub(crate) fn give_back(&mut self, range: Range<usize>) {
        let part = &mut self[range];
        // SAFETY: private memory with no other user. Afterwards it contains the same bytes or zeroes.
        if unsafe { libc::madvise(part.as_mut_ptr().cast(), part.len(), libc::MADV_DONTNEED) } < 0 {
            // Not whole pages, if pages are large.
            part.fill(0);
        }
    }
}

impl Deref for Pages {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: mapped while this lives, always initialised, and written only through `&mut self`.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr(), self.len) }
    }
}

impl DerefMut for Pages {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and no other borrow exists.
        unsafe { std::slice::from_raw_parts_mut(self.base.as_ptr(), self.len) }
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: mapped in `new`, and no borrow outlives this.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len) };
    }
}

// SAFETY: this owns the memory, as a `Box<[u8]>` does.
unsafe impl Send for Pages {}
// SAFETY: as above.
unsafe impl Sync for Pages {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_zero_until_written_and_after_give_back() {
        let mut pages = Pages::new(1 << 20).unwrap();
        assert!(pages.iter().all(|&byte| byte == 0));
        pages.fill(7);
        pages.give_back(64 << 10..192 << 10);
        for (at, &byte) in pages.iter().enumerate() {
            assert_eq!(byte == 0, (64 << 10..192 << 10).contains(&at), "{byte} at {at}");
        }
    }

    #[test]
    fn is_aligned_low_and_rounded() {
        let (a, b) = (Mapping::new(1).unwrap(), Mapping::new((2 << 20) + 1).unwrap());
        assert_eq!((a.len(), b.len()), (ALIGN, 2 * ALIGN));
        for m in [&a, &b] {
            assert_eq!(m.as_ptr() as usize % ALIGN, 0);
            assert!(m.iova().get() < HIGHEST as u64);
        }
    }

    #[test]
    fn a_peer_cannot_change_its_size() {
        let m = Mapping::new(1).unwrap();
        let file = std::fs::File::from(m.as_fd().try_clone_to_owned().unwrap());
        for size in [0, 4096, 4 * ALIGN as u64] {
            assert_eq!(file.set_len(size).unwrap_err().raw_os_error(), Some(libc::EPERM), "to {size}");
        }
        // SAFETY: plain system call on an open descriptor.
        let sealed = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, libc::F_SEAL_WRITE) };
        assert!(sealed < 0, "nobody can forbid writes while it is mapped");
    }

    #[test]
    fn a_hole_in_shared_memory_reads_as_zeroes() {
        let m = Mapping::shared(2 * ALIGN).unwrap();
        let mut buf = m.arenas(1).remove(0).alloc(2 * ALIGN).unwrap();
        buf.copy_from(0, &[1; 8192]);
        let punch = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        // SAFETY: plain system call on an open descriptor. The content changes while it is mapped, as a peer could do it.
        assert_eq!(unsafe { libc::fallocate(m.as_fd().as_raw_fd(), punch, 0, 4096) }, 0);
        assert!(buf.is_zero(0, 4096));
        assert_eq!(buf.to_vec()[4096..8192], [1; 4096]);
    }

    #[test]
    fn consolidated_memory_is_resident_and_keeps_its_content() {
        let m = Mapping::new(3 * ALIGN).unwrap();
        let mut buf = m.arenas(1).remove(0).alloc(3 * ALIGN).unwrap();
        buf.copy_from(ALIGN - 2, b"kept");
        m.consolidate();
        assert_eq!(buf.to_vec()[ALIGN - 2..ALIGN + 2], *b"kept");
        let mut resident = vec![0_u8; m.len() / 4096];
        // SAFETY: the whole mapping, and one byte of result for each of its pages.
        assert_eq!(unsafe { libc::mincore(m.as_ptr().cast(), m.len(), resident.as_mut_ptr()) }, 0);
        assert!(resident.iter().all(|byte| byte & 1 == 1));
    }

    #[test]
    fn memory_without_a_file_is_consolidated_and_discarded_as_well() {
        let m = Arc::new(Mapping::unshareable(4 * ALIGN).unwrap());
        assert!(!m.is_shareable());
        assert_eq!((m.as_ptr() as usize % ALIGN, m.len()), (0, 4 * ALIGN));
        assert!(m.iova().get() < HIGHEST as u64);
        let mut buf = m.arenas(1).remove(0).alloc(4 * ALIGN).unwrap();
        // The last piece is not written before it is consolidated.
        for at in [ALIGN - 2, 2 * ALIGN + 9] {
            buf.copy_from(at, b"kept");
        }
        m.consolidate();
        let mut resident = vec![0_u8; m.len() / 4096];
        // SAFETY: the whole mapping, and one byte of result for each of its pages.
        assert_eq!(unsafe { libc::mincore(m.as_ptr().cast(), m.len(), resident.as_mut_ptr()) }, 0);
        assert!(resident.iter().all(|byte| byte & 1 == 1));
        assert_eq!(buf.to_vec()[ALIGN - 2..ALIGN + 2], *b"kept");
        assert!(buf.is_zero(3 * ALIGN, ALIGN));
        m.discard(2 * ALIGN..3 * ALIGN);
        assert!(buf.is_zero(2 * ALIGN, ALIGN), "discarded memory reads as zeroes");
        assert_eq!(buf.to_vec()[ALIGN - 2..ALIGN + 2], *b"kept");
    }

    #[test]
    #[should_panic(expected = "every byte of a mapping has one owner")]
    fn no_byte_has_two_owners() {
        let m = Mapping::new(1).unwrap();
        let _first = m.arenas(2);
        m.arenas(1);
    }
}
