//! [`Reconnect`]: a device that is opened again when it dies, so that its users only see a pause.
//!
//! When the connection to the device breaks, requests wait, new ones too. A thread opens the device again, on fresh queues. Then:
//!
//! 1. Changes that had completed, but were not flushed, are made again, in order, and flushed (see [`Unflushed`]).
//! 2. Each queue sends again what was in flight, in the order in which it was first sent.
//! 3. When all queues have done so, new requests follow.
//!
//! After [`Options::window`], requests fail with [`Error::Io`](crate::Error::Io) instead of waiting, until the device is back.
//!
//! Changes that overlap and were in flight at the same time have no order, as always; so neither do they have one afterwards.
//!
//! ```
//! use std::sync::Arc;
//!
//! use blkdev::{Device, memory::Memory, reconnect::{Options, Reconnect}};
//!
//! let open = || Ok(Arc::new(Memory::new(1 << 20)) as Arc<dyn Device>);
//! let device = Reconnect::new(open()?, Box::new(open), Options::default())?;
//! assert_eq!(device.capacity(), 1 << 20);
//! # Ok::<(), std::io::Error>(())
//! ```

mod berth;
mod fit;
mod gap;
mod log;
mod memories;
mod queue;
mod replay;
mod shared;
#[cfg(test)]
mod tests;
mod track;

use std::{
    io,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use crate::{
    device::{Device, Info, Queue, State},
    mem::Mapping,
    thread::Role,
    wake::{Wake, Watcher},
};

use self::{queue::ReconnectQueue, shared::Shared};

/// Longest wait for the thread when the device is closed.
const CLOSE: Duration = Duration::from_millis(500);

/// Opens the device again.
pub type Reopen = Box<dyn Fn() -> io::Result<Arc<dyn Device>> + Send + Sync>;

/// What a [`Reconnect`] does. There may be more fields later.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Options {
    /// How long requests wait for a device that has died; later they fail until it is back. Default: 1 min.
    pub window: Duration,
    /// What happens to changes that have completed, but were not flushed, when the device dies. No effect on a device without a
    /// volatile cache ([`Caps::flush`](crate::Caps::flush)).
    pub unflushed: Unflushed,
    /// Most memory of such changes that is kept, in bytes. Default, `None`: a quarter of the memory that is registered.
    pub unflushed_memory: Option<usize>,
}

impl Default for Options {
    fn default() -> Self {
        Self { window: Duration::from_secs(60), unflushed: Unflushed::Keep, unflushed_memory: None }
    }
}

/// What happens to changes that have completed, but were not flushed, when the device dies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unflushed {
    /// They are kept until a flush, and made again. The queue flushes on its own when they take half of
    /// [`Options::unflushed_memory`], and takes no new change when they take all of it.
    Keep,
    /// They are lost. Requests in flight, and all until the device is back, end with [`Error::Gone`](crate::Error::Gone), and
    /// [`Queue::losses`] counts the loss.
    Fail,
    /// A change that has completed is safe, because the device has written it to something that outlives the device.
    Trust,
}

/// A device that is opened again when it dies.
#[derive(Debug)]
pub struct Reconnect {
    shared: Arc<Shared>,
    /// `None`: a test takes the steps of the thread.
    watcher: Option<Watcher>,
}

impl Reconnect {
    /// Watches over `device`. `reopen` opens it again; it may take its time, and must not wait forever.
    ///
    /// # Errors
    /// No thread or file descriptor is left.
    pub fn new(device: Arc<dyn Device>, reopen: Reopen, options: Options) -> io::Result<Self> {
        let shared = Shared::new(device, reopen, options);
        let seen = Arc::clone(&shared);
        let watcher = Watcher::start(Role::Opener, "reconnect", move |stop| seen.run(stop))?;
        shared.set_bell(Arc::clone(watcher.wake()));
        Ok(Self { shared, watcher: Some(watcher) })
    }
}

impl Device for Reconnect {
    fn info(&self) -> &Info {
        &self.shared.info
    }

    fn capacity(&self) -> u64 {
        self.shared.capacity()
    }

    fn register(&self, mapping: &Arc<Mapping>) -> io::Result<()> {
        self.shared.register(mapping)
    }

    fn unregister(&self, mapping: &Arc<Mapping>) {
        self.shared.unregister(mapping);
    }

    fn pins_memory(&self) -> bool {
        self.shared.pins_memory
    }

    fn shares_memory(&self) -> bool {
        self.shared.shares_memory
    }

    fn refresh(&self) {
        if let Some(device) = self.shared.device() {
            device.refresh();
        }
    }

    fn reconnects(&self) -> u64 {
        self.shared.returns.load(Ordering::Relaxed)
    }

    fn details(&self) -> Vec<(&'static str, String)> {
        let mut details = self.shared.device().map(|device| device.details()).unwrap_or_default();
        details.push(("memory of unflushed changes", self.shared.kept.load(Ordering::Relaxed).to_string()));
        details
    }

    fn state(&self) -> State {
        match self.shared.device().map(|device| device.state()) {
            Some(State::Working) => State::Working,
            _ => State::Reconnecting,
        }
    }

    fn ring_at_death(&self, bell: &Arc<Wake>) {
        self.shared.add_bell(bell);
    }

    fn is_replaced(&self) -> bool {
        // A device that has died is opened again by its name anyway.
        self.shared.device().is_some_and(|device| device.state() == State::Working && device.is_replaced())
    }

    fn open_queue(&self, depth: u16) -> io::Result<Box<dyn Queue>> {
        Ok(Box::new(ReconnectQueue::open(&self.shared, depth)?))
    }
}

impl Drop for Reconnect {
    /// The thread may be about to open the device, which can take some seconds. The owner does not wait so long.
    fn drop(&mut self) {
        self.shared.close();
        if let Some(watcher) = &mut self.watcher {
            watcher.stop_within(CLOSE);
        }
    }
}
