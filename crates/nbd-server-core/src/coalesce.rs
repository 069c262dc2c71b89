//! [`Coalesce`]: pauses a worker briefly so that requests arrive in batches, like interrupt moderation in a network card.
//!
//! A client that writes 4 KiB at a time takes longer to send a request than the worker takes to answer it. So a worker that
//! answers at once wakes up for every one or two requests, and wakes the client as often. Reads need no pause: their replies fill
//! the socket, and requests gather while it is full.

use std::{thread, time::Duration};

use blkdev::Io;

use crate::decaying_max::DecayingMax;

/// One client's request pattern, and the length of the next pause.
#[derive(Debug, Default)]
pub(crate) struct Coalesce {
    /// Requests answered in this turn.
    batch: u32,
    /// The turn included a read.
    read: bool,
    /// The largest recent batch: it shows how many requests this client keeps in flight.
    recent: DecayingMax,
    time: Duration,
}

/// A batch of this size needs no pause.
const PLENTY: u32 = 24;
/// A client that never had this many requests in flight would run out of replies to read: it gets no pause.
const DEEP: DecayingMax = DecayingMax::of(32);
/// A sleep shorter than `MIN` costs more than it saves. One longer than `MAX` could be noticed.
const MIN: Duration = Duration::from_micros(4);
const MAX: Duration = Duration::from_micros(100);
/// Each pause is this much longer than the last one, while the client still has replies to read.
const STEP: Duration = Duration::from_micros(2);

impl Coalesce {
    /// Counts a request that has ended.
    #[inline]
    pub(crate) fn count(&mut self, io: &Io) {
        self.batch += 1;
        self.read |= matches!(io, Io::Read { .. });
    }

    /// Ends a turn. Returns whether a pause may help; the caller then checks whether the client has unread replies.
    #[inline]
    pub(crate) fn is_due(&mut self) -> bool {
        let (batch, read) = (std::mem::take(&mut self.batch), std::mem::take(&mut self.read));
        self.recent.count(batch);
        !read && (1..PLENTY).contains(&batch) && self.recent >= DEEP
    }

    /// Pauses. The pause grows until `is_behind` returns that the client had nothing left to read at its end; then it is halved.
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
    fn is_due_for_deep_writers_with_small_batches() {
        let mut coalesce = Coalesce::default();
        let mut turn = |batch: usize, io: &Io| {
            (0..batch).for_each(|_| coalesce.count(io));
            coalesce.is_due()
        };
        assert!(!(0..100).any(|_| turn(8, &FLUSH)), "the batch was never larger than 8");
        assert!(!turn(64, &FLUSH), "plenty");
        assert!(turn(2, &FLUSH));
        assert!(!turn(0, &FLUSH), "nothing was answered");
        assert!(!(0..10_000).any(|_| turn(0, &FLUSH)) && !turn(8, &FLUSH), "the large batch was long ago");
    }

    #[test]
    fn rests_longer_until_the_client_runs_dry() {
        let mut coalesce = Coalesce::default();
        coalesce.rest(|| false);
        assert_eq!(coalesce.time, Duration::ZERO, "no client to wait for");
        (0..100).for_each(|_| coalesce.rest(|| true));
        assert_eq!(coalesce.time, MAX);
        let asked = std::cell::Cell::new(false);
        coalesce.rest(|| !asked.replace(true));
        assert_eq!(coalesce.time, MAX / 2);
    }
}
