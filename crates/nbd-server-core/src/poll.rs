//! The little of epoll that the door and the workers need: edge-triggered, with tokens.

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

/// What is waited for. Errors are told in any case.
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

/// Something happened to the descriptor with this token.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Happened {
    pub(crate) token: u64,
    /// There is something to read, an end of the stream or an error included.
    pub(crate) readable: bool,
    /// The peer has closed, or there was an error: after what there is to read comes the end, and no further event.
    pub(crate) ended: bool,
}

impl Poll {
    pub(crate) fn new() -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        Ok(Self { epoll: Arc::new(epoll), events: vec![EpollEvent::empty(); 256] })
    }

    /// Tells each time that the descriptor becomes what `interest` says, not that it still is.
    pub(crate) fn add_edge(&self, fd: impl AsFd, token: u64, interest: Interest) -> io::Result<()> {
        Ok(self.epoll.add(fd, EpollEvent::new(interest.flags(), token))?)
    }

    /// Changes the interest, and tells what is already so.
    pub(crate) fn set_edge(&self, fd: impl AsFd, token: u64, interest: Interest) -> io::Result<()> {
        Ok(self.epoll.modify(fd, &mut EpollEvent::new(interest.flags(), token))?)
    }

    /// For other threads, to have descriptors waited for.
    pub(crate) fn watch(&self) -> Watch {
        Watch(Arc::clone(&self.epoll))
    }

    /// Reports as long as the descriptor is readable, or its peer has closed.
    pub(crate) fn add_level(&self, fd: impl AsFd, token: u64) -> io::Result<()> {
        Ok(self.epoll.add(fd, EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP, token))?)
    }

    pub(crate) fn remove(&self, fd: impl AsFd) -> io::Result<()> {
        Ok(self.epoll.delete(fd)?)
    }

    /// Waits for events, at most `timeout` (rounded up to milliseconds).
    pub(crate) fn wait(&mut self, timeout: Option<Duration>) -> io::Result<impl Iterator<Item = Happened> + use<'_>> {
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
            Happened {
                token: e.data(),
                ended: e.events().intersects(EpollFlags::EPOLLRDHUP | bad),
                readable: e.events().intersects(EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP | bad),
            }
        }))
    }
}

/// Another thread's way to have a [`Poll`] wait for more.
#[derive(Debug)]
pub(crate) struct Watch(Arc<Epoll>);

impl Watch {
    /// Tells each time that the descriptor becomes readable.
    pub(crate) fn add_wake(&self, fd: impl AsFd, token: u64) -> io::Result<()> {
        Ok(self.0.add(fd, EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, token))?)
    }
}

/// An eventfd that one thread waits on and others ring.
pub(crate) fn bell() -> io::Result<EventFd> {
    Ok(EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?)
}
