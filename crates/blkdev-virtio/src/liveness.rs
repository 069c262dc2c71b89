//! [`Liveness`]: whether a device is alive, and which queues wake when it dies.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use crate::notifier::Notifier;

/// The liveness of a device, shared by its transport and its queues. A device dies once, as a whole, and stays dead.
#[derive(Debug)]
pub struct Liveness {
    /// Driver and target, for log messages.
    name: String,
    /// Another process holds the queues' eventfds, and can make a write to them block.
    shared: bool,
    dead: AtomicBool,
    sleepers: Mutex<Vec<Sleeper>>,
}

#[derive(Debug)]
struct Sleeper {
    call: Arc<Notifier>,
    /// For [`Notifier::is_stuck`].
    seen: u64,
}

impl Liveness {
    /// A live device whose eventfds are shared with the kernel only. `name` (driver and target) is for log messages.
    pub fn new(name: String) -> Arc<Self> {
        Arc::new(Self { name, shared: false, dead: AtomicBool::new(false), sleepers: Mutex::default() })
    }

    /// As [`new`](Self::new), for a device in another process that holds the eventfds and is not trusted with them. The
    /// transport must call [`unblock`](Self::unblock) periodically.
    pub fn in_another_process(name: String) -> Arc<Self> {
        Arc::new(Self { name, shared: true, dead: AtomicBool::new(false), sleepers: Mutex::default() })
    }

    /// Whether the device is dead. Data that it wrote earlier can be read, but must not be trusted.
    #[inline]
    pub fn is_dead(&self) -> bool {
        self.dead.load(Ordering::Acquire)
    }

    /// Marks the device dead. The first call logs the reason and wakes every queue.
    pub fn end(&self, why: &str) {
        if self.end_quietly() {
            log::error!("{}: {why}", self.name);
        }
    }

    /// As [`end`](Self::end), without the log message, for a caller that reports the reason itself. Returns whether the device
    /// was alive.
    pub fn end_quietly(&self) -> bool {
        // SeqCst: a queue first empties its eventfd and then loads `dead` before it sleeps; see `Queue::arm`.
        if self.dead.swap(true, Ordering::SeqCst) {
            return false;
        }
        // If a peer shares the eventfds, a write may block. So write without the lock, and on a separate thread that nothing
        // waits for. A sleeper with a readable eventfd wakes without a write.
        let calls: Vec<_> = self.sleepers().iter().map(|sleeper| Arc::clone(&sleeper.call)).collect();
        let wake = move || calls.iter().for_each(|call| call.ring_if_empty());
        if !self.shared {
            wake();
        } else if let Err(e) = thread::Builder::new().name("virtio-wake".to_owned()).spawn(wake.clone()) {
            log::debug!("{}: cannot start a thread to wake the queues: {e}", self.name);
            wake();
        }
        true
    }

    /// Frees the thread that wakes the queues, if another process makes it block. `last`: there will be no further call.
    pub fn unblock(&self, last: bool) {
        if !self.is_dead() {
            return;
        }
        for sleeper in self.sleepers().iter_mut() {
            if last || sleeper.call.is_stuck(&mut sleeper.seen) {
                sleeper.call.unblock();
            }
        }
    }

    fn sleepers(&self) -> MutexGuard<'_, Vec<Sleeper>> {
        self.sleepers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Registers `call` to be written when the device dies. If the device is dead already, [`is_dead`](Self::is_dead) returns
    /// it.
    pub(crate) fn watch(&self, call: &Arc<Notifier>) {
        self.sleepers().push(Sleeper { call: Arc::clone(call), seen: 0 });
    }

    pub(crate) fn unwatch(&self, call: &Arc<Notifier>) {
        // If the device is dead, `unblock` still needs them.
        if !self.is_dead() {
            self.sleepers().retain(|sleeper| !Arc::ptr_eq(&sleeper.call, call));
        }
    }
}
