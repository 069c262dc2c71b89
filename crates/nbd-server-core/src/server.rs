//! [`Server`]: opens the queues, starts the threads, and ends them.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use blkdev::Plan;
use nbd_proto::limits::PAYLOAD_MAX;
use nix::sys::eventfd::EventFd;

use crate::{
    End, Export, Exports, Listener, Removal, Status,
    door::Door,
    poll::bell,
    roster::Roster,
    tls::Tls,
    worker::{self, Handle},
};

/// What bounds the server.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Threads that move data; a device with fewer queues is served by as many.
    pub workers: usize,
    /// Payload memory of each worker for each export, in bytes, at least 1 MiB. Requests that do not fit wait, first come,
    /// first served. An eighth more is a reserve for the small requests of clients that hold little: at most a 64th of this.
    /// A READ or WRITE is at most as long as this, or 32 MiB.
    pub memory: usize,
    /// Requests in a device's queue.
    pub depth: u16,
    /// Connections, in their handshake or served. For one more, a client that has been silent in the handshake for a second
    /// is cut off; if there is none, the new one is closed at once. If it is 1, multi-conn is not advertised.
    pub connections: usize,
    /// Connections in their handshake. For one more, the one of the most crowded peer (address, user, virtual machine) that
    /// has been silent for longest is cut off.
    pub handshakes: usize,
    /// How long a handshake may take.
    pub handshake_timeout: Duration,
    /// Refuse clients that do not ask for block sizes, such as the Linux kernel, where blocks are larger than a byte. They
    /// are served otherwise, but each write of a part of a block stops the other writes of the device for a moment.
    pub block_size_required: bool,
    /// The time that a client has, while others wait for the memory, to send a payload that it has announced. A client whose
    /// pace, measured over a fifth of this, is too slow for that is cut off. To take its replies it has a tenth of this; if
    /// it is slower, measured over a 200th of this, the replies lose their memory, and are read again when it takes them.
    pub stall_timeout: Duration,
    /// How long the clients of an export that is removed [softly](Removal::Soft) have to say goodbye.
    pub farewell: Duration,
    /// For how long, at most, a worker without anything to do looks again before it sleeps. It does so for devices that
    /// answer soon, and for clients that have few requests at a time but the next one soon: these are served without the
    /// time that waking up takes, tens of microseconds for each request. The processor is left to whoever else wants it.
    /// Zero: never.
    pub poll: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            workers: thread::available_parallelism().map_or(1, Into::into),
            memory: 64 << 20,
            depth: 256,
            connections: 4096,
            handshakes: 1024,
            block_size_required: false,
            handshake_timeout: Duration::from_secs(10),
            stall_timeout: Duration::from_secs(10),
            farewell: Duration::from_secs(10),
            poll: Duration::from_micros(100),
        }
    }
}

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

/// Waits until a thread has done its work. Not until it is gone: the kernel keeps a thread until the requests are over that it
/// handed to an io_uring, and a file system that hangs does not end them. The end of the process does.
pub(crate) fn await_end(thread: &JoinHandle<()>) {
    let mut pause = Duration::from_micros(10);
    while !thread.is_finished() {
        thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(5));
    }
}
