//! [`Track`]: knows which changes of a queue are durable.

use std::sync::atomic::Ordering;

use crate::device::{Completion, Op, Queue, Request};

use super::{Unflushed, berth::Berth, log::Change, shared::Shared};

/// The tag of flushes that no user has asked for.
const OWN: u64 = u64::MAX;

/// What a queue with a volatile cache behind it has in flight, and what it keeps.
#[derive(Debug)]
pub(super) struct Track {
    keeps: bool,
    /// Data of writes in flight, in bytes.
    in_flight: usize,
    /// Flushes in flight: the tag, and the number of the first change that it does not cover.
    flushes: Vec<(u64, u64)>,
    /// A flush of our own is in flight.
    flushes_itself: bool,
    /// It is due, but the queue was full.
    is_due: bool,
}

impl Track {
    pub(super) fn new(unflushed: Unflushed) -> Self {
        let keeps = unflushed == Unflushed::Keep;
        Self { keeps, in_flight: 0, flushes: Vec::new(), flushes_itself: false, is_due: false }
    }

    /// Whether a request can be sent now. Otherwise it waits for a flush, which [`flush`](Self::flush) sends.
    #[inline]
    pub(super) fn admits(&mut self, op: &Op, shared: &Shared) -> bool {
        if !self.keeps || !matches!(op, Op::Write { .. } | Op::Zero { .. } | Op::Discard { .. }) {
            return true;
        }
        let kept = shared.kept.load(Ordering::Relaxed);
        let used = self.in_flight + kept;
        let admits = used == 0 || used + data_len(op) <= shared.bound.load(Ordering::Relaxed);
        // Perhaps it is another queue that keeps everything, and does nothing more.
        self.is_due |= !admits && kept > 0 && !self.flushes_itself;
        admits
    }

    /// Sends a request that is [admitted](Self::admits).
    #[inline]
    pub(super) fn push(&mut self, inner: &mut dyn Queue, request: Request, shared: &Shared) -> Result<(), Request> {
        let flush = matches!(request.op, Op::Flush).then_some(request.tag);
        let len = data_len(&request.op);
        // Before it is sent: a change that completes later may not be covered.
        let number = shared.number.load(Ordering::Acquire);
        inner.push(request)?;
        self.in_flight += len;
        if let Some(tag) = flush {
            self.flushes.push((tag, number));
        }
        Ok(())
    }

    /// Notes what has completed. Moves completions that no longer count to `again`: their device has died, and the changes that
    /// must be made again were counted before they came.
    #[inline]
    pub(super) fn note(&mut self, done: &mut Vec<Completion>, start: usize, at: &At<'_>, again: &mut Vec<Request>) {
        let matters = |completion: &Completion| !matches!(completion.op, Op::Read { .. });
        if done[start..].iter().any(matters) {
            self.note_changes(done, start, at, again);
        }
    }

    fn note_changes(&mut self, done: &mut Vec<Completion>, start: usize, at: &At<'_>, again: &mut Vec<Request>) {
        let mut place = at.berth.place();
        let counts = place.generation == at.generation;
        let (mut n, mut flushed, mut kept) = (start, 0, 0);
        while n < done.len() {
            let completion = &mut done[n];
            let is_good = completion.result.is_ok();
            self.in_flight -= data_len(&completion.op);
            match &completion.op {
                Op::Flush => {
                    let end = self.end_flush(completion.tag);
                    let is_own = completion.tag == OWN;
                    if is_good && counts {
                        flushed = end.max(flushed);
                    }
                    if is_own {
                        done.swap_remove(n);
                        continue;
                    }
                }
                Op::Write { .. } | Op::Zero { .. } | Op::Discard { .. } if is_good && counts => {
                    let number = at.shared.number.fetch_add(1, Ordering::AcqRel);
                    if self.keeps
                        && let Some(change) = Change::of(completion)
                    {
                        kept += place.log.push(number, change);
                    }
                }
                _ => {}
            }
            let is_change = !matches!(done[n].op, Op::Read { .. } | Op::Status { .. } | Op::Prefetch { .. });
            if is_good && !counts && is_change {
                let Completion { tag, op, .. } = done.remove(n);
                again.push(Request { tag, op });
                continue;
            }
            n += 1;
        }
        // Before the lock is gone: another queue may forget these changes then.
        let all = at.shared.kept.fetch_add(kept, Ordering::AcqRel) + kept;
        drop(place);
        if flushed > 0 {
            at.shared.forget(flushed);
        }
        self.is_due |= !self.flushes_itself && kept > 0 && all > at.shared.bound.load(Ordering::Relaxed) / 2;
    }

    fn end_flush(&mut self, tag: u64) -> u64 {
        self.flushes_itself &= tag != OWN;
        let n = self.flushes.iter().position(|(known, _)| *known == tag);
        n.map_or(0, |n| self.flushes.swap_remove(n).1)
    }

    /// Sends the flush that is due.
    #[inline]
    pub(super) fn flush(&mut self, inner: &mut dyn Queue, shared: &Shared) {
        if self.is_due {
            self.flush_now(inner, shared);
        }
    }

    #[cold]
    fn flush_now(&mut self, inner: &mut dyn Queue, shared: &Shared) {
        if self.push(inner, Request { tag: OWN, op: Op::Flush }, shared).is_ok() {
            (self.is_due, self.flushes_itself) = (false, true);
            inner.kick();
        }
    }

    /// Makes the log shorter, as soon as possible.
    pub(super) fn shorten(&mut self, berth: &Berth) -> bool {
        self.is_due |= berth.place().log.memory() > 0 && !self.flushes_itself;
        self.shortens()
    }

    /// Whether the log becomes shorter soon.
    pub(super) fn shortens(&self) -> bool {
        self.is_due || self.flushes_itself
    }

    /// The device has died with all requests in flight. Drops the flush of our own.
    pub(super) fn reset(&mut self, unfinished: &mut Vec<Request>) {
        unfinished.retain(|request| request.tag != OWN);
        self.flushes.clear();
        (self.in_flight, self.flushes_itself, self.is_due) = (0, false, false);
    }
}

/// Where a queue is.
pub(super) struct At<'a> {
    pub(super) shared: &'a Shared,
    pub(super) berth: &'a Berth,
    pub(super) generation: u64,
}

#[inline]
fn data_len(op: &Op) -> usize {
    match op {
        Op::Write { buf, .. } => buf.len(),
        _ => 0,
    }
}
