//! [`End`]: how a server ends, for a caller that waits for that.

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

/// Reports how a [`Server`](crate::Server) ends. Cheap to clone, and valid when the server has gone.
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
    /// Blocks until the server has stopped or failed. `None`: it was stopped. Otherwise what has failed: a thread of it has
    /// ended, or it has nothing left to listen on. Such a server goes on with what still works, but does not recover: stop
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

    /// Something of the server has failed that it does not recover from.
    pub(crate) fn failed(&self, what: impl fmt::Display) {
        log::error!("{what}");
        self.set(Fate::Failed(what.to_string()));
    }

    /// What comes first counts: the rest may follow from it.
    fn set(&self, new: Fate) {
        let mut fate = lock(&self.0.fate);
        if matches!(*fate, Fate::Running) {
            *fate = new;
            self.0.changed.notify_all();
        }
    }

    /// Runs the body of a thread, and reports when that has ended although `stop` was not set.
    pub(crate) fn watch(&self, name: &str, stop: &AtomicBool, body: impl FnOnce()) {
        // All that the body has is gone afterwards, but for what is behind a lock, which is always whole.
        match catch_unwind(AssertUnwindSafe(body)) {
            Err(panic) => self.failed(format_args!("the thread \"{name}\" panicked: {}", words(&*panic))),
            Ok(()) if !stop.load(Ordering::Relaxed) => {
                self.failed(format_args!(
                    "the thread \"{name}\" ended before its time; the message before this says why"
                ));
            }
            Ok(()) => {}
        }
    }
}

/// What a panic says.
pub(crate) fn words(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("without a word")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_end_counts_and_everybody_hears_of_it() {
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
    fn only_a_thread_that_was_told_to_may_end() {
        let stop = AtomicBool::new(false);
        let end = End::default();
        end.watch("door", &stop, || stop.store(true, Ordering::Relaxed));
        end.stopped();
        assert_eq!(end.wait(), None);
        stop.store(false, Ordering::Relaxed);
        let end = End::default();
        end.watch("door", &stop, || {});
        assert!(end.wait().unwrap().contains("\"door\" ended before its time"));
    }
}
