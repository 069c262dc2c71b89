//! [`Server`]: opens the queues, starts the threads, and ends them.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use blkdev::{Channel, Plan};
use nbd_proto::limits::PAYLOAD_MAX;
use nix::sys::eventfd::EventFd;

use crate::{
    Export, Exports, Listener,
    door::Door,
    poll::bell,
    worker::{self, Handle},
};

/// What bounds the server.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Threads that move data; a device with fewer queues is served by as many.
    pub workers: usize,
    /// Payload memory of each worker for each export, in bytes, at least 1 MiB. Requests that do not fit wait in their
    /// sockets. A READ or WRITE is at most as long as this, or 32 MiB.
    pub memory: usize,
    /// Requests in a device's queue.
    pub depth: u16,
    /// Connections that are served; more are closed at once.
    pub connections: usize,
    /// Connections in their handshake; more are closed at once.
    pub handshakes: usize,
    /// How long a handshake may take.
    pub handshake_timeout: Duration,
    /// How long a client may hold memory without a byte moving, while others wait for it.
    pub stall_timeout: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            workers: thread::available_parallelism().map_or(1, Into::into),
            memory: 64 << 20,
            depth: 256,
            connections: 4096,
            handshakes: 1024,
            handshake_timeout: Duration::from_secs(10),
            stall_timeout: Duration::from_secs(60),
        }
    }
}

/// A running server. Dropped, it stops.
#[derive(Debug)]
pub struct Server {
    stop: Arc<AtomicBool>,
    bell: Arc<EventFd>,
    workers: Arc<[Handle]>,
    threads: Vec<JoinHandle<()>>,
}

impl Server {
    /// Opens the queues of all exports, starts the threads and serves. The first export is the default one.
    ///
    /// # Errors
    /// Bad names or limits, or what a device or the kernel said. Nothing was accepted then.
    pub fn start(exports: Vec<Export>, listeners: Vec<Listener>, limits: Limits) -> io::Result<Self> {
        if limits.memory < 1 << 20 || limits.workers == 0 {
            let text =
                format!("{} workers with {} bytes: at least one, and 1 MiB, are needed", limits.workers, limits.memory);
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        let payload_max = PAYLOAD_MAX.min(u32::try_from(limits.memory).unwrap_or(u32::MAX));
        let exports = Exports::new(exports, payload_max)?;
        let mut channels: Vec<Vec<Option<Channel>>> = Vec::new();
        channels.resize_with(limits.workers, || exports.list().iter().map(|_| None).collect());
        let plan = Plan { memory: limits.memory, depth: limits.depth };
        for (n, export) in exports.list().iter().enumerate() {
            let count = limits.workers.min(export.device.info().queues_max.into());
            for (k, channel) in plan.open(&export.device, count)?.into_iter().enumerate() {
                // Devices with one queue are spread over the workers.
                channels[(n + k) % limits.workers][n] = Some(channel);
            }
        }
        let (stop, bell) = (Arc::new(AtomicBool::new(false)), Arc::new(bell()?));
        let (mut workers, mut threads) = (Vec::new(), Vec::new());
        for (n, channels) in channels.into_iter().enumerate() {
            let (handle, thread) = worker::start(format!("worker {n}"), channels, limits.stall_timeout, &stop)?;
            workers.push(handle);
            threads.push(thread);
        }
        let workers: Arc<[Handle]> = workers.into();
        // From here on dropping `server` ends what was started.
        let mut server =
            Self { stop: Arc::clone(&stop), bell: Arc::clone(&bell), workers: Arc::clone(&workers), threads };
        let door = Door::new(listeners, exports, workers, bell, stop, limits)?;
        server.threads.insert(0, thread::Builder::new().name("door".into()).spawn(move || door.run())?);
        Ok(server)
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
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}
