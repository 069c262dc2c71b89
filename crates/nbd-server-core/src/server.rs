//! [`Server`]: opens the queues, starts and stops the threads.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread::{self, JoinHandle},
};

use blkdev::Plan;
use nbd_proto::limits::PAYLOAD_MAX;
use nix::sys::eventfd::EventFd;

use crate::{
    door::Door,
    end::End,
    export::{Export, Exports},
    limits::Limits,
    listener::Listener,
    poll::bell,
    removal::Removal,
    roster::{Roster, Status},
    threads::await_end,
    tls::Tls,
    worker::{self, Handle},
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
        let workers: Arc<[Handle]> = workers.into();
        let mut plan = Plan::new(limits.memory);
        (plan.reserve, plan.depth) = (limits.memory / RESERVE, limits.depth);
        let roster = Roster::new(
            Arc::clone(&workers),
            plan,
            Exports::none(payload_max, limits.connections > 1),
            (sender, closers),
        );
        // From here on, dropping `server` stops the threads.
        let mut server = Self {
            stop: Arc::clone(&stop),
            bell: Arc::clone(&bell),
            workers: Arc::clone(&workers),
            roster,
            threads,
            end: end.clone(),
        };
        if let Some(e) = failed {
            return Err(e);
        }
        server.replace(exports, tls, |_| Removal::Hide)?;
        let door = Door::new(listeners, server.roster.views(), workers, bell, Arc::clone(&stop), limits, end.clone())?;
        let door = move || end.watch("door", &stop, || door.run());
        server.threads.insert(0, thread::Builder::new().name("door".into()).spawn(door)?);
        Ok(server)
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
