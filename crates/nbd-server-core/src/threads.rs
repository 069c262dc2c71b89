//! Helpers for threads: locks that survive a panic, and waiting for the end of a thread.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    thread::{self, JoinHandle},
    time::Duration,
};

/// Locks a mutex, even if it is poisoned. The data is consistent after a panic, because every change is one last step.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits until a thread has done its work, but not until the kernel has removed it. The kernel keeps a thread until all requests
/// are over that it submitted to an io_uring. On a hung file system they do not end, until the process does.
pub(crate) fn await_end(thread: &JoinHandle<()>) {
    let mut pause = Duration::from_micros(10);
    while !thread.is_finished() {
        thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(5));
    }
}
