//! pidfd_open(2) and landlock_restrict_self(2), which `nix` does not have.
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::{errno::Errno, libc, unistd::Pid};

/// A descriptor for a process, readable when the process has ended. Linux 5.3.
pub(crate) fn pidfd_open(pid: Pid) -> Result<OwnedFd, Errno> {
    // SAFETY: pidfd_open takes two numbers and no pointer.
    let fd = Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), 0) })?;
    // SAFETY: the kernel has just opened this descriptor for us, and nothing else knows its number.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// Confines the calling thread by a landlock ruleset. The thread must have no_new_privs set (prctl(2)).
pub(crate) fn landlock_restrict_self(ruleset: BorrowedFd<'_>) -> Result<(), Errno> {
    // SAFETY: landlock_restrict_self takes two numbers and no pointer.
    Errno::result(unsafe { libc::syscall(libc::SYS_landlock_restrict_self, ruleset.as_raw_fd(), 0) }).map(drop)
}

/// Maps a page of new memory, which can be executed or not.
#[cfg(test)]
pub(crate) fn map_page(executable: bool) -> Result<(), Errno> {
    use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous};

    let mut protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    protection.set(ProtFlags::PROT_EXEC, executable);
    let len = 4096.try_into().expect("not 0");
    // SAFETY: the kernel chooses an address where nothing is, and nothing uses the page.
    unsafe { mmap_anonymous(None, len, protection, MapFlags::MAP_PRIVATE) }.map(drop)
}
