//! A thread that watches the control socket. It detects that the back end is gone, that a reply is late, and that the back end
//! blocks a thread of this process.
//!
//! Receive time-outs on the socket are not enough: `vhost`'s front end retries after EAGAIN, forever.

use std::{
    io,
    net::Shutdown,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::UnixStream,
    },
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use blkdev::wake::{Stop, Wake, Watcher, now};
use blkdev_virtio::{Liveness, Notifier, unblock};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::requests::Requests;

/// Interval of checks for blocked threads.
const LOOK: Duration = Duration::from_millis(500);

/// Pause of the channel after a part of a flood of requests.
const REST: Duration = Duration::from_millis(20);

/// Reasons for the end of a device.
pub(crate) const GONE: &str = "the back end closed the connection";
pub(crate) const LATE: &str = "the back end did not reply to a control message in time";
const BLOCKS: &str = "the back end blocked a kick eventfd";

#[derive(Debug)]
pub(crate) struct Watch {
    shared: Arc<Shared>,
    /// Woken after every change of the state.
    watcher: Watcher,
}

#[derive(Debug)]
struct Shared {
    stream: UnixStream,
    life: Arc<Liveness>,
    /// Written when the back end has reported a configuration change.
    config_changes: Wake,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Deadline of the current message's reply.
    deadline: Option<Instant>,
    /// A deadline has passed. This ends the connection: a late reply would be taken for the next message's.
    late: bool,
    /// The connect is complete: from here on, the end of the back end is logged.
    established: bool,
    /// Kick eventfds, each with the last result of [`Notifier::is_stuck`].
    kicks: Vec<(Arc<Notifier>, u64)>,
}

impl Watch {
    pub(crate) fn new(stream: UnixStream, requests: Requests, life: Arc<Liveness>) -> io::Result<Self> {
        let shared = Arc::new(Shared { stream, life, config_changes: Wake::new()?, state: Mutex::default() });
        let mut guard = Guard { shared: Arc::clone(&shared), requests, over: false, rest: None };
        let watcher = Watcher::with_turns("vhost-user", move |stop| guard.turn(stop))?;
        Ok(Self { shared, watcher })
    }

    /// Calls `exchange`, which exchanges messages with the back end. After `timeout` the socket is shut down, so `exchange`
    /// fails.
    pub(crate) fn within<R>(&self, timeout: Duration, exchange: impl FnOnce() -> R) -> R {
        self.change(|state| state.deadline = now().checked_add(timeout));
        let result = exchange();
        self.change(|state| state.deadline = None);
        result
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.shared.state());
        self.watcher.wake().ring();
    }

    /// Whether a deadline has passed.
    pub(crate) fn was_late(&self) -> bool {
        self.shared.state().late
    }

    pub(crate) fn established(&self) {
        self.shared.state().established = true;
    }

    /// Watches kick eventfds, so that a kick cannot block forever.
    pub(crate) fn guard(&self, kicks: [&Arc<Notifier>; 2]) {
        self.change(|state| state.kicks.extend(kicks.map(|kick| (Arc::clone(kick), 0))));
    }

    pub(crate) fn unguard(&self, kicks: [&Arc<Notifier>; 2]) {
        self.shared.state().kicks.retain(|(known, _)| !kicks.iter().any(|kick| Arc::ptr_eq(kick, known)));
    }

    /// Ends the device and the connection.
    pub(crate) fn end(&self, why: &str) {
        let established = self.shared.state().established;
        self.shared.end(established, why);
    }

    /// Becomes readable when the back end has reported a configuration change.
    pub(crate) fn config_changes(&self) -> BorrowedFd<'_> {
        self.shared.config_changes.as_fd()
    }

    /// Shuts the socket down. The back end sees a disconnect, and every exchange fails.
    pub(crate) fn shut_down(&self) {
        let _ = self.shared.stream.shutdown(Shutdown::Both);
    }
}

/// The state of the thread.
struct Guard {
    shared: Arc<Shared>,
    requests: Requests,
    /// The connection has ended. The thread continues, because blocked threads must still be freed.
    over: bool,
    /// End of the pause after a flood of requests.
    rest: Option<Instant>,
}

impl Guard {
    /// Waits for something to do, and does it. Returns whether there is more to do: the device is open.
    fn turn(&mut self, stop: &Stop) -> bool {
        let Self { shared, requests, over, rest } = self;
        let time = now();
        *rest = rest.filter(|end| *end > time);
        let incoming = requests.incoming().filter(|_| !*over && rest.is_none());
        let woken = shared.sleep(stop.wake(), incoming, *over, stop.patience(shared.patience(time, *over, *rest)));
        if woken.incoming {
            let taken = requests.take();
            if taken.changed {
                // Another thread reads the configuration: this one enforces the deadline of that read.
                shared.config_changes.ring();
            }
            if taken.more {
                *rest = Some(now() + REST);
            }
        }
        stop.wake().clear();
        if stop.is_requested() {
            unblock(&shared.life, true);
            return false;
        }
        *over |= shared.check(*over, woken.gone);
        unblock(&shared.life, false);
        true
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn end(&self, established: bool, why: &str) {
        let _ = self.stream.shutdown(Shutdown::Both);
        if established {
            self.life.end(why);
        } else {
            // The connecting thread reports the reason.
            self.life.end_quietly();
        }
    }

    /// Time until the next deadline, the end of the pause `rest`, or the next check for blocked threads.
    fn patience(&self, now: Instant, over: bool, rest: Option<Instant>) -> Option<Duration> {
        let (deadline, looks) = {
            let state = self.state();
            (state.deadline.filter(|_| !over), over || !state.kicks.is_empty())
        };
        let ends = [deadline, rest, looks.then(|| now + LOOK)];
        ends.into_iter().flatten().min().map(|end| end.saturating_duration_since(now))
    }

    /// Waits for `wake`, for requests of the back end at `incoming`, and for the end of the connection if it is not `over`.
    fn sleep(&self, wake: &Wake, incoming: Option<BorrowedFd<'_>>, over: bool, time: Option<Duration>) -> Woken {
        // Rounded up: a wait that is too short by a part of a millisecond would be repeated without sleep.
        let timeout = time.map_or(PollTimeout::NONE, |time| {
            PollTimeout::try_from(time + Duration::from_micros(999)).unwrap_or(PollTimeout::MAX)
        });
        let woken = PollFd::new(wake.as_fd(), PollFlags::POLLIN);
        let stream = PollFd::new(self.stream.as_fd(), PollFlags::from_bits_retain(libc::POLLRDHUP));
        let incoming_fd = PollFd::new(incoming.unwrap_or(wake.as_fd()), PollFlags::POLLIN);
        let mut fds = [woken, incoming_fd, stream];
        let watched = if over { 1 } else { 3 };
        // EINTR is harmless: the caller checks everything again.
        let _ = poll(&mut fds[..watched], timeout);
        Woken {
            incoming: incoming.is_some() && fds[1].any() != Some(false),
            // `None`: nix has no name for some of the flags, such as the requested one.
            gone: !over && fds[2].any() != Some(false),
        }
    }

    /// Ends the device if its back end is `gone`, late, or blocks a thread. Returns whether it did. Frees the blocked threads.
    fn check(&self, over: bool, gone: bool) -> bool {
        let mut state = self.state();
        let stuck: Vec<_> =
            state.kicks.iter_mut().filter_map(|(kick, seen)| kick.is_stuck(seen).then(|| Arc::clone(kick))).collect();
        let late = !over && !gone && state.deadline.is_some_and(|deadline| deadline <= now());
        state.late |= late;
        let established = state.established;
        drop(state);
        let why = match (late, gone) {
            (true, _) => Some(LATE),
            (_, true) => Some(GONE),
            _ => (!stuck.is_empty()).then_some(BLOCKS),
        };
        if let Some(why) = why {
            self.end(established, why);
        }
        // Freed only when the device is dead, so that no other kick follows.
        for kick in stuck {
            kick.unblock();
        }
        why.is_some()
    }
}

/// Events that ended a wait.
struct Woken {
    /// The back end has sent a request, or closed that channel.
    incoming: bool,
    /// The back end has closed the connection.
    gone: bool,
}
