//! [`Engine`]: a TLS connection without its socket.

use std::{fmt, io};

use rustls::{ExtractedSecrets, kernel::KernelConnection, server::ServerConnectionData};

use super::suite::Suite;
use crate::peer::Identity;

/// Longest plain text of one record, in bytes (RFC 8446, 5.1).
pub(super) const PLAIN_MAX: usize = 1 << 14;

/// Longest record, in bytes: a header, and 256 bytes that a cipher adds (RFC 8446, 5.2).
pub(super) const RECORD_MAX: usize = 5 + PLAIN_MAX + 256;

/// Most bytes that wait for the rest of their record: one record, and a message in several records, of which only short ones are
/// legal after the handshake.
pub(super) const REST_MAX: usize = RECORD_MAX + 256;

/// A TLS connection without its socket. A library does the work. Each function appends the bytes that must be sent to `out`, also if
/// it fails: then these are the alert with the reason.
pub(super) trait Engine: fmt::Debug + Send {
    /// Continues the handshake with the bytes that were `received`. `true`: the handshake is over. Data that came with its last
    /// record is appended to `early`.
    fn shake(&mut self, received: &[u8], early: &mut Vec<u8>, out: &mut Vec<u8>) -> io::Result<bool>;

    /// The client's identity, after the handshake.
    fn identity(&self) -> io::Result<Option<Identity>>;

    /// At least the number of received bytes that are not opened yet, because their record is incomplete.
    fn rest(&self) -> usize;

    /// Copies bytes that the next [`open`](Self::open) needs again to `staging`, from [`PLAIN_MAX`] on. Returns their number.
    fn load(&self, staging: &mut [u8]) -> usize;

    /// Opens all whole records of `staging` from [`PLAIN_MAX`] to `end`: what [`load`](Self::load) put there, and what was received
    /// behind that. Moves their plain text to the front of `staging`, where there is room for it.
    fn open(&mut self, staging: &mut [u8], end: usize, out: &mut Vec<u8>) -> io::Result<Opening>;

    /// Returns sealed records. `fill` puts plain text into a buffer and returns its length; it is called while it has data and
    /// `staging` has room. No records: there was no data. `staging` has room for [`PLAIN_MAX`] and [`SEALED_MAX`].
    fn seal<'a>(
        &'a mut self,
        staging: &'a mut [u8],
        fill: &mut dyn FnMut(&mut [u8]) -> usize,
        out: &mut Vec<u8>,
    ) -> io::Result<&'a [u8]>;

    /// Ends our direction.
    fn close(&mut self, out: &mut Vec<u8>);

    /// The version and the cipher of the connection, if the kernel can continue it.
    fn suite_for_kernel(&self) -> Option<Suite> {
        None
    }

    /// Returns the secrets, and the state that derives further ones.
    fn into_secrets(self: Box<Self>) -> io::Result<(ExtractedSecrets, KernelConnection<ServerConnectionData>)> {
        Err(broken("the secrets stay in the library"))
    }
}

/// The room that [`Engine::seal`] needs for one more record, in bytes: a message that changes keys may come first.
pub(super) const SEALED_MAX: usize = RECORD_MAX + 256;

/// The result of [`Engine::open`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Opening {
    /// Bytes of plain text, now at the front of the buffer.
    pub(super) plain: usize,
    /// The client has ended its direction: no more data comes.
    pub(super) has_ended: bool,
}

pub(super) fn broken(text: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("TLS: {text}"))
}
