//! What passes between a [`Stream`](crate::stream::Stream) and its socket: what was [`Received`], and how bytes are pushed.

use std::{io, os::fd::BorrowedFd};

use blkdev::socket::Gather;

/// Staging that a stream needs at least, bytes.
pub(crate) const STAGING_MIN: usize = 64 << 10;

/// What was received.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Received {
    /// Bytes where the caller wanted them.
    pub(crate) landed: usize,
    /// Bytes at the front of the staging buffer.
    pub(crate) staged: usize,
    /// There may be more, of which no event will tell.
    pub(crate) more: bool,
}

/// Sends what the socket takes now, and returns how many bytes that was.
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
