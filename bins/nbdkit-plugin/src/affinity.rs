//! [`Affinity`]: the processor that the threads of a busy connection keep to.
//!
//! nbdkit's threads take turns under two locks that a connection has: one to take a request from the socket, one to put a
//! reply into it. On several processors each of those turns, and each end of a request, is a call from one processor to
//! another, which costs more than the request does. So while a connection is busy all of its threads stay on one. On which
//! is the kernel's choice, made anew all the time: for a moment they run free, and where they are then they stay.

use std::{
    cell::Cell,
    sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering::Relaxed},
    time::Instant,
};

use nix::{
    sched::{CpuSet, sched_getaffinity, sched_getcpu, sched_setaffinity},
    unistd::Pid,
};

/// Requests between two looks at how busy the connection is.
const SAMPLE: u32 = 64;
/// Busy are so many requests a second, whoever makes them …
const BUSY: u64 = 30_000;
/// … or so many, when there are this many at a time. Few and long ones are better off with more processors.
const BUSY_TOGETHER: u64 = 8_000;
const TOGETHER: u32 = 4;
/// Microseconds before a connection that stays busy runs free again.
const STAY: u64 = 250_000;
/// Not kept to any processor.
const ANYWHERE: usize = usize::MAX;

/// To the calls of sched(7): the thread that calls.
const MYSELF: Pid = Pid::from_raw(0);

thread_local! {
    /// What this thread keeps to.
    static KEPT: Cell<usize> = const { Cell::new(ANYWHERE) };
    /// Where it may run when it is free.
    static FREE: Cell<Option<CpuSet>> = const { Cell::new(None) };
}

/// Of one connection.
#[derive(Debug)]
pub(crate) struct Affinity {
    opened: Instant,
    cpu: AtomicUsize,
    requests: AtomicU32,
    /// Under way now, and the sum of that over the requests since the last look.
    inside: AtomicU32,
    crowd: AtomicU32,
    /// Microseconds from `opened` to the last look, and to the last choice of a processor.
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

    /// A request begins, and ends when what this returns is dropped.
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
        // Half of what makes it busy keeps it so.
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

/// Keeps this thread to a processor, or lets it run where it did before. It is for speed only: a failure changes nothing.
fn keep_to(cpu: usize) {
    let before = KEPT.replace(cpu);
    if before == cpu {
        return;
    }
    if before == ANYWHERE {
        // Asked for each time: somebody may have changed it.
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

    /// Makes requests, each after a pause, until the connection is at home somewhere, or nowhere.
    fn until(home: &Affinity, at_home: bool, pause: Duration) {
        let start = Instant::now();
        while (home.cpu.load(Relaxed) != ANYWHERE) != at_home {
            assert!(start.elapsed() < Duration::from_secs(60), "{home:?}");
            thread::sleep(pause);
            drop(home.enter());
        }
        // What was decided by the last one is done by the next.
        drop(home.enter());
    }

    #[test]
    fn threads_of_a_busy_connection_keep_to_one_processor_and_are_let_go() {
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
        // A request each millisecond is not worth it.
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
    fn where_a_busy_connection_is_at_home_is_chosen_anew() {
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
