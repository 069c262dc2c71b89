//! [`Notifier`]: an eventfd that a hostile process may share, used so that this process cannot block on it forever.
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

/// Longest single call of [`Notifier::unblock`].
const TRY: Duration = Duration::from_millis(20);

/// An eventfd shared with a back end: the kernel, or a process that is not trusted.
///
/// O_NONBLOCK and the counter belong to the open file, which both processes share. A peer that clears the flag and fills the
/// counter makes a write(2) block. Reads use RWF_NOWAIT; the kernel has no such flag for writes to an eventfd. So a write may
/// block while a peer attacks. Another thread frees the writer by periodic calls of [`unblock`](Self::unblock).
#[derive(Debug)]
pub struct Notifier {
    fd: OwnedFd,
    /// Odd during a write. Only the writing thread changes it.
    rings: AtomicU64,
    /// For [`is_still_stuck`](Self::is_still_stuck).
    seen: AtomicU64,
}

impl Notifier {
    /// Creates an eventfd.
    ///
    /// # Errors
    /// No file descriptor is left.
    pub fn new() -> io::Result<Self> {
        let fd = EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        Ok(Self { fd: fd.into(), rings: AtomicU64::new(0), seen: AtomicU64::new(0) })
    }

    /// Duplicates the descriptor for another thread. Only one thread at a time may [`ring`](Self::ring) a notifier.
    ///
    /// # Errors
    /// No file descriptor is left.
    pub fn duplicate(&self) -> io::Result<Self> {
        Ok(Self { fd: self.fd.try_clone()?, rings: AtomicU64::new(0), seen: AtomicU64::new(0) })
    }

    /// Wakes the other side. Only one thread at a time may call it.
    #[inline]
    pub fn ring(&self) {
        let rings = self.rings.load(Ordering::Relaxed);
        self.rings.store(rings.wrapping_add(1), Ordering::Relaxed);
        // EAGAIN: the counter is full, so the other side is already notified.
        let _ = nix::unistd::write(&self.fd, &1_u64.to_ne_bytes());
        self.rings.store(rings.wrapping_add(2), Ordering::Relaxed);
    }

    /// Rings unless the eventfd is readable already. So it never writes to a full counter.
    pub(crate) fn ring_if_empty(&self) {
        if !self.polls(PollFlags::POLLIN) {
            self.ring();
        }
    }

    /// Resets the counter to zero. Never blocks.
    #[inline]
    pub(crate) fn drain(&self) {
        let mut count = [0_u8; 8];
        let vector = libc::iovec { iov_base: count.as_mut_ptr().cast(), iov_len: count.len() };
        // SAFETY: `vector` describes `count`, which outlives the call. Offset -1: an eventfd has no position.
        let got = unsafe { libc::preadv2(self.fd.as_raw_fd(), &raw const vector, 1, -1, libc::RWF_NOWAIT) };
        if got < 0 && nix::errno::Errno::last() == nix::errno::Errno::EOPNOTSUPP {
            // Linux before 5.8 has no RWF_NOWAIT for eventfds.
            let _ = nix::unistd::read(&self.fd, &mut count);
        }
    }

    /// Whether a thread has been blocked in [`ring`](Self::ring) since the last call with the same `seen`: the counter is full,
    /// and the write has not returned.
    pub fn is_stuck(&self, seen: &mut u64) -> bool {
        let now = self.rings.load(Ordering::Relaxed);
        let stays = std::mem::replace(seen, now) == now;
        // If the eventfd is writable, the thread is only preempted, not blocked.
        stays && now % 2 == 1 && !self.polls(PollFlags::POLLOUT)
    }

    /// As [`is_stuck`](Self::is_stuck), since the last call of this. Only one thread at a time may call it.
    pub(crate) fn is_still_stuck(&self) -> bool {
        let mut seen = self.seen.load(Ordering::Relaxed);
        let stuck = self.is_stuck(&mut seen);
        self.seen.store(seen, Ordering::Relaxed);
        stuck
    }

    /// Frees a thread that is blocked in [`ring`](Self::ring), by emptying the counter. A peer may refill it at once, so this
    /// repeats until the thread has written, for at most 20 ms. Returns whether the thread is free.
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

    /// Simulates a hostile peer: clears O_NONBLOCK, then fills the counter.
    fn attack(notifier: &Notifier, fill: bool) {
        // SAFETY: a plain system call on a descriptor that the notifier owns.
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
        // Not joined: this thread may block itself.
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
