//! [`Outbox`]: replies on their way to the client, heads and payloads in order.

use std::{collections::VecDeque, io, os::fd::BorrowedFd};

use blkdev::{Buf, socket::Gather};
use nbd_proto::Put;

/// What is still to be sent. A payload is sent from the memory that the device put it in, which is free again when the last
/// byte is out.
///
/// When others need that memory, it can be [taken](Self::reclaim) earlier: then only the place of the payload on the device is
/// kept, and the payload is read again, in parts, when the client takes it.
#[derive(Debug, Default)]
pub struct Outbox {
    items: VecDeque<Item>,
    /// All heads that are not sent, one behind the other, after `start`.
    bytes: Vec<u8>,
    start: usize,
    /// How much of the first payload is sent, if that is the first item.
    payload_sent: usize,
    /// Bytes of all payloads.
    held: usize,
    /// Bytes sent since the connection began.
    sent: u64,
}

#[derive(Debug)]
enum Item {
    /// So many of `bytes`.
    Heads(usize),
    /// What the device holds at `at`.
    Payload { buf: Buf, at: u64 },
    /// The same, to be read again.
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
    /// Adds a payload, to be sent after everything that was put before. The device holds it at `at`.
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

    /// What must be read before anything else can be sent: first byte and length.
    #[inline]
    pub fn missing(&self) -> Option<(u64, usize)> {
        match self.items.front() {
            Some(&Item::Missing { at, len }) => Some((at, len)),
            _ => None,
        }
    }

    /// Takes the first part of what is [missing](Self::missing), or all of it.
    ///
    /// # Panics
    /// If nothing is, or not as much.
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

    /// Heads and payloads, roughly: a measure of how far the client is behind.
    #[inline]
    pub fn len(&self) -> usize {
        self.items.len()
    }

    /// Bytes of heads that are not sent.
    #[inline]
    pub fn heads(&self) -> usize {
        self.bytes.len() - self.start
    }

    /// Bytes sent since the connection began, heads and payloads.
    pub fn sent(&self) -> u64 {
        self.sent
    }

    /// Returns what a burst has left of capacity.
    pub fn shrink(&mut self) {
        if self.items.is_empty() {
            (self.bytes, self.items) = Default::default();
        }
    }

    /// Bytes of payload memory that it holds.
    #[inline]
    pub fn held(&self) -> usize {
        self.held
    }

    /// Sends until all is out or something is [missing](Self::missing) (`true`), or the socket is full (`false`).
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

    /// Moves up to `into.len()` bytes out, for owners without a socket. Returns how many.
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

    /// Lists what comes first, as much as one system call takes. Returns how many bytes that is.
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

    /// Forgets what was sent.
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

/// Sent heads are cut off the front when there are so many bytes of them that the move is worth it.
const COMPACT: usize = 64 << 10;

#[cfg(test)]
mod tests {
    use blkdev::Mapping;

    use super::*;

    /// What a device holds.
    fn content(at: u64, len: usize) -> Vec<u8> {
        (at..at + len as u64).map(|n| (n * 7 + n / 251) as u8).collect()
    }

    #[test]
    fn comes_out_as_it_went_in_whatever_the_pieces() {
        let mut arena = Mapping::new(1 << 20).unwrap().arenas(1).remove(0);
        // After every so many pieces the memory is taken.
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
