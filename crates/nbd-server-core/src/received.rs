//! The data that passes between a [`Stream`](crate::stream::Stream) and its socket: [`Received`] and [`push`].

use std::{io, os::fd::BorrowedFd};

use blkdev::{
    Buf,
    socket::{self, Gather},
};

/// Smallest staging buffer of a stream, in bytes.
pub(crate) const STAGING_MIN: usize = 64 << 10;

/// The result of one receive.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Received {
    /// Bytes that went directly to the caller's buffer.
    pub(crate) landed: usize,
    /// Bytes at the front of the staging buffer.
    pub(crate) staged: usize,
    /// There may be more, and no event will report it.
    pub(crate) more: bool,
}

impl Received {
    /// Receives plain text from `socket`: into `landing` first, the rest into `staging`. `None`: the peer has closed.
    pub(crate) fn from(
        socket: BorrowedFd<'_>,
        landing: Option<(&mut Buf, usize)>,
        staging: &mut [u8],
    ) -> io::Result<Option<Self>> {
        let room = landing.as_ref().map_or(0, |(buf, at)| buf.len() - at);
        let got = socket::receive(socket, landing, staging)?;
        let landed = got.min(room);
        // Less than the buffers hold: the socket is empty, and the next bytes cause a new event.
        let more = got == room + staging.len();
        Ok((got > 0).then_some(Self { landed, staged: got - landed, more }))
    }
}

/// Sends as many bytes as the socket takes now. Returns their number.
pub(crate) fn push(socket: BorrowedFd<'_>, bytes: &[u8]) -> io::Result<usize> {
    let mut sent = 0;
    while sent < bytes.len() {
        let mut list = Gather::new();
        list.bytes(&bytes[sent..]);
        match list.send(socket) {
            Ok(n) => sent += n,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(sent)
}
