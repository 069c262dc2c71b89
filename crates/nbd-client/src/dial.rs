//! Connects a socket to an address, within a time limit.

use std::{
    io,
    net::{TcpStream, ToSocketAddrs},
    os::fd::{AsRawFd, OwnedFd},
    time::Duration,
};

use nix::{
    errno::Errno,
    sys::{
        socket::{
            AddressFamily, SockFlag, SockType, SockaddrLike, UnixAddr, VsockAddr, connect, getsockopt, setsockopt,
            socket, sockopt,
        },
        time::{TimeVal, TimeValLike},
    },
};

use crate::{
    deadline::{Deadline, Interest},
    error::Error,
    uri::Address,
};

/// Connects. The time that the resolver takes for the name of a host is not bounded.
///
/// # Errors
/// [`Error::Io`] and [`Error::Timeout`] name the address.
pub(crate) fn dial(address: &Address, limit: Option<Duration>) -> Result<OwnedFd, Error> {
    let what = format!("connecting to {address}");
    let deadline = Deadline::after(limit);
    // The kernel has a limit of its own, which is reported under its own name.
    let failed = |error: io::Error| match (error.kind(), error.raw_os_error()) {
        (io::ErrorKind::TimedOut, None) => deadline.passed(&what),
        _ => Error::io(&what, error),
    };
    match address {
        Address::Tcp { host, port } => tcp(host, *port, deadline).map_err(failed),
        Address::Unix(path) => {
            UnixAddr::new(path).map_err(Into::into).and_then(|to| unix(&to, deadline)).map_err(failed)
        }
        Address::Abstract(name) => {
            UnixAddr::new_abstract(name).map_err(Into::into).and_then(|to| unix(&to, deadline)).map_err(failed)
        }
        Address::Vsock { cid, port } => vsock(&VsockAddr::new(*cid, *port), deadline, &what),
    }
}

/// Tries the addresses of a host, one by one, until the first that takes the connection.
fn tcp(host: &str, port: u16, deadline: Deadline) -> io::Result<OwnedFd> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the host has no address");
    for address in (host, port).to_socket_addrs()? {
        let tried = match deadline.left() {
            None => TcpStream::connect(address),
            Some(Duration::ZERO) => return Err(io::ErrorKind::TimedOut.into()),
            Some(left) => TcpStream::connect_timeout(&address, left),
        };
        match tried {
            Ok(stream) => {
                // proto.md: both sides SHOULD.
                stream.set_nodelay(true)?;
                return Ok(stream.into());
            }
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// The backlog of a Unix socket may be full. Then a socket that does not block cannot wait at all, but one that blocks waits
/// for as long as its send time-out is.
fn unix(to: &UnixAddr, deadline: Deadline) -> io::Result<OwnedFd> {
    let socket = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    loop {
        if let Some(left) = deadline.left() {
            if deadline.is_over() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            let micros = i64::try_from(left.as_micros()).unwrap_or(i64::MAX).max(1);
            setsockopt(&socket, sockopt::SendTimeout, &TimeVal::microseconds(micros))?;
        }
        match connect(socket.as_raw_fd(), to) {
            Ok(()) => return Ok(socket),
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) if deadline.left().is_some() => {}
            Err(error) => return Err(error.into()),
        }
    }
}

fn vsock(to: &dyn SockaddrLike, deadline: Deadline, what: &str) -> Result<OwnedFd, Error> {
    let failed = |error: Errno| Error::io(what, error.into());
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Vsock, SockType::Stream, flags, None).map_err(failed)?;
    match connect(socket.as_raw_fd(), to) {
        Ok(()) => {}
        Err(Errno::EINPROGRESS | Errno::EINTR) => {
            deadline.wait(&socket, Interest { readable: false, writable: true }, what)?;
            match getsockopt(&socket, sockopt::SocketError).map_err(failed)? {
                0 => {}
                error => return Err(failed(Errno::from_raw(error))),
            }
        }
        Err(error) => return Err(failed(error)),
    }
    Ok(socket)
}
