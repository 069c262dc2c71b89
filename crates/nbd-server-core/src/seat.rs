//! [`Seat`] and [`Ticket`]: where a device is served, and the claims of clients that have not arrived yet.

use std::{
    ops::Deref,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use crate::{observe::LaneGauges, threads::lock};

/// Where a device is served. It exists as long as a client may be sent there.
#[derive(Debug)]
pub(crate) struct Seat {
    /// The name of its export.
    pub(crate) name: String,
    /// The gauges of each worker's lane.
    pub(crate) gauges: Vec<Arc<LaneGauges>>,
    /// When a slow request was last reported.
    reported: Mutex<Option<Instant>>,
    /// Its lane number in the workers. The number is not reused while the seat exists.
    pub(crate) lane: usize,
    /// The workers that serve it.
    pub(crate) workers: Vec<usize>,
    /// Number of connections to it.
    pub(crate) clients: AtomicUsize,
    /// Number of tickets, and of views that contain it.
    coming: AtomicUsize,
}

impl Seat {
    pub(crate) fn new(name: String, lane: usize, workers: Vec<usize>, gauges: Vec<Arc<LaneGauges>>) -> Arc<Self> {
        let (clients, coming, reported) = (AtomicUsize::new(0), AtomicUsize::new(0), Mutex::default());
        Arc::new(Self { name, gauges, reported, lane, workers, clients, coming })
    }

    /// Whether a slow request may be reported now: once in an `interval`, for all workers together.
    pub(crate) fn may_report(&self, now: Instant, interval: Duration) -> bool {
        let mut reported = lock(&self.reported);
        let may = reported.is_none_or(|last| now.saturating_duration_since(last) >= interval);
        if may {
            *reported = Some(now);
        }
        may
    }

    /// Whether an admitted client is still on its way to a worker, or a thread still uses a view from which it could admit one.
    /// Once no handshake finds the export any more, no new client can arrive.
    pub(crate) fn is_awaited(&self) -> bool {
        self.coming.load(Ordering::Relaxed) > 0
    }
}

/// A claim to a seat. A client holds it from its admission until a worker has the client; a view holds one as well.
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
