//! [`Gate`]: gives one read-modify-write exclusive use of the whole device, at no cost to reads and almost none to writes.
//!
//! A write that covers only a part of a block becomes a read, a merge and a write of the whole block. Another write to that block
//! in between would be lost, although it had been acknowledged; and it may come from another channel. So each channel counts its
//! changes in flight, on a cache line of its own. A channel that must merge closes the gate and waits until all counts are zero.
//! Devices with a block size of one byte need none of this.
//!
//! Channels that found the gate closed, and those that want to close it, stand in line. The first one has its turn: it begins its
//! waiting changes, up to and including one merge, and goes to the end of the line if it has more. So merges and other writes
//! alternate, from all channels.

use std::{
    collections::VecDeque,
    io,
    os::fd::{AsFd, BorrowedFd},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering},
    },
};

use crate::wake::Wake;

/// The gate of a device, shared by all its channels.
#[derive(Debug)]
pub(crate) struct Gate {
    closed: AtomicBool,
    lanes: Box<[Lane]>,
    /// The lanes of waiting channels; the first one has its turn.
    line: Mutex<VecDeque<usize>>,
    overdue: Overdue,
}

/// Changes in flight on one channel. It has its own cache line, because every write touches it.
#[derive(Debug)]
#[repr(align(64))]
struct Lane {
    inside: AtomicU32,
    /// Written when this channel gets its turn, and when the condition is met that its turn waits for. `None`: it is the only
    /// channel.
    turn: Option<Wake>,
}

/// Changes that were reported as failed because the device did not answer in time. It may still execute them.
#[derive(Debug, Default)]
struct Overdue {
    count: AtomicUsize,
    ranges: Mutex<Vec<(u64, u64)>>,
}

/// One channel's access to the gate. Dropping it leaves the line and opens the gate if it was closed by this pass.
#[derive(Debug)]
pub(crate) struct Pass {
    gate: Arc<Gate>,
    lane: usize,
    in_line: bool,
    holds: bool,
}

impl Gate {
    /// Returns a new gate's `count` passes.
    ///
    /// # Errors
    /// No descriptor is left.
    pub(crate) fn passes(count: usize) -> io::Result<Vec<Pass>> {
        let lane = |_| {
            let turn = (count > 1).then(Wake::new).transpose()?;
            Ok(Lane { inside: AtomicU32::new(0), turn })
        };
        let lanes = (0..count).map(lane).collect::<io::Result<_>>()?;
        let (closed, line, overdue) = (AtomicBool::new(false), Mutex::default(), Overdue::default());
        let gate = Arc::new(Self { closed, lanes, line, overdue });
        Ok((0..count).map(|lane| Pass { gate: Arc::clone(&gate), lane, in_line: false, holds: false }).collect())
    }

    fn line(&self) -> MutexGuard<'_, VecDeque<usize>> {
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wakes the channel that has its turn, unless it is `except`.
    fn wake_first(&self, except: usize) {
        let first = self.line().front().copied();
        if let Some(turn) = first.filter(|&lane| lane != except).and_then(|lane| self.lanes[lane].turn.as_ref()) {
            turn.ring();
        }
    }
}

impl Pass {
    /// Begins a change. `false`: the gate is closed; wait for a [turn](Self::has_turn).
    pub(crate) fn enter(&self) -> bool {
        let lane = &self.gate.lanes[self.lane].inside;
        // SeqCst here and in `close`/`is_quiet`: either we see the gate closed, or the channel that closed it sees our count.
        lane.fetch_add(1, Ordering::SeqCst);
        if self.gate.closed.load(Ordering::SeqCst) {
            self.leave();
            return false;
        }
        true
    }

    /// Ends a change that `enter` began.
    pub(crate) fn leave(&self) {
        let before = self.gate.lanes[self.lane].inside.fetch_sub(1, Ordering::SeqCst);
        if before == 1 && self.gate.closed.load(Ordering::SeqCst) {
            self.gate.wake_first(self.lane);
        }
    }

    /// Joins the line if it is not in it yet. Returns whether it has its turn.
    pub(crate) fn has_turn(&mut self) -> bool {
        let mut line = self.gate.line();
        if !self.in_line {
            self.in_line = true;
            line.push_back(self.lane);
        }
        line.front() == Some(&self.lane)
    }

    /// Ends a turn, or leaves the line. `again`: goes to the end of the line, because more changes wait.
    pub(crate) fn end_turn(&mut self, again: bool) {
        if !self.in_line {
            return;
        }
        {
            let mut line = self.gate.line();
            line.retain(|&lane| lane != self.lane);
            if again {
                line.push_back(self.lane);
            }
        }
        self.in_line = again;
        self.gate.wake_first(self.lane);
    }

    /// Closes the gate for all other changes. Only during its turn.
    pub(crate) fn close(&mut self) {
        self.holds = true;
        self.gate.closed.store(true, Ordering::SeqCst);
    }

    /// Whether no change is in flight anywhere. Final once the gate is closed.
    pub(crate) fn is_quiet(&self) -> bool {
        self.gate.lanes.iter().all(|lane| lane.inside.load(Ordering::SeqCst) == 0)
    }

    /// Opens the gate again.
    pub(crate) fn open(&mut self) {
        if self.holds {
            self.holds = false;
            self.gate.closed.store(false, Ordering::SeqCst);
        }
    }

    /// Readable when the channel has its turn, or can continue it.
    pub(crate) fn turn_fd(&self) -> Option<BorrowedFd<'_>> {
        self.gate.lanes[self.lane].turn.as_ref().map(AsFd::as_fd)
    }

    /// Makes [`turn_fd`](Self::turn_fd) unreadable until the next event.
    pub(crate) fn disarm(&self) {
        if let Some(turn) = &self.gate.lanes[self.lane].turn {
            turn.clear();
        }
    }

    /// From now on, the device may execute a change of this range at any time.
    pub(crate) fn add_overdue(&self, at: u64, len: u64) {
        let overdue = &self.gate.overdue;
        overdue.ranges.lock().unwrap_or_else(PoisonError::into_inner).push((at, len));
        overdue.count.fetch_add(1, Ordering::SeqCst);
    }

    /// A change that [was overdue](Self::add_overdue) is over.
    pub(crate) fn remove_overdue(&self, at: u64, len: u64) {
        let mut ranges = self.gate.overdue.ranges.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(n) = ranges.iter().position(|&range| range == (at, len)) {
            ranges.swap_remove(n);
            self.gate.overdue.count.fetch_sub(1, Ordering::SeqCst);
        }
    }

    /// Whether an overdue change of the range, on any channel, might still overwrite a new one.
    #[inline]
    pub(crate) fn is_overdue(&self, at: u64, len: u64) -> bool {
        self.gate.overdue.count.load(Ordering::Relaxed) > 0 && self.overlaps_overdue(at, len)
    }

    #[cold]
    fn overlaps_overdue(&self, at: u64, len: u64) -> bool {
        let ranges = self.gate.overdue.ranges.lock().unwrap_or_else(PoisonError::into_inner);
        ranges.iter().any(|&(from, n)| at < from.saturating_add(n) && from < at.saturating_add(len))
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        self.gate.lanes[self.lane].inside.store(0, Ordering::SeqCst);
        self.open();
        self.end_turn(false);
        self.gate.wake_first(self.lane);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_closed_gate_admits_no_change_and_waits_for_those_in_flight() {
        let mut p = Gate::passes(2).unwrap();
        assert!(p[0].enter());
        assert!(p[1].has_turn());
        p[1].close();
        assert!(!p[1].is_quiet());
        assert!(!p[0].enter() && !p[0].has_turn());
        p[0].leave();
        assert!(p[1].is_quiet());
        p[1].open();
        assert!(p[0].enter());
    }

    #[test]
    fn turns_go_round() {
        let mut p = Gate::passes(3).unwrap();
        assert!(p[0].has_turn() && !p[1].has_turn() && !p[2].has_turn());
        p[0].end_turn(true);
        assert!(!p[0].has_turn() && p[1].has_turn());
        p[1].end_turn(false);
        assert!(p[2].has_turn());
        p[2].end_turn(false);
        assert!(p[0].has_turn() && !p[1].has_turn());
    }

    #[test]
    fn a_channel_is_woken_for_its_turn_and_to_continue_it() {
        let mut p = Gate::passes(2).unwrap();
        let is_woken = |p: &Pass| p.gate.lanes[p.lane].turn.as_ref().unwrap().clear();
        assert!(p[0].has_turn() && !p[1].has_turn());
        p[0].end_turn(false);
        assert!(is_woken(&p[1]));
        assert!(p[0].enter());
        p[1].close();
        assert!(!p[1].is_quiet() && !is_woken(&p[1]));
        p[0].leave();
        assert!(is_woken(&p[1]));
    }

    #[test]
    fn a_dropped_pass_does_not_block_others() {
        let mut p = Gate::passes(2).unwrap();
        assert!(p[0].enter() && p[0].has_turn());
        p[0].close();
        assert!(!p[1].has_turn());
        p.remove(0);
        assert!(p[0].is_quiet() && p[0].enter() && p[0].has_turn());
    }

    #[test]
    fn an_overdue_change_keeps_others_off_its_range() {
        let p = Gate::passes(2).unwrap();
        assert!(!p[1].is_overdue(0, u64::MAX));
        p[0].add_overdue(4096, 4096);
        assert!(p[1].is_overdue(8191, 1) && !p[1].is_overdue(8192, 4096) && !p[1].is_overdue(0, 4096));
        p[0].remove_overdue(4096, 4096);
        assert!(!p[1].is_overdue(4096, 1));
    }
}
