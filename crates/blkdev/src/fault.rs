//! [`Fault`]: another device, made slow, disorderly, unreliable, mortal and faulty, the same way each time for the same seed.

use std::{
    collections::HashMap,
    io,
    os::fd::{AsFd, BorrowedFd},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::{
    device::{Completion, Device, Info, Op, Queue, Request},
    error::Error,
    mem::Mapping,
};

/// What goes wrong, and how often. Probabilities are from 0 (never) to 1 (always).
///
/// [`Faults::new`] is a device that keeps its word, in the worst way it can: out of order, late, full for no reason. Every
/// conforming consumer gets along with it. The rest are faults, all off until asked for.
#[derive(Clone, Debug)]
pub struct Faults {
    /// Everything that follows is a function of this and of the calls that are made.
    pub seed: u64,
    /// A completion is withheld for up to this many calls of [`Queue::reap`], each for another number of them. So they also
    /// come out of order.
    pub delay_max: u32,
    /// [`Queue::push`] is refused though there is room. Never while nothing is in flight: nobody would ever try again.
    pub full: f64,
    /// [`Queue::arm`] answers `false` though nothing waits.
    pub unready: f64,
    /// A request fails.
    pub errors: Errors,
    /// A write that fails has written some whole blocks of its front all the same.
    pub torn: bool,
    /// A request is never answered, until the queue is given up ([`Queue::give_up`]) or the device dies.
    pub lost: f64,
    /// With this request (counted from 0 over all queues) the device dies: it and all that are in flight, or come later, end
    /// with [`Error::Gone`].
    pub death: Option<u64>,
    /// From this request on (counted as for `death`) the driver is faulty, now and then.
    pub bug: Option<(u64, Bug)>,
}

/// What a faulty driver does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Bug {
    /// A method of a queue panics.
    Panic,
    /// [`Device::capacity`] panics.
    PanicOfDevice,
    /// A request completes with a tag that belongs to no request, or to another one.
    WrongTag,
    /// There is a completion more than there are requests.
    Twice,
}

/// How often each kind of request fails, with an error that fits it.
#[derive(Clone, Copy, Debug, Default)]
#[expect(missing_docs, reason = "the names of the operations")]
pub struct Errors {
    pub read: f64,
    pub write: f64,
    pub zero: f64,
    pub discard: f64,
    pub flush: f64,
    pub status: f64,
    pub prefetch: f64,
}

impl Faults {
    /// Late and out of order, but right.
    pub fn new(seed: u64) -> Self {
        Self {
            seed,
            delay_max: 8,
            full: 0.1,
            unready: 0.1,
            errors: Errors::default(),
            torn: false,
            lost: 0.0,
            death: None,
            bug: None,
        }
    }
}

/// A device with faults. Its queues have a [`Queue::wake_fd`] even when those of the device within have none.
#[derive(Debug)]
pub struct Fault<D> {
    device: D,
    faults: Faults,
    shared: Arc<Shared>,
}

/// What the queues of a device have in common.
#[derive(Debug, Default)]
struct Shared {
    requests: AtomicU64,
    dead: AtomicBool,
    /// One for each queue that was ever opened: all of them learn of the device's death.
    wakes: Mutex<Vec<Arc<EventFd>>>,
}

impl<D: Device> Fault<D> {
    /// Wraps `device`.
    pub fn new(device: D, faults: Faults) -> Self {
        Self { device, faults, shared: Arc::default() }
    }

    /// The device within.
    pub fn device(&self) -> &D {
        &self.device
    }

    /// How many requests have been pushed so far, on all queues: the number of the next one, as [`Faults::death`] counts.
    pub fn requests(&self) -> u64 {
        self.shared.requests.load(Ordering::Relaxed)
    }
}

impl<D: Device> Device for Fault<D> {
    fn info(&self) -> &Info {
        self.device.info()
    }

    fn capacity(&self) -> u64 {
        if let Some((number, Bug::PanicOfDevice)) = self.faults.bug {
            assert!(self.requests() < number, "a bug of the device, on purpose");
        }
        self.device.capacity()
    }

    fn register(&self, mapping: &Arc<Mapping>) -> io::Result<()> {
        self.device.register(mapping)
    }

    fn unregister(&self, mapping: &Arc<Mapping>) {
        self.device.unregister(mapping);
    }

    fn pins_memory(&self) -> bool {
        self.device.pins_memory()
    }

    fn shares_memory(&self) -> bool {
        self.device.shares_memory()
    }

    fn refresh(&self) {
        self.device.refresh();
    }

    fn is_replaced(&self) -> bool {
        self.device.is_replaced()
    }

    fn open_queue(&self, depth: u16) -> io::Result<Box<dyn Queue>> {
        let within = self.device.open_queue(depth)?;
        let wake = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?);
        let mut wakes = self.shared.wakes.lock().unwrap_or_else(PoisonError::into_inner);
        let number = wakes.len() as u64;
        wakes.push(Arc::clone(&wake));
        let info = self.device.info();
        Ok(Box::new(FaultQueue {
            rng: Rng::new(self.faults.seed.wrapping_add(number)),
            faults: self.faults.clone(),
            shared: Arc::clone(&self.shared),
            block: info.block_size as usize,
            depth: usize::from(depth.clamp(1, info.depth_max)),
            within,
            wake,
            inside: HashMap::new(),
            next: 0,
            outside: Vec::new(),
            lost: Vec::new(),
            buffer: Vec::new(),
            dead: false,
        }))
    }
}

#[derive(Debug)]
struct FaultQueue {
    rng: Rng,
    faults: Faults,
    shared: Arc<Shared>,
    block: usize,
    depth: usize,
    within: Box<dyn Queue>,
    wake: Arc<EventFd>,
    /// Requests that the device within has, by the tag that it knows them by.
    inside: HashMap<u64, Inside>,
    next: u64,
    /// Completions that are withheld, each for so many more reaps.
    outside: Vec<(u32, Completion)>,
    /// Requests that nobody will answer.
    lost: Vec<Request>,
    /// Empty; kept for its memory.
    buffer: Vec<Completion>,
    dead: bool,
}

#[derive(Debug)]
struct Inside {
    tag: u64,
    /// The write that has failed, while the device within has a loan of its front.
    torn: Option<Op>,
}

impl FaultQueue {
    fn in_flight(&self) -> usize {
        self.inside.len() + self.outside.len() + self.lost.len()
    }

    fn forward(&mut self, tag: u64, op: Op, torn: Option<Op>) -> Result<(), Request> {
        if let Err(Request { op, .. }) = self.within.push(Request { tag: self.next, op }) {
            return Err(Request { tag, op: torn.unwrap_or(op) });
        }
        self.inside.insert(self.next, Inside { tag, torn });
        self.next += 1;
        Ok(())
    }

    /// Ends a request with an error that fits it, without the device within.
    fn fail(&mut self, tag: u64, mut op: Op) {
        let error = match &mut op {
            // Nobody may rely on what is in the buffer.
            Op::Read { buf, .. } => {
                let mut rubbish = vec![0; buf.len()];
                self.rng.fill(&mut rubbish);
                buf.copy_from(0, &rubbish);
                Error::Io
            }
            Op::Write { .. } | Op::Zero { .. } => *self.rng.pick(&[Error::Io, Error::NoSpace]),
            Op::Flush | Op::Discard { .. } | Op::Status { .. } | Op::Prefetch { .. } => Error::Io,
        };
        self.hold(tag, op, Err(error));
    }

    /// Withholds a completion for a while.
    fn hold(&mut self, tag: u64, op: Op, result: Result<(), Error>) {
        let delay = self.rng.below(u64::from(self.faults.delay_max) + 1) as u32;
        self.outside.push((delay, Completion { tag, op, result }));
    }

    /// Takes from the device within what it has finished.
    fn collect(&mut self) {
        let mut done = std::mem::take(&mut self.buffer);
        self.within.reap(&mut done);
        for Completion { tag, op, result } in done.drain(..) {
            let Inside { tag, torn } = self.inside.remove(&tag).expect("a queue completes only what was pushed to it");
            if self.dead {
                self.outside.push((0, gone(tag, torn.unwrap_or(op))));
            } else if let Some(op) = torn {
                self.hold(tag, op, Err(Error::Io));
            } else {
                self.hold(tag, op, result);
            }
        }
        self.buffer = done;
    }

    fn die(&mut self) {
        if self.dead {
            return;
        }
        self.dead = true;
        self.within.give_up();
        let withheld = std::mem::take(&mut self.outside).into_iter().map(|(_, done)| (done.tag, done.op));
        let lost = std::mem::take(&mut self.lost).into_iter().map(|request| (request.tag, request.op));
        self.outside = withheld.chain(lost).map(|(tag, op)| (0, gone(tag, op))).collect();
        // Its owner may be asleep, or about to be.
        let _ = self.wake.write(1);
    }

    fn device_is_dead(&self) -> bool {
        self.shared.dead.load(Ordering::Acquire)
    }

    /// Whether to be faulty now.
    fn has_bug(&mut self, bug: Bug) -> bool {
        let now = |(number, which)| which == bug && self.shared.requests.load(Ordering::Relaxed) >= number;
        self.faults.bug.is_some_and(now) && self.rng.chance(0.2)
    }

    fn may_panic(&mut self) {
        assert!(!self.has_bug(Bug::Panic), "a bug of the queue, on purpose");
    }
}

/// The device has died with this request, and may use its memory for ever: fill it, or write what its next owner has put
/// there.
fn gone(tag: u64, mut op: Op) -> Completion {
    if let Op::Read { buf, .. } | Op::Write { buf, .. } = &mut op {
        buf.abandon();
    }
    Completion { tag, op, result: Err(Error::Gone) }
}

impl Shared {
    fn die(&self) {
        self.dead.store(true, Ordering::Release);
        for wake in self.wakes.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            let _ = wake.write(1);
        }
    }
}

impl Queue for FaultQueue {
    fn push(&mut self, request: Request) -> Result<(), Request> {
        self.may_panic();
        if self.in_flight() >= self.depth || (self.in_flight() > 0 && self.rng.chance(self.faults.full)) {
            return Err(request);
        }
        if self.faults.death.is_some_and(|death| self.shared.requests.load(Ordering::Relaxed) >= death) {
            self.shared.die();
        }
        if self.device_is_dead() {
            self.die();
        }
        let Request { tag, op } = request;
        let errors = &self.faults.errors;
        let error = match op {
            Op::Read { .. } => errors.read,
            Op::Write { .. } => errors.write,
            Op::Zero { .. } => errors.zero,
            Op::Discard { .. } => errors.discard,
            Op::Flush => errors.flush,
            Op::Status { .. } => errors.status,
            Op::Prefetch { .. } => errors.prefetch,
        };
        if self.dead {
            // The device never heard of it, nor of its memory.
            self.outside.push((0, Completion { tag, op, result: Err(Error::Gone) }));
        } else if self.rng.chance(self.faults.lost) {
            self.lost.push(Request { tag, op });
        } else if self.rng.chance(error) {
            match &op {
                Op::Write { at, buf, fua } if self.faults.torn && buf.len() > self.block => {
                    let blocks = self.rng.range(1, (buf.len() / self.block) as u64) as usize;
                    let front = Op::Write { at: *at, buf: buf.lend(0, blocks * self.block), fua: *fua };
                    self.forward(tag, front, Some(op))?;
                }
                _ => self.fail(tag, op),
            }
        } else {
            self.forward(tag, op, None)?;
        }
        self.shared.requests.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn kick(&mut self) {
        self.may_panic();
        self.within.kick();
    }

    fn reap(&mut self, done: &mut Vec<Completion>) {
        // Nothing to read is as good: then nobody was woken by it.
        let _ = self.wake.read();
        if self.device_is_dead() {
            self.die();
        }
        self.collect();
        self.may_panic();
        if self.has_bug(Bug::Twice) {
            done.push(Completion { tag: self.rng.below(4), op: Op::Flush, result: Ok(()) });
        }
        let mut n = 0;
        while n < self.outside.len() {
            if self.outside[n].0 == 0 {
                let mut completion = self.outside.swap_remove(n).1;
                if self.has_bug(Bug::WrongTag) {
                    completion.tag = *self.rng.pick(&[completion.tag ^ 1, 1 << 40, u64::MAX]);
                }
                done.push(completion);
            } else {
                self.outside[n].0 -= 1;
                n += 1;
            }
        }
    }

    /// The device's own, where it has one; what is withheld then makes [`arm`](Queue::arm) answer `false`.
    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        self.within.wake_fd().or_else(|| Some(self.wake.as_fd()))
    }

    fn arm(&mut self) -> bool {
        self.may_panic();
        if self.dead != self.device_is_dead() || self.rng.chance(self.faults.unready) || !self.within.arm() {
            return false;
        }
        if self.outside.is_empty() {
            return true;
        }
        // What is withheld raises no event of its own: either say so, or raise one.
        self.within.wake_fd().is_none() && self.rng.chance(0.5) && self.wake.write(1).is_ok()
    }

    fn give_up(&mut self) {
        self.may_panic();
        self.die();
    }

    fn is_dead(&self) -> bool {
        self.dead || self.device_is_dead()
    }
}

/// A small generator of pseudo-random numbers (splitmix64): the same seed, the same numbers, on every machine.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// Every seed is as good as any other.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// Any number.
    #[expect(clippy::should_implement_trait, reason = "it never ends")]
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `end`.
    ///
    /// # Panics
    /// When `end` is 0.
    pub fn below(&mut self, end: u64) -> u64 {
        assert!(end > 0, "there is no number below 0");
        ((u128::from(self.next()) * u128::from(end)) >> 64) as u64
    }

    /// A number from `start` to `end`, without `end`.
    ///
    /// # Panics
    /// When there is none.
    pub fn range(&mut self, start: u64, end: u64) -> u64 {
        start + self.below(end - start)
    }

    /// `true` with this probability.
    pub fn chance(&mut self, probability: f64) -> bool {
        // Not even a number is drawn for what never happens, so that a fault that is off changes nothing else.
        probability > 0.0 && ((self.next() >> 11) as f64) < probability * (1u64 << 53) as f64
    }

    /// One of them.
    ///
    /// # Panics
    /// When there is none.
    pub fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len() as u64) as usize]
    }

    /// Fills `bytes` with noise.
    pub fn fill(&mut self, bytes: &mut [u8]) {
        for part in bytes.chunks_mut(8) {
            part.copy_from_slice(&self.next().to_le_bytes()[..part.len()]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Arena, memory::Memory};

    fn arena() -> Arena {
        Mapping::new(1 << 20).unwrap().arenas(1).remove(0)
    }

    type Order = Vec<(u64, Result<(), Error>)>;

    /// Pushes `count` writes of 4 KiB, each in its place, and reaps until nothing more comes. All memory is back, but for
    /// what a device that died was using.
    fn writes(faults: &Faults, count: u64) -> (Fault<Memory>, Order) {
        let device = Fault::new(Memory::new(1 << 20), faults.clone());
        let mut arena = arena();
        let mut queue = device.open_queue(1024).unwrap();
        let mut done = Vec::new();
        for tag in 0..count {
            let mut buf = arena.alloc(4096).unwrap();
            buf.copy_from(0, &[tag as u8 + 1; 4096]);
            let mut request = Request { tag, op: Op::Write { at: tag * 4096, buf, fua: false } };
            while let Err(back) = queue.push(request) {
                request = back;
            }
        }
        for _ in 0..100 {
            queue.reap(&mut done);
        }
        let order = done.iter().map(|done| (done.tag, done.result)).collect();
        drop(done);
        let used = faults.death.unwrap_or(0) as usize * 4096;
        assert_eq!(arena.capacity() - arena.free(), used);
        (device, order)
    }

    #[test]
    fn disorderly_but_complete_and_the_same_each_time() {
        let (device, order) = writes(&Faults::new(7), 64);
        let mut sorted = order.clone();
        sorted.sort_by_key(|done| done.0);
        assert_eq!(sorted, (0..64).map(|tag| (tag, Ok(()))).collect::<Vec<_>>());
        assert_ne!(sorted, order);
        assert_eq!(order, writes(&Faults::new(7), 64).1);
        assert_ne!(order, writes(&Faults::new(8), 64).1);
        let mut byte = [0];
        device.device().read(63 * 4096, &mut byte);
        assert_eq!((byte, device.requests()), ([64], 64));
    }

    #[test]
    fn a_write_that_fails_changes_nothing_or_only_its_front() {
        let errors = Errors { write: 1.0, ..Errors::default() };
        for torn in [false, true] {
            let (device, order) = writes(&Faults { errors, torn, ..Faults::new(1) }, 1);
            assert!(matches!(order[..], [(0, Err(Error::Io | Error::NoSpace))]));
            let mut bytes = [0; 4096];
            device.device().read(0, &mut bytes);
            assert_eq!(bytes.contains(&1), torn);
            assert!(bytes.is_sorted_by(|a, b| a >= b) && bytes[4095] == 0);
        }
    }

    #[test]
    fn death_takes_what_is_in_flight_and_what_comes_later() {
        let (_, order) = writes(&Faults { delay_max: 0, death: Some(3), ..Faults::new(1) }, 5);
        assert_eq!(order.len(), 5);
        assert!(order.iter().all(|done| done.1 == Err(Error::Gone)));
    }

    #[test]
    fn the_lost_come_back_when_the_queue_is_given_up_without_the_memory_of_reads() {
        let device = Fault::new(Memory::new(1 << 20), Faults { lost: 1.0, full: 0.0, ..Faults::new(1) });
        let (mut arena, mut done) = (arena(), Vec::new());
        let mut queue = device.open_queue(8).unwrap();
        queue.push(Request { tag: 1, op: Op::Read { at: 0, buf: arena.alloc(4096).unwrap() } }).unwrap();
        for _ in 0..100 {
            queue.reap(&mut done);
        }
        assert!(done.is_empty());
        queue.give_up();
        queue.reap(&mut done);
        assert!(matches!(done[..], [Completion { tag: 1, result: Err(Error::Gone), .. }]));
        drop(done);
        assert_eq!(arena.capacity() - arena.free(), 4096);
    }

    #[test]
    fn a_second_queue_hears_of_the_death() {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        let device = Fault::new(Memory::new(1 << 20), Faults { death: Some(0), unready: 0.0, ..Faults::new(1) });
        let (mut one, mut two) = (device.open_queue(8).unwrap(), device.open_queue(8).unwrap());
        assert!(two.arm());
        one.push(Request { tag: 1, op: Op::Prefetch { at: 0, len: 4096 } }).unwrap();
        let mut fds = [PollFd::new(two.wake_fd().unwrap(), PollFlags::POLLIN)];
        assert_eq!(poll(&mut fds, PollTimeout::ZERO).unwrap(), 1);
        assert!(!two.arm(), "reap first");
    }
}
