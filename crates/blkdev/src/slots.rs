//! The requests that a channel has under way: where each is kept, and how old it is.

use std::time::{Duration, Instant};

use crate::job::Job;

/// The requests that are not done, by the tag that the queue knows them by.
#[derive(Debug)]
pub(crate) struct Slots {
    pub(crate) list: Vec<Slot>,
    free: u32,
    pub(crate) in_use: usize,
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
    },
    Job(Job),
}

/// No slot, no age.
pub(crate) const NEVER: u32 = u32::MAX;

impl Default for Slots {
    fn default() -> Self {
        Self { list: Vec::new(), free: NEVER, in_use: 0 }
    }
}

impl Slots {
    #[inline]
    pub(crate) fn insert(&mut self, slot: Slot) -> u32 {
        self.in_use += 1;
        let index = self.free;
        match self.list.get_mut(index as usize) {
            Some(place) => {
                let Slot::Free { next } = *place else { unreachable!("the free list holds free slots") };
                self.free = next;
                *place = slot;
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

/// How long requests have been under way: not a clock reading each, but a count of those born in each eighth of the time-out.
#[derive(Debug)]
pub(crate) struct Ages {
    pub(crate) unit: Option<Duration>,
    next: Option<Instant>,
    now: u32,
    counts: [u32; 16],
}

/// Units after which a request is overdue.
const OVERDUE: u32 = 8;

impl Ages {
    pub(crate) fn new(timeout: Option<Duration>) -> Self {
        Self { unit: timeout.map(|t| t / OVERDUE), next: None, now: 0, counts: [0; 16] }
    }

    /// Counts a request as born now.
    #[inline]
    pub(crate) fn renew(&mut self, born: &mut u32) {
        if self.unit.is_some() {
            self.end(*born);
            *born = self.now;
            self.counts[(self.now % 16) as usize] += 1;
        }
    }

    #[inline]
    pub(crate) fn end(&mut self, born: u32) {
        if born != NEVER {
            self.counts[(born % 16) as usize] -= 1;
        }
    }

    /// Whether something is overdue. However far apart two calls are, at most one unit passes between them: a process that
    /// was stopped for a while must first hear what has finished meanwhile.
    #[inline]
    pub(crate) fn tick(&mut self, now: Instant) -> bool {
        let Some(unit) = self.unit else { return false };
        if self.next.is_some_and(|next| now < next) {
            return false;
        }
        self.next = Some(now + unit);
        self.now = (self.now + 1) % (1 << 30);
        (OVERDUE + 1..16).any(|age| self.counts[(self.now.wrapping_sub(age) % 16) as usize] > 0)
    }
}
