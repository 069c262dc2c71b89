//! pidfd_open(2), which `nix` does not have.
#![allow(unsafe_code)]

use std::os::fd::{FromRawFd, OwnedFd, RawFd};

use nix::{errno::Errno, libc, unistd::Pid};

/// A descriptor for a process, readable when the process has ended. Linux 5.3.
pub(crate) fn pidfd_open(pid: Pid) -> Result<OwnedFd, Errno> {
    // SAFETY: pidfd_open takes two numbers and no pointer.
    let fd = Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), 0) })?;
    // SAFETY: the kernel has just opened this descriptor for us, and nothing else knows its number.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}
