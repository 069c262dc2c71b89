//! [`Server`]: opens the queues, starts and stops the threads.

use std::{
    io,
    os::fd::AsFd,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use blkdev::{
    Plan,
    thread::{Role, spawn},
};
use nbd_proto::limits::PAYLOAD_MAX;
use nix::sys::eventfd::EventFd;

use crate::{
    door::{Door, Lobby},
    end::End,
    export::{Export, Exports},
    handover::{Connection, Handover, Pause, Paused},
    limits::Limits,
    listener::Listener,
    observe::{Book, Observation, protocol},
    peer::Peer,
    poll::bell,
    removal::Removal,
    roster::{Roster, Status},
    stream::Stream,
    threads::await_end,
    tls::Tls,
    worker::{self, Arrival, Handle, Phase, least_loaded},
};

/// The reserve for small requests, in addition to [`Limits::memory`]: an eighth of it.
const RESERVE: usize = 8;

/// A running server. Dropping it stops it.
#[derive(Debug)]
pub struct Server {
    stop: Arc<AtomicBool>,
    bell: Arc<EventFd>,
    workers: Arc<[Handle]>,
    roster: Roster,
    book: Arc<Book>,
    payload_max: u32,
    /// To the door.
    pauses: mpsc::Sender<Pause<Lobby>>,
    threads: Vec<JoinHandle<()>>,
    end: End,
}

impl Server {
    /// Opens the queues of all exports, starts the threads and serves. The first export is the default one. With `tls`, the
    /// server offers TLS in addition to plain text, or requires it ([`Tls::required`]).
    ///
    /// # Errors
    /// Invalid names or limits, or an error of a device or the kernel. No connection has been accepted then.
    pub fn start(exports: Vec<Export>, listeners: Vec<Listener>, tls: Option<Tls>, limits: Limits) -> io::Result<Self> {
        let (mut server, mut door) = Self::begin(exports, tls, limits)?;
        listeners.into_iter().try_for_each(|listener| door.open_to(listener))?;
        server.run(door)?;
        Ok(server)
    }

    /// As [`start`](Self::start), but continues the service of another server where it was [paused](Self::pause). A client whose
    /// export does not exist, or takes only shorter requests than were negotiated, is disconnected.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub fn resume(exports: Vec<Export>, handover: Handover, tls: Option<Tls>, limits: Limits) -> io::Result<Self> {
        let (mut server, mut door) = Self::begin(exports, tls, limits)?;
        let Handover { listeners, guests, connections } = handover;
        listeners.into_iter().try_for_each(|socket| door.listen(socket))?;
        guests.into_iter().for_each(|guest| door.resume(guest));
        connections.into_iter().for_each(|connection| server.welcome(connection));
        server.run(door)?;
        Ok(server)
    }

    /// Continues a connection.
    fn welcome(&self, connection: Connection) {
        let Connection { socket, tls, export, state } = connection;
        let peer = Peer::of(socket.as_fd());
        let Some(ticket) = self.roster.ticket(&export) else {
            return log::warn!("{peer} is disconnected: there is no export {export:?} any more");
        };
        let longest = state.terms.block.payload_max;
        if longest > self.payload_max {
            let limit = self.payload_max;
            return log::warn!(
                "{peer} is disconnected: it may send {longest} bytes at a time, and the limit is {limit}"
            );
        }
        if let Some(worker) = least_loaded(&self.workers, &ticket) {
            let stream = match Stream::resume(socket, tls.as_ref()) {
                Ok(stream) => stream,
                Err(e) => return log::warn!("{peer} is disconnected: {e}"),
            };
            let entry = self.book.enter(peer, export, format!("{stream:?}"), protocol(state.terms.mode));
            let phase = Phase::Continues(Box::new(state));
            worker.welcome(Arrival { stream, phase, ticket, entry, over: None });
        }
    }

    /// Stops serving for a while: waits until the devices have completed all requests that have begun, at most for `limit`, and
    /// begins no other one. Clients only see that replies take longer. Drop the result to go on; exports do not change until then.
    ///
    /// # Errors
    /// A device did not complete its requests in time, a thread has failed, or the server is paused already. The server goes on
    /// then.
    pub fn pause(&self, limit: Duration) -> io::Result<Paused> {
        let deadline = Instant::now() + limit;
        let failed = |_| io::Error::other("a thread of this server has failed");
        let hold = self.roster.hold(deadline)?;
        let (pause, sender, reported) = Pause::new(deadline);
        self.pauses.send(pause).map_err(|_| io::Error::other("the server accepts no connections any more"))?;
        self.bell.write(1)?;
        // The door first: then no client is on its way to a worker that has paused.
        let Lobby { state: mut lobby, mut leaving } = reported.recv().map_err(failed)??;
        let mut threads = vec![sender];
        let lanes = self.roster.lanes();
        let reports: Vec<_> = self
            .workers
            .iter()
            .map(|worker| {
                let (pause, sender, reported) = Pause::new(deadline);
                threads.push(sender);
                worker.pause(pause);
                reported
            })
            .collect();
        for reported in reports {
            let standstill = reported.recv().map_err(failed)??;
            leaving += standstill.leaving;
            for (lane, socket, tls, state) in standstill.connections {
                match lanes.iter().find(|(number, _)| *number == lane) {
                    Some((_, export)) => {
                        lobby.connections.push(Connection { socket, tls, export: export.clone(), state });
                    }
                    // Its export was removed.
                    None => leaving += 1,
                }
            }
        }
        Ok(Paused { state: lobby, threads, leaving, _hold: hold })
    }

    /// Starts the workers and opens the queues.
    fn begin(exports: Vec<Export>, tls: Option<Tls>, limits: Limits) -> io::Result<(Self, Door)> {
        if limits.memory < 1 << 20 || limits.workers == 0 {
            let text = format!(
                "{} workers with {} bytes of memory: needs at least 1 worker and 1 MiB",
                limits.workers, limits.memory
            );
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        let payload_max = PAYLOAD_MAX.min(u32::try_from(limits.memory).unwrap_or(u32::MAX));
        let (stop, bell) = (Arc::new(AtomicBool::new(false)), Arc::new(bell()?));
        let (mut workers, mut threads) = (Vec::new(), Vec::new());
        let (sender, closers) = mpsc::channel();
        let end = End::default();
        let mut failed = None;
        for n in 0..limits.workers {
            match worker::start(format!("worker {n}"), &limits, &stop, sender.clone(), &end) {
                Ok((handle, thread)) => {
                    workers.push(handle);
                    threads.push(thread);
                }
                Err(e) => {
                    failed = Some(e);
                    break;
                }
            }
        }
        let (workers, book): (Arc<[Handle]>, _) = (workers.into(), Arc::new(Book::default()));
        let mut plan = Plan::new(limits.memory);
        (plan.reserve, plan.depth) = (limits.memory / RESERVE, limits.depth);
        let roster = Roster::new(
            Arc::clone(&workers),
            plan,
            Exports::none(payload_max, limits.connections > 1),
            (sender, closers),
        );
        // From here on, dropping `server` stops the threads.
        let (pauses, paused) = mpsc::channel();
        let server = Self {
            stop: Arc::clone(&stop),
            bell: Arc::clone(&bell),
            workers: Arc::clone(&workers),
            roster,
            book: Arc::clone(&book),
            payload_max,
            pauses,
            threads,
            end: end.clone(),
        };
        if let Some(e) = failed {
            return Err(e);
        }
        server.replace(exports, tls, |_| Removal::Hide)?;
        let door = Door::new(server.roster.views(), (workers, book), (bell, paused), stop, limits, end)?;
        Ok((server, door))
    }

    /// Starts to accept connections.
    fn run(&mut self, door: Door) -> io::Result<()> {
        let (end, stop) = (self.end.clone(), Arc::clone(&self.stop));
        let door = move || end.watch("door", &stop, || door.run());
        self.threads.insert(0, spawn(Role::Worker, "door", door)?);
        Ok(())
    }

    /// Adds an export. Opens the queues of its device on this thread.
    ///
    /// # Errors
    /// An invalid or duplicate name, an error of the device or the kernel, or all workers have failed. Nothing has changed then.
    pub fn add(&self, export: Export) -> io::Result<()> {
        self.roster.add(export)
    }

    /// Removes an export; `removal` decides what happens to its clients. The device is closed when the last of them has
    /// disconnected. For an export that was already removed but still has clients, a stronger removal replaces the earlier one.
    ///
    /// # Errors
    /// [`NotFound`](io::ErrorKind::NotFound): there is no such export.
    pub fn remove(&self, name: &str, removal: Removal) -> io::Result<()> {
        self.roster.remove(name, removal)
    }

    /// Replaces all exports and the TLS configuration at once: no client sees a part of the change. The first export is the
    /// default one. Established connections keep the TLS that they have.
    ///
    /// An export with the same name and the same device (compared by pointer) stays in place, even if its other properties
    /// change; its clients keep the properties that the handshake reported. Any other export is new. Exports that are missing
    /// from the list, or have another device, are removed as `removal` returns for each name.
    ///
    /// # Errors
    /// As [`add`](Self::add). Nothing has changed then.
    pub fn replace(&self, exports: Vec<Export>, tls: Option<Tls>, removal: impl Fn(&str) -> Removal) -> io::Result<()> {
        self.roster.replace(exports, tls, &removal)
    }

    /// All exports, the default one first, then removed exports that still have clients.
    pub fn exports(&self) -> Vec<Status> {
        self.roster.status()
    }

    /// Returns the state and the counters of the server. Waits for no device, and for no change of exports.
    pub fn observe(&self) -> Observation {
        let now = Instant::now();
        let (clients, clients_served) = self.book.view(now);
        let mut workers: Vec<_> = self.workers.iter().map(Handle::view).collect();
        let exports = self.roster.observe();
        for queue in exports.iter().flat_map(|export| &export.queues) {
            workers[queue.worker].memory += queue.memory;
        }
        Observation { exports, workers, clients, clients_served }
    }

    /// Disconnects the client with this [id](crate::ClientView::id). Returns whether there is such a client.
    pub fn disconnect(&self, id: u64) -> bool {
        let is_here = self.book.has(id);
        if is_here {
            // Only one worker has it.
            self.workers.iter().for_each(|worker| worker.disconnect(id));
        }
        is_here
    }

    /// Disconnects all clients of an export. Returns their number; `None`: there is no such export.
    pub fn disconnect_all(&self, export: &str) -> Option<usize> {
        let ids = self.book.ids_of(export);
        let count = ids.into_iter().filter(|id| self.disconnect(*id)).count();
        (count > 0 || self.roster.has(export)).then_some(count)
    }

    /// Blocks until the server fails: see [`End::wait`]. A failed server must still be dropped.
    pub fn wait(&self) -> io::Error {
        io::Error::other(self.end.wait().unwrap_or_else(|| "the server was stopped".into()))
    }

    /// Returns a handle with which another thread can wait for the end of the server.
    pub fn end(&self) -> End {
        self.end.clone()
    }

    /// Stops listening, closes all connections, and lets the devices complete their requests, in bounded time.
    pub fn stop(self) {}
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = self.bell.write(1);
        for worker in &*self.workers {
            worker.ring();
        }
        self.threads.drain(..).for_each(|thread| await_end(&thread));
        self.roster.await_closed();
        self.end.stopped();
    }
}
