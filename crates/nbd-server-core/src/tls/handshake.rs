//! [`Shaking`]: a TLS handshake in progress.

use std::{io, os::fd::BorrowedFd};

use blkdev::socket;

use super::{
    engine::{Engine, broken},
    secure::Secure,
};
use crate::{peer::Identity, received::push};

/// A handshake in progress.
pub(crate) struct Shaking {
    engine: Box<dyn Engine>,
    /// Data that came with the last record of the handshake.
    early: Vec<u8>,
    /// Bytes to be sent.
    out: Vec<u8>,
}

/// Longest unprocessed input of a handshake, in bytes: rustls accepts messages of up to 64 KiB.
const INPUT_MAX: usize = 128 << 10;

impl Shaking {
    pub(super) fn new(engine: Box<dyn Engine>) -> Self {
        Self { engine, early: Vec::new(), out: Vec::new() }
    }

    /// Continues with the data that has arrived. `true`: the handshake is over; call [`agree`](Self::agree) next.
    ///
    /// # Errors
    /// The handshake has failed. The client got an alert if possible; close the connection.
    pub(crate) fn go(&mut self, socket: BorrowedFd<'_>, staging: &mut [u8]) -> io::Result<bool> {
        let mut got = 0;
        loop {
            let over = self.engine.shake(&staging[..got], &mut self.early, &mut self.out);
            let sent = self.flush(socket)?;
            if over? {
                return Ok(sent);
            }
            if !sent {
                return Ok(false);
            }
            got = match socket::receive(socket, None, staging) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(_) if self.engine.rest() > INPUT_MAX => return Err(broken("the handshake is too long")),
                Ok(got) => got,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => 0,
                Err(e) => return Err(e),
            };
        }
    }

    fn flush(&mut self, socket: BorrowedFd<'_>) -> io::Result<bool> {
        let sent = push(socket, &self.out)?;
        self.out.drain(..sent);
        Ok(self.out.is_empty())
    }

    /// Returns the connection, and the client's identity.
    ///
    /// # Errors
    /// The client's certificate cannot be read.
    pub(crate) fn agree(self) -> io::Result<(Secure, Option<Identity>)> {
        let identity = self.engine.identity()?;
        Ok((Secure::new(self.engine, self.early), identity))
    }
}
