//! [`Berth`]: what a queue and the thread that reconnects have in common.

use std::{
    io,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use crate::{arena::Arena, device::Queue, peer::Peer, wake::Wake};

use super::log::Log;

/// The place of a queue at the device.
#[derive(Debug)]
pub(super) struct Berth {
    pub(super) depth: u16,
    /// Wakes the owner of the queue.
    pub(super) signal: Wake,
    /// The signal may be readable.
    is_rung: AtomicBool,
    place: Mutex<Place>,
}

#[derive(Debug, Default)]
pub(super) struct Place {
    /// Changes that have completed, but were not flushed.
    pub(super) log: Log,
    /// The generation of the device that the queue belongs to. Completions of an older one no longer count.
    pub(super) generation: u64,
    /// The queue has left the device that died.
    pub(super) has_left: bool,
    /// Memory of the reads that wait, in bytes, and the peer that may still write to it.
    pub(super) memory: usize,
    pub(super) peer: Option<Arc<Peer>>,
    pub(super) offer: Option<Offer>,
}

/// A queue of the device that was opened again.
#[derive(Debug)]
pub(super) struct Offer {
    pub(super) queue: Box<dyn Queue>,
    pub(super) generation: u64,
    pub(super) peer: Option<Arc<Peer>>,
    pub(super) spare: Option<Arena>,
}

impl Berth {
    pub(super) fn new(depth: u16, generation: u64, has_left: bool) -> io::Result<Arc<Self>> {
        let place = Mutex::new(Place { generation, has_left, ..Place::default() });
        Ok(Arc::new(Self { depth, signal: Wake::new()?, is_rung: AtomicBool::new(false), place }))
    }

    pub(super) fn wake(&self) {
        self.is_rung.store(true, Ordering::Release);
        self.signal.ring();
    }

    /// Makes the signal unreadable. Look for news after this.
    #[inline]
    pub(super) fn clear(&self) {
        if self.is_rung.load(Ordering::Relaxed) && self.is_rung.swap(false, Ordering::AcqRel) {
            self.signal.clear();
        }
    }

    #[inline]
    pub(super) fn place(&self) -> MutexGuard<'_, Place> {
        self.place.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
