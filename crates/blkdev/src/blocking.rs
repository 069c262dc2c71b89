//! [`Blocking`]: requests are served by a pool of threads, which may wait as long as they like.

use std::{
    collections::VecDeque,
    fmt, io,
    os::fd::{AsFd, BorrowedFd},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU16, Ordering},
    },
    time::{Duration, Instant},
};

use crate::{
    device::{Completion, Device, Info, Op, Queue, Request},
    error::Error,
    mem::Mapping,
    serve::{Serve, open_one},
    thread::{Role, spawn},
    wake::Wake,
};

/// How long a queue that is dropped waits for requests that are being served.
const DRAIN: Duration = Duration::from_secs(2);

/// A device whose requests are served by threads, a pool for each queue. A request that waits holds up one of these threads, and
/// nothing else. If [`Serve::serve`] panics, its request fails with [`Error::Io`], and the device goes on.
#[derive(Debug)]
pub struct Blocking<S> {
    served: Arc<S>,
    threads: usize,
    open: Arc<AtomicU16>,
}

impl<S: Serve> Blocking<S> {
    /// A device of it. Each of its queues has so many threads (at least one), and thus serves so many requests at a time. As many as
    /// the back end can use at a time are enough: 8 or 16 for one disk or one connection.
    pub fn new(served: S, threads: usize) -> Self {
        Self { served: Arc::new(served), threads: threads.max(1), open: Arc::default() }
    }

    /// What serves the requests.
    pub fn served(&self) -> &S {
        &self.served
    }

    /// As the consumers of devices want it.
    pub fn into_device(self) -> Arc<dyn Device> {
        Arc::new(self)
    }
}

impl<S: Serve> Device for Blocking<S> {
    fn info(&self) -> &Info {
        self.served.info()
    }

    fn capacity(&self) -> u64 {
        self.served.capacity()
    }

    fn pins_memory(&self) -> bool {
        false
    }

    fn register(&self, _: &Arc<Mapping>) -> io::Result<()> {
        Ok(())
    }

    fn open_queue(&self, depth: u16) -> io::Result<Box<dyn Queue>> {
        let wake = Wake::new()?;
        let pool = Arc::new(Pool { state: Mutex::default(), begun: Condvar::new(), ended: Condvar::new(), wake });
        open_one(&self.open, self.info())?;
        // From here on dropping the queue ends the threads.
        let depth = usize::from(depth.clamp(1, self.info().depth_max));
        let queue = BlockingQueue { pool: Arc::clone(&pool), depth, in_flight: 0, open: Arc::clone(&self.open) };
        for n in 0..self.threads.min(depth) {
            let (pool, served) = (Arc::clone(&pool), Arc::clone(&self.served));
            spawn(Role::Worker, format!("{} {n}", self.info().driver), move || pool.run(&*served))?;
        }
        Ok(Box::new(queue))
    }
}

/// What a queue and its threads share.
struct Pool {
    state: Mutex<State>,
    /// There are requests to serve, or no more will come.
    begun: Condvar,
    /// A request has been served, for a queue that is dropped.
    ended: Condvar,
    wake: Wake,
}

#[derive(Default)]
struct State {
    waiting: VecDeque<Request>,
    /// Requests that are being served, by their place. The threads have a loan of the memory.
    serving: Vec<Option<Request>>,
    done: Vec<Completion>,
    armed: bool,
    dead: bool,
    closed: bool,
}

impl Pool {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Serves requests until the queue is closed.
    fn run(&self, served: &impl Serve) {
        let mut state = self.lock();
        loop {
            let Some(request) = state.waiting.pop_front() else {
                if state.closed {
                    return;
                }
                state = self.begun.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let mut op = loan(&request.op);
            let place = state.serving.iter().position(Option::is_none).unwrap_or(state.serving.len());
            if place == state.serving.len() {
                state.serving.push(None);
            }
            state.serving[place] = Some(request);
            drop(state);
            let result = catch_unwind(AssertUnwindSafe(|| served.serve(&mut op))).unwrap_or(Err(Error::Io));
            state = self.lock();
            // `None`: the queue was declared dead meanwhile, and has completed the request.
            if let Some(Request { tag, op: mut original }) = state.serving[place].take() {
                if let (Op::Status { extents, .. }, Op::Status { extents: found, .. }) = (&mut original, &mut op) {
                    *extents = std::mem::take(found);
                }
                state.done.push(Completion { tag, op: original, result });
                self.wake_up(&mut state);
            }
            self.ended.notify_one();
        }
    }

    fn wake_up(&self, state: &mut State) {
        if std::mem::take(&mut state.armed) {
            self.wake.ring();
        }
    }
}

/// The same request on the same memory, which it does not own.
fn loan(op: &Op) -> Op {
    match *op {
        Op::Read { at, ref buf } => Op::Read { at, buf: buf.lend(0, buf.len()) },
        Op::Write { at, ref buf, fua } => Op::Write { at, buf: buf.lend(0, buf.len()), fua },
        Op::Zero { at, len, unmap } => Op::Zero { at, len, unmap },
        Op::Discard { at, len } => Op::Discard { at, len },
        Op::Flush => Op::Flush,
        Op::Status { at, len, .. } => Op::Status { at, len, extents: Vec::new() },
        Op::Prefetch { at, len } => Op::Prefetch { at, len },
    }
}

struct BlockingQueue {
    pool: Arc<Pool>,
    depth: usize,
    /// Requests that were not reaped.
    in_flight: usize,
    open: Arc<AtomicU16>,
}

impl fmt::Debug for BlockingQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BlockingQueue").field("depth", &self.depth).field("in_flight", &self.in_flight).finish()
    }
}

impl Queue for BlockingQueue {
    fn push(&mut self, request: Request) -> Result<(), Request> {
        if self.in_flight == self.depth {
            return Err(request);
        }
        self.in_flight += 1;
        let mut state = self.pool.lock();
        if state.dead {
            state.done.push(request.refuse(Error::Gone));
        } else {
            state.waiting.push_back(request);
            self.pool.begun.notify_one();
        }
        Ok(())
    }

    fn kick(&mut self) {}

    fn reap(&mut self, done: &mut Vec<Completion>) {
        self.pool.wake.clear();
        let before = done.len();
        done.append(&mut self.pool.lock().done);
        self.in_flight -= done.len() - before;
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.pool.wake.as_fd())
    }

    fn arm(&mut self) -> bool {
        let mut state = self.pool.lock();
        state.armed = state.done.is_empty();
        state.armed
    }

    fn give_up(&mut self) {
        let mut state = self.pool.lock();
        let state = &mut *state;
        state.dead = true;
        let waiting = state.waiting.drain(..).map(|request| request.refuse(Error::Gone));
        // A thread still uses their memory.
        let serving = state.serving.iter_mut().filter_map(Option::take).map(Request::lose);
        state.done.extend(waiting.chain(serving));
        self.pool.wake_up(state);
    }

    fn is_dead(&self) -> bool {
        self.pool.lock().dead
    }
}

impl Drop for BlockingQueue {
    fn drop(&mut self) {
        let mut state = self.pool.lock();
        state.closed = true;
        self.pool.begun.notify_all();
        let start = Instant::now();
        // Requests that wait are served as well: their owner has not cancelled them.
        while !state.waiting.is_empty() || state.serving.iter().any(Option::is_some) {
            let Some(left) = DRAIN.checked_sub(start.elapsed()) else { break };
            state = self.pool.ended.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        drop(state);
        // What is still being served keeps its memory for good.
        self.give_up();
        self.pool.lock().done.clear();
        self.open.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::*;
    use crate::{Io, Plan, memory::Memory};

    /// A RAM disk that serves nothing while its gate is shut, and panics when it is told to.
    struct Gated {
        disk: Memory,
        shut: Mutex<bool>,
        opened: Condvar,
        panics: AtomicUsize,
        /// Threads that are at the gate, or were.
        came: AtomicUsize,
    }

    impl Gated {
        fn new() -> Self {
            let (shut, opened) = (Mutex::new(false), Condvar::new());
            Self { disk: Memory::new(64 << 20), shut, opened, panics: AtomicUsize::new(0), came: AtomicUsize::new(0) }
        }

        fn shut(&self, shut: bool) {
            *self.shut.lock().unwrap() = shut;
            self.opened.notify_all();
        }
    }

    impl Serve for Gated {
        fn info(&self) -> &Info {
            self.disk.info()
        }

        fn capacity(&self) -> u64 {
            self.disk.capacity()
        }

        fn serve(&self, op: &mut Op) -> Result<(), Error> {
            self.came.fetch_add(1, Ordering::Relaxed);
            let mut shut = self.shut.lock().unwrap();
            while *shut {
                shut = self.opened.wait(shut).unwrap();
            }
            drop(shut);
            assert!(self.panics.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1)).is_err());
            self.disk.disk.served().serve(op)
        }
    }

    #[test]
    fn conforms() {
        crate::conformance::check(&(Blocking::new(Gated::new(), 3).into_device()));
    }

    #[test]
    fn what_waits_holds_up_nothing_else_and_a_panic_costs_one_request() {
        let device = Arc::new(Blocking::new(Gated::new(), 2));
        let (gate, dynamic): (_, Arc<dyn Device>) = (Arc::clone(&device.served), device);
        let mut channel = Plan { memory: 1 << 20, ..Plan::default() }.open(&dynamic, 1).unwrap().remove(0);
        channel.write_at(3, b"text").unwrap();
        gate.shut(true);
        let buf = channel.alloc(3, 4).unwrap();
        channel.submit(7, Io::Read { at: 3, buf });
        let mut done = Vec::new();
        channel.reap(&mut done);
        assert!(done.is_empty() && channel.in_flight() == 1, "the caller goes on");
        gate.panics.store(1, Ordering::Relaxed);
        gate.shut(false);
        channel.wait(&mut done);
        assert_eq!((done[0].tag, done[0].result), (7, Err(Error::Io)));
        let mut bytes = [0; 4];
        channel.read_at(3, &mut bytes).unwrap();
        assert_eq!(&bytes, b"text");
    }

    #[test]
    fn an_abandoned_queue_keeps_the_memory_that_threads_use() {
        let device = Arc::new(Blocking::new(Gated::new(), 2));
        let (gate, dynamic): (_, Arc<dyn Device>) = (Arc::clone(&device.served), device);
        let mut channel = Plan { memory: 1 << 20, ..Plan::default() }.open(&dynamic, 1).unwrap().remove(0);
        gate.shut(true);
        for tag in 0..5 {
            let buf = channel.alloc(0, 4096).unwrap();
            channel.submit(tag, Io::Read { at: 0, buf });
        }
        // Two are with the threads.
        while gate.came.load(Ordering::Relaxed) < 2 {
            std::thread::yield_now();
        }
        channel.give_up();
        let mut done = Vec::new();
        while done.len() < 5 {
            channel.reap(&mut done);
        }
        assert!(done.iter().all(|done| done.result == Err(Error::Gone)));
        done.clear();
        let lost = channel.memory() - channel.memory_free();
        assert!((4096..=2 * 4096).contains(&lost), "{lost} bytes");
        gate.shut(false);
    }
}
