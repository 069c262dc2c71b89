//! [`Roster`]: the exports and the workers that serve them; changed atomically while the server runs.

use std::{
    io,
    ops::Deref,
    sync::{
        Arc, Mutex, Weak,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use blkdev::{
    Channel, Context, Counts, Device, Plan,
    thread::{Role, spawn},
};

use crate::{
    export::{Export, Exports},
    handover::Hold,
    observe::{DeviceView, ExportView, LaneGauges, MemoryView},
    removal::Removal,
    seat::{Seat, Ticket},
    threads::{await_end, lock},
    tls::Tls,
    worker::Handle,
};

/// The present state of an export.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// The export's name.
    pub name: String,
    /// Number of connections to it.
    pub clients: usize,
    /// How it was removed, if it still has clients, or its device has requests in flight.
    pub removal: Option<Removal>,
}

/// The state that a handshake uses: the exports, where each is served, and the TLS configuration.
#[derive(Debug)]
pub(crate) struct View {
    /// Claims for clients that may arrive while a thread uses this view. Declared first, so that they are dropped first: a thread
    /// that finds a device closed must find the export gone.
    seats: Vec<Ticket>,
    pub(crate) exports: Exports,
    pub(crate) tls: Option<Tls>,
}

impl View {
    /// Returns a claim to the seat of an export.
    pub(crate) fn ticket(&self, position: usize) -> Ticket {
        self.seats[position].clone()
    }
}

/// The present view. The lock is held only to take or replace it: a thread keeps the view that it has taken.
#[derive(Debug)]
pub(crate) struct Views {
    current: Mutex<Arc<View>>,
    /// Receives the threads that close a device.
    closers: mpsc::Sender<JoinHandle<()>>,
}

impl Views {
    pub(crate) fn look(&self) -> Look<'_> {
        Look { view: Some(Arc::clone(&lock(&self.current))), views: self }
    }
}

/// A view that a thread has taken.
pub(crate) struct Look<'a> {
    view: Option<Arc<View>>,
    views: &'a Views,
}

impl Deref for Look<'_> {
    type Target = View;

    fn deref(&self) -> &View {
        self.view.as_ref().expect("present until dropped")
    }
}

impl Drop for Look<'_> {
    fn drop(&mut self) {
        // The view was replaced in the meantime. Closing a device can take long, and other clients must not wait for it.
        if let Some(view) = self.view.take().and_then(Arc::into_inner)
            && !view.seats.is_empty()
            && let Ok(thread) = spawn(Role::Helper, "closing", move || drop(view))
        {
            let _ = self.views.closers.send(thread);
        }
    }
}

/// The exports of a running server. Changes happen one at a time, on the caller's thread, and are atomic: handshakes and workers
/// see only changes that have succeeded.
#[derive(Debug)]
pub(crate) struct Roster {
    views: Arc<Views>,
    workers: Arc<[Handle]>,
    plan: Plan,
    state: Mutex<State>,
    /// The server is paused: exports do not change.
    held: Arc<AtomicBool>,
}

#[derive(Debug)]
struct State {
    /// Indexed by number. A number is free when its seat no longer exists.
    lanes: Vec<Weak<Seat>>,
    /// Removed, and perhaps still in use.
    leaving: Vec<Leaving>,
    /// Threads that close devices.
    closing: Vec<JoinHandle<()>>,
    closers: mpsc::Receiver<JoinHandle<()>>,
}

#[derive(Debug)]
struct Leaving {
    name: String,
    removal: Removal,
    seat: Weak<Seat>,
    device: Weak<dyn Device>,
}

/// Open channels to a device that the workers do not have yet.
struct NewSeat {
    seat: Arc<Seat>,
    /// Each with the number of the worker that will get it. In the order of the seat's gauges.
    channels: Vec<(usize, Channel)>,
}

impl Roster {
    /// `exports`: an empty list. `closers` receives the threads that close a device.
    pub(crate) fn new(
        workers: Arc<[Handle]>,
        plan: Plan,
        exports: Exports,
        (sender, closers): (mpsc::Sender<JoinHandle<()>>, mpsc::Receiver<JoinHandle<()>>),
    ) -> Self {
        let view = View { exports, tls: None, seats: Vec::new() };
        let state = State { lanes: Vec::new(), leaving: Vec::new(), closing: Vec::new(), closers };
        let views = Views { current: Mutex::new(Arc::new(view)), closers: sender };
        Self { views: Arc::new(views), workers, plan, state: Mutex::new(state), held: Arc::default() }
    }

    /// The views, for the door.
    pub(crate) fn views(&self) -> Arc<Views> {
        Arc::clone(&self.views)
    }

    /// See [`Server::add`](crate::Server::add).
    pub(crate) fn add(&self, export: Export) -> io::Result<()> {
        let mut state = lock(&self.state);
        let mut exports = self.views.look().exports.list().to_vec();
        exports.push(export);
        self.set(&mut state, exports, self.tls(), &|_| Removal::Hide)
    }

    /// See [`Server::remove`](crate::Server::remove).
    pub(crate) fn remove(&self, name: &str, removal: Removal) -> io::Result<()> {
        let mut state = lock(&self.state);
        state.tidy();
        let mut exports = self.views.look().exports.list().to_vec();
        let count = exports.len();
        exports.retain(|export| export.name != name);
        if exports.len() == count && !state.leaving.iter().any(|leaving| leaving.name == name) {
            return Err(io::Error::new(io::ErrorKind::NotFound, format!("no export is named {name:?}")));
        }
        for leaving in state.leaving.iter_mut().filter(|leaving| leaving.name == name && leaving.removal < removal) {
            leaving.removal = removal;
            if let Some(seat) = leaving.seat.upgrade() {
                self.retire(&seat, removal);
            }
        }
        self.set(&mut state, exports, self.tls(), &|_| removal)
    }

    /// See [`Server::replace`](crate::Server::replace).
    pub(crate) fn replace(
        &self,
        exports: Vec<Export>,
        tls: Option<Tls>,
        removal: &dyn Fn(&str) -> Removal,
    ) -> io::Result<()> {
        self.set(&mut lock(&self.state), exports, tls, removal)
    }

    fn tls(&self) -> Option<Tls> {
        self.views.look().tls.clone()
    }

    fn set(
        &self,
        state: &mut State,
        list: Vec<Export>,
        tls: Option<Tls>,
        removal: &dyn Fn(&str) -> Removal,
    ) -> io::Result<()> {
        state.tidy();
        if self.held.load(Ordering::Acquire) {
            return Err(io::Error::new(io::ErrorKind::ResourceBusy, "the server is paused, to be replaced: try again"));
        }
        let before = self.views.look();
        let exports = before.exports.with(list)?;
        let mut old: Vec<_> =
            before.exports.list().iter().zip(before.seats.iter().map(|ticket| Arc::clone(ticket.seat()))).collect();
        // Do everything that can fail first; publish the change last.
        let (mut seats, mut added) = (Vec::new(), Vec::new());
        for new in exports.list() {
            let kept = old.iter().position(|(e, _)| e.name == new.name && Arc::ptr_eq(&e.device, &new.device));
            seats.push(match kept {
                Some(n) => old.swap_remove(n).1,
                None => {
                    let name = &new.name;
                    let of = |error: io::Error| Context::wrap(format!("export {name:?}: {error}"), error);
                    let new = self.open(state, name, &new.device).map_err(of)?;
                    let seat = Arc::clone(&new.seat);
                    added.push(new);
                    seat
                }
            });
        }
        for NewSeat { seat, channels } in added {
            for ((worker, channel), gauges) in channels.into_iter().zip(&seat.gauges) {
                self.workers[worker].open(Arc::clone(&seat), Arc::clone(gauges), channel);
            }
        }
        let seats = seats.iter().map(Ticket::new).collect();
        // `before` is still alive, so no device is closed under the lock that the door takes.
        *lock(&self.views.current) = Arc::new(View { exports, tls, seats });
        for (export, seat) in old {
            let (name, removal) = (export.name.clone(), removal(&export.name));
            self.retire(&seat, removal);
            let device = Arc::downgrade(&export.device);
            state.leaving.push(Leaving { name, removal, seat: Arc::downgrade(&seat), device });
        }
        Ok(())
    }

    /// Opens the queues of a device.
    fn open(&self, state: &mut State, name: &str, device: &Arc<dyn Device>) -> io::Result<NewSeat> {
        let lane = state.lanes.iter().position(|seat| seat.upgrade().is_none()).unwrap_or(state.lanes.len());
        let living: Vec<usize> = (0..self.workers.len()).filter(|n| self.workers[*n].is_alive()).collect();
        if living.is_empty() {
            return Err(io::Error::other("all workers of this server have failed: restart the server"));
        }
        let count = living.len().min(device.info().queues_max.into());
        // Devices with few queues are distributed over the workers.
        let workers: Vec<usize> = (0..count).map(|n| living[(lane + n) % living.len()]).collect();
        let channels: Vec<_> = workers.iter().copied().zip(self.plan.open(device, count)?).collect();
        for (worker, channel) in &channels {
            self.workers[*worker].watch(lane, channel)?;
        }
        let gauges = channels.iter().map(|(_, channel)| LaneGauges::new(channel)).collect();
        let seat = Seat::new(name.into(), lane, workers, gauges);
        match state.lanes.get_mut(lane) {
            Some(free) => *free = Arc::downgrade(&seat),
            None => state.lanes.push(Arc::downgrade(&seat)),
        }
        Ok(NewSeat { seat, channels })
    }

    fn retire(&self, seat: &Seat, removal: Removal) {
        seat.workers.iter().for_each(|worker| self.workers[*worker].retire(seat.lane, removal));
    }

    /// See [`Server::exports`](crate::Server::exports).
    pub(crate) fn status(&self) -> Vec<Status> {
        let mut state = lock(&self.state);
        state.tidy();
        let view = self.views.look();
        let status = |name: &str, removal, seat: &Seat| {
            let clients = seat.clients.load(Ordering::Relaxed);
            Status { name: name.into(), clients, removal }
        };
        let present = view.exports.list().iter().zip(&view.seats).map(|(e, seat)| status(&e.name, None, seat));
        let seats = state.leaving.iter().filter_map(|leaving| Some((leaving, leaving.seat.upgrade()?)));
        let leaving = seats.map(|(leaving, seat)| status(&leaving.name, Some(leaving.removal), &seat));
        present.chain(leaving).collect()
    }

    /// The exports for an observation, and then removed exports that are still in use. A change of exports may take long. This does
    /// not wait for it; removed exports are missing meanwhile.
    pub(crate) fn observe(&self) -> Vec<ExportView> {
        let state = self.state.try_lock().ok();
        let view = self.views.look();
        let mut found: Vec<_> = view
            .exports
            .list()
            .iter()
            .zip(&view.seats)
            .map(|(export, seat)| (Arc::clone(seat.seat()), None, Some(Arc::clone(&export.device))))
            .collect();
        let leaving = state.iter().flat_map(|state| &state.leaving);
        let seats = leaving.filter_map(|leaving| Some((leaving, leaving.seat.upgrade()?)));
        found.extend(seats.map(|(leaving, seat)| (seat, Some(leaving.removal), leaving.device.upgrade())));
        drop(state);
        found.into_iter().map(|(seat, removal, device)| view_of(&seat, removal, device.as_deref())).collect()
    }

    /// Stops changes until the result is dropped.
    ///
    /// # Errors
    /// Changes have stopped already, or a removed device is still being closed at the deadline.
    pub(crate) fn hold(&self, deadline: Instant) -> io::Result<Hold> {
        let mut state = lock(&self.state);
        if self.held.swap(true, Ordering::AcqRel) {
            return Err(io::Error::new(io::ErrorKind::ResourceBusy, "the server is paused already"));
        }
        let hold = Hold(Arc::clone(&self.held));
        loop {
            state.tidy();
            if state.closing.is_empty() {
                return Ok(hold);
            }
            if Instant::now() >= deadline {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "the device of a removed export is still closing"));
            }
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// The exports that clients can open, each with its lane.
    pub(crate) fn lanes(&self) -> Vec<(usize, String)> {
        let view = self.views.look();
        view.seats.iter().zip(view.exports.list()).map(|(seat, export)| (seat.lane, export.name.clone())).collect()
    }

    /// Whether clients can open an export of this name.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.views.look().exports.list().iter().any(|export| export.name == name)
    }

    /// Returns a claim to the seat of an export by its name.
    pub(crate) fn ticket(&self, name: &str) -> Option<Ticket> {
        let view = self.views.look();
        let position = view.exports.list().iter().position(|export| export.name == name)?;
        Some(view.ticket(position))
    }

    /// Waits until all devices are closed that are being closed. Call it when the workers have ended.
    pub(crate) fn await_closed(&self) {
        let mut state = lock(&self.state);
        state.tidy();
        state.closing.drain(..).for_each(|thread| await_end(&thread));
    }
}

/// An export for an observation.
fn view_of(seat: &Seat, removal: Option<Removal>, device: Option<&dyn Device>) -> ExportView {
    let (mut counts, mut memory, mut queues) = (Counts::default(), MemoryView::default(), Vec::new());
    for (lane, worker) in seat.gauges.iter().zip(&seat.workers) {
        let copied = lane.counters.copy();
        let queue = lane.view(*worker, &copied);
        counts += &copied;
        memory += queue.memory;
        queues.push(queue);
    }
    queues.sort_by_key(|queue| queue.worker);
    let refused = seat.gauges.iter().map(|lane| lane.refused.get()).sum();
    let oldest = queues.iter().filter_map(|queue| queue.oldest).max();
    let device = device.map(|device| DeviceView {
        info: device.info().clone(),
        capacity: device.capacity(),
        state: device.state(),
        is_stalled: queues.iter().any(|queue| queue.is_stalled),
        queues: queues.len(),
        reconnects: device.reconnects(),
        details: device.details(),
    });
    let clients = seat.clients.load(Ordering::Relaxed);
    ExportView { name: seat.name.clone(), clients, removal, device, counts, refused, oldest, memory, queues }
}

impl State {
    /// Removes entries that are over.
    fn tidy(&mut self) {
        self.leaving.retain(|leaving| leaving.seat.upgrade().is_some());
        self.closing.extend(self.closers.try_iter());
        self.closing.retain(|thread| !thread.is_finished());
    }
}
