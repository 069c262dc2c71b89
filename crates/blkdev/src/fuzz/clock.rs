//! [`Clock`]: a simulated clock that advances only in waits, and the watchers that use it.

use std::{
    cell::RefCell,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::{Duration, Instant},
};

thread_local! {
    static ENTERED: RefCell<Option<Clock>> = const { RefCell::new(None) };
}

/// A clock of a fuzz target. A thread that has [entered](Self::enter) it reads no other clock ([`now`](crate::wake::now)), and
/// its waits take no time: they advance the clock. The [watchers](crate::wake::Watcher) that it starts get no threads, but
/// [turns](Self::turn) between its own actions. So one thread does everything, and the same input gives the same run.
#[derive(Clone, Debug)]
pub struct Clock(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    now: Instant,
    watchers: Vec<Weak<dyn Turns>>,
}

/// A watcher without a thread.
pub(crate) trait Turns: fmt::Debug + Send + Sync {
    /// Gives it one turn.
    fn take(&self);
}

/// A thread uses the clock until this is dropped.
#[derive(Debug)]
#[must_use = "the thread leaves the clock when this is dropped"]
pub struct Entered(());

impl Default for Clock {
    fn default() -> Self {
        Self(Arc::new(Mutex::new(State { now: Instant::now(), watchers: Vec::new() })))
    }
}

impl Clock {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes this the clock of the calling thread.
    pub fn enter(&self) -> Entered {
        ENTERED.set(Some(self.clone()));
        Entered(())
    }

    /// Advances the clock.
    pub fn pass(&self, time: Duration) {
        self.state().now += time;
    }

    /// Gives each watcher one turn.
    pub fn turn(&self) {
        let watchers = {
            let mut state = self.state();
            state.watchers.retain(|watcher| watcher.strong_count() > 0);
            state.watchers.clone()
        };
        watchers.iter().filter_map(Weak::upgrade).for_each(|watcher| watcher.take());
    }

    /// The clock that the calling thread has entered.
    pub(crate) fn entered() -> Option<Self> {
        ENTERED.with_borrow(Clone::clone)
    }

    pub(crate) fn now(&self) -> Instant {
        self.state().now
    }

    pub(crate) fn watch(&self, watcher: Weak<dyn Turns>) {
        self.state().watchers.push(watcher);
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        ENTERED.set(None);
    }
}
