//! [`Secure`]: the state of a connection whose records a library opens and seals.

use std::{fmt, io, mem, os::fd::BorrowedFd};

use blkdev::socket;

use super::{
    engine::{Engine, Opening, PLAIN_MAX, RECORD_MAX, REST_MAX, SEALED_MAX, broken},
    kernel::{self, Kernel},
};
use crate::received::{Received, STAGING_MIN, push};

/// The part of the staging buffer that one call of [`Engine::seal`] uses: enough for few system calls, but little enough to stay in
/// the cache, and to be kept for a client whose socket is full.
const BATCH: usize = PLAIN_MAX + 8 * SEALED_MAX;

/// Most bytes that wait to be sent. A client can cause answers, such as alerts, without reading any.
const UNSENT_MAX: usize = 2 * BATCH;

pub(crate) struct Secure {
    engine: Box<dyn Engine>,
    /// Data that came with the last record of the handshake.
    early: Vec<u8>,
    /// Data may have been received already, which no event will report.
    is_fresh: bool,
    /// Sealed bytes that the socket has not taken yet.
    unsent: Vec<u8>,
    has_ended: bool,
}

impl Secure {
    pub(super) fn new(engine: Box<dyn Engine>, early: Vec<u8>) -> Self {
        let is_fresh = engine.rest() > 0;
        Self { engine, early, is_fresh, unsent: Vec::new(), has_ended: false }
    }

    /// At least the number of received bytes that are not opened yet.
    pub(crate) fn rest(&self) -> usize {
        self.engine.rest()
    }

    /// Frees spare capacity after a burst.
    pub(crate) fn shrink(&mut self) {
        self.unsent.shrink_to_fit();
    }

    /// Whether the kernel can continue the connection from here: see [`into_kernel`](Self::into_kernel).
    pub(crate) fn suits_kernel(&self, socket: BorrowedFd<'_>) -> bool {
        let is_idle = self.engine.rest() == 0
            && self.early.is_empty()
            && self.unsent.is_empty()
            && !self.is_fresh
            && !self.has_ended;
        is_idle && self.engine.suite_for_kernel().is_some_and(|suite| kernel::can_take(socket, suite))
    }

    /// Gives the connection to the kernel.
    ///
    /// # Errors
    /// The kernel failed: close the connection.
    pub(crate) fn into_kernel(self, socket: BorrowedFd<'_>) -> io::Result<Kernel> {
        let suite = self.engine.suite_for_kernel().ok_or_else(|| broken("no secrets for the kernel"))?;
        let (secrets, state) = self.engine.into_secrets()?;
        Kernel::new(socket, suite, secrets, state)
    }

    /// As [`Stream::receive`](crate::stream::Stream::receive).
    pub(crate) fn receive(&mut self, socket: BorrowedFd<'_>, staging: &mut [u8]) -> io::Result<Option<Received>> {
        if self.has_ended {
            return Ok(None);
        }
        if !self.early.is_empty() {
            let len = self.early.len().min(staging.len());
            self.early.drain(..len).zip(staging).for_each(|(byte, place)| *place = byte);
            return Ok(Some(Received { landed: 0, staged: len, more: true }));
        }
        let is_fresh = mem::take(&mut self.is_fresh);
        let start = PLAIN_MAX + self.engine.load(staging);
        let got = if is_fresh { 0 } else { socket::receive(socket, None, &mut staging[start..])? };
        if got == 0 && !is_fresh {
            return Ok(None);
        }
        let more = is_fresh || start + got == staging.len();
        let opened = self.engine.open(staging, start + got, &mut self.unsent);
        if !self.unsent.is_empty() && !self.flush(socket)? && self.unsent.len() > UNSENT_MAX {
            return Err(broken("the client reads nothing"));
        }
        let Opening { plain, has_ended } = opened?;
        self.has_ended = has_ended;
        Ok(Some(Received { landed: 0, staged: plain, more: more || has_ended }))
    }

    /// Sends the data that `fill` supplies, until all is sent (`true`) or the socket is full (`false`).
    pub(crate) fn send(
        &mut self,
        socket: BorrowedFd<'_>,
        staging: &mut [u8],
        mut fill: impl FnMut(&mut [u8]) -> usize,
    ) -> io::Result<bool> {
        let batch = staging.len().min(BATCH);
        loop {
            if !self.flush(socket)? {
                return Ok(false);
            }
            let sealed = match self.engine.seal(&mut staging[..batch], &mut fill, &mut self.unsent) {
                Ok(sealed) => sealed,
                Err(e) => {
                    // The reason, for the client.
                    self.flush(socket)?;
                    return Err(e);
                }
            };
            if sealed.is_empty() {
                return self.flush(socket);
            }
            if !self.unsent.is_empty() {
                // What the library sends on its own comes first.
                self.unsent.extend_from_slice(sealed);
                continue;
            }
            let sent = push(socket, sealed)?;
            if sent < sealed.len() {
                self.unsent.extend_from_slice(&sealed[sent..]);
                return Ok(false);
            }
        }
    }

    /// Sends what is sealed. Returns whether that was all.
    fn flush(&mut self, socket: BorrowedFd<'_>) -> io::Result<bool> {
        let sent = push(socket, &self.unsent)?;
        self.unsent.drain(..sent);
        Ok(self.unsent.is_empty())
    }

    /// Sends a closure alert, so that the client can distinguish the end from truncation (RFC 8446, 6.1). If the socket is full,
    /// the alert is lost.
    pub(crate) fn close(&mut self, socket: BorrowedFd<'_>) {
        self.engine.close(&mut self.unsent);
        let _ = self.flush(socket);
    }
}

impl fmt::Debug for Secure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.engine.fmt(f)
    }
}

// To open a record takes room for its plain text, the rest of the previous one and itself; to seal one takes room for both forms.
const _: () = assert!(STAGING_MIN >= PLAIN_MAX + REST_MAX + RECORD_MAX && STAGING_MIN >= PLAIN_MAX + SEALED_MAX);
