//! Creates and writes eventfds.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd},
};

use nix::sys::eventfd::{EfdFlags, EventFd};

/// Creates an eventfd. Reads and writes never block.
pub(crate) fn eventfd() -> io::Result<EventFd> {
    Ok(EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?)
}

/// Notifies the owner of an eventfd.
pub(crate) fn signal(fd: BorrowedFd<'_>) {
    // EAGAIN: the counter is full, so the eventfd is readable already.
    let _ = nix::unistd::write(fd.as_fd(), &1u64.to_ne_bytes());
}
