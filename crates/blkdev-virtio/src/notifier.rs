//! [`Notifier`]: an eventfd that another process may hold too, used in ways in which that process cannot block us.
#![allow(unsafe_code)]

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::eventfd::{EfdFlags, EventFd},
};

/// How long one call of [`Notifier::unblock`] tries.
const TRY: Duration = Duration::from_millis(20);

/// An eventfd whose other end is a back end: in the kernel, or in a process that is not trusted.
///
/// O_NONBLOCK belongs to the open file, which both processes share, and so does the counter. A peer that clears the flag and
/// fills the counter makes a write(2) block. Reads ask for RWF_NOWAIT instead, which the kernel does not offer for writes to
/// an eventfd. So a write may block, but only while a peer attacks, and another thread that calls
/// [`unblock`](Self::unblock) now and then frees the writer.
#[derive(Debug)]
pub struct Notifier {
    fd: OwnedFd,
    /// Odd during a write. Only the writer changes it.
    rings: AtomicU64,
}

impl Notifier {
    /// A new eventfd.
    ///
    /// # Errors
    /// No file descriptor left.
    pub fn new() -> io::Result<Self> {
        let fd = EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        Ok(Self { fd: fd.into(), rings: AtomicU64::new(0) })
    }

    /// The same eventfd for another thread, since one thread at a time may [`ring`](Self::ring) a notifier.
    ///
    /// # Errors
    /// No file descriptor left.
    pub fn duplicate(&self) -> io::Result<Self> {
        Ok(Self { fd: self.fd.try_clone()?, rings: AtomicU64::new(0) })
    }

    /// Wakes the other side. One thread at a time.
    #[inline]
    pub fn ring(&self) {
        let rings = self.rings.load(Ordering::Relaxed);
        self.rings.store(rings.wrapping_add(1), Ordering::Relaxed);
        // EAGAIN: the counter is full, so the other side has something to read anyway.
        let _ = nix::unistd::write(&self.fd, &1_u64.to_ne_bytes());
        self.rings.store(rings.wrapping_add(2), Ordering::Relaxed);
    }

    /// Rings unless the eventfd is readable, so that a full counter is left alone.
    pub(crate) fn ring_if_empty(&self) {
        if !self.polls(PollFlags::POLLIN) {
            self.ring();
        }
    }

    /// Empties the eventfd. Never blocks.
    #[inline]
    pub(crate) fn drain(&self) {
        let mut count = [0_u8; 8];
        let vector = libc::iovec { iov_base: count.as_mut_ptr().cast(), iov_len: count.len() };
        // SAFETY: the vector describes `count`, which outlives the call. Offset -1: an eventfd has no position.
        let got = unsafe { libc::preadv2(self.fd.as_raw_fd(), &raw const vector, 1, -1, libc::RWF_NOWAIT) };
        if got < 0 && nix::errno::Errno::last() == nix::errno::Errno::EOPNOTSUPP {
            // Linux before 5.8.
            let _ = nix::unistd::read(&self.fd, &mut count);
        }
    }

    /// Whether a thread has been blocked in [`ring`](Self::ring) since the last call with the same `seen`: the counter is full
    /// and nothing has moved.
    pub fn is_stuck(&self, seen: &mut u64) -> bool {
        let now = self.rings.load(Ordering::Relaxed);
        let stays = std::mem::replace(seen, now) == now;
        // A thread that is only not running has room to write to.
        stays && now % 2 == 1 && !self.polls(PollFlags::POLLOUT)
    }

    /// Frees a thread that is blocked in [`ring`](Self::ring), by emptying the counter. A peer may fill it at once, so this
    /// goes on until the thread has got through, for a moment at most. Returns whether it has.
    pub fn unblock(&self) -> bool {
        let stuck = self.rings.load(Ordering::Relaxed);
        let end = Instant::now() + TRY;
        while stuck % 2 == 1 && self.rings.load(Ordering::Relaxed) == stuck {
            if Instant::now() >= end {
                return false;
            }
            self.drain();
        }
        true
    }

    fn polls(&self, what: PollFlags) -> bool {
        let mut fds = [PollFd::new(self.fd.as_fd(), what)];
        poll(&mut fds, PollTimeout::ZERO).is_ok() && fds[0].revents().is_some_and(|events| events.contains(what))
    }
}

impl AsFd for Notifier {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::{Arc, atomic::AtomicBool},
        thread,
    };

    use super::*;

    /// What a hostile peer does to an eventfd that it was given: the flag, then the counter.
    fn attack(notifier: &Notifier, fill: bool) {
        // SAFETY: plain system call on a descriptor that the notifier owns.
        unsafe { libc::fcntl(notifier.fd.as_raw_fd(), libc::F_SETFL, 0) };
        if fill {
            nix::unistd::write(&notifier.fd, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        }
    }

    #[test]
    fn an_empty_eventfd_that_blocks_is_drained_without_blocking() {
        let notifier = Notifier::new().unwrap();
        attack(&notifier, false);
        notifier.drain();
        notifier.ring();
        assert!(notifier.polls(PollFlags::POLLIN));
        notifier.drain();
        assert!(!notifier.polls(PollFlags::POLLIN));
    }

    #[test]
    fn a_full_eventfd_that_blocks_is_left_alone() {
        let notifier = Notifier::new().unwrap();
        attack(&notifier, true);
        notifier.ring_if_empty();
        assert!(notifier.polls(PollFlags::POLLIN));
    }

    #[test]
    fn a_thread_that_is_blocked_is_freed_even_while_the_counter_is_filled_again() {
        let notifier = Arc::new(Notifier::new().unwrap());
        attack(&notifier, true);
        let writer = Arc::clone(&notifier);
        let blocked = thread::spawn(move || writer.ring());
        let mut seen = 0;
        while !notifier.is_stuck(&mut seen) {
            thread::sleep(Duration::from_millis(1));
        }
        // Not waited for: it may block itself.
        let (peer, freed) = (notifier.duplicate().unwrap(), Arc::new(AtomicBool::new(false)));
        let seen_by_peer = Arc::clone(&freed);
        thread::spawn(move || {
            while !seen_by_peer.load(Ordering::Relaxed) {
                peer.drain();
                let _ = nix::unistd::write(&peer.fd, &(u64::MAX - 1).to_ne_bytes());
            }
        });
        while !notifier.unblock() {}
        freed.store(true, Ordering::Relaxed);
        blocked.join().unwrap();
        assert!(!notifier.is_stuck(&mut seen));
    }
}
