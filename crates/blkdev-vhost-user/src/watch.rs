//! A thread that watches the control socket: it notices that the back end is gone, that it is late with an answer, and that
//! it has made a thread of ours block.
//!
//! Receive time-outs on the socket would not do: `vhost`'s front end takes EAGAIN for "try again", for ever.

use std::{
    io,
    net::Shutdown,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::UnixStream,
    },
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use blkdev_virtio::{Liveness, Notifier};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::eventfd::{EfdFlags, EventFd},
};

use crate::requests::Requests;

/// How often it looks for threads that the back end has made block.
const LOOK: Duration = Duration::from_millis(500);

/// After a part of a flood of requests, the channel is left alone for so long.
const REST: Duration = Duration::from_millis(20);

/// Why a device ends.
pub(crate) const GONE: &str = "the back end closed the connection; the device is not used any more";
pub(crate) const LATE: &str = "the back end did not answer a control message in time; the device is not used any more";
const BLOCKS: &str = "the back end made the eventfd of a kick block; the device is not used any more";

#[derive(Debug)]
pub(crate) struct Watch {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    stream: UnixStream,
    life: Arc<Liveness>,
    /// Written to when `state` has changed.
    wake: EventFd,
    /// Written to when the back end says that its configuration has changed.
    config_changes: EventFd,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// When the answer to the current message has to be there.
    deadline: Option<Instant>,
    /// A deadline passed. The connection is over then: a late answer would be taken for the next message's.
    late: bool,
    /// Connecting has succeeded: from here on the log is told when the back end goes.
    established: bool,
    stop: bool,
    /// The eventfds of kicks, and what [`Notifier::is_stuck`] saw last.
    kicks: Vec<(Arc<Notifier>, u64)>,
}

impl Watch {
    pub(crate) fn new(stream: UnixStream, requests: Requests, life: Arc<Liveness>) -> io::Result<Self> {
        let eventfd = || EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK);
        let (wake, config_changes) = (eventfd()?, eventfd()?);
        let shared = Arc::new(Shared { stream, life, wake, config_changes, state: Mutex::default() });
        let seen = Arc::clone(&shared);
        let thread = thread::Builder::new().name("vhost-user".to_owned()).spawn(move || seen.run(requests))?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Runs `exchange`, which talks to the back end. After `timeout` the socket is shut down, and `exchange` fails.
    pub(crate) fn within<R>(&self, timeout: Duration, exchange: impl FnOnce() -> R) -> R {
        self.shared.change(|state| state.deadline = Instant::now().checked_add(timeout));
        let result = exchange();
        self.shared.change(|state| state.deadline = None);
        result
    }

    /// Whether a deadline has passed.
    pub(crate) fn was_late(&self) -> bool {
        self.shared.state().late
    }

    pub(crate) fn established(&self) {
        self.shared.state().established = true;
    }

    /// Has an eye on the eventfds, in which a kick must not block.
    pub(crate) fn guard(&self, kicks: [&Arc<Notifier>; 2]) {
        self.shared.change(|state| state.kicks.extend(kicks.map(|kick| (Arc::clone(kick), 0))));
    }

    pub(crate) fn unguard(&self, kicks: [&Arc<Notifier>; 2]) {
        self.shared.state().kicks.retain(|(known, _)| !kicks.iter().any(|kick| Arc::ptr_eq(kick, known)));
    }

    /// Ends the device and the connection.
    pub(crate) fn end(&self, why: &str) {
        let established = self.shared.state().established;
        self.shared.end(established, why);
    }

    /// Readable when the back end has said that its configuration has changed.
    pub(crate) fn config_changes(&self) -> BorrowedFd<'_> {
        self.shared.config_changes.as_fd()
    }

    /// Shuts the socket down. The back end sees the front end leave, and every exchange fails.
    pub(crate) fn shut_down(&self) {
        let _ = self.shared.stream.shutdown(Shutdown::Both);
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state());
        let _ = self.wake.write(1);
    }

    fn end(&self, established: bool, why: &str) {
        let _ = self.stream.shutdown(Shutdown::Both);
        if established {
            self.life.end(why);
        } else {
            // The thread that connects reports the reason.
            self.life.end_quietly();
        }
    }

    fn run(&self, mut requests: Requests) {
        // The connection has ended. The thread goes on: what blocks must be freed then, too.
        let mut over = false;
        let mut rest: Option<Instant> = None;
        loop {
            let now = Instant::now();
            rest = rest.filter(|end| *end > now);
            let (deadline, looks) = {
                let state = self.state();
                (state.deadline.filter(|_| !over), over || !state.kicks.is_empty())
            };
            let ends = [deadline, rest, looks.then(|| now + LOOK)];
            let timeout = ends.into_iter().flatten().min().map_or(PollTimeout::NONE, |end| {
                let left = end.saturating_duration_since(now) + Duration::from_micros(999);
                PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
            });
            let incoming = requests.incoming().filter(|_| !over && rest.is_none());
            let wake = PollFd::new(self.wake.as_fd(), PollFlags::POLLIN);
            let stream = PollFd::new(self.stream.as_fd(), PollFlags::from_bits_retain(libc::POLLRDHUP));
            let incoming_fd = PollFd::new(incoming.unwrap_or(self.wake.as_fd()), PollFlags::POLLIN);
            let mut fds = [wake, incoming_fd, stream];
            let watched = if over { 1 } else { 3 };
            // EINTR is as good as nothing having happened.
            let _ = poll(&mut fds[..watched], timeout);
            // `None`: flags that nix has no name for, such as the one asked for.
            let gone = !over && fds[2].any() != Some(false);
            if incoming.is_some() && fds[1].any() != Some(false) {
                let taken = requests.take();
                if taken.changed {
                    // Not read from here, but by the thread that wants to know: this one sees to it that reading ends.
                    let _ = self.config_changes.write(1);
                }
                if taken.more {
                    rest = Some(Instant::now() + REST);
                }
            }
            let _ = self.wake.read();

            let mut state = self.state();
            if state.stop {
                drop(state);
                self.life.unblock(true);
                return;
            }
            let stuck: Vec<_> = state
                .kicks
                .iter_mut()
                .filter_map(|(kick, seen)| kick.is_stuck(seen).then(|| Arc::clone(kick)))
                .collect();
            let late = !over && !gone && state.deadline.is_some_and(|deadline| deadline <= Instant::now());
            state.late |= late;
            let established = state.established;
            drop(state);
            if gone || late || !stuck.is_empty() {
                over = true;
                self.end(
                    established,
                    if late {
                        LATE
                    } else if gone {
                        GONE
                    } else {
                        BLOCKS
                    },
                );
            }
            // Freed only when the device is dead, so that no other kick follows.
            for kick in stuck {
                kick.unblock();
            }
            self.life.unblock(false);
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.shared.change(|state| state.stop = true);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
