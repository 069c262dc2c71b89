//! [`Outbox`]: replies on their way to the client, headers and payloads in order.

use std::{collections::VecDeque, io, os::fd::BorrowedFd};

use blkdev::{Buf, socket::Gather};
use nbd_proto::Put;

use crate::continuation::Unsent;

/// Unsent replies. A payload is sent from the memory that the device wrote it to; the memory is free after the last byte is sent.
///
/// If other requests need the memory, [`reclaim`](Self::reclaim) frees it earlier. Then only the payload's offset on the device
/// is kept, and the payload is read again, in parts, when the client continues.
#[derive(Debug, Default)]
pub struct Outbox {
    items: VecDeque<Item>,
    /// All unsent headers, one after the other, from `start` on.
    bytes: Vec<u8>,
    start: usize,
    /// Bytes of the first payload that are sent, if it is the first item.
    payload_sent: usize,
    /// Bytes of all payloads in memory.
    held: usize,
    /// Bytes sent since the connection began.
    sent: u64,
}

#[derive(Debug)]
enum Item {
    /// So many bytes of `bytes`.
    Heads(usize),
    /// The content of the device at `at`.
    Payload { buf: Buf, at: u64 },
    /// The same, but it must be read again.
    Missing { at: u64, len: usize },
}

impl Put for Outbox {
    #[inline]
    fn put(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
        match self.items.back_mut() {
            Some(Item::Heads(len)) => *len += bytes.len(),
            _ => self.items.push_back(Item::Heads(bytes.len())),
        }
    }
}

impl Outbox {
    /// Returns an outbox with the replies of another one.
    pub(crate) fn resume(unsent: Vec<Unsent>) -> Self {
        let mut outbox = Self::default();
        for part in unsent {
            match part {
                Unsent::Bytes(bytes) => outbox.put(&bytes),
                Unsent::Content { at, len } => outbox.items.push_back(Item::Missing { at, len }),
            }
        }
        outbox
    }

    /// Lists what is not sent yet.
    pub(crate) fn unsent(&self) -> Vec<Unsent> {
        let (mut head, mut sent) = (self.start, self.payload_sent);
        let list = self.items.iter().map(|item| {
            let sent = std::mem::take(&mut sent);
            match item {
                Item::Heads(len) => {
                    head += len;
                    Unsent::Bytes(self.bytes[head - len..head].to_vec())
                }
                Item::Payload { buf, at } => Unsent::Content { at: at + sent as u64, len: buf.len() - sent },
                Item::Missing { at, len } => Unsent::Content { at: *at, len: *len },
            }
        });
        list.collect()
    }

    /// Adds a payload after all earlier items. It is the content of the device at `at`.
    #[inline]
    pub fn payload(&mut self, buf: Buf, at: u64) {
        if !buf.is_empty() {
            self.held += buf.len();
            self.items.push_back(Item::Payload { buf, at });
        }
    }

    /// Frees the memory of all payloads.
    #[cold]
    pub fn reclaim(&mut self) {
        let mut sent = std::mem::take(&mut self.payload_sent);
        for item in &mut self.items {
            if let Item::Payload { buf, at } = item {
                *item = Item::Missing { at: *at + sent as u64, len: buf.len() - sent };
            }
            sent = 0;
        }
        self.held = 0;
    }

    /// The payload that must be read before anything else can be sent: its first byte on the device, and its length in bytes.
    #[inline]
    pub fn missing(&self) -> Option<(u64, usize)> {
        match self.items.front() {
            Some(&Item::Missing { at, len }) => Some((at, len)),
            _ => None,
        }
    }

    /// Supplies the first part of the [missing](Self::missing) payload, or all of it.
    ///
    /// # Panics
    /// If no payload is missing, or less than `buf` holds.
    #[cold]
    pub fn restore(&mut self, buf: Buf) {
        let Some(Item::Missing { at, len }) = self.items.pop_front() else { panic!("no payload is missing") };
        let rest = len.checked_sub(buf.len()).expect("no more is restored than is missing");
        if rest > 0 {
            self.items.push_front(Item::Missing { at: at + buf.len() as u64, len: rest });
        }
        self.held += buf.len();
        self.items.push_front(Item::Payload { buf, at });
    }

    /// Whether everything is sent.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    /// Bytes of headers and payloads, roughly: how far the client is behind.
    #[inline]
    pub fn len(&self) -> usize {
        self.items.len()
    }

    /// Bytes of unsent headers.
    #[inline]
    pub fn heads(&self) -> usize {
        self.bytes.len() - self.start
    }

    /// Bytes sent since the connection began, headers and payloads.
    pub fn sent(&self) -> u64 {
        self.sent
    }

    /// Frees spare capacity after a burst.
    pub fn shrink(&mut self) {
        if self.items.is_empty() {
            (self.bytes, self.items) = Default::default();
        }
    }

    /// Bytes of payload memory in use.
    #[inline]
    pub fn held(&self) -> usize {
        self.held
    }

    /// Sends until all is sent or a payload is [missing](Self::missing) (`true`), or the socket is full (`false`).
    ///
    /// # Errors
    /// The connection is broken.
    pub fn send(&mut self, socket: BorrowedFd<'_>) -> io::Result<bool> {
        while !matches!(self.items.front(), None | Some(Item::Missing { .. })) {
            let mut list = Gather::new();
            let wanted = self.gather(&mut list);
            match list.send(socket) {
                Ok(sent) => {
                    self.advance(sent);
                    if sent < wanted {
                        return Ok(false);
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(true)
    }

    /// Moves up to `into.len()` bytes out, for a caller without a socket. Returns their number.
    pub fn read(&mut self, into: &mut [u8]) -> usize {
        let mut done = 0;
        while done < into.len() {
            let room = into.len() - done;
            let n = match self.items.front() {
                None | Some(Item::Missing { .. }) => break,
                Some(Item::Heads(len)) => {
                    let n = room.min(*len);
                    into[done..done + n].copy_from_slice(&self.bytes[self.start..self.start + n]);
                    n
                }
                Some(Item::Payload { buf, .. }) => {
                    let n = room.min(buf.len() - self.payload_sent);
                    buf.copy_to(self.payload_sent, &mut into[done..done + n]);
                    n
                }
            };
            self.advance(n);
            done += n;
        }
        done
    }

    /// Lists the next bytes, as many as one system call takes. Returns their number.
    fn gather<'a>(&'a self, list: &mut Gather<'a>) -> usize {
        let (mut head, mut sent, mut total) = (self.start, self.payload_sent, 0);
        for item in &self.items {
            if list.is_full() {
                break;
            }
            match item {
                Item::Heads(len) => {
                    list.bytes(&self.bytes[head..head + len]);
                    head += len;
                    total += len;
                }
                Item::Payload { buf, .. } => {
                    list.buf(buf, sent);
                    total += buf.len() - sent;
                }
                Item::Missing { .. } => break,
            }
            sent = 0;
        }
        total
    }

    /// Removes sent bytes.
    fn advance(&mut self, mut sent: usize) {
        self.sent += sent as u64;
        while sent > 0 {
            match self.items.front_mut() {
                Some(Item::Heads(len)) => {
                    let n = sent.min(*len);
                    *len -= n;
                    self.start += n;
                    sent -= n;
                    if *len > 0 {
                        break;
                    }
                }
                Some(Item::Payload { buf, .. }) => {
                    let n = sent.min(buf.len() - self.payload_sent);
                    self.payload_sent += n;
                    sent -= n;
                    if self.payload_sent < buf.len() {
                        break;
                    }
                    self.payload_sent = 0;
                    self.held -= buf.len();
                }
                None | Some(Item::Missing { .. }) => unreachable!("no more is sent than there is"),
            }
            self.items.pop_front();
        }
        if self.start == self.bytes.len() {
            self.bytes.clear();
            self.start = 0;
        } else if self.start > COMPACT {
            self.bytes.drain(..self.start);
            self.start = 0;
        }
    }
}

/// Sent headers are removed from the front of `bytes` once they exceed this many bytes, so that the move pays off.
const COMPACT: usize = 64 << 10;

#[cfg(test)]
mod tests {
    use blkdev::Mapping;

    use super::*;

    /// The content of the device.
    fn content(at: u64, len: usize) -> Vec<u8> {
        (at..at + len as u64).map(|n| (n * 7 + n / 251) as u8).collect()
    }

    #[test]
    fn bytes_come_out_unchanged_in_pieces_of_any_size() {
        let mut arena = Mapping::new(1 << 20).unwrap().arenas(1).remove(0);
        // `reclaims`: the memory is taken back after this many pieces.
        for (piece, reclaims) in [(1, 97), (3, 10), (7, 0), (64, 5), (1000, 1), (100_000, 0)] {
            let (mut outbox, mut expected) = (Outbox::default(), Vec::new());
            let mut fill = |at: u64, len: usize| {
                let mut buf = arena.alloc(len).unwrap();
                buf.copy_from(0, &content(at, len));
                buf
            };
            for n in 0..40u8 {
                outbox.put(&[n; 16]);
                expected.extend([n; 16]);
                if n % 3 > 0 {
                    let (at, len) = (u64::from(n) << 20, usize::from(n) * 11);
                    outbox.payload(fill(at, len), at);
                    expected.extend(content(at, len));
                }
            }
            let (mut got, mut part) = (Vec::new(), vec![0; piece]);
            for turn in 1.. {
                if outbox.is_empty() {
                    break;
                }
                let n = outbox.read(&mut part);
                got.extend_from_slice(&part[..n]);
                if turn % reclaims.max(1) == 0 && reclaims > 0 {
                    outbox.reclaim();
                    assert_eq!(outbox.held(), 0);
                }
                if let Some((at, len)) = outbox.missing() {
                    outbox.restore(fill(at, len.min(100)));
                }
            }
            assert_eq!(got, expected);
            assert_eq!(arena.free(), arena.capacity(), "every Buf came back");
        }
    }
}
