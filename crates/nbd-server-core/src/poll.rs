//! [`Poll`]: the part of epoll(7) that the door and the workers need: edge-triggered events, with tokens.

use std::{io, os::fd::AsFd, sync::Arc, time::Duration};

use nix::sys::{
    epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout},
    eventfd::{EfdFlags, EventFd},
};

/// A set of file descriptors, each with a token, and the events of the last wait.
#[derive(Debug)]
pub(crate) struct Poll {
    epoll: Arc<Epoll>,
    events: Vec<EpollEvent>,
}

/// The events to wait for. Errors are always reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Interest {
    Read,
    Write,
    Both,
}

impl Interest {
    fn flags(self) -> EpollFlags {
        let read = EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP;
        EpollFlags::EPOLLET
            | match self {
                Self::Read => read,
                Self::Write => EpollFlags::EPOLLOUT,
                Self::Both => read | EpollFlags::EPOLLOUT,
            }
    }
}

/// An event of the descriptor with this token.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Readiness {
    pub(crate) token: u64,
    /// There is something to read, or the end of the stream, or an error.
    pub(crate) readable: bool,
    /// The peer has closed, or there was an error. After the data comes the end of the stream; no further event follows.
    pub(crate) ended: bool,
}

impl Poll {
    pub(crate) fn new() -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        Ok(Self { epoll: Arc::new(epoll), events: vec![EpollEvent::empty(); 256] })
    }

    /// Adds a descriptor, edge-triggered: reports each change to the state in `interest`, not the state itself.
    pub(crate) fn add_edge(&self, fd: impl AsFd, token: u64, interest: Interest) -> io::Result<()> {
        Ok(self.epoll.add(fd, EpollEvent::new(interest.flags(), token))?)
    }

    /// Changes the interest, and reports states that are already so.
    pub(crate) fn set_edge(&self, fd: impl AsFd, token: u64, interest: Interest) -> io::Result<()> {
        Ok(self.epoll.modify(fd, &mut EpollEvent::new(interest.flags(), token))?)
    }

    /// Returns a handle with which other threads can add descriptors.
    pub(crate) fn watch(&self) -> Watch {
        Watch(Arc::clone(&self.epoll))
    }

    /// Adds a descriptor, level-triggered: reports as long as it is readable or its peer has closed.
    pub(crate) fn add_level(&self, fd: impl AsFd, token: u64) -> io::Result<()> {
        Ok(self.epoll.add(fd, EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP, token))?)
    }

    pub(crate) fn remove(&self, fd: impl AsFd) -> io::Result<()> {
        Ok(self.epoll.delete(fd)?)
    }

    /// Waits for events, at most for `timeout`, rounded up to milliseconds.
    pub(crate) fn wait(&mut self, timeout: Option<Duration>) -> io::Result<impl Iterator<Item = Readiness> + use<'_>> {
        let timeout = match timeout {
            None => EpollTimeout::NONE,
            Some(t) => {
                let ms = t.as_micros().div_ceil(1000).min(i32::MAX as u128);
                EpollTimeout::try_from(ms as i32).unwrap_or(EpollTimeout::MAX)
            }
        };
        let count = match self.epoll.wait(&mut self.events, timeout) {
            Ok(count) => count,
            Err(nix::errno::Errno::EINTR) => 0,
            Err(e) => return Err(e.into()),
        };
        Ok(self.events[..count].iter().map(|e| {
            let bad = EpollFlags::EPOLLERR | EpollFlags::EPOLLHUP;
            Readiness {
                token: e.data(),
                ended: e.events().intersects(EpollFlags::EPOLLRDHUP | bad),
                readable: e.events().intersects(EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP | bad),
            }
        }))
    }
}

/// Adds descriptors to a [`Poll`] from another thread.
#[derive(Debug)]
pub(crate) struct Watch(Arc<Epoll>);

impl Watch {
    /// Reports each time that the descriptor becomes readable.
    pub(crate) fn add_wake(&self, fd: impl AsFd, token: u64) -> io::Result<()> {
        Ok(self.0.add(fd, EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, token))?)
    }
}

/// Returns an eventfd that one thread waits for and others ring.
pub(crate) fn bell() -> io::Result<EventFd> {
    Ok(EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?)
}
