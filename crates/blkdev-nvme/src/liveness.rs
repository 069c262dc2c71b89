//! [`Liveness`]: whether a controller is alive, and which threads wake when it dies.

use std::sync::{
    Arc, Mutex, PoisonError,
    atomic::{AtomicBool, Ordering},
};

use blkdev::wake::Wake;

/// The liveness of a controller, shared by all its users. It dies once, as a whole, and stays dead.
#[derive(Debug)]
pub(crate) struct Liveness {
    /// The device's name in log messages.
    name: String,
    dead: AtomicBool,
    sleepers: Mutex<Vec<Arc<Wake>>>,
}

impl Liveness {
    pub(crate) fn new(name: String) -> Self {
        Self { name, dead: AtomicBool::new(false), sleepers: Mutex::default() }
    }

    #[inline]
    pub(crate) fn is_dead(&self) -> bool {
        self.dead.load(Ordering::Acquire)
    }

    /// Marks the controller dead. The first call logs the reason and wakes all sleeping threads.
    pub(crate) fn end(&self, why: &str) {
        // SeqCst: a queue first empties its eventfd and then loads `dead` before it sleeps.
        if self.dead.swap(true, Ordering::SeqCst) {
            return;
        }
        log::error!("{}: {why}; the device is declared dead", self.name);
        for sleeper in self.sleepers.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            sleeper.ring();
        }
    }

    pub(crate) fn watch(&self, sleeper: &Arc<Wake>) {
        self.sleepers.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::clone(sleeper));
        if self.is_dead() {
            sleeper.ring();
        }
    }

    pub(crate) fn unwatch(&self, sleeper: &Arc<Wake>) {
        self.sleepers.lock().unwrap_or_else(PoisonError::into_inner).retain(|s| !Arc::ptr_eq(s, sleeper));
    }
}
