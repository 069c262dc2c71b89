//! [`Inline`]: requests are served in `push`.

use std::{
    io,
    os::fd::BorrowedFd,
    sync::{
        Arc,
        atomic::{AtomicU16, Ordering},
    },
};

use crate::{
    device::{Completion, Device, Info, Queue, Request},
    error::Error,
    mem::Mapping,
    serve::{Serve, open_one},
};

/// A device that has served a request when [`Queue::push`] returns.
///
/// The thread that pushes does the work, and serves its other clients only after that: a request should take microseconds. The
/// queues need no wake-up and have no [`Queue::wake_fd`].
#[derive(Debug)]
pub struct Inline<S> {
    shared: Arc<Shared<S>>,
}

#[derive(Debug)]
struct Shared<S> {
    served: S,
    open: AtomicU16,
}

impl<S: Serve> Inline<S> {
    /// A device of it.
    pub fn new(served: S) -> Self {
        Self { shared: Arc::new(Shared { served, open: 0.into() }) }
    }

    /// What serves the requests.
    pub fn served(&self) -> &S {
        &self.shared.served
    }

    /// The same, to be changed. `None`: a queue is open.
    pub fn served_mut(&mut self) -> Option<&mut S> {
        Some(&mut Arc::get_mut(&mut self.shared)?.served)
    }

    /// As the consumers of devices want it.
    pub fn into_device(self) -> Arc<dyn Device> {
        Arc::new(self)
    }
}

impl<S: Serve> Device for Inline<S> {
    fn info(&self) -> &Info {
        self.shared.served.info()
    }

    fn capacity(&self) -> u64 {
        self.shared.served.capacity()
    }

    fn pins_memory(&self) -> bool {
        false
    }

    fn register(&self, _: &Arc<Mapping>) -> io::Result<()> {
        Ok(())
    }

    fn open_queue(&self, depth: u16) -> io::Result<Box<dyn Queue>> {
        open_one(&self.shared.open, self.info())?;
        let depth = usize::from(depth.clamp(1, self.info().depth_max));
        let shared = Arc::clone(&self.shared);
        Ok(Box::new(InlineQueue { shared, depth, done: Vec::with_capacity(depth), given_up: false }))
    }
}

#[derive(Debug)]
struct InlineQueue<S: Serve> {
    shared: Arc<Shared<S>>,
    depth: usize,
    done: Vec<Completion>,
    given_up: bool,
}

impl<S: Serve> Queue for InlineQueue<S> {
    fn push(&mut self, mut request: Request) -> Result<(), Request> {
        if self.done.len() == self.depth {
            return Err(request);
        }
        let result = if self.given_up { Err(Error::Gone) } else { self.shared.served.serve(&mut request.op) };
        self.done.push(Completion { tag: request.tag, op: request.op, result });
        Ok(())
    }

    fn kick(&mut self) {}

    fn reap(&mut self, done: &mut Vec<Completion>) {
        done.append(&mut self.done);
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// With nothing to reap nothing is in flight either, so no wake-up is missed.
    fn arm(&mut self) -> bool {
        self.done.is_empty()
    }

    fn give_up(&mut self) {
        self.given_up = true;
    }

    fn is_dead(&self) -> bool {
        self.given_up
    }
}

impl<S: Serve> Drop for InlineQueue<S> {
    fn drop(&mut self) {
        self.shared.open.fetch_sub(1, Ordering::Relaxed);
    }
}
