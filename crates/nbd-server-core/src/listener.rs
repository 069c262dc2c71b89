//! [`Listener`]: a source of connections.

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

/// A source of connections.
#[derive(Debug)]
pub enum Listener {
    /// A bound, listening stream socket of any address family.
    Listening(OwnedFd),
    /// A single client that is already connected.
    Connected {
        /// A connected stream socket.
        socket: OwnedFd,
        /// Dropped when the connection is over and none of its requests is left at a device.
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
    /// Takes an inherited socket, which must be a listening stream socket.
    ///
    /// # Errors
    /// It is not one, or not a socket.
    pub fn inherited(socket: OwnedFd) -> io::Result<Self> {
        let kind = getsockopt(&socket, SockType)?;
        if kind != nix::sys::socket::SockType::Stream || !getsockopt(&socket, AcceptConn)? {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a listening stream socket"));
        }
        Ok(Self::Listening(socket))
    }
}

/// Accepts a connection without blocking.
pub(crate) fn accept(listening: BorrowedFd<'_>) -> Result<OwnedFd, Obstacle> {
    Ok(socket::accept(listening)?)
}

/// The reason why accept(2) returned no connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Obstacle {
    /// No connection is pending: another process may have accepted it.
    None,
    /// The client has disconnected. Another one may be pending.
    Gone,
    /// Descriptors or memory are short. Closing other connections may help.
    Room(Errno),
    /// A condition that may pass on its own.
    Other(Errno),
    /// The socket can never return another connection.
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

/// Sets the options of an accepted connection.
pub(crate) fn prepare(socket: BorrowedFd<'_>) -> io::Result<Peer> {
    let peer = Peer::of(socket);
    if let Origin::Tcp(_) = peer.origin {
        // Replies leave in batches already; waiting for more would only delay them.
        setsockopt(&socket, TcpNoDelay, &true)?;
        // Without keep-alive, a machine that has vanished would hold its connection forever.
        setsockopt(&socket, KeepAlive, &true)?;
    }
    Ok(peer)
}
