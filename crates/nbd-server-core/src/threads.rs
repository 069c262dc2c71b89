//! What threads share: locks that outlive a panic, and the wait for each other's end.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    thread::{self, JoinHandle},
    time::Duration,
};

/// What was left behind by a panic is whole: all changes are made at their end.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits until a thread has done its work. Not until it is gone: the kernel keeps a thread until the requests are over that it
/// handed to an io_uring, and a file system that hangs does not end them. The end of the process does.
pub(crate) fn await_end(thread: &JoinHandle<()>) {
    let mut pause = Duration::from_micros(10);
    while !thread.is_finished() {
        thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(5));
    }
}
