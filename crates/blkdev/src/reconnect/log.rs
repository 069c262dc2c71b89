//! [`Log`]: changes that have completed, but were not flushed.

use std::collections::VecDeque;

use crate::{
    arena::{Buf, PAGE},
    device::{Completion, Op},
};

/// Memory that an entry takes beyond its data, in bytes.
const ENTRY: usize = size_of::<Kept>();

/// A change that has completed. Changes of all queues have one order, the one in which they completed.
#[derive(Debug)]
pub(super) struct Kept {
    pub(super) number: u64,
    pub(super) change: Change,
}

#[derive(Debug)]
pub(super) enum Change {
    Write { at: u64, data: Data },
    Zero { at: u64, len: u64, unmap: bool },
    Discard { at: u64, len: u64 },
}

/// The data of a write.
#[derive(Debug)]
pub(super) enum Data {
    Own(Buf),
    /// Of a write whose memory belongs to a longer request.
    Copy(Vec<u8>),
}

impl Data {
    pub(super) fn len(&self) -> usize {
        match self {
            Self::Own(buf) => buf.len(),
            Self::Copy(bytes) => bytes.len(),
        }
    }

    pub(super) fn copy_to(&self, into: &mut Buf) {
        match self {
            Self::Own(buf) => into.copy_buf(0, buf, 0, buf.len()),
            Self::Copy(bytes) => into.copy_from(0, bytes),
        }
    }
}

impl Change {
    /// Takes the data of a completed change. `None`: the request changed nothing.
    #[inline]
    pub(super) fn of(completion: &mut Completion) -> Option<Self> {
        match &mut completion.op {
            Op::Write { at, buf, .. } => {
                let at = *at;
                let data = if buf.is_loan() { Data::Copy(buf.to_vec()) } else { Data::Own(buf.take()) };
                Some(Self::Write { at, data })
            }
            Op::Zero { at, len, unmap } => Some(Self::Zero { at: *at, len: *len, unmap: *unmap }),
            Op::Discard { at, len } => Some(Self::Discard { at: *at, len: *len }),
            _ => None,
        }
    }

    /// First byte and length of the range.
    pub(super) fn range(&self) -> (u64, u64) {
        match self {
            Self::Write { at, data } => (*at, data.len() as u64),
            Self::Zero { at, len, .. } | Self::Discard { at, len } => (*at, *len),
        }
    }

    fn memory(&self) -> usize {
        match self {
            Self::Write { data, .. } => data.len().next_multiple_of(PAGE) + ENTRY,
            Self::Zero { .. } | Self::Discard { .. } => ENTRY,
        }
    }
}

/// The changes of a queue, in order.
#[derive(Debug, Default)]
pub(super) struct Log {
    kept: VecDeque<Kept>,
    memory: usize,
}

impl Log {
    /// Adds a change. Returns the memory that it takes, in bytes.
    #[inline]
    pub(super) fn push(&mut self, number: u64, change: Change) -> usize {
        let memory = change.memory();
        self.memory += memory;
        self.kept.push_back(Kept { number, change });
        memory
    }

    /// Forgets the changes before number `end`. Returns the memory that they took, in bytes.
    pub(super) fn forget(&mut self, end: u64) -> usize {
        let before = self.memory;
        while self.kept.front().is_some_and(|kept| kept.number < end)
            && let Some(kept) = self.kept.pop_front()
        {
            self.memory -= kept.change.memory();
        }
        before - self.memory
    }

    /// Memory in use, in bytes.
    #[inline]
    pub(super) fn memory(&self) -> usize {
        self.memory
    }

    /// Takes all changes, and returns the memory that they take, in bytes.
    pub(super) fn take(&mut self) -> (VecDeque<Kept>, usize) {
        (std::mem::take(&mut self.kept), std::mem::take(&mut self.memory))
    }
}
