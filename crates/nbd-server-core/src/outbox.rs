//! [`Outbox`]: replies on their way to the client, heads and payloads in order.

use std::{collections::VecDeque, io, os::fd::BorrowedFd};

use blkdev::{Buf, socket::Gather};
use nbd_proto::Put;

/// What is still to be sent. A payload is sent from the memory the device put it in, and given back when its last byte is
/// out.
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
    Payload(Buf),
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
    /// Adds a payload, to be sent after everything that was put before.
    #[inline]
    pub fn payload(&mut self, buf: Buf) {
        if !buf.is_empty() {
            self.held += buf.len();
            self.items.push_back(Item::Payload(buf));
        }
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

    /// Sends until all is out (`true`) or the socket is full (`false`).
    ///
    /// # Errors
    /// The connection is broken.
    pub fn send(&mut self, socket: BorrowedFd<'_>) -> io::Result<bool> {
        while !self.items.is_empty() {
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

    /// Moves up to `into.len()` bytes out, for who has no socket. Tells how many.
    pub fn read(&mut self, into: &mut [u8]) -> usize {
        let mut done = 0;
        while done < into.len() {
            let room = into.len() - done;
            let n = match self.items.front() {
                None => break,
                Some(Item::Heads(len)) => {
                    let n = room.min(*len);
                    into[done..done + n].copy_from_slice(&self.bytes[self.start..self.start + n]);
                    n
                }
                Some(Item::Payload(buf)) => {
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

    /// Lists what comes first, as much as one system call takes; tells how many bytes that is.
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
                Item::Payload(buf) => {
                    list.buf(buf, sent);
                    total += buf.len() - sent;
                }
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
                Some(Item::Payload(buf)) => {
                    let n = sent.min(buf.len() - self.payload_sent);
                    self.payload_sent += n;
                    sent -= n;
                    if self.payload_sent < buf.len() {
                        break;
                    }
                    self.payload_sent = 0;
                    self.held -= buf.len();
                }
                None => unreachable!("no more is sent than there is"),
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

    #[test]
    fn comes_out_as_it_went_in_whatever_the_pieces() {
        let mut arena = Mapping::new(1 << 20).unwrap().arenas(1).remove(0);
        for piece in [1, 3, 7, 64, 1000, 100_000] {
            let (mut outbox, mut expected) = (Outbox::default(), Vec::new());
            for n in 0..40u8 {
                outbox.put(&[n; 16]);
                expected.extend([n; 16]);
                if n % 3 > 0 {
                    let mut buf = arena.alloc(usize::from(n) * 11).unwrap();
                    let content = vec![n ^ 0xff; buf.len()];
                    buf.copy_from(0, &content);
                    outbox.payload(buf);
                    expected.extend(content);
                }
            }
            let (mut got, mut part) = (Vec::new(), vec![0; piece]);
            while !outbox.is_empty() {
                let n = outbox.read(&mut part);
                got.extend_from_slice(&part[..n]);
            }
            assert_eq!(got, expected);
            assert_eq!(arena.free(), arena.capacity(), "every Buf came back");
        }
    }
}
