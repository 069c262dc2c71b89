//! One queue of libblkio. Its calls take raw pointers and keep them. These rules keep the memory alive meanwhile:
//!
//! - **Payload.** A request moves into `slots` before libblkio sees it, and leaves only after libblkio has completed it. If a
//!   queue cannot be drained, it is leaked together with its requests and its [`Home`].
//! - **Rings.** A `Blkioq` of a virtio driver points into memory of its `Blkio`, which its type does not express. Each queue
//!   holds the `Home` with both, and is dropped before it.
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

use blkdev::{Completion, Error, Mapping, Op, Queue, Request};
use blkio::{Blkio, Blkioq, Errno, ReqFlags};

use crate::lock;

/// The state that a device and its queues share. Drop order: queues, then the device, then the memory that it uses.
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

    /// Whether a queue was abandoned with requests in flight. Then nothing of this is ever dropped.
    pub(crate) fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Acquire)
    }
}

impl fmt::Debug for Home {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Home").field("idle_queues", &lock(&self.queues).len()).finish_non_exhaustive()
    }
}

/// Longest wait of a dropped queue for the requests in flight.
const DRAIN: Duration = Duration::from_secs(5);

/// Most completions in one call.
const BATCH: usize = 32;

pub(crate) struct LibblkioQueue {
    /// `None` after the queue was abandoned and leaked.
    queue: Option<Blkioq>,
    home: Arc<Home>,
    /// `None`: a poll queue.
    fd: Option<RawFd>,
    /// Requests in flight; their index identifies them to libblkio.
    slots: Box<[Option<Request>]>,
    free: Vec<usize>,
    ready: Vec<Completion>,
    /// The kernel did not take all requests: submit again.
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

    /// Submits pending requests, and takes completions. With a `timeout` it waits for one.
    fn turn(&mut self, mut timeout: Option<Duration>) {
        loop {
            let Some(queue) = &mut self.queue else { return };
            let mut batch = [const { MaybeUninit::<blkio::Completion>::uninit() }; BATCH];
            let min = usize::from(timeout.is_some());
            let outcome = catch_unwind(AssertUnwindSafe(|| queue.do_io(&mut batch, min, timeout.as_mut(), None)));
            let count = match outcome {
                Ok(Ok(count)) => count,
                // No request is lost: unsubmitted requests are still queued in libblkio.
                Ok(Err(error)) if [Errno::TIME, Errno::INTR, Errno::AGAIN, Errno::BUSY].contains(&error.errno()) => {
                    self.again = error.errno() != Errno::TIME;
                    return;
                }
                Ok(Err(_)) | Err(_) => return self.give_up(),
            };
            self.again = false;
            for done in &batch[..count] {
                // SAFETY: do_io has initialised the first `count`, and libblkio's Completion needs no drop.
                let done = unsafe { done.assume_init_ref() };
                let request = self.slots.get_mut(done.user_data).and_then(Option::take);
                // libblkio itself drops invalid completions of a peer; this would be an error of libblkio.
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
            self.ready.push(request.refuse(Error::Gone));
            return Ok(());
        };
        // Never more than fit in the ring: requests that wait inside libblkio may wait forever.
        let Some(slot) = self.free.pop() else { return Err(request) };
        let none = ReqFlags::empty();
        // The pointers stay valid while the request is in its slot: see the module documentation.
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
                let request = self.slots[slot].take().expect("the request was stored above");
                self.ready.push(request.refuse(Error::NotSupported));
            }
        }
        Ok(())
    }

    fn kick(&mut self) {
        // It also takes completions, and keeps them for `reap`.
        self.turn(None);
    }

    fn reap(&mut self, done: &mut Vec<Completion>) {
        self.turn(None);
        done.append(&mut self.ready);
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        // SAFETY: the descriptor belongs to the Blkioq or its transport, and both live in `self` or, once abandoned, forever.
        self.fd.map(|fd| unsafe { BorrowedFd::borrow_raw(fd) })
    }

    fn arm(&mut self) -> bool {
        if !self.ready.is_empty() || self.again {
            return false;
        }
        let (Some(queue), Some(fd)) = (&mut self.queue, self.fd) else { return self.in_flight() == 0 };
        let mut count = [0u8; 8];
        // SAFETY: an eventfd's 8 bytes are read into 8 bytes. Done before the look for completions, so that no later event is
        // lost.
        unsafe { libc::read(fd, count.as_mut_ptr().cast(), count.len()) };
        // On virtio this requests an event from the device. On io_uring it has no effect: events always come.
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
            // libblkio cannot stop its device: the rings, and all memory that it has registered, must stay forever.
            self.home.lost.store(true, Ordering::Release);
            mem::forget(queue);
            mem::forget(Arc::clone(&self.home));
        }
        for (n, slot) in self.slots.iter_mut().enumerate() {
            let Some(request) = slot.take() else { continue };
            self.free.push(n);
            self.ready.push(request.lose());
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
