//! [`Requests`]: the channel for requests from the back end, which reports configuration changes.

use std::{
    io::{self, Read, Write},
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::UnixStream,
    },
};

/// Message id of BACKEND_CONFIG_CHANGE_MSG.
const CONFIG_CHANGE: u32 = 2;

/// Header flags: version 1, reply, reply requested.
const VERSION: u32 = 1;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;

/// Length of a message header, and the longest accepted payload, in bytes.
const HEADER: usize = 12;
const PAYLOAD_MAX: usize = 4096;

/// Most reads of one [`Requests::take`], each of 1 KiB.
const READS: usize = 4;

/// Result of [`Requests::take`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Outcome {
    /// The configuration changed.
    pub(crate) changed: bool,
    /// More data may be pending.
    pub(crate) more: bool,
}

#[derive(Debug)]
pub(crate) struct Requests {
    stream: UnixStream,
    /// An incomplete message.
    received: Vec<u8>,
    /// The channel was closed, or received an invalid message.
    over: bool,
}

impl Requests {
    pub(crate) fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self { stream, received: Vec::new(), over: false })
    }

    /// The descriptor of incoming requests; `None`: the channel has ended.
    pub(crate) fn incoming(&self) -> Option<BorrowedFd<'_>> {
        (!self.over).then(|| self.stream.as_fd())
    }

    /// Handles pending requests, without waiting. Handles only a part of a flood.
    pub(crate) fn take(&mut self) -> Outcome {
        let mut outcome = Outcome { changed: false, more: true };
        let mut bytes = [0; 1024];
        for _ in 0..READS {
            match self.stream.read(&mut bytes) {
                Ok(0) => self.over = true,
                Ok(len) => self.received.extend_from_slice(&bytes[..len]),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    outcome.more = false;
                    return outcome;
                }
                Err(_) => self.over = true,
            }
            while let Some((request, flags, len)) = self.header() {
                if len > PAYLOAD_MAX {
                    self.over = true;
                    break;
                }
                if self.received.len() < HEADER + len {
                    break;
                }
                self.received.drain(..HEADER + len);
                outcome.changed |= request == CONFIG_CHANGE;
                if flags & NEED_REPLY != 0 {
                    // Zero means success. CONFIG_CHANGE is the only supported request.
                    let words = [request, VERSION | REPLY, 8, u32::from(request != CONFIG_CHANGE), 0];
                    self.over |= self.stream.write_all(&words.map(u32::to_ne_bytes).concat()).is_err();
                }
            }
            if self.over {
                outcome.more = false;
                break;
            }
        }
        outcome
    }

    /// Id, flags and payload length of the first pending message.
    fn header(&self) -> Option<(u32, u32, usize)> {
        let header = self.received.first_chunk::<HEADER>()?;
        let word = |at: usize| u32::from_ne_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        Some((word(0), word(4), word(8) as usize))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(words: &[u32]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_ne_bytes()).collect()
    }

    #[test]
    fn requests_are_understood_in_any_pieces() {
        let all = [message(&[99, 9, 4, 7]), message(&[CONFIG_CHANGE, 9, 0]), message(&[CONFIG_CHANGE, 1, 0])].concat();
        for cut in 0..=all.len() {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            let mut requests = Requests::new(ours).unwrap();
            theirs.write_all(&all[..cut]).unwrap();
            let first = requests.take();
            theirs.write_all(&all[cut..]).unwrap();
            assert!(first.changed | requests.take().changed, "cut at {cut}");
            assert!(requests.incoming().is_some());
            let mut answers = [0; 40];
            theirs.read_exact(&mut answers).unwrap();
            assert_eq!(answers[..], message(&[99, 5, 8, 1, 0, CONFIG_CHANGE, 5, 8, 0, 0]));
        }
    }

    #[test]
    fn a_flood_is_taken_in_parts() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut requests = Requests::new(ours).unwrap();
        let flood = message(&[CONFIG_CHANGE, 1, 0]).repeat(1000);
        theirs.write_all(&flood).unwrap();
        assert_eq!(requests.take(), Outcome { changed: true, more: true });
        let mut parts = 2;
        while requests.take().more {
            parts += 1;
        }
        assert!(parts >= flood.len() / (READS * 1024), "{parts}");
        assert!(requests.incoming().is_some());
    }

    #[test]
    fn what_is_no_request_ends_the_channel() {
        for (bytes, close) in [(message(&[CONFIG_CHANGE, 1, u32::MAX]), false), (message(&[CONFIG_CHANGE]), true)] {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            let mut requests = Requests::new(ours).unwrap();
            theirs.write_all(&bytes).unwrap();
            let keep = (!close).then(|| theirs.try_clone().unwrap());
            drop(theirs);
            assert!(!requests.take().changed);
            assert!(requests.incoming().is_none());
            drop(keep);
        }
    }
}
