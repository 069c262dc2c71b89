//! One queue of libblkio. Its calls take plain pointers and remember them; here is who keeps the memory alive meanwhile.
//!
//! - **Payload.** A request moves into `slots` before libblkio hears of it, and leaves only when libblkio has completed it, or
//!   never: a queue that cannot be drained is forgotten together with its requests and its [`Home`].
//! - **Rings.** A `Blkioq` of a virtio driver points into memory of its `Blkio` without saying so in its type. Each queue holds
//!   the `Home` with both, and is dropped before it.
#![allow(unsafe_code)]

use std::{
    fmt,
    mem::{self, MaybeUninit},
    os::fd::{BorrowedFd, RawFd},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use blkdev::{Buf, Completion, Error, Mapping, Op, Queue, Request};
use blkio::{Blkio, Blkioq, Errno, ReqFlags};

use crate::lock;

/// What a device and its queues share. Dropped in this order: queues, then the device, then the memory it works on.
pub(crate) struct Home {
    pub(crate) queues: Mutex<Vec<Blkioq>>,
    pub(crate) blkio: Mutex<Blkio>,
    pub(crate) mappings: Mutex<Vec<Arc<Mapping>>>,
    lost: AtomicBool,
}

impl Home {
    pub(crate) fn new(blkio: Blkio, queues: Vec<Blkioq>) -> Self {
        Self {
            queues: Mutex::new(queues),
            blkio: Mutex::new(blkio),
            mappings: Mutex::default(),
            lost: AtomicBool::new(false),
        }
    }

    /// Whether a queue was abandoned with requests in flight: nothing of this is ever dropped then.
    pub(crate) fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Acquire)
    }
}

impl fmt::Debug for Home {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Home").field("idle_queues", &lock(&self.queues).len()).finish_non_exhaustive()
    }
}

/// How long a queue that is dropped waits for what is in flight.
const DRAIN: Duration = Duration::from_secs(5);

/// Completions that are taken at a time.
const BATCH: usize = 32;

pub(crate) struct LibblkioQueue {
    /// `None` after the queue was given up and forgotten.
    queue: Option<Blkioq>,
    home: Arc<Home>,
    /// `None`: a poll queue.
    fd: Option<RawFd>,
    /// Requests in flight; libblkio knows them by their index.
    slots: Box<[Option<Request>]>,
    free: Vec<usize>,
    ready: Vec<Completion>,
    /// The kernel took not all requests: try again.
    again: bool,
}

impl fmt::Debug for LibblkioQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LibblkioQueue").field("in_flight", &self.in_flight()).finish_non_exhaustive()
    }
}

impl LibblkioQueue {
    pub(crate) fn new(home: &Arc<Home>, queue: Blkioq, depth: u16) -> Self {
        let depth = usize::from(depth);
        Self {
            fd: queue.get_completion_fd(),
            queue: Some(queue),
            home: Arc::clone(home),
            slots: (0..depth).map(|_| None).collect(),
            free: (0..depth).rev().collect(),
            ready: Vec::with_capacity(depth),
            again: false,
        }
    }

    fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Submits what waits, and takes what has finished; with `timeout` it waits for something to finish.
    fn turn(&mut self, mut timeout: Option<Duration>) {
        loop {
            let Some(queue) = &mut self.queue else { return };
            let mut batch = [const { MaybeUninit::<blkio::Completion>::uninit() }; BATCH];
            let min = usize::from(timeout.is_some());
            let outcome = catch_unwind(AssertUnwindSafe(|| queue.do_io(&mut batch, min, timeout.as_mut(), None)));
            let count = match outcome {
                Ok(Ok(count)) => count,
                // Nothing is lost: what was not submitted still waits in libblkio.
                Ok(Err(error)) if [Errno::TIME, Errno::INTR, Errno::AGAIN, Errno::BUSY].contains(&error.errno()) => {
                    self.again = error.errno() != Errno::TIME;
                    return;
                }
                Ok(Err(_)) | Err(_) => return self.give_up(),
            };
            self.again = false;
            for done in &batch[..count] {
                // SAFETY: do_io has filled the first `count`, and libblkio's Completion needs no drop.
                let done = unsafe { done.assume_init_ref() };
                let request = self.slots.get_mut(done.user_data).and_then(Option::take);
                // A peer's nonsense is dropped by libblkio itself; this would be libblkio's own.
                let Request { tag, op } = request.expect("libblkio completes each request once");
                self.free.push(done.user_data);
                let result = if done.ret == 0 { Ok(()) } else { Err(Error::from_errno(-done.ret)) };
                self.ready.push(Completion { tag, op, result });
            }
            if count < BATCH {
                return;
            }
            timeout = None;
        }
    }
}

impl Queue for LibblkioQueue {
    fn push(&mut self, request: Request) -> Result<(), Request> {
        let Some(queue) = &mut self.queue else {
            let Request { tag, op } = request;
            self.ready.push(Completion { tag, op, result: Err(Error::Gone) });
            return Ok(());
        };
        // Never more than the ring has room for: what waits inside libblkio may wait for ever.
        let Some(slot) = self.free.pop() else { return Err(request) };
        let none = ReqFlags::empty();
        // The pointers stay good while the request is in its slot: see the top of this file.
        match &self.slots[slot].insert(request).op {
            Op::Read { at, buf } => queue.read(*at, buf.as_ptr(), buf.len(), slot, none),
            Op::Write { at, buf, fua } => {
                let flags = if *fua { ReqFlags::FUA } else { none };
                queue.write(*at, buf.as_ptr(), buf.len(), slot, flags);
            }
            Op::Zero { at, len, unmap } => {
                queue.write_zeroes(*at, *len, slot, if *unmap { none } else { ReqFlags::NO_UNMAP });
            }
            Op::Discard { at, len } => queue.discard(*at, *len, slot, none),
            Op::Flush => queue.flush(slot, none),
            Op::Status { .. } | Op::Prefetch { .. } => {
                self.free.push(slot);
                let Request { tag, op } = self.slots[slot].take().expect("it was put there just now");
                self.ready.push(Completion { tag, op, result: Err(Error::NotSupported) });
            }
        }
        Ok(())
    }

    fn kick(&mut self) {
        // Whatever has finished meanwhile comes along, and waits for `reap`.
        self.turn(None);
    }

    fn reap(&mut self, done: &mut Vec<Completion>) {
        self.turn(None);
        done.append(&mut self.ready);
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        // SAFETY: the descriptor is the Blkioq's or its transport's, and both live in `self` or, when given up, for ever.
        self.fd.map(|fd| unsafe { BorrowedFd::borrow_raw(fd) })
    }

    fn arm(&mut self) -> bool {
        if !self.ready.is_empty() || self.again {
            return false;
        }
        let (Some(queue), Some(fd)) = (&mut self.queue, self.fd) else { return self.in_flight() == 0 };
        let mut count = [0u8; 8];
        // SAFETY: an eventfd's 8 bytes go to 8 bytes. Before looking for completions, so that no later event is eaten.
        unsafe { libc::read(fd, count.as_mut_ptr().cast(), count.len()) };
        // On virtio this asks the device for an event; on io_uring it does nothing, and events always come.
        queue.set_completion_fd_enabled(true);
        self.turn(None);
        if self.ready.is_empty() && !self.again {
            return true;
        }
        if let Some(queue) = &mut self.queue {
            queue.set_completion_fd_enabled(false);
        }
        false
    }

    fn give_up(&mut self) {
        let Some(queue) = self.queue.take() else { return };
        if self.in_flight() > 0 {
            // libblkio cannot stop its device: the rings, and all memory that it knows, must stay for ever.
            self.home.lost.store(true, Ordering::Release);
            mem::forget(queue);
            mem::forget(Arc::clone(&self.home));
        }
        for (n, slot) in self.slots.iter_mut().enumerate() {
            let Some(Request { tag, mut op }) = slot.take() else { continue };
            // Of a write too: what the device still reads would otherwise be the next owner's data.
            if let Op::Read { buf, .. } | Op::Write { buf, .. } = &mut op {
                Buf::abandon(buf);
            }
            self.free.push(n);
            self.ready.push(Completion { tag, op, result: Err(Error::Gone) });
        }
    }

    fn is_dead(&self) -> bool {
        self.queue.is_none()
    }
}

impl Drop for LibblkioQueue {
    fn drop(&mut self) {
        let start = Instant::now();
        while self.in_flight() > 0 && start.elapsed() < DRAIN && self.queue.is_some() {
            self.turn(Some(Duration::from_millis(100)));
        }
        if self.in_flight() > 0 {
            return self.give_up();
        }
        if let Some(mut queue) = self.queue.take() {
            queue.set_completion_fd_enabled(false);
            lock(&self.home.queues).push(queue);
        }
    }
}
