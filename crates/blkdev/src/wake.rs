//! [`Wake`]: an eventfd that wakes a thread, and [`Watcher`]: a thread that a driver keeps for its events.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::eventfd::{EfdFlags, EventFd},
};

/// An eventfd between the threads of this process, the kernel, or a device. Neither side ever blocks on it.
///
/// A process that is not trusted must not have it: it could clear O_NONBLOCK.
#[derive(Debug)]
pub struct Wake(EventFd);

impl Wake {
    /// Creates an eventfd.
    ///
    /// # Errors
    /// No file descriptor is left.
    pub fn new() -> io::Result<Self> {
        Ok(Self(EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?))
    }

    /// Makes it readable.
    #[inline]
    pub fn ring(&self) {
        // EAGAIN: the counter is full, so it is readable already.
        let _ = self.0.write(1);
    }

    /// Makes it unreadable. Returns whether it was readable.
    #[inline]
    pub fn clear(&self) -> bool {
        self.0.read().is_ok()
    }
}

impl AsFd for Wake {
    #[inline]
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Makes another owner's eventfd readable.
pub fn ring(fd: BorrowedFd<'_>) {
    // EAGAIN: the counter is full, so it is readable already.
    let _ = nix::unistd::write(fd, &1_u64.to_ne_bytes());
}

/// Waits until one of the descriptors is readable or has an error, or the time is over (`None`: it never is), or a signal comes.
/// Returns for each descriptor whether it is readable or has an error.
pub fn wait<const N: usize>(fds: [BorrowedFd<'_>; N], time: Option<Duration>) -> [bool; N] {
    // Rounded up: a wait that is too short by a part of a millisecond would be repeated without sleep.
    let timeout = time.map_or(PollTimeout::NONE, |time| {
        PollTimeout::try_from(time.saturating_add(Duration::from_micros(999))).unwrap_or(PollTimeout::MAX)
    });
    let mut polled = fds.map(|fd| PollFd::new(fd, PollFlags::POLLIN));
    match poll(&mut polled, timeout) {
        // `None`: nix has no name for some of the flags.
        Ok(_) => polled.map(|fd| fd.any() != Some(false)),
        Err(_) => [false; N],
    }
}

/// A thread that ends when this is dropped.
#[derive(Debug)]
pub struct Watcher {
    stop: Arc<Stop>,
    thread: Option<JoinHandle<()>>,
}

/// How a [`Watcher`] tells its thread to go on, or to end.
#[derive(Debug)]
pub struct Stop {
    wake: Arc<Wake>,
    is_requested: AtomicBool,
}

impl Stop {
    /// Whether the thread must return.
    #[inline]
    pub fn is_requested(&self) -> bool {
        self.is_requested.load(Ordering::Acquire)
    }

    /// Rings when the thread must return, and whenever the owner has [something else](Watcher::wake) for it.
    pub fn wake(&self) -> &Arc<Wake> {
        &self.wake
    }
}

impl Watcher {
    /// Starts a thread that runs `run`, which waits for [`Stop::wake`] among other descriptors.
    ///
    /// # Errors
    /// No thread or file descriptor is left.
    pub fn start(name: &str, run: impl FnOnce(&Stop) + Send + 'static) -> io::Result<Self> {
        let stop = Arc::new(Stop { wake: Arc::new(Wake::new()?), is_requested: AtomicBool::new(false) });
        let seen = Arc::clone(&stop);
        let thread = thread::Builder::new().name(name.to_owned()).spawn(move || run(&seen))?;
        Ok(Self { stop, thread: Some(thread) })
    }

    /// Wakes the thread when rung.
    pub fn wake(&self) -> &Arc<Wake> {
        &self.stop.wake
    }

    /// As [`stop`](Self::stop), but waits for `time` at most. A thread that takes longer ends later.
    pub fn stop_within(&mut self, time: Duration) {
        self.stop.is_requested.store(true, Ordering::Release);
        self.stop.wake.ring();
        let start = Instant::now();
        while self.thread.as_ref().is_some_and(|thread| !thread.is_finished()) {
            if start.elapsed() >= time {
                self.thread = None;
                return;
            }
            thread::sleep(Duration::from_millis(1));
        }
        self.stop();
    }

    /// Makes the thread return, and waits for that.
    pub fn stop(&mut self) {
        self.stop.is_requested.store(true, Ordering::Release);
        self.stop.wake.ring();
        if let Some(thread) = self.thread.take() {
            // The panic hook has reported a panic.
            let _ = thread.join();
        }
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.stop();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn a_watcher_is_woken_and_ends_when_it_is_dropped() {
        let (seen, calls) = mpsc::channel();
        let watcher = Watcher::start("watcher", move |stop| {
            while !stop.is_requested() {
                wait([stop.wake().as_fd()], None);
                seen.send(stop.wake().clear()).unwrap();
            }
        })
        .unwrap();
        watcher.wake().ring();
        assert_eq!(calls.recv(), Ok(true));
        drop(watcher);
        // The thread may see the request to stop before it waits again. The iteration ends with the thread.
        assert!(calls.iter().all(|rung| rung));
    }

    #[test]
    fn a_wait_returns_which_descriptor_is_readable() {
        let (one, two) = (Wake::new().unwrap(), Wake::new().unwrap());
        assert_eq!(wait([one.as_fd(), two.as_fd()], Some(Duration::ZERO)), [false, false]);
        two.ring();
        two.ring();
        assert_eq!(wait([one.as_fd(), two.as_fd()], None), [false, true]);
        assert!(two.clear() && !two.clear(), "however often it was rung");
    }
}
