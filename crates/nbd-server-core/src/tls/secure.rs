//! [`Secure`]: the state of a connection whose TLS records we seal and open ourselves.

use std::{fmt, io, mem, os::fd::BorrowedFd};

use blkdev::socket;

use super::{
    kernel,
    records::{Opened, RECORD_MAX, Records, SEALED_MAX, Version},
};
use crate::received::{Received, STAGING_MIN, push};

/// Bytes sealed at a time: enough for few system calls, but little enough to stay in the cache, and to be kept for a client whose
/// socket is full.
const BATCH: usize = 8 * SEALED_MAX;

pub(crate) struct Secure {
    records: Records,
    /// Received bytes that are not opened: the beginning of a record, or data that followed the handshake.
    part: Vec<u8>,
    /// `part` may contain whole records, which no event will report.
    fresh: bool,
    /// Sealed bytes that the socket has not taken yet.
    unsent: Vec<u8>,
    /// The directions that the kernel handles.
    kernel: Kernel,
}

/// The directions of a connection that the kernel handles.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Kernel {
    pub(crate) receives: bool,
    pub(crate) sends: bool,
}

impl Secure {
    pub(super) fn new(records: Records, part: Vec<u8>) -> Self {
        Self { records, fresh: !part.is_empty(), part, unsent: Vec::new(), kernel: Kernel::default() }
    }

    /// The directions that the kernel handles: there the socket's bytes are plain text.
    pub(crate) fn kernel(&self) -> Kernel {
        self.kernel
    }

    /// Number of received bytes that could not be opened yet.
    pub(crate) fn part(&self) -> usize {
        self.part.len()
    }

    /// Frees spare capacity after a burst.
    pub(crate) fn shrink(&mut self) {
        self.part.shrink_to_fit();
        self.unsent.shrink_to_fit();
    }

    /// Moves the directions that the kernel can handle into the kernel, from the present state on.
    ///
    /// # Errors
    /// The kernel failed half-way.
    pub(crate) fn offload(&mut self, socket: BorrowedFd<'_>) -> io::Result<()> {
        let Some((version, receive, send)) = self.records.secrets() else { return Ok(()) };
        if !self.unsent.is_empty() || !kernel::is_ready(socket) {
            return Ok(());
        }
        // Under TLS 1.3 the client may change its key, as GnuTLS does after 2^24 records, and kernels before 6.14 cannot follow.
        // So we keep the receiving direction.
        if version == Version::Tls12 && self.part.is_empty() {
            self.kernel.receives = kernel::receive(socket, version, receive).is_ok();
        }
        self.kernel.sends = match kernel::send(socket, version, send) {
            Ok(()) => true,
            Err(_) if !self.kernel.receives => false,
            Err(e) => return Err(e.into()),
        };
        Ok(())
    }

    /// As [`Stream::receive`](crate::stream::Stream::receive).
    pub(crate) fn receive(&mut self, socket: BorrowedFd<'_>, staging: &mut [u8]) -> io::Result<Option<Received>> {
        if self.records.ended() {
            return Ok(None);
        }
        let (had, fresh) = (self.part.len(), mem::take(&mut self.fresh));
        staging[..had].copy_from_slice(&self.part);
        let got = if fresh { 0 } else { socket::receive(socket, None, &mut staging[had..])? };
        if got == 0 && !fresh {
            return Ok(None);
        }
        let more = fresh || had + got == staging.len();
        let bytes = &mut staging[..had + got];
        let Opened { plain, used } = self.records.open(bytes)?;
        self.part.clear();
        self.part.extend_from_slice(&bytes[used..]);
        Ok(Some(Received { landed: 0, staged: plain, more: more || self.records.ended() }))
    }

    /// Sends the data that `fill` supplies, until all is sent (`true`) or the socket is full (`false`).
    pub(crate) fn send(
        &mut self,
        socket: BorrowedFd<'_>,
        staging: &mut [u8],
        mut fill: impl FnMut(&mut [u8]) -> usize,
    ) -> io::Result<bool> {
        let sent = push(socket, &self.unsent)?;
        self.unsent.drain(..sent);
        if !self.unsent.is_empty() {
            return Ok(false);
        }
        loop {
            let batch = staging.len().min(BATCH);
            let len = self.records.seal(&mut staging[..batch], &mut fill)?;
            if len == 0 {
                return Ok(true);
            }
            let sent = push(socket, &staging[..len])?;
            if sent < len {
                self.unsent.extend_from_slice(&staging[sent..len]);
                return Ok(false);
            }
        }
    }

    /// Sends a closure alert, so that the client can distinguish the end from truncation (RFC 8446, 6.1). If the socket is full,
    /// the alert is lost.
    pub(crate) fn close(&mut self, socket: BorrowedFd<'_>, staging: &mut [u8]) {
        if self.unsent.is_empty()
            && !self.kernel.sends
            && let Ok(len) = self.records.close(staging)
        {
            let _ = push(socket, &staging[..len]);
        }
    }
}

impl fmt::Debug for Secure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.records.fmt(f)?;
        match self.kernel {
            Kernel { receives: true, sends: true } => f.write_str(", both ways in the kernel"),
            Kernel { receives: false, sends: true } => f.write_str(", sent by the kernel"),
            Kernel { receives: true, sends: false } => f.write_str(", received by the kernel"),
            Kernel { receives: false, sends: false } => Ok(()),
        }
    }
}

// To open a record takes room for the rest of the previous record and one more; to seal one takes room for it.
const _: () = assert!(STAGING_MIN >= 2 * RECORD_MAX && STAGING_MIN >= SEALED_MAX);
