//! [`Liveness`]: whether a device is alive, and which threads wake when it dies.

use std::sync::{
    Arc, Mutex, MutexGuard, PoisonError,
    atomic::{AtomicBool, Ordering},
};

use crate::{
    thread::{Role, spawn},
    wake::Wake,
};

/// What wakes a thread that sleeps until a device does something: an eventfd.
pub trait Sleeper: Send + Sync + 'static {
    /// Wakes the thread. Many calls may do the same as one.
    fn wake(&self);
}

impl Sleeper for Wake {
    fn wake(&self) {
        self.ring();
    }
}

/// The liveness of a device, shared by everything that uses it. A device dies once, as a whole, and stays dead.
///
/// No sleeper misses the end: [`end`](Self::end) first marks the device and then wakes. A thread that is about to sleep first
/// empties its eventfd, then puts a fence (`SeqCst`), and then looks at [`is_dead`](Self::is_dead).
#[derive(Debug)]
pub struct Liveness<S = Wake> {
    /// Driver and target, for log messages.
    name: String,
    /// Another process holds the eventfds, and can make a write to them block.
    wakes_may_block: bool,
    dead: AtomicBool,
    sleepers: Mutex<Vec<Arc<S>>>,
    /// Rung at the end. Only this process has them.
    bells: Mutex<Vec<Arc<Wake>>>,
}

impl<S: Sleeper> Liveness<S> {
    /// A live device whose eventfds are shared with the kernel only. `name` (driver and target) is for log messages.
    pub fn new(name: String) -> Arc<Self> {
        Arc::new(Self::with(name, false))
    }

    /// As [`new`](Self::new), for a device in another process that holds the eventfds and is not trusted with them. The driver
    /// must free a thread that blocks when it wakes one of the [`sleepers`](Self::sleepers).
    pub fn in_another_process(name: String) -> Arc<Self> {
        Arc::new(Self::with(name, true))
    }

    fn with(name: String, wakes_may_block: bool) -> Self {
        let (sleepers, bells) = (Mutex::default(), Mutex::default());
        Self { name, wakes_may_block, dead: AtomicBool::new(false), sleepers, bells }
    }

    /// Driver and target, for log messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Rings `bell` when the device dies; now, if it is dead.
    pub fn ring_at_end(&self, bell: &Arc<Wake>) {
        self.bells.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::clone(bell));
        if self.is_dead() {
            bell.ring();
        }
    }

    /// Whether the device is dead. Data that it wrote earlier can be read, but must not be trusted.
    #[inline]
    pub fn is_dead(&self) -> bool {
        self.dead.load(Ordering::Acquire)
    }

    /// Marks the device dead. The first call logs the reason and wakes every sleeper.
    pub fn end(&self, why: &str) {
        if self.end_quietly() {
            log::error!("{}: {why}; the device is declared dead", self.name);
        }
    }

    /// As [`end`](Self::end), without the log message, for a caller that reports the reason itself. Returns whether the device
    /// was alive.
    pub fn end_quietly(&self) -> bool {
        // SeqCst: see the order above.
        if self.dead.swap(true, Ordering::SeqCst) {
            return false;
        }
        self.bells.lock().unwrap_or_else(PoisonError::into_inner).iter().for_each(|bell| bell.ring());
        // A wake may block, so wake without the lock, and on a separate thread that nothing waits for.
        let sleepers = self.sleepers();
        let is_alone = sleepers.is_empty();
        let wake = move || sleepers.iter().for_each(|sleeper| sleeper.wake());
        if !self.wakes_may_block || is_alone {
            wake();
        } else if let Err(e) = spawn(Role::Helper, "wake", wake.clone()) {
            log::debug!("{}: cannot start a thread to wake the queues: {e}", self.name);
            wake();
        }
        true
    }

    /// Registers a sleeper to be woken when the device dies. If it is dead already, wakes it now.
    pub fn watch(&self, sleeper: &Arc<S>) {
        self.lock().push(Arc::clone(sleeper));
        if self.is_dead() && !self.wakes_may_block {
            sleeper.wake();
        }
    }

    /// Takes back [`watch`](Self::watch). A dead device in another process keeps its sleepers: a thread that wakes one may still
    /// block.
    pub fn unwatch(&self, sleeper: &Arc<S>) {
        if !(self.wakes_may_block && self.is_dead()) {
            self.lock().retain(|other| !Arc::ptr_eq(other, sleeper));
        }
    }

    /// All sleepers.
    pub fn sleepers(&self) -> Vec<Arc<S>> {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Arc<S>>> {
        self.sleepers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn the_end_wakes_all_who_watch_once() {
        let life = Liveness::new("test".into());
        let [one, two, late] = [(); 3].map(|()| Arc::new(Wake::new().unwrap()));
        life.watch(&one);
        life.watch(&two);
        life.unwatch(&two);
        assert!(!life.is_dead() && !one.clear());
        assert!(life.end_quietly() && life.is_dead());
        assert!(one.clear() && !two.clear());
        assert!(!life.end_quietly(), "it dies once");
        life.end("again");
        assert!(!one.clear());
        life.watch(&late);
        assert!(late.clear(), "it watches a dead device");
        life.unwatch(&late);
        assert_eq!(life.sleepers().len(), 1);
    }

    /// A wake that blocks until the other end is dropped.
    struct Blocking(Mutex<mpsc::Receiver<()>>);

    impl Sleeper for Blocking {
        fn wake(&self) {
            let _ = self.0.lock().unwrap().recv();
        }
    }

    #[test]
    fn a_wake_that_blocks_delays_no_caller() {
        let life = Liveness::in_another_process("test".into());
        let (peer, blocks) = mpsc::channel();
        let sleeper = Arc::new(Blocking(Mutex::new(blocks)));
        life.watch(&sleeper);
        assert!(life.end_quietly(), "although the wake blocks");
        life.watch(&sleeper);
        life.unwatch(&sleeper);
        assert_eq!(life.sleepers().len(), 2, "those of a dead device stay, to be freed");
        drop(peer);
    }
}
