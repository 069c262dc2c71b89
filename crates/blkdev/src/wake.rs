//! [`Wake`]: an eventfd that wakes a thread, and [`Watcher`]: a thread that a driver keeps for its events.

#[cfg(feature = "fuzz")]
use std::{fmt, sync::Mutex};
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

#[cfg(feature = "fuzz")]
use crate::fuzz::clock::{Clock, Turns};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::eventfd::{EfdFlags, EventFd},
};

use crate::thread::{Role, spawn};

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

/// The present time. Drivers use no other clock, so that fuzz targets can simulate it.
#[inline]
pub fn now() -> Instant {
    #[cfg(feature = "fuzz")]
    if let Some(clock) = Clock::entered() {
        return clock.now();
    }
    Instant::now()
}

/// Sleeps for `time`.
pub fn sleep(time: Duration) {
    #[cfg(feature = "fuzz")]
    if let Some(clock) = Clock::entered() {
        return clock.pass(time);
    }
    thread::sleep(time);
}

/// Waits until one of the descriptors is readable or has an error, or the time is over (`None`: it never is), or a signal comes.
/// Returns for each descriptor whether it is readable or has an error.
pub fn wait<const N: usize>(fds: [BorrowedFd<'_>; N], time: Option<Duration>) -> [bool; N] {
    #[cfg(feature = "fuzz")]
    if let Some(clock) = Clock::entered() {
        let ready = poll_for(fds, Some(Duration::ZERO));
        if ready == [false; N] {
            clock.pass(time.expect("no other thread can end this wait"));
        }
        return ready;
    }
    poll_for(fds, time)
}

/// As [`wait`], while all watchers have turns.
#[cfg(feature = "fuzz")]
fn wait_with_turns<const N: usize>(clock: &Clock, fds: [BorrowedFd<'_>; N], time: Duration) -> [bool; N] {
    let end = clock.now() + time;
    loop {
        let left = end.saturating_duration_since(clock.now()).min(Duration::from_millis(1));
        let ready = wait(fds, Some(left));
        if left.is_zero() || ready != [false; N] {
            return ready;
        }
        clock.turn();
    }
}

fn poll_for<const N: usize>(fds: [BorrowedFd<'_>; N], time: Option<Duration>) -> [bool; N] {
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
    /// In place of the thread.
    #[cfg(feature = "fuzz")]
    turns: Option<Arc<dyn Turns>>,
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

    /// The time that a [turn](Watcher::with_turns) may wait at its end if there is nothing to do until then: `time`.
    pub fn patience(&self, time: Option<Duration>) -> Option<Duration> {
        #[cfg(feature = "fuzz")]
        if Clock::entered().is_some() {
            return Some(Duration::ZERO);
        }
        time
    }
}

/// In place of a thread, in a fuzz target.
#[cfg(feature = "fuzz")]
struct Turn {
    stop: Arc<Stop>,
    act: Mutex<Act>,
}

#[cfg(feature = "fuzz")]
type Act = Option<Box<dyn FnMut(&Stop) -> bool + Send>>;

#[cfg(feature = "fuzz")]
impl Turns for Turn {
    fn take(&self) {
        // Locked: this turn is running already.
        if let Ok(mut act) = self.act.try_lock() {
            *act = act.take().and_then(|mut turn| turn(&self.stop).then_some(turn));
        }
    }
}

#[cfg(feature = "fuzz")]
impl fmt::Debug for Turn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Turn").finish_non_exhaustive()
    }
}

impl Watcher {
    /// Starts a thread with a role that runs `run`, which waits for [`Stop::wake`] among other descriptors.
    ///
    /// # Errors
    /// No thread or file descriptor is left.
    pub fn start(role: Role, name: &str, run: impl FnOnce(&Stop) + Send + 'static) -> io::Result<Self> {
        let stop = Arc::new(Stop { wake: Arc::new(Wake::new()?), is_requested: AtomicBool::new(false) });
        let seen = Arc::clone(&stop);
        let thread = spawn(role, name, move || run(&seen))?;
        Ok(Self {
            stop,
            thread: Some(thread),
            #[cfg(feature = "fuzz")]
            turns: None,
        })
    }

    /// As [`start`](Self::start), for a thread that does the same again and again: it calls `turn` until that returns `false`,
    /// which it must do when [`Stop::is_requested`]. A turn waits only at its end, for [`Stop::patience`] at most, besides waits for the
    /// device.
    ///
    /// # Errors
    /// No thread or file descriptor is left.
    pub fn with_turns(name: &str, mut turn: impl FnMut(&Stop) -> bool + Send + 'static) -> io::Result<Self> {
        #[cfg(feature = "fuzz")]
        if let Some(clock) = Clock::entered() {
            let stop = Arc::new(Stop { wake: Arc::new(Wake::new()?), is_requested: AtomicBool::new(false) });
            let act: Act = Some(Box::new(turn));
            let turns: Arc<dyn Turns> = Arc::new(Turn { stop: Arc::clone(&stop), act: Mutex::new(act) });
            clock.watch(Arc::downgrade(&turns));
            return Ok(Self { stop, thread: None, turns: Some(turns) });
        }
        Self::start(Role::Watcher, name, move |stop| while turn(stop) {})
    }

    /// Wakes the thread when rung.
    pub fn wake(&self) -> &Arc<Wake> {
        &self.stop.wake
    }

    /// Wakes the thread. The caller then waits for its result, and holds no lock that the thread takes.
    pub fn rouse(&self) {
        self.stop.wake.ring();
        #[cfg(feature = "fuzz")]
        if let Some(turns) = &self.turns {
            turns.take();
        }
    }

    /// As [`wait`], for an event that the thread may cause. The caller holds no lock that the thread takes.
    pub fn wait<const N: usize>(&self, fds: [BorrowedFd<'_>; N], time: Duration) -> [bool; N] {
        #[cfg(feature = "fuzz")]
        if let Some(clock) = Clock::entered() {
            return wait_with_turns(&clock, fds, time);
        }
        wait(fds, Some(time))
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
        #[cfg(feature = "fuzz")]
        if let Some(turns) = self.turns.take() {
            turns.take();
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
        let watcher = Watcher::start(Role::Watcher, "watcher", move |stop| {
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
    fn a_watcher_with_turns_has_them_until_it_is_dropped() {
        let (seen, calls) = mpsc::channel();
        let watcher = Watcher::with_turns("watcher", move |stop| {
            let is_last = stop.is_requested();
            let _ = seen.send(is_last);
            !is_last
        });
        assert_eq!((calls.recv(), calls.recv()), (Ok(false), Ok(false)));
        drop(watcher);
        assert_eq!(
            calls.iter().last(),
            Some(true),
            "the last turn learns that it is the last; then the thread is gone"
        );
    }

    #[cfg(feature = "fuzz")]
    #[test]
    fn by_a_clock_a_watcher_has_no_thread_and_waits_take_no_time() {
        let clock = Clock::default();
        let _entered = clock.enter();
        let (start, wake) = (now(), Arc::new(Wake::new().unwrap()));
        let (bell, mut turns) = (Arc::clone(&wake), 0);
        let watcher = Watcher::with_turns("watcher", move |stop| {
            turns += 1;
            if turns == 3 {
                bell.ring();
            }
            !stop.is_requested()
        });
        let watcher = watcher.unwrap();
        assert_eq!(watcher.wait([wake.as_fd()], Duration::from_secs(1)), [true]);
        assert_eq!(now() - start, Duration::from_millis(3), "a turn in each millisecond");
        assert!(wake.clear());
        assert_eq!(watcher.wait([wake.as_fd()], Duration::from_secs(1)), [false]);
        sleep(Duration::from_secs(3600));
        assert_eq!(wait([wake.as_fd()], Some(Duration::from_secs(3600))), [false]);
        assert_eq!(now() - start, Duration::from_millis(7_201_003));
        drop(watcher);
        assert_eq!(Arc::strong_count(&wake), 1, "its last turn is over");
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
