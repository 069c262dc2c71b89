//! [`Listener`]: where connections come from.

use std::{
    io,
    net::TcpListener,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::UnixListener,
    },
    sync::mpsc,
};

use nix::sys::socket::{
    getsockopt, setsockopt,
    sockopt::{AcceptConn, KeepAlive, SockType, TcpNoDelay},
};
use rustix::net::{SocketFlags, accept_with};

use crate::{Peer, peer::Origin};

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
pub(crate) fn accept(listening: BorrowedFd<'_>) -> io::Result<(OwnedFd, Peer)> {
    let socket = accept_with(listening, SocketFlags::CLOEXEC)?;
    let peer = prepare(socket.as_fd())?;
    Ok((socket, peer))
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
