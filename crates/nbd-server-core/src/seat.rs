//! [`Seat`] and [`Ticket`]: where a device is served, and the claims of clients that are still to come.

use std::{
    ops::Deref,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

/// Where a device is served. It exists as long as a client may be sent there.
#[derive(Debug)]
pub(crate) struct Seat {
    /// Its number with the workers, which is not used again while this exists.
    pub(crate) lane: usize,
    /// The workers that serve it.
    pub(crate) workers: Vec<usize>,
    /// Connections to it.
    pub(crate) clients: AtomicUsize,
    /// Tickets for it, and views that have it.
    coming: AtomicUsize,
}

impl Seat {
    pub(crate) fn new(lane: usize, workers: Vec<usize>) -> Arc<Self> {
        Arc::new(Self { lane, workers, clients: AtomicUsize::new(0), coming: AtomicUsize::new(0) })
    }

    /// Whether a client has been let in that no worker has yet, or a thread still uses a view in which one may be. Once
    /// no handshake finds the export any more, no new client is.
    pub(crate) fn is_awaited(&self) -> bool {
        self.coming.load(Ordering::Relaxed) > 0
    }
}

/// A claim to a seat: a client's, from its admission until a worker has it, and a view's.
#[derive(Debug)]
pub(crate) struct Ticket(Arc<Seat>);

impl Ticket {
    pub(crate) fn new(seat: &Arc<Seat>) -> Self {
        seat.coming.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(seat))
    }

    pub(crate) fn seat(&self) -> &Arc<Seat> {
        &self.0
    }
}

impl Clone for Ticket {
    fn clone(&self) -> Self {
        Self::new(&self.0)
    }
}

impl Deref for Ticket {
    type Target = Seat;

    fn deref(&self) -> &Seat {
        &self.0
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.0.coming.fetch_sub(1, Ordering::Relaxed);
    }
}
