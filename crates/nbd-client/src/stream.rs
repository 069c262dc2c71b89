//! [`Stream`]: a connection's bytes, in plain text or through TLS.

use std::{
    io::{self, IoSlice, Read, Write},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use crate::{
    deadline::{Deadline, Interest},
    error::Error,
    socket::Nonblocking,
    tls::{Session, Tls},
};

/// A connected socket, and what its bytes go through. Its calls fail with `WouldBlock` instead of waiting, but for those
/// that take a [`Deadline`].
#[derive(Debug)]
pub(crate) struct Stream {
    socket: OwnedFd,
    /// `None`: plain text.
    tls: Option<Box<Session>>,
}

const READABLE: Interest = Interest { readable: true, writable: false };
const WRITABLE: Interest = Interest { readable: false, writable: true };

impl Stream {
    /// Receives what is there; 0 is the end of the connection.
    pub(crate) fn receive(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match &mut self.tls {
            None => Nonblocking(self.socket.as_fd()).read(buf),
            Some(tls) => tls.receive(self.socket.as_fd(), buf),
        }
    }

    /// Takes some bytes, which may not be sent yet when it returns: see [`flush`](Self::flush).
    pub(crate) fn send(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        match &mut self.tls {
            None => Nonblocking(self.socket.as_fd()).write_vectored(slices),
            Some(tls) => tls.send(self.socket.as_fd(), slices),
        }
    }

    /// Sends all that [`send`](Self::send) took.
    pub(crate) fn flush(&mut self) -> io::Result<()> {
        self.tls.as_mut().map_or(Ok(()), |tls| tls.flush(self.socket.as_fd()))
    }

    /// Whether all that was taken is sent.
    pub(crate) fn is_flushed(&self) -> bool {
        self.tls.as_ref().is_none_or(|tls| tls.is_flushed())
    }

    /// Ends TLS in good order, as far as the socket takes it.
    pub(crate) fn close(&mut self) {
        if let Some(tls) = &mut self.tls {
            tls.close(self.socket.as_fd());
        }
    }

    /// Does the TLS handshake.
    ///
    /// # Errors
    /// The server cannot be trusted, does not trust the client, or is too slow.
    pub(crate) fn start_tls(&mut self, tls: &Tls, host: &str, deadline: Deadline) -> Result<(), Error> {
        const WHAT: &str = "TLS handshake";
        let mut session = Session::new(tls, host)?;
        loop {
            match session.shake(self.socket.as_fd()) {
                Ok(true) => break,
                Ok(false) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(Error::of_connection(WHAT, error)),
            }
            let interest = if session.is_flushed() { READABLE } else { WRITABLE };
            deadline.wait(self, interest, WHAT)?;
        }
        self.tls = Some(session.into());
        Ok(())
    }

    /// Waits for bytes and receives them; at least one.
    ///
    /// # Errors
    /// The connection has ended, or the server is too slow.
    pub(crate) fn receive_by(&mut self, buf: &mut [u8], deadline: Deadline, what: &str) -> Result<usize, Error> {
        loop {
            // A server that never stops talking is too slow as well.
            if deadline.is_over() {
                return Err(deadline.passed(what));
            }
            match self.receive(buf) {
                Ok(0) => return Err(Error::Closed),
                Ok(n) => return Ok(n),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(Error::of_connection(what, error)),
            }
            deadline.wait(self, READABLE, what)?;
        }
    }

    /// Sends all of the bytes.
    ///
    /// # Errors
    /// The connection has ended, or the server is too slow.
    pub(crate) fn send_by(&mut self, mut bytes: &[u8], deadline: Deadline, what: &str) -> Result<(), Error> {
        loop {
            let sent = if bytes.is_empty() {
                self.flush()
            } else {
                self.send(&[IoSlice::new(bytes)]).map(|n| bytes = &bytes[n..])
            };
            match sent {
                Ok(()) if bytes.is_empty() && self.is_flushed() => return Ok(()),
                Ok(()) => continue,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(Error::of_connection(what, error)),
            }
            deadline.wait(self, WRITABLE, what)?;
        }
    }
}

impl From<OwnedFd> for Stream {
    fn from(socket: OwnedFd) -> Self {
        Self { socket, tls: None }
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
