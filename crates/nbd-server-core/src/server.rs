//! [`Server`]: opens the queues, starts the threads, and ends them.

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

/// The part of [`Limits::memory`] that comes on top of it for small requests: an eighth.
const RESERVE: usize = 8;

/// A running server. Dropped, it stops.
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
    /// Opens the queues of all exports, starts the threads and serves. The first export is the default one.
    /// `tls`: what it offers beside plain text, or instead of it.
    ///
    /// # Errors
    /// Bad names or limits, or what a device or the kernel said. Nothing was accepted then.
    pub fn start(exports: Vec<Export>, listeners: Vec<Listener>, tls: Option<Tls>, limits: Limits) -> io::Result<Self> {
        if limits.memory < 1 << 20 || limits.workers == 0 {
            let text =
                format!("{} workers with {} bytes: at least one, and 1 MiB, are needed", limits.workers, limits.memory);
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
        let plan = Plan { memory: limits.memory, reserve: limits.memory / RESERVE, depth: limits.depth };
        let roster = Roster::new(
            Arc::clone(&workers),
            plan,
            Exports::none(payload_max, limits.connections > 1),
            (sender, closers),
        );
        // From here on dropping `server` ends what was started.
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

    /// Serves one more export. Its device's queues are opened on this thread.
    ///
    /// # Errors
    /// A name that is taken or cannot be, what the device or the kernel said, or that all workers have failed. Nothing has
    /// changed then.
    pub fn add(&self, export: Export) -> io::Result<()> {
        self.roster.add(export)
    }

    /// Stops serving an export, and has `removal` done to its clients. When the last of them has gone its device is closed.
    /// For an export that was removed already, and still has clients, a stronger removal takes the place of the first.
    ///
    /// # Errors
    /// There is no such export.
    pub fn remove(&self, name: &str, removal: Removal) -> io::Result<()> {
        self.roster.remove(name, removal)
    }

    /// Serves these exports instead, under this TLS, all at once: no client sees a part of the change. The first is the
    /// default one. Connections that are under way keep the TLS that they have.
    ///
    /// An export of the same name and the same device (by its pointer) stays where it is, whatever else has changed about
    /// it; its clients keep what they were told. Any other is new. Those that are not there any more, or have another
    /// device, are removed as `removal` says for each name.
    ///
    /// # Errors
    /// As [`add`](Self::add). Nothing has changed then.
    pub fn replace(&self, exports: Vec<Export>, tls: Option<Tls>, removal: impl Fn(&str) -> Removal) -> io::Result<()> {
        self.roster.replace(exports, tls, &removal)
    }

    /// All exports, the default one first, then those that were removed and still have clients.
    pub fn exports(&self) -> Vec<Status> {
        self.roster.status()
    }

    /// Blocks until the server has failed: see [`End::wait`]. It is still to be dropped then.
    pub fn wait(&self) -> io::Error {
        io::Error::other(self.end.wait().unwrap_or_else(|| "the server was stopped".into()))
    }

    /// The way to wait for its end without the server itself, as on another thread.
    pub fn end(&self) -> End {
        self.end.clone()
    }

    /// Stops listening, cuts the connections, lets the devices finish what they have, in bounded time.
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
