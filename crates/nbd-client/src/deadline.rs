//! [`Deadline`]: until when to wait, and waiting itself.

use std::{
    os::fd::{AsFd, BorrowedFd},
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
};

use crate::error::Error;

/// What to wait for on a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Interest {
    /// The server has sent something, or has closed.
    pub readable: bool,
    /// There is room to send.
    pub writable: bool,
}

/// The end of a wait; or none.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Deadline {
    at: Option<Instant>,
    limit: Duration,
}

impl Deadline {
    /// `None` is no limit, and so is more than the clock can count.
    pub(crate) fn after(limit: Option<Duration>) -> Self {
        Self { at: limit.and_then(|limit| Instant::now().checked_add(limit)), limit: limit.unwrap_or_default() }
    }

    /// Time that is left; `None` is no limit.
    pub(crate) fn left(self) -> Option<Duration> {
        self.at.map(|at| at.saturating_duration_since(Instant::now()))
    }

    /// Whether no time is left.
    pub(crate) fn is_over(self) -> bool {
        self.left() == Some(Duration::ZERO)
    }

    /// The error for a wait that has reached the deadline.
    pub(crate) fn passed(self, what: impl Into<String>) -> Error {
        Error::Timeout { what: what.into(), limit: self.limit }
    }

    /// Waits until the socket is ready.
    ///
    /// # Errors
    /// [`Error::Timeout`], or an error of the system; both name `what`.
    pub(crate) fn wait(self, socket: &impl AsFd, interest: Interest, what: &str) -> Result<(), Error> {
        if wait(socket.as_fd(), interest, self, what)? { Ok(()) } else { Err(self.passed(what)) }
    }
}

/// Waits until the socket is ready (`true`) or the time is over (`false`).
pub(crate) fn wait(socket: BorrowedFd<'_>, interest: Interest, deadline: Deadline, what: &str) -> Result<bool, Error> {
    let mut events = PollFlags::empty();
    events.set(PollFlags::POLLIN, interest.readable);
    events.set(PollFlags::POLLOUT, interest.writable);
    loop {
        let left = deadline.left();
        // Rounded up, or the last millisecond would be spent without sleeping.
        let timeout = left.map_or(PollTimeout::NONE, |left| {
            let ms = left.as_nanos().div_ceil(1_000_000);
            i32::try_from(ms).ok().and_then(|ms| ms.try_into().ok()).unwrap_or(PollTimeout::MAX)
        });
        match poll(&mut [PollFd::new(socket, events)], timeout) {
            Ok(0) if deadline.is_over() => return Ok(false),
            Ok(0) | Err(Errno::EINTR) => {}
            Ok(_) => return Ok(true),
            Err(error) => return Err(Error::io(what, error.into())),
        }
    }
}
