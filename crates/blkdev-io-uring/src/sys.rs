//! System calls without a safe wrapper in std or nix.
#![allow(unsafe_code)]

use std::{
    fs::File,
    io,
    mem::MaybeUninit,
    os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd},
};

use blkdev::Buf;

/// `pread` into the whole buffer, from file offset `at` on.
pub(crate) fn read(file: &File, at: u64, buf: &mut Buf) -> io::Result<usize> {
    // SAFETY: the Buf's memory is borrowed for the call. An offset above i64::MAX is negative, which the kernel refuses.
    count(unsafe { libc::pread64(file.as_raw_fd(), buf.as_ptr().cast(), buf.len(), at as i64) })
}

/// `pwrite`, as [`read`].
pub(crate) fn write(file: &File, at: u64, buf: &Buf) -> io::Result<usize> {
    // SAFETY: as in `read`.
    count(unsafe { libc::pwrite64(file.as_raw_fd(), buf.as_ptr().cast(), buf.len(), at as i64) })
}

/// Duplicates descriptor number `fd` of this process, if it is open.
pub(crate) fn duplicate(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: borrowed for this one call, which only duplicates it. If the number was closed meanwhile, the call fails; if it
    // was reused, the result is another file of this process, and the caller checks for that.
    unsafe { BorrowedFd::borrow_raw(fd) }.try_clone_to_owned()
}

fn count(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// The alignment in bytes that a file requires of direct transfers: of memory, and of offsets and lengths. `None`: the kernel
/// (before 6.1) or the file system does not report it. Zeroes: the file does not support direct transfers.
pub(crate) fn direct_alignment(file: &File) -> Option<(u32, u32)> {
    let mut out = MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: an empty path with AT_EMPTY_PATH names the descriptor itself; `out` has the size of the structure, and all zeroes
    // is a valid value of it.
    let out = unsafe {
        let (flags, mask) = (libc::AT_EMPTY_PATH, libc::STATX_DIOALIGN);
        if libc::statx(file.as_raw_fd(), c"".as_ptr(), flags, mask, out.as_mut_ptr()) < 0 {
            return None;
        }
        out.assume_init()
    };
    (out.stx_mask & libc::STATX_DIOALIGN != 0).then_some((out.stx_dio_mem_align, out.stx_dio_offset_align))
}

/// `_IO(0x12, 94)`: whether a block device is read-only.
const BLKROGET: libc::Ioctl = 0x125e;
/// `_IO(0x12, 104)`: a block device's logical block size.
const BLKSSZGET: libc::Ioctl = 0x1268;
/// `_IOR(0x12, 114, size_t)`: a block device's size in bytes.
const BLKGETSIZE64: libc::Ioctl = 0x8008_1272;
/// `_IO(0x12, 123)`: a block device's physical block size.
const BLKPBSZGET: libc::Ioctl = 0x127b;

pub(crate) fn is_read_only(disk: &File) -> io::Result<bool> {
    int(disk, BLKROGET).map(|n| n != 0)
}

pub(crate) fn logical_block_size(disk: &File) -> io::Result<u32> {
    int(disk, BLKSSZGET)
}

pub(crate) fn physical_block_size(disk: &File) -> io::Result<u32> {
    int(disk, BLKPBSZGET)
}

pub(crate) fn disk_size(disk: &File) -> io::Result<u64> {
    let mut value = 0_u64;
    // SAFETY: the ioctl stores 64 bits. It fails for descriptors of other files than block devices.
    if unsafe { libc::ioctl(disk.as_raw_fd(), BLKGETSIZE64, &raw mut value) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(value)
}

fn int(disk: &File, request: libc::Ioctl) -> io::Result<u32> {
    let mut value: libc::c_int = 0;
    // SAFETY: each of the ioctls above stores one int. They fail for descriptors of other files than block devices.
    if unsafe { libc::ioctl(disk.as_raw_fd(), request, &raw mut value) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(value as u32)
}
