//! [`Gap`]: the time from the death of a device to its return, and the thread that ends it.

use std::{
    io,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use crate::{
    arena::Arena,
    device::Device,
    wake::{Stop, wait},
};

use super::{
    Unflushed,
    berth::{Offer, Place},
    fit::fits,
    log::Kept,
    replay::replay,
    shared::{Shared, State},
};

/// Longest wait for queues to leave. Those that do not are idle.
const LEAVING: Duration = Duration::from_millis(100);

/// Pauses between attempts.
const PAUSE_MIN: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(1);

/// Interval of looks for memory that can be freed.
const SWEEP: Duration = Duration::from_secs(1);

/// A device is dead.
#[derive(Debug)]
pub(super) struct Gap {
    since: Instant,
    /// Time of the next attempt, and the pause after it.
    next: Instant,
    pause: Duration,
    /// Changes to make again. `None`: not collected yet.
    kept: Option<Vec<Kept>>,
    /// Why the last attempt failed.
    why: String,
}

impl Gap {
    fn new(now: Instant) -> Self {
        Self { since: now, next: now, pause: PAUSE_MIN, kept: None, why: String::new() }
    }

    /// Why the last attempt failed.
    #[cfg(test)]
    pub(super) fn why(&self) -> &str {
        &self.why
    }
}

impl Shared {
    /// Opens the device again whenever it has died, until it is closed.
    pub(super) fn run(&self, stop: &Stop) {
        let mut gap = None;
        while !stop.is_requested() && !self.is_closed.load(Ordering::Acquire) {
            let pause = self.step(&mut gap, Instant::now());
            wait([std::os::fd::AsFd::as_fd(&**stop.wake())], pause);
            stop.wake().clear();
        }
    }

    /// Does what is due. Returns the time until the next step.
    pub(super) fn step(&self, gap: &mut Option<Gap>, now: Instant) -> Option<Duration> {
        self.look();
        if self.device().is_some() {
            *gap = None;
            return self.sweep().then_some(SWEEP);
        }
        let gap_now = gap.get_or_insert_with(|| self.begin(now));
        let left = self.options.window.checked_sub(now.duration_since(gap_now.since)).filter(|left| !left.is_zero());
        if left.is_none() {
            self.expire(gap_now);
        }
        let until = |end: Instant| Some(end.saturating_duration_since(now).min(left.unwrap_or(PAUSE_MAX)));
        if gap_now.kept.is_none() {
            let waits = self.state().berths.iter().any(|berth| !berth.place().has_left);
            if waits && now < gap_now.since + LEAVING {
                return until(gap_now.since + LEAVING);
            }
            gap_now.kept = Some(self.collect());
        }
        let dead = self.state().dead.take();
        drop(dead);
        if now < gap_now.next {
            return until(gap_now.next);
        }
        match self.attempt(gap_now) {
            _ if self.is_closed.load(Ordering::Acquire) => None,
            Ok(()) => {
                self.report_return(gap_now);
                *gap = None;
                self.sweep().then_some(SWEEP)
            }
            Err(e) => {
                self.report_failure(gap_now, &e);
                gap_now.next = now + gap_now.pause;
                gap_now.pause = (gap_now.pause * 2).min(PAUSE_MAX);
                until(gap_now.next)
            }
        }
    }

    fn begin(&self, now: Instant) -> Gap {
        log::warn!(
            "{} {}: reconnecting; requests wait for up to {:?}",
            self.info.driver,
            self.info.target,
            self.options.window
        );
        Gap::new(now)
    }

    /// The window is over.
    fn expire(&self, gap: &Gap) {
        if !self.is_expired.swap(true, Ordering::AcqRel) {
            let why = if gap.why.is_empty() { "" } else { ": " };
            log::error!(
                "{} {}: not back within {:?}{why}{}; requests fail until it is",
                self.info.driver,
                self.info.target,
                self.options.window,
                gap.why
            );
            self.wake_all();
        }
    }

    /// Takes the changes that were not flushed. From now on, completions of the dead device do not count.
    fn collect(&self) -> Vec<Kept> {
        let mut state = self.state();
        state.generation += 1;
        let flushed = self.flushed.load(Ordering::Acquire);
        let mut kept = std::mem::take(&mut state.orphans);
        for berth in &state.berths {
            let mut place = berth.place();
            place.generation = state.generation;
            let (changes, memory) = place.log.take();
            self.kept.fetch_sub(memory, Ordering::AcqRel);
            kept.extend(changes);
        }
        kept.retain(|kept| kept.number >= flushed);
        kept.sort_unstable_by_key(|kept| kept.number);
        let unflushed = self.number.load(Ordering::Acquire).saturating_sub(self.flushed.load(Ordering::Acquire));
        drop(state);
        if self.tracks() && self.options.unflushed == Unflushed::Fail && unflushed > 0 {
            log::error!(
                "{} {}: changes that had completed were not flushed and may be lost, so present clients cannot go on",
                self.info.driver,
                self.info.target
            );
            self.losses.fetch_add(1, Ordering::AcqRel);
            self.is_lost.store(true, Ordering::Release);
            self.wake_all();
        }
        kept
    }

    fn attempt(&self, gap: &Gap) -> io::Result<()> {
        self.check_memory()?;
        let device = (self.reopen)()?;
        if self.is_closed.load(Ordering::Acquire) {
            return Ok(());
        }
        let queues = self.state().berths.len();
        fits(&self.info, self.capacity(), device.info(), device.capacity(), queues)
            .map_err(|why| io::Error::new(io::ErrorKind::InvalidData, why))?;
        replay(&device, gap.kept.as_deref().unwrap_or_default())?;
        self.publish(device)
    }

    /// Each time the device is back, new requests get other memory. A process that keeps the old one must not use up all there is.
    fn check_memory(&self) -> io::Result<()> {
        self.sweep();
        if self.state().memories.is_exhausted() {
            let why = "the process behind it has died as a device several times, and still maps the memory of then; end it first";
            return Err(io::Error::new(io::ErrorKind::ResourceBusy, why));
        }
        Ok(())
    }

    /// Gives the device to its users.
    fn publish(&self, device: Arc<dyn Device>) -> io::Result<()> {
        let mut state = self.state();
        // A device that is no process, and is gone, accesses nothing.
        let is_replaced = state.peer.is_some();
        let fresh = state.memories.register(&*device, is_replaced)?;
        let spares = spares(&state, &*device)?;
        let generation = state.generation;
        let peer = device.peer().map(|peer| peer.or_known(state.memories.peers().chain(&state.peer)));
        let mut offers = Vec::new();
        for (berth, spare) in state.berths.iter().zip(spares) {
            let queue = device.open_queue(berth.depth)?;
            offers.push(Offer { queue, generation, peer: peer.clone(), spare });
        }
        // Before a queue goes on: what completes there frees memory, which must not be used again.
        let old = std::mem::replace(&mut state.peer, peer);
        state.memories.replace(fresh, old.as_ref());
        for spare in offers.iter().filter_map(|offer| offer.spare.as_ref()) {
            state.memories.add_spare(spare.mapping());
        }
        for (berth, offer) in state.berths.iter().zip(offers) {
            berth.place().offer = Some(offer);
        }
        // What was made again was flushed as well, and nothing else has completed since.
        self.flushed.fetch_max(self.number.load(Ordering::Acquire), Ordering::AcqRel);
        self.is_expired.store(false, Ordering::Release);
        self.is_lost.store(false, Ordering::Release);
        self.returns.fetch_add(1, Ordering::Relaxed);
        self.set_device(Some(device));
        drop(state);
        self.wake_all();
        Ok(())
    }

    /// Frees memory that neither a request nor a peer uses any more. Returns whether some is left.
    fn sweep(&self) -> bool {
        let mut state = self.state();
        let unused = state.memories.unused();
        drop(state);
        if let Some(device) = self.device() {
            unused.iter().for_each(|unused| device.unregister(&unused.mapping));
        }
        let mut state = self.state();
        unused.into_iter().for_each(|unused| state.memories.hold(unused));
        state.memories.free()
    }

    fn report_return(&self, gap: &Gap) {
        let kept = gap.kept.as_ref().map_or(0, Vec::len);
        log::warn!(
            "{} {}: back after {:.1?}; {kept} changes were made again and flushed",
            self.info.driver,
            self.info.target,
            gap.since.elapsed()
        );
    }

    fn report_failure(&self, gap: &mut Gap, error: &io::Error) {
        let why = error.to_string();
        let Self { info, .. } = self;
        // That it is not there yet is what a restart looks like.
        let is_normal = matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused);
        if why != gap.why && !is_normal {
            log::warn!("{} {}: cannot reconnect yet: {why}", info.driver, info.target);
        }
        gap.why = why;
    }
}

/// Memory for each queue whose reads must move, because a living peer may still write to theirs.
fn spares(state: &State, device: &dyn Device) -> io::Result<Vec<Option<Arena>>> {
    let mut spares = Vec::new();
    for berth in &state.berths {
        let wanted = moving(&berth.place());
        let spare = if wanted == 0 {
            None
        } else {
            let mapping = device.new_memory(wanted)?;
            device.register(&mapping)?;
            Some(mapping.arenas(1).remove(0))
        };
        spares.push(spare);
    }
    Ok(spares)
}

/// Memory of reads that must move, because a living peer may still write to it, in bytes.
fn moving(place: &Place) -> usize {
    if place.peer.as_ref().is_some_and(|peer| peer.may_live()) { place.memory } else { 0 }
}
