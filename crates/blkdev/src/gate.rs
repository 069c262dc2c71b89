//! [`Gate`]: lets one read-modify-write have the whole device to itself, at no cost to reads and almost none to writes.
//!
//! A write that covers only a part of a block is a read, a merge and a write of the whole block. Another write to that
//! block in between would be lost, though it had been acknowledged; and it may come from another channel. So a channel
//! counts the changes it has in flight on a cache line of its own, and whoever must merge closes the gate and waits
//! until all counts are zero. Devices whose block is one byte never need any of this.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicU32, Ordering},
};

/// Shared by all channels of a device.
#[derive(Debug)]
pub(crate) struct Gate {
    closed: AtomicBool,
    lanes: Box<[Lane]>,
}

/// Changes in flight on one channel; alone on its cache line, since every write touches it.
#[derive(Debug, Default)]
#[repr(align(64))]
struct Lane(AtomicU32);

/// One channel's way through the gate. Dropped, it leaves and opens whatever it held.
#[derive(Debug)]
pub(crate) struct Pass {
    gate: Arc<Gate>,
    lane: usize,
    holds: bool,
}

impl Gate {
    /// A gate with `lanes` passes.
    pub(crate) fn passes(lanes: usize) -> Vec<Pass> {
        let gate =
            Arc::new(Self { closed: AtomicBool::new(false), lanes: (0..lanes).map(|_| Lane::default()).collect() });
        (0..lanes).map(|lane| Pass { gate: Arc::clone(&gate), lane, holds: false }).collect()
    }
}

impl Pass {
    /// Begins a change. `false`: the gate is closed, try again later.
    pub(crate) fn enter(&self) -> bool {
        let lane = &self.gate.lanes[self.lane].0;
        // SeqCst here and in `close`/`is_quiet`: either we see the gate closed, or who closed it sees us counted.
        lane.fetch_add(1, Ordering::SeqCst);
        if self.gate.closed.load(Ordering::SeqCst) {
            lane.fetch_sub(1, Ordering::SeqCst);
            return false;
        }
        true
    }

    /// Ends a change that `enter` began.
    pub(crate) fn leave(&self) {
        self.gate.lanes[self.lane].0.fetch_sub(1, Ordering::SeqCst);
    }

    /// Closes the gate for everybody else. `false`: another channel has it. Already ours: `true`.
    pub(crate) fn close(&mut self) -> bool {
        self.holds =
            self.holds || self.gate.closed.compare_exchange(false, true, Ordering::SeqCst, Ordering::SeqCst).is_ok();
        self.holds
    }

    /// Whether no change is in flight anywhere. Final once the gate is closed.
    pub(crate) fn is_quiet(&self) -> bool {
        self.gate.lanes.iter().all(|lane| lane.0.load(Ordering::SeqCst) == 0)
    }

    /// Opens the gate again.
    pub(crate) fn open(&mut self) {
        if self.holds {
            self.holds = false;
            self.gate.closed.store(false, Ordering::SeqCst);
        }
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        self.gate.lanes[self.lane].0.store(0, Ordering::SeqCst);
        self.open();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_closed_gate_lets_nobody_in_and_waits_for_those_inside() {
        let mut p = Gate::passes(2);
        assert!(p[0].enter());
        assert!(p[1].close() && !p[1].is_quiet());
        assert!(!p[0].enter() && !p[0].close());
        p[0].leave();
        assert!(p[1].is_quiet());
        p[1].open();
        assert!(p[0].enter());
    }

    #[test]
    fn a_dropped_pass_blocks_nobody() {
        let mut p = Gate::passes(2);
        assert!(p[0].enter() && p[0].close());
        p.remove(0);
        assert!(p[0].is_quiet() && p[0].enter());
    }
}
