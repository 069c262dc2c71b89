//! [`Peer`]: a process that shares memory with this one.

use std::os::fd::{AsFd, OwnedFd};

use crate::wake;

/// A process that maps memory of a device, and may access it as long as it lives.
#[derive(Debug)]
pub struct Peer(Option<OwnedFd>);

impl Peer {
    /// The process behind a pidfd (pidfd_open(2), SO_PEERPIDFD). `None`: it is not known, so it may live forever.
    pub fn new(pidfd: Option<OwnedFd>) -> Self {
        Self(pidfd)
    }

    /// Whether the process may still run.
    pub fn may_live(&self) -> bool {
        // A pidfd is readable when its process has ended.
        self.0.as_ref().is_none_or(|pidfd| !wake::wait([pidfd.as_fd()], Some(std::time::Duration::ZERO))[0])
    }
}
