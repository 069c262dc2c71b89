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

use nix::sys::socket::{
    getsockopt, setsockopt,
    sockopt::{AcceptConn, KeepAlive, SockType, TcpNoDelay},
};
use rustix::{
    io::Errno,
    net::{SocketFlags, accept_with},
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
    Ok(accept_with(listening, SocketFlags::CLOEXEC)?)
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
            Errno::AGAIN => Self::None,
            // accept(2) also returns errors of the connection that it would have returned.
            Errno::INTR | Errno::CONNABORTED | Errno::CONNRESET | Errno::TIMEDOUT | Errno::PROTO => Self::Gone,
            Errno::NETDOWN | Errno::NETUNREACH | Errno::HOSTDOWN | Errno::HOSTUNREACH => Self::Gone,
            Errno::NOPROTOOPT | Errno::NONET | Errno::PIPE => Self::Gone,
            Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM => Self::Room(errno),
            // EINVAL: a process has called shutdown(2).
            Errno::INVAL | Errno::BADF | Errno::NOTSOCK | Errno::OPNOTSUPP => Self::Dead(errno),
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
