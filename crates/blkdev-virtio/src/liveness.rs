//! [`Liveness`]: whether a device still lives, and which sleepers wake when it does not.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use crate::notifier::Notifier;

/// One for each device, shared by its transport and its queues. A device dies once, as a whole, and stays dead.
#[derive(Debug)]
pub struct Liveness {
    /// Driver and target, for the log.
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
    /// A device that lives and whose eventfds only the kernel shares. `name` is for the log: driver and target.
    pub fn new(name: String) -> Arc<Self> {
        Arc::new(Self { name, shared: false, dead: AtomicBool::new(false), sleepers: Mutex::default() })
    }

    /// As [`new`](Self::new), for a device in another process, which is not trusted with the eventfds that it holds. The
    /// transport calls [`unblock`](Self::unblock) from time to time.
    pub fn in_another_process(name: String) -> Arc<Self> {
        Arc::new(Self { name, shared: true, dead: AtomicBool::new(false), sleepers: Mutex::default() })
    }

    /// Whether it is over. What the device has written before it died can be read, but need not be believed.
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

    /// As [`end`](Self::end), for a caller that reports the reason in another way. Returns whether the device was alive.
    pub fn end_quietly(&self) -> bool {
        // SeqCst: a queue that goes to sleep first empties its eventfd and then looks at `dead`; see `Queue::arm`.
        if self.dead.swap(true, Ordering::SeqCst) {
            return false;
        }
        // Not written to under the lock, and not by a thread that anything waits for, where a write may block. A sleeper whose
        // eventfd is readable wakes without us.
        let calls: Vec<_> = self.sleepers().iter().map(|sleeper| Arc::clone(&sleeper.call)).collect();
        let wake = move || calls.iter().for_each(|call| call.ring_if_empty());
        if !self.shared {
            wake();
        } else if let Err(e) = thread::Builder::new().name("virtio-wake".to_owned()).spawn(wake.clone()) {
            log::debug!("{}: no thread to wake the queues: {e}", self.name);
            wake();
        }
        true
    }

    /// Frees the thread that wakes the queues, if another process has made it block. `last`: there will be no further call.
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

    /// From now on `call` is written to when the device dies. If it is dead already, [`is_dead`](Self::is_dead) says so.
    pub(crate) fn watch(&self, call: &Arc<Notifier>) {
        self.sleepers().push(Sleeper { call: Arc::clone(call), seen: 0 });
    }

    pub(crate) fn unwatch(&self, call: &Arc<Notifier>) {
        // Of a dead device they are kept, for `unblock`.
        if !self.is_dead() {
            self.sleepers().retain(|sleeper| !Arc::ptr_eq(&sleeper.call, call));
        }
    }
}
