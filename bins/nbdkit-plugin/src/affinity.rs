//! [`Affinity`]: keeps the threads of a busy connection on one CPU.
//!
//! nbdkit's threads take turns under two locks of a connection: one to read a request from the socket, one to write a reply. On
//! several CPUs, each of those turns, and each end of a request, wakes a thread on another CPU, which costs more than the
//! request. So while a connection is busy, all its threads stay on one CPU. The kernel chooses it, again and again: for a moment
//! the threads run on any CPU, and then they stay where they are.

use std::{
    cell::Cell,
    sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering::Relaxed},
    time::Instant,
};

use nix::{
    sched::{CpuSet, sched_getaffinity, sched_getcpu, sched_setaffinity},
    unistd::Pid,
};

/// Requests between two measurements of the load.
const SAMPLE: u32 = 64;
/// A connection is busy with so many requests per second in any case …
const BUSY: u64 = 30_000;
/// … or with so many, if this many are in flight at a time. Few and long requests are faster on several CPUs.
const BUSY_TOGETHER: u64 = 8_000;
const TOGETHER: u32 = 4;
/// Time after which the threads of a busy connection run on any CPU again for a moment, in microseconds.
const STAY: u64 = 250_000;
/// Not bound to any CPU.
const ANYWHERE: usize = usize::MAX;

/// For sched(7): the calling thread.
const MYSELF: Pid = Pid::from_raw(0);

thread_local! {
    /// The CPU that this thread is bound to.
    static KEPT: Cell<usize> = const { Cell::new(ANYWHERE) };
    /// The CPUs on which it may run when it is not bound.
    static FREE: Cell<Option<CpuSet>> = const { Cell::new(None) };
}

/// The state of one connection.
#[derive(Debug)]
pub(crate) struct Affinity {
    opened: Instant,
    cpu: AtomicUsize,
    requests: AtomicU32,
    /// Requests in flight, and their sum over the requests since the last measurement.
    inside: AtomicU32,
    crowd: AtomicU32,
    /// Microseconds from `opened` to the last measurement, and to the last choice of a CPU.
    looked: AtomicU64,
    chosen: AtomicU64,
}

impl Affinity {
    pub(crate) fn new() -> Self {
        Self {
            opened: Instant::now(),
            cpu: AtomicUsize::new(ANYWHERE),
            requests: AtomicU32::new(0),
            inside: AtomicU32::new(0),
            crowd: AtomicU32::new(0),
            looked: AtomicU64::new(0),
            chosen: AtomicU64::new(0),
        }
    }

    /// Begins a request, which ends when the returned value is dropped.
    pub(crate) fn enter(&self) -> impl Drop + use<'_> {
        let inside = self.inside.fetch_add(1, Relaxed) + 1;
        self.crowd.fetch_add(inside, Relaxed);
        if self.requests.fetch_add(1, Relaxed) % SAMPLE == SAMPLE - 1 {
            self.look();
        }
        keep_to(self.cpu.load(Relaxed));
        Inside(self)
    }

    fn look(&self) {
        let now = self.opened.elapsed().as_micros() as u64;
        let took = now - self.looked.swap(now, Relaxed).min(now);
        let together = self.crowd.swap(0, Relaxed) / SAMPLE;
        let is_free = self.cpu.load(Relaxed) == ANYWHERE;
        // Half the load that makes a connection busy keeps it busy.
        let least = if together >= TOGETHER { BUSY_TOGETHER } else { BUSY } / if is_free { 1 } else { 2 };
        let is_busy = u64::from(SAMPLE) * 1_000_000 > took * least;
        if is_free && is_busy {
            if let Ok(cpu) = sched_getcpu() {
                self.chosen.store(now, Relaxed);
                self.cpu.store(cpu, Relaxed);
            }
        } else if !is_busy || now - self.chosen.load(Relaxed).min(now) > STAY {
            self.cpu.store(ANYWHERE, Relaxed);
        }
    }
}

struct Inside<'a>(&'a Affinity);

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        self.0.inside.fetch_sub(1, Relaxed);
    }
}

/// Binds this thread to a CPU, or restores its earlier set. A failure costs only speed.
fn keep_to(cpu: usize) {
    let before = KEPT.replace(cpu);
    if before == cpu {
        return;
    }
    if before == ANYWHERE {
        // Read it each time, because it may have been changed.
        FREE.set(sched_getaffinity(MYSELF).ok());
    }
    let Some(free) = FREE.get() else { return };
    if cpu == ANYWHERE {
        let _ = sched_setaffinity(MYSELF, &free);
    } else if free.is_set(cpu) == Ok(true) {
        let mut only = CpuSet::new();
        let _ = only.set(cpu).and_then(|()| sched_setaffinity(MYSELF, &only));
    }
}

#[cfg(test)]
mod tests {
    use std::{thread, time::Duration};

    use super::*;

    fn allowed() -> Vec<usize> {
        let set = sched_getaffinity(MYSELF).unwrap();
        (0..CpuSet::count()).filter(|&cpu| set.is_set(cpu).unwrap()).collect()
    }

    /// Makes requests, with a pause after each, until the connection is bound to a CPU, or to none.
    fn until(home: &Affinity, at_home: bool, pause: Duration) {
        let start = Instant::now();
        while (home.cpu.load(Relaxed) != ANYWHERE) != at_home {
            assert!(start.elapsed() < Duration::from_secs(60), "{home:?}");
            thread::sleep(pause);
            drop(home.enter());
        }
        // The next request applies the decision of the last one.
        drop(home.enter());
    }

    #[test]
    fn threads_of_a_busy_connection_stay_on_one_cpu_and_are_released() {
        let before = allowed();
        let home = Affinity::new();
        until(&home, true, Duration::ZERO);
        thread::scope(|scope| {
            let other = scope.spawn(|| {
                drop(home.enter());
                KEPT.get()
            });
            assert_eq!(other.join().unwrap(), KEPT.get(), "threads of a connection keep together");
        });
        assert_eq!(allowed(), [KEPT.get()]);
        assert!(before.contains(&KEPT.get()));
        // One request per millisecond is not busy.
        until(&home, false, Duration::from_millis(1));
        assert_eq!((allowed(), KEPT.get()), (before, ANYWHERE));
    }

    #[test]
    fn a_connection_with_requests_now_and_then_runs_free() {
        let home = Affinity::new();
        for _ in 0..4 * SAMPLE {
            thread::sleep(Duration::from_micros(200));
            drop(home.enter());
        }
        assert_eq!((home.cpu.load(Relaxed), KEPT.get()), (ANYWHERE, ANYWHERE));
    }

    #[test]
    fn the_cpu_of_a_busy_connection_is_chosen_again() {
        let home = Affinity::new();
        until(&home, true, Duration::ZERO);
        let chosen = home.chosen.load(Relaxed);
        let start = Instant::now();
        while home.chosen.load(Relaxed) == chosen {
            assert!(start.elapsed() < Duration::from_secs(60), "{home:?}");
            drop(home.enter());
        }
    }
}
