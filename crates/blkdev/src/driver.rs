//! [`Driver`]: a queue of a device, whose code may be wrong. If it panics, or completes a request that it does not have, its
//! device is dead, and nothing else is harmed.

use std::{
    fmt, io,
    os::fd::BorrowedFd,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use crate::{
    arena::Buf,
    device::{Completion, Device, Info, Queue, Request},
    mem::Mapping,
    registration::Registration,
};

/// A device, and memory that it knows until the last channel that uses it is closed.
#[derive(Debug)]
pub(crate) struct Registered {
    device: Arc<dyn Device>,
    /// Present until drop.
    registration: Mutex<Option<Registration>>,
    /// The driver is faulty. Each channel finds out at its next `reap`.
    failed: AtomicBool,
}

impl Registered {
    /// Registers memory with a device.
    ///
    /// # Errors
    /// What the device returned, or that the driver panicked.
    pub(crate) fn new(device: &Arc<dyn Device>, mapping: &Arc<Mapping>) -> io::Result<Arc<Self>> {
        let registration = Mutex::new(Some(catch(|| Registration::new(device, mapping))??));
        Ok(Arc::new(Self { device: Arc::clone(device), registration, failed: AtomicBool::new(false) }))
    }

    pub(crate) fn device(&self) -> &Arc<dyn Device> {
        &self.device
    }

    fn follow(&self, mapping: &Arc<Mapping>) {
        if let Some(registration) = &mut *self.registration.lock().unwrap_or_else(PoisonError::into_inner) {
            registration.follow(mapping);
        }
    }

    /// Declares the driver faulty. The log gets the reason, once.
    #[cold]
    pub(crate) fn fail(&self, reason: fmt::Arguments<'_>) {
        if !self.failed.swap(true, Ordering::Relaxed) {
            let Info { driver, target, .. } = self.device.info();
            log::error!("{driver} {target}: {reason}; from now on all its requests fail");
        }
    }

    /// Calls the driver. `None`: it panicked.
    #[inline(always)]
    fn call<T>(&self, call: impl FnOnce() -> T) -> Option<T> {
        catch_unwind(AssertUnwindSafe(call)).map_err(|_| self.panicked()).ok()
    }

    #[cold]
    fn panicked(&self) {
        // The panic hook has printed the rest.
        self.fail(format_args!("the driver panicked"));
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        let registration = self.registration.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        self.call(|| drop(registration));
    }
}

/// Calls a driver that is not in use yet.
///
/// # Errors
/// It panicked.
pub(crate) fn catch<T>(call: impl FnOnce() -> T) -> io::Result<T> {
    catch_unwind(AssertUnwindSafe(call)).map_err(|_| io::Error::other("the driver panicked"))
}

/// A queue, and the device that it belongs to.
#[derive(Debug)]
pub(crate) struct Driver {
    queue: Box<dyn Queue>,
    /// A queue that failed. Dropped with the channel, since that may take its time.
    broken: Option<Box<dyn Queue>>,
    /// An empty buffer of the channel's memory, to [exhaust](Buf::exhaust) it.
    memory: Buf,
    /// Dropped after the queue.
    registered: Arc<Registered>,
}

impl Driver {
    /// Opens a queue.
    ///
    /// # Errors
    /// What the device returned, or that the driver panicked.
    pub(crate) fn open(registered: &Arc<Registered>, depth: u16, memory: Buf) -> io::Result<Self> {
        let queue = catch(|| registered.device.open_queue(depth))??;
        Ok(Self { queue, broken: None, memory, registered: Arc::clone(registered) })
    }

    /// Whether the driver is faulty, and this is not dealt with yet: see [`retire`](Self::retire).
    #[inline]
    pub(crate) fn has_failed(&self) -> bool {
        self.registered.failed.load(Ordering::Relaxed) && self.broken.is_none()
    }

    /// Uses the queue no more. What it has is never completed. Its memory stays with it.
    #[cold]
    pub(crate) fn retire(&mut self) {
        let mut queue = std::mem::replace(&mut self.queue, Box::new(Dead));
        self.registered.call(|| queue.give_up());
        self.broken = Some(queue);
    }

    /// Whether [`retire`](Self::retire) was called.
    #[inline]
    pub(crate) fn is_retired(&self) -> bool {
        self.broken.is_some()
    }

    /// See [`Registered::fail`].
    #[cold]
    pub(crate) fn fail(&self, reason: fmt::Arguments<'_>) {
        self.registered.fail(reason);
    }

    /// `None`: the driver is faulty.
    #[inline]
    pub(crate) fn capacity(&self) -> Option<u64> {
        if self.is_retired() {
            return None;
        }
        self.registered.call(|| self.registered.device.capacity())
    }

    pub(crate) fn pins_memory(&self) -> bool {
        self.is_retired() || self.registered.call(|| self.registered.device.pins_memory()).unwrap_or(true)
    }

    /// As [`Queue::push`]. A request whose push panics is never completed.
    #[inline]
    pub(crate) fn push(&mut self, request: Request) -> Result<(), Request> {
        self.call(|queue| queue.push(request)).unwrap_or(Ok(()))
    }

    /// Calls the queue. `None`: it panicked. Then it may have dropped buffers that the device still uses, so none is handed out
    /// any more.
    #[inline(always)]
    fn call<T>(&mut self, call: impl FnOnce(&mut dyn Queue) -> T) -> Option<T> {
        let result = self.registered.call(|| call(&mut *self.queue));
        if result.is_none() {
            self.memory.exhaust();
        }
        result
    }

    #[inline]
    pub(crate) fn kick(&mut self) {
        self.call(|queue| queue.kick());
    }

    #[inline]
    pub(crate) fn reap(&mut self, done: &mut Vec<Completion>) {
        self.call(|queue| queue.reap(done));
    }

    pub(crate) fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        self.registered.call(|| self.queue.wake_fd()).flatten()
    }

    pub(crate) fn arm(&mut self) -> bool {
        self.call(|queue| queue.arm()).unwrap_or(false) && !self.has_failed()
    }

    /// As [`Queue::recover`].
    #[cold]
    pub(crate) fn recover(&mut self) -> bool {
        self.call(|queue| queue.recover()).unwrap_or(false)
    }

    /// As [`Queue::relieve`].
    #[cold]
    pub(crate) fn relieve(&mut self) -> bool {
        self.call(|queue| queue.relieve()).unwrap_or(false)
    }

    /// As [`Queue::relieves`].
    pub(crate) fn relieves(&self) -> bool {
        self.registered.call(|| self.queue.relieves()).unwrap_or(false)
    }

    /// The channel's memory is another one now, which takes the place of that before.
    #[cold]
    pub(crate) fn follow(&mut self, mapping: &Arc<Mapping>, memory: Buf) {
        self.memory = memory;
        self.registered.follow(mapping);
    }

    /// As [`Queue::describe`].
    #[cold]
    pub(crate) fn describe(&self) -> String {
        self.registered.call(|| self.queue.describe()).unwrap_or_default()
    }

    /// As [`Queue::losses`].
    pub(crate) fn losses(&self) -> u32 {
        self.registered.call(|| self.queue.losses()).unwrap_or(0)
    }

    pub(crate) fn give_up(&mut self) {
        self.call(|queue| queue.give_up());
    }

    #[inline]
    pub(crate) fn is_dead(&self) -> bool {
        self.registered.call(|| self.queue.is_dead()).unwrap_or(true)
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        let queue = std::mem::replace(&mut self.queue, Box::new(Dead));
        let broken = self.broken.take();
        self.registered.call(|| drop(queue));
        self.registered.call(|| drop(broken));
    }
}

/// Stands for a queue that is used no more.
#[derive(Debug)]
struct Dead;

impl Queue for Dead {
    fn push(&mut self, request: Request) -> Result<(), Request> {
        Err(request)
    }

    fn kick(&mut self) {}

    fn reap(&mut self, _: &mut Vec<Completion>) {}

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn arm(&mut self) -> bool {
        true
    }

    fn give_up(&mut self) {}

    fn is_dead(&self) -> bool {
        true
    }
}
