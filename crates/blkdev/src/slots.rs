//! [`Slots`]: the requests that a channel has in flight, and where each is kept.

use crate::{ages::NEVER, arena::Buf, job::Job};

/// The requests that are not done, by the tag that the queue knows them by.
#[derive(Debug)]
pub(crate) struct Slots {
    pub(crate) list: Vec<Slot>,
    free: u32,
    /// Requests that are not done.
    pub(crate) in_use: usize,
    /// Requests that were reported as failed and that the device still has.
    pub(crate) overdue: usize,
}

#[derive(Debug)]
pub(crate) enum Slot {
    Free {
        next: u32,
    },
    /// Gone to the queue as it was.
    Direct {
        tag: u64,
        born: u32,
        kind: Kind,
        len: u32,
        at: u64,
    },
    // Boxed, as all slots are moved about, and few are jobs.
    Job(Box<Job>),
    Overdue(Box<Overdue>),
}

/// A request that was reported to its owner as failed. What comes back from the device is thrown away.
#[derive(Debug)]
pub(crate) struct Overdue {
    /// What the device may still change: first byte and length.
    pub(crate) changes: Option<(u64, u64)>,
    /// Payload memory that is not free until then, bytes.
    pub(crate) held: u64,
    /// A job, with its memory.
    pub(crate) job: Option<Box<Job>>,
    /// What the job used of the channel's memory.
    pub(crate) edges: Option<Buf>,
}

const _: () = assert!(size_of::<Slot>() <= 32);

/// What a direct request is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Read,
    Write,
    Flush,
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

    pub(crate) fn job(&mut self, index: u32) -> &mut Job {
        let Slot::Job(job) = &mut self.list[index as usize] else { unreachable!("slot {index} holds a job") };
        job
    }
}
