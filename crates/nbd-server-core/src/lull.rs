//! [`Lull`]: keeps a worker still for a moment so that requests come in batches, as interrupt moderation does in a network
//! card.
//!
//! A client that writes 4 KiB at a time sends each request by itself and takes longer for it than we do, so that a worker
//! which answers at once is woken for each one or two of them, and wakes the client as often. Reads need no such thing: their
//! replies fill the socket, and while it is full requests gather by themselves.

use std::{thread, time::Duration};

use blkdev::Io;

use crate::peak::Peak;

/// How one client's requests come, and how long to keep still.
#[derive(Debug, Default)]
pub(crate) struct Lull {
    /// Requests answered in this turn.
    batch: u32,
    /// One of them was a read.
    read: bool,
    /// The largest batch of late: what this client's depth allows.
    peak: Peak,
    time: Duration,
}

/// A batch of so many needs no help.
const PLENTY: u32 = 24;
/// A client that never had so many under way would run out of replies to read: it is answered at once.
const DEEP: Peak = Peak::of(32);
/// A sleep shorter than this costs more than it brings, one longer could be noticed.
const MIN: Duration = Duration::from_micros(4);
const MAX: Duration = Duration::from_micros(100);
/// How much longer the next one is, as long as the client does not run dry.
const STEP: Duration = Duration::from_micros(2);

impl Lull {
    /// Counts a request that has ended.
    #[inline]
    pub(crate) fn count(&mut self, io: &Io) {
        self.batch += 1;
        self.read |= matches!(io, Io::Read { .. });
    }

    /// Ends a turn. Whether it is worth to ask if the client is behind with reading its replies.
    #[inline]
    pub(crate) fn is_due(&mut self) -> bool {
        let (batch, read) = (std::mem::take(&mut self.batch), std::mem::take(&mut self.read));
        self.peak.count(batch);
        !read && (1..PLENTY).contains(&batch) && self.peak >= DEEP
    }

    /// Keeps still, longer from one time to the next until `is_behind` says that the client had nothing to read in the end.
    pub(crate) fn rest(&mut self, is_behind: impl Fn() -> bool) {
        if is_behind() {
            self.time = self.time.max(MIN);
            thread::sleep(self.time);
            self.time = if is_behind() { (self.time + STEP).min(MAX) } else { self.time / 2 };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FLUSH: Io = Io::Flush;

    #[test]
    fn is_due_for_deep_writers_whose_batches_are_small() {
        let mut lull = Lull::default();
        let mut turn = |batch: usize, io: &Io| {
            (0..batch).for_each(|_| lull.count(io));
            lull.is_due()
        };
        assert!(!(0..100).any(|_| turn(8, &FLUSH)), "never had more than 8");
        assert!(!turn(64, &FLUSH), "plenty");
        assert!(turn(2, &FLUSH));
        assert!(!turn(0, &FLUSH), "nothing was answered");
        assert!(!(0..10_000).any(|_| turn(0, &FLUSH)) && !turn(8, &FLUSH), "that it was deep is long ago");
    }

    #[test]
    fn rests_longer_until_the_client_runs_dry() {
        let mut lull = Lull::default();
        lull.rest(|| false);
        assert_eq!(lull.time, Duration::ZERO, "nobody to wait for");
        (0..100).for_each(|_| lull.rest(|| true));
        assert_eq!(lull.time, MAX);
        let asked = std::cell::Cell::new(false);
        lull.rest(|| !asked.replace(true));
        assert_eq!(lull.time, MAX / 2);
    }
}
