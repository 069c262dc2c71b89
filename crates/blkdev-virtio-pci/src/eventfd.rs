//! Eventfds: how they are made, and how they are written to.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd},
};

use nix::sys::eventfd::{EfdFlags, EventFd};

/// An eventfd that nobody waits in.
pub(crate) fn eventfd() -> io::Result<EventFd> {
    Ok(EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?)
}

/// Rings an eventfd of somebody else's.
pub(crate) fn signal(fd: BorrowedFd<'_>) {
    // EAGAIN: it is full, and thus readable.
    let _ = nix::unistd::write(fd.as_fd(), &1u64.to_ne_bytes());
}
