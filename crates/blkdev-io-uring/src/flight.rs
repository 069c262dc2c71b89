//! [`Flight`]: an entry of the ring, as io_uring commands.

use std::{os::fd::AsFd, sync::Arc};

use blkdev::{Buf, Op, Request};
use blkdev_ring::{Command, Operation, Ring};

use crate::status::Mailbox;

/// An entry of the ring.
#[derive(Debug)]
pub(crate) enum Flight {
    Request(Moving),
    /// Waits for replies.
    Poll(Arc<Mailbox>),
}

/// A request in the ring.
#[derive(Debug)]
pub(crate) struct Moving {
    pub(crate) request: Request,
    /// Number of bytes already transferred.
    pub(crate) moved: u32,
    pub(crate) tries: u8,
    /// For `Zero` and `Discard`: the mode of `fallocate`, or 0 for the block device's own discard.
    pub(crate) mode: i32,
}

impl Operation for Flight {
    #[inline]
    fn command(&self) -> Command<'_> {
        let flight = match self {
            Self::Request(flight) => flight,
            Self::Poll(mailbox) => return Command::Poll(mailbox.as_fd()),
        };
        match &flight.request.op {
            Op::Read { at, buf } => Command::Read { at: *at, buf, skip: flight.moved },
            Op::Write { at, buf, fua } => Command::Write { at: *at, buf, skip: flight.moved, durable: *fua },
            &(Op::Zero { at, len, .. } | Op::Discard { at, len }) => match flight.mode {
                0 => Command::Discard { at, len },
                mode => Command::Allocate { mode, at, len },
            },
            Op::Flush => Command::Sync,
            &Op::Prefetch { at, len } => Command::Prefetch { at, len: len.try_into().unwrap_or(u32::MAX) },
            Op::Status { .. } => unreachable!("a Status goes to the helper"),
        }
    }

    fn buf_mut(&mut self) -> Option<&mut Buf> {
        match self {
            Self::Request(Moving {
                request: Request { op: Op::Read { buf, .. } | Op::Write { buf, .. }, .. }, ..
            }) => Some(buf),
            _ => None,
        }
    }
}

impl Flight {
    /// Whether the kernel supports discards on the ring's block device without a worker thread. A discard of length 0 is
    /// refused because of its length only after all other checks have passed.
    pub(crate) fn probe_discard(ring: &mut Ring<Self>) -> bool {
        let probe = Moving::new(Request { tag: 0, op: Op::Discard { at: 0, len: 0 } }, 0);
        assert!(ring.push(Self::Request(probe)).is_ok(), "a new ring has room");
        ring.kick();
        let mut known = false;
        // The refusal never waits, so the result is available at once. Otherwise fallocate is used.
        ring.reap(|_, result| {
            known = result == Err(libc::EINVAL);
            None
        });
        known
    }
}

impl Moving {
    pub(crate) fn new(request: Request, mode: i32) -> Self {
        Self { request, moved: 0, tries: 0, mode }
    }
}

const _: () = assert!(size_of::<Flight>() <= 128);
