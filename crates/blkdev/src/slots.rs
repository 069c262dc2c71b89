//! [`Slots`]: the requests that a channel has in flight, and the state of each.

use crate::{ages::NEVER, arena::Buf, counters::Operation, job::Job, stamp::Stamp};

/// The requests that have not ended, by their tags at the queue.
#[derive(Debug)]
pub(crate) struct Slots {
    pub(crate) list: Vec<Slot>,
    free: u32,
    /// Number of requests that have not ended.
    pub(crate) in_use: usize,
    /// Number of requests that were reported as failed but that the device still has.
    pub(crate) overdue: usize,
}

#[derive(Debug)]
pub(crate) enum Slot {
    Free {
        next: u32,
    },
    /// It went to the queue unchanged.
    Direct {
        tag: u64,
        since: Stamp,
        born: u32,
        kind: Kind,
        len: u32,
        at: u64,
    },
    // Boxed, because slots are moved, and few are jobs.
    Job(Box<Job>),
    Overdue(Box<Overdue>),
}

/// A request that was reported to its owner as failed. Its result from the device is discarded.
#[derive(Debug)]
pub(crate) struct Overdue {
    /// The range that the device may still change: first byte and length.
    pub(crate) changes: Option<(u64, u64)>,
    /// Payload memory that it holds until the device returns it, in bytes.
    pub(crate) held: u64,
    /// A job, with its memory.
    pub(crate) job: Option<Box<Job>>,
    /// The part of the channel's own memory that the job used.
    pub(crate) edges: Option<Buf>,
}

const _: () = assert!(size_of::<Slot>() <= 32);

/// The kind of a direct request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Read,
    Write,
    Flush,
}

impl Kind {
    pub(crate) fn operation(self) -> Operation {
        match self {
            Self::Read => Operation::Read,
            Self::Write => Operation::Write,
            Self::Flush => Operation::Flush,
        }
    }
}

impl Default for Slots {
    fn default() -> Self {
        Self { list: Vec::new(), free: NEVER, in_use: 0, overdue: 0 }
    }
}

impl Slots {
    #[inline]
    pub(crate) fn insert(&mut self, slot: Slot) -> u32 {
        self.in_use += 1;
        let index = self.free;
        match self.list.get_mut(index as usize) {
            Some(place) => {
                let Slot::Free { next } = std::mem::replace(place, slot) else {
                    unreachable!("the free list holds free slots")
                };
                self.free = next;
                index
            }
            None => {
                self.list.push(slot);
                self.list.len() as u32 - 1
            }
        }
    }

    #[inline]
    pub(crate) fn remove(&mut self, index: u32) -> Slot {
        self.in_use -= 1;
        let next = std::mem::replace(&mut self.free, index);
        std::mem::replace(&mut self.list[index as usize], Slot::Free { next })
    }

    /// As [`remove`](Self::remove), for a [`Slot::Direct`].
    #[inline]
    pub(crate) fn remove_direct(&mut self, index: u32) {
        let slot = self.remove(index);
        debug_assert!(matches!(slot, Slot::Direct { .. }), "slot {index} holds no direct request");
        // There is nothing to drop, which the compiler does not know.
        std::mem::forget(slot);
    }

    pub(crate) fn job(&mut self, index: u32) -> &mut Job {
        let Slot::Job(job) = &mut self.list[index as usize] else { unreachable!("slot {index} holds a job") };
        job
    }
}
