//! The data that passes between a [`Stream`](crate::stream::Stream) and its socket: [`Received`] and [`push`].

use std::{io, os::fd::BorrowedFd};

use blkdev::socket::Gather;

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
