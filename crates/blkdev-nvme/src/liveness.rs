//! [`Liveness`]: whether a controller still lives, and who must hear of it when it does not.

use std::sync::{
    Arc, Mutex, PoisonError,
    atomic::{AtomicBool, Ordering},
};

use nix::sys::eventfd::EventFd;

/// One for each controller, shared by all that use it. It dies once, as a whole, and stays dead.
#[derive(Debug)]
pub(crate) struct Liveness {
    /// What the log calls the device.
    name: String,
    dead: AtomicBool,
    sleepers: Mutex<Vec<Arc<EventFd>>>,
}

impl Liveness {
    pub(crate) fn new(name: String) -> Self {
        Self { name, dead: AtomicBool::new(false), sleepers: Mutex::default() }
    }

    #[inline]
    pub(crate) fn is_dead(&self) -> bool {
        self.dead.load(Ordering::Acquire)
    }

    /// Ends it: the first time, the log is told why, and everybody who sleeps is woken.
    pub(crate) fn end(&self, why: &str) {
        // SeqCst: a queue that goes to sleep first empties its eventfd and then looks at `dead`.
        if self.dead.swap(true, Ordering::SeqCst) {
            return;
        }
        log::error!("{}: {why}; the device is not used any more", self.name);
        for sleeper in self.sleepers.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            // A full counter is readable, too.
            let _ = sleeper.write(1);
        }
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
