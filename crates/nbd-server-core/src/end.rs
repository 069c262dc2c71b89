//! [`End`]: reports how a server ends, to a caller that waits for it.

use std::{
    any::Any,
    fmt,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

use crate::threads::lock;

/// Reports how a [`Server`](crate::Server) ends. Cheap to clone. Stays valid after the server is dropped.
#[derive(Clone, Debug, Default)]
pub struct End(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    fate: Mutex<Fate>,
    changed: Condvar,
}

#[derive(Clone, Debug, Default)]
enum Fate {
    #[default]
    Running,
    Stopped,
    Failed(String),
}

impl End {
    /// Blocks until the server has stopped or failed. `None`: it was stopped. Otherwise the text names the failure: a thread has
    /// ended, or no listening socket is left. Such a server continues with the parts that still work, but does not recover: stop
    /// it, and start another one.
    pub fn wait(&self) -> Option<String> {
        let mut fate = lock(&self.0.fate);
        loop {
            match &*fate {
                Fate::Running => {}
                Fate::Stopped => return None,
                Fate::Failed(text) => return Some(text.clone()),
            }
            fate = self.0.changed.wait(fate).unwrap_or_else(|poisoned| poisoned.into_inner());
        }
    }

    /// The server has stopped.
    pub(crate) fn stopped(&self) {
        self.set(Fate::Stopped);
    }

    /// Reports a failure that the server does not recover from.
    pub(crate) fn failed(&self, what: impl fmt::Display) {
        log::error!("{what}");
        self.set(Fate::Failed(what.to_string()));
    }

    /// Only the first report counts: later ones may be its consequences.
    fn set(&self, new: Fate) {
        let mut fate = lock(&self.0.fate);
        if matches!(*fate, Fate::Running) {
            *fate = new;
            self.0.changed.notify_all();
        }
    }

    /// Runs the body of a thread. Reports a failure if it ends although `stop` was not set.
    pub(crate) fn watch(&self, name: &str, stop: &AtomicBool, body: impl FnOnce()) {
        // The body and its state are dropped after a panic. Data behind locks remains, and is always consistent.
        match catch_unwind(AssertUnwindSafe(body)) {
            Err(panic) => self.failed(format_args!("the thread \"{name}\" panicked: {}", words(&*panic))),
            Ok(()) if !stop.load(Ordering::Relaxed) => {
                self.failed(format_args!(
                    "the thread \"{name}\" ended unexpectedly; see the previous log message for the reason"
                ));
            }
            Ok(()) => {}
        }
    }
}

/// The message of a panic.
pub(crate) fn words(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("(no message)")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_end_counts_and_every_waiter_gets_it() {
        let (end, stop) = (End::default(), AtomicBool::new(false));
        let waiters = [(); 3].map(|()| {
            let end = end.clone();
            std::thread::spawn(move || end.wait())
        });
        end.watch("first", &stop, || panic!("on {}", "purpose"));
        end.watch("second", &stop, || {});
        end.stopped();
        for waiter in waiters {
            assert_eq!(waiter.join().unwrap().unwrap(), "the thread \"first\" panicked: on purpose");
        }
    }

    #[test]
    fn a_thread_that_ends_without_stop_is_a_failure() {
        let stop = AtomicBool::new(false);
        let end = End::default();
        end.watch("door", &stop, || stop.store(true, Ordering::Relaxed));
        end.stopped();
        assert_eq!(end.wait(), None);
        stop.store(false, Ordering::Relaxed);
        let end = End::default();
        end.watch("door", &stop, || {});
        assert!(end.wait().unwrap().contains("\"door\" ended unexpectedly"));
    }
}
