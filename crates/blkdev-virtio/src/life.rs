//! [`Life`]: whether a device still lives, and who must hear of it when it does not.

use std::sync::{
    Arc, Mutex, PoisonError,
    atomic::{AtomicBool, Ordering},
};

use nix::sys::eventfd::EventFd;

/// One for each device, shared by its transport and its queues. A device dies once, as a whole, and stays dead.
#[derive(Debug)]
pub struct Life {
    /// Driver and target, for the log.
    name: String,
    dead: AtomicBool,
    sleepers: Mutex<Vec<Arc<EventFd>>>,
}

impl Life {
    /// A device that lives. `name` is what the log calls it: driver and target.
    pub fn new(name: String) -> Arc<Self> {
        Arc::new(Self { name, dead: AtomicBool::new(false), sleepers: Mutex::default() })
    }

    /// Whether it is over. What the device has written before it died can be read, but need not be believed.
    #[inline]
    pub fn is_dead(&self) -> bool {
        self.dead.load(Ordering::Acquire)
    }

    /// Ends it: the first time, the log is told why, and every queue's sleeper is woken.
    pub fn end(&self, why: &str) {
        if self.end_quietly() {
            log::error!("{}: {why}", self.name);
        }
    }

    /// As [`end`](Self::end) for who reports the reason in another way. Tells whether the device was alive.
    pub fn end_quietly(&self) -> bool {
        // SeqCst: a queue that goes to sleep first empties its eventfd and then looks at `dead`; see `Queue::arm`.
        if self.dead.swap(true, Ordering::SeqCst) {
            return false;
        }
        for sleeper in self.sleepers.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            // A full counter is readable, too.
            let _ = sleeper.write(1);
        }
        true
    }

    pub(crate) fn watch(&self, sleeper: &Arc<EventFd>) {
        self.sleepers.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::clone(sleeper));
        if self.is_dead() {
            let _ = sleeper.write(1);
        }
    }

    pub(crate) fn unwatch(&self, sleeper: &Arc<EventFd>) {
        self.sleepers.lock().unwrap_or_else(PoisonError::into_inner).retain(|s| !Arc::ptr_eq(s, sleeper));
    }
}
