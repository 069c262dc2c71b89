//! [`Listener`]: where connections come from.

use std::{
    io,
    net::TcpListener,
    os::{
        fd::{BorrowedFd, OwnedFd},
        unix::net::UnixListener,
    },
    sync::mpsc,
};

use blkdev::socket;
use nix::{
    errno::Errno,
    sys::socket::{
        getsockopt, setsockopt,
        sockopt::{AcceptConn, KeepAlive, SockType, TcpNoDelay},
    },
};

use crate::peer::{Origin, Peer};

/// Where connections come from.
#[derive(Debug)]
pub enum Listener {
    /// A stream socket that is bound and listens, of whatever family.
    Listening(OwnedFd),
    /// One client, who is there already.
    Connected {
        /// A stream socket.
        socket: OwnedFd,
        /// Dropped when its connection is over, and nothing of it is left at a device.
        over: mpsc::Sender<()>,
    },
}

impl From<UnixListener> for Listener {
    fn from(listener: UnixListener) -> Self {
        Self::Listening(listener.into())
    }
}

impl From<TcpListener> for Listener {
    fn from(listener: TcpListener) -> Self {
        Self::Listening(listener.into())
    }
}

impl Listener {
    /// Takes a socket that somebody else made: it must listen for streams.
    ///
    /// # Errors
    /// It does not, or is no socket.
    pub fn inherited(socket: OwnedFd) -> io::Result<Self> {
        let kind = getsockopt(&socket, SockType)?;
        if kind != nix::sys::socket::SockType::Stream || !getsockopt(&socket, AcceptConn)? {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "it does not listen for streams"));
        }
        Ok(Self::Listening(socket))
    }
}

/// Takes the next connection of a listening socket, which need not wait for one.
pub(crate) fn accept(listening: BorrowedFd<'_>) -> Result<OwnedFd, Obstacle> {
    Ok(socket::accept(listening)?)
}

/// Why there is no connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Obstacle {
    /// Nothing is there: another process took it.
    None,
    /// The client has gone again. The next one may be there already.
    Gone,
    /// Others may go for it to go away: descriptors or memory.
    Room(Errno),
    /// It may go away on its own.
    Other(Errno),
    /// This socket will never give one again.
    Dead(Errno),
}

impl From<Errno> for Obstacle {
    fn from(errno: Errno) -> Self {
        match errno {
            Errno::EAGAIN => Self::None,
            // accept(2) also returns errors of the connection that it would have returned.
            Errno::EINTR | Errno::ECONNABORTED | Errno::ECONNRESET | Errno::ETIMEDOUT | Errno::EPROTO => Self::Gone,
            Errno::ENETDOWN | Errno::ENETUNREACH | Errno::EHOSTDOWN | Errno::EHOSTUNREACH => Self::Gone,
            Errno::ENOPROTOOPT | Errno::ENONET | Errno::EPIPE => Self::Gone,
            Errno::EMFILE | Errno::ENFILE | Errno::ENOBUFS | Errno::ENOMEM => Self::Room(errno),
            // EINVAL: a process has called shutdown(2).
            Errno::EINVAL | Errno::EBADF | Errno::ENOTSOCK | Errno::EOPNOTSUPP => Self::Dead(errno),
            _ => Self::Other(errno),
        }
    }
}

/// Makes a connection ready to serve.
pub(crate) fn prepare(socket: BorrowedFd<'_>) -> io::Result<Peer> {
    let peer = Peer::of(socket);
    if let Origin::Tcp(_) = peer.origin {
        // Replies leave in batches already; waiting for more would only delay them.
        setsockopt(&socket, TcpNoDelay, &true)?;
        // A machine that has gone without a word would keep its connection for ever.
        setsockopt(&socket, KeepAlive, &true)?;
    }
    Ok(peer)
}
