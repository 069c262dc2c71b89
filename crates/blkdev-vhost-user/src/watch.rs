//! A thread that watches the control socket: it notices that the back end has gone, and that it is late with an answer.
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

use blkdev_virtio::Life;
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::eventfd::{EfdFlags, EventFd},
};

use crate::requests::Requests;

#[derive(Debug)]
pub(crate) struct Watch {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    stream: UnixStream,
    life: Arc<Life>,
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
}

impl Watch {
    pub(crate) fn new(stream: UnixStream, requests: Requests, life: Arc<Life>) -> io::Result<Self> {
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

    fn run(&self, mut requests: Requests) {
        loop {
            let timeout = match self.state().deadline {
                None => PollTimeout::NONE,
                Some(deadline) => {
                    let left = deadline.saturating_duration_since(Instant::now()) + Duration::from_micros(999);
                    PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
                }
            };
            let incoming = requests.incoming();
            let mut fds = [
                PollFd::new(self.stream.as_fd(), PollFlags::from_bits_retain(libc::POLLRDHUP)),
                PollFd::new(self.wake.as_fd(), PollFlags::POLLIN),
                PollFd::new(incoming.unwrap_or(self.wake.as_fd()), PollFlags::POLLIN),
            ];
            // EINTR is as good as nothing having happened.
            let _ = poll(&mut fds, timeout);
            // `None`: flags that nix has no name for, such as the one asked for.
            let gone = fds[0].any() != Some(false);
            if incoming.is_some() && fds[2].any() != Some(false) && requests.take() {
                // Not read from here, but by whoever wants to know: this thread sees to it that reading ends.
                let _ = self.config_changes.write(1);
            }
            let _ = self.wake.read();

            let mut state = self.state();
            if state.stop {
                return;
            }
            let late = !gone && state.deadline.is_some_and(|deadline| deadline <= Instant::now());
            if !gone && !late {
                continue;
            }
            state.late = late;
            let established = state.established;
            drop(state);
            let _ = self.stream.shutdown(Shutdown::Both);
            let why = if late {
                "the back end did not answer a control message in time; the device is not used any more"
            } else {
                "the back end closed the connection; the device is not used any more"
            };
            if established {
                self.life.end(why);
            } else {
                // Whoever is connecting reports the reason.
                self.life.end_quietly();
            }
            return;
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
