//! The counters of a [`Channel`], and its requests in flight as others see them.

use std::sync::Arc;

use crate::{
    counters::{Counters, Operation, Pending},
    error::Error,
    io::{Done, Io},
    job::{Job, Marks, Way},
    slots::Slot,
    stamp::Stamp,
};

use super::Channel;

impl Channel {
    /// Ends a request that does not reach the device.
    #[cold]
    pub(super) fn conclude(&mut self, since: Stamp, done: Done) {
        let len = match &done.io {
            Io::Read { buf, .. } | Io::Write { buf, .. } => buf.len() as u64,
            Io::Zero { len, .. } | Io::Discard { len, .. } | Io::Status { len, .. } | Io::Prefetch { len, .. } => *len,
            Io::Flush => 0,
        };
        self.count(Operation::of(&done.io), since, len, done.result);
        self.ready.push(done);
    }

    /// Counts a request that has ended.
    #[inline]
    pub(super) fn count(&self, operation: Operation, since: Stamp, len: u64, result: Result<(), Error>) {
        if since.is_counted() {
            self.counters.end(operation, self.clock.since(since), len, result);
        }
    }

    /// The counters of this channel. Any thread may read them.
    pub fn counters(&self) -> &Arc<Counters> {
        &self.counters
    }

    /// The requests that have not ended, in no order.
    pub fn pending(&self) -> impl Iterator<Item = Pending> {
        self.slots.list.iter().filter_map(|slot| {
            let (tag, since, operation, at, len) = match slot {
                Slot::Direct { tag, since, kind, at, len, .. } => {
                    (*tag, *since, kind.operation(), *at, u64::from(*len))
                }
                Slot::Job(job) => (job.tag, job.since, job.operation(), job.at, job.len),
                Slot::Free { .. } | Slot::Overdue(_) => return None,
            };
            since.is_counted().then(|| Pending { tag, operation, at, len, age: self.clock.age(since) })
        })
    }

    /// The state of the queue for log messages: empty, or text in parentheses after a space.
    pub fn describe(&self) -> String {
        let state = self.queue_state();
        if state.is_empty() { state } else { format!(" ({state})") }
    }

    /// The state of the queue in a few words, such as the positions in its rings. Empty: the driver has no words for it.
    pub fn queue_state(&self) -> String {
        let (state, held) = (self.driver.describe(), self.held.len());
        let held = if held == 0 { String::new() } else { format!("{held} requests wait for room in the queue") };
        let parts: Vec<_> = [state, held].into_iter().filter(|part| !part.is_empty()).collect();
        parts.join("; ")
    }

    /// Counts a job that has ended, and the extra work that it caused.
    pub(super) fn count_job(&self, job: &Job) {
        let Marks { split, flushed, zeroed } = job.marks;
        self.counters.split.add(split.into());
        self.counters.merged.add((job.way == Way::Alone).into());
        self.counters.flushed.add(flushed.into());
        self.counters.zeroed.add(zeroed.into());
        self.count(job.operation(), job.since, job.len, job.error.map_or(Ok(()), Err));
    }
}
