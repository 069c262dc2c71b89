//! [`Outbox`]: requests on their way to the server.

use std::{collections::VecDeque, io::IoSlice};

use nbd_proto::Cookie;

/// Heads that are kept in one piece, in bytes, at most.
const HEADS_MAX: usize = 16 << 10;

/// Pieces that one system call sends.
const PIECES: usize = 32;

/// Heads and payloads, in the order in which they are sent.
#[derive(Debug, Default)]
pub(crate) struct Outbox {
    pieces: VecDeque<Piece>,
    /// Bytes of the first piece that are sent.
    sent: usize,
}

#[derive(Debug)]
enum Piece {
    Heads(Vec<u8>),
    Payload(Cookie, Vec<u8>),
}

impl Piece {
    fn bytes(&self) -> &[u8] {
        match self {
            Self::Heads(bytes) | Self::Payload(_, bytes) => bytes,
        }
    }
}

impl Outbox {
    pub(crate) fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// Where the next head is appended.
    pub(crate) fn heads(&mut self) -> &mut Vec<u8> {
        if !matches!(self.pieces.back(), Some(Piece::Heads(bytes)) if bytes.len() < HEADS_MAX) {
            self.pieces.push_back(Piece::Heads(Vec::new()));
        }
        match self.pieces.back_mut() {
            Some(Piece::Heads(bytes)) => bytes,
            _ => unreachable!("the last piece has heads"),
        }
    }

    /// Appends the payload of a WRITE, which is not empty.
    pub(crate) fn push(&mut self, cookie: Cookie, payload: Vec<u8>) {
        self.pieces.push_back(Piece::Payload(cookie, payload));
    }

    /// Hands the first pieces to `send`, which returns how many bytes it took.
    pub(crate) fn send<E>(&self, send: impl FnOnce(&[IoSlice<'_>]) -> Result<usize, E>) -> Result<usize, E> {
        let mut slices = [IoSlice::new(&[]); PIECES];
        let used = self.pieces.len().min(PIECES);
        for (n, (slice, piece)) in slices.iter_mut().zip(&self.pieces).enumerate() {
            *slice = IoSlice::new(&piece.bytes()[if n == 0 { self.sent } else { 0 }..]);
        }
        send(&slices[..used])
    }

    /// Takes `n` bytes as sent, and returns the next payload that is sent whole. Then to be called with 0, until it returns
    /// `None`.
    pub(crate) fn advance(&mut self, n: usize) -> Option<(Cookie, Vec<u8>)> {
        self.sent += n;
        while self.pieces.front().is_some_and(|piece| piece.bytes().len() <= self.sent) {
            let piece = self.pieces.pop_front().expect("it was just there");
            self.sent -= piece.bytes().len();
            if let Piece::Payload(cookie, payload) = piece {
                return Some((cookie, payload));
            }
        }
        None
    }

    /// The payloads that are not sent, since they never will be.
    pub(crate) fn payloads(self) -> impl Iterator<Item = (Cookie, Vec<u8>)> {
        self.pieces.into_iter().filter_map(|piece| match piece {
            Piece::Heads(_) => None,
            Piece::Payload(cookie, payload) => Some((cookie, payload)),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_sent_in_order_and_payloads_come_back() {
        let mut outbox = Outbox::default();
        outbox.heads().extend_from_slice(b"ab");
        outbox.push(Cookie(1), b"cde".to_vec());
        outbox.push(Cookie(2), b"f".to_vec());
        outbox.heads().extend_from_slice(b"g");
        outbox.heads().extend_from_slice(b"h");
        let (mut wire, mut back) = (Vec::new(), Vec::new());
        for most in (1..4).cycle() {
            if outbox.is_empty() {
                break;
            }
            let take = |slices: &[IoSlice<'_>]| {
                let bytes: Vec<u8> = slices.iter().flat_map(|slice| slice.iter().copied()).take(most).collect();
                wire.extend_from_slice(&bytes);
                Ok::<_, ()>(bytes.len())
            };
            let mut sent = outbox.send(take).unwrap();
            while let Some(payload) = outbox.advance(std::mem::take(&mut sent)) {
                back.push(payload);
            }
        }
        assert_eq!(wire, b"abcdefgh");
        assert_eq!(back, [(Cookie(1), b"cde".to_vec()), (Cookie(2), b"f".to_vec())]);
    }
}
