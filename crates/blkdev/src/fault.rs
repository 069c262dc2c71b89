//! [`Fault`] wraps a device and makes it slow, unordered, unreliable, mortal or faulty, reproducibly for the same seed.

use std::{
    collections::HashMap,
    io,
    os::fd::{AsFd, BorrowedFd},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use crate::{
    device::{Completion, Device, Info, Op, Queue, Request, State},
    error::Error,
    mem::Mapping,
    peer::Peer,
    wake::Wake,
};

/// The faults of a device, and their probabilities, from 0 (never) to 1 (always).
///
/// [`Faults::new`] is a correct device with the worst legal behaviour: out of order, late, full for no reason. Every conforming
/// consumer must work with it. All other fields are faults, and off by default.
#[derive(Clone, Debug)]
pub struct Faults {
    /// All behaviour depends only on this and on the calls.
    pub seed: u64,
    /// A request takes effect at once, or after a random number of [`Queue::reap`] calls, up to this. Then each completion is delayed for a random number of [`Queue::reap`] calls, up to this. So completions also come out of
    /// order.
    pub delay_max: u32,
    /// [`Queue::push`] refuses a request although there is room. Never while nothing is in flight, because no completion would
    /// then cause another try.
    pub full: f64,
    /// [`Queue::arm`] returns `false` although nothing waits.
    pub unready: f64,
    /// A request fails.
    pub errors: Errors,
    /// A write that fails has nevertheless written some whole blocks from its start.
    pub torn: bool,
    /// A request never completes, until the queue is declared dead ([`Queue::give_up`]) or the device dies.
    pub lost: f64,
    /// The device dies with this request (counted from 0 over all queues): this one, all in flight, and all later ones end with
    /// [`Error::Gone`].
    pub death: Option<u64>,
    /// From this request on (counted as for `death`), the driver is sometimes faulty.
    pub bug: Option<(u64, Bug)>,
}

/// A bug of a driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Bug {
    /// A method of a queue panics.
    Panic,
    /// [`Device::capacity`] panics.
    PanicOfDevice,
    /// A completion has the tag of no request, or of another request.
    WrongTag,
    /// A request completes twice.
    Twice,
}

/// The failure probability of each operation. The error fits the operation.
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
    /// Late and out of order, but correct.
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

/// A device with faults. Its queues have a [`Queue::wake_fd`] even if those of the wrapped device have none.
#[derive(Debug)]
pub struct Fault<D> {
    device: D,
    faults: Faults,
    shared: Arc<Shared>,
}

/// The state that the queues of a device share.
#[derive(Debug, Default)]
struct Shared {
    requests: AtomicU64,
    dead: AtomicBool,
    /// One for each queue that was ever opened: the death of the device wakes them all.
    wakes: Mutex<Vec<Arc<Wake>>>,
}

impl<D: Device> Fault<D> {
    /// Wraps `device`.
    pub fn new(device: D, faults: Faults) -> Self {
        Self { device, faults, shared: Arc::default() }
    }

    /// The wrapped device.
    pub fn device(&self) -> &D {
        &self.device
    }

    /// Number of requests pushed so far, on all queues. This is the number of the next one, as [`Faults::death`] counts.
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

    fn reconnects(&self) -> u64 {
        self.device.reconnects()
    }

    fn details(&self) -> Vec<(&'static str, String)> {
        self.device.details()
    }

    fn state(&self) -> State {
        if self.shared.dead.load(Ordering::Acquire) { State::Dead } else { self.device.state() }
    }

    fn peer(&self) -> Option<Arc<Peer>> {
        self.device.peer()
    }

    fn is_replaced(&self) -> bool {
        self.device.is_replaced()
    }

    fn open_queue(&self, depth: u16) -> io::Result<Box<dyn Queue>> {
        let within = self.device.open_queue(depth)?;
        let wake = Arc::new(Wake::new()?);
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
            before: Vec::new(),
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
    wake: Arc<Wake>,
    /// Requests at the wrapped device, by their tags there.
    inside: HashMap<u64, Inside>,
    next: u64,
    /// Requests that the wrapped device does not have yet, each with its remaining number of reaps.
    before: Vec<(u32, Late)>,
    /// Delayed completions, each with its remaining number of reaps.
    outside: Vec<(u32, Completion)>,
    /// Requests that never complete.
    lost: Vec<Request>,
    /// Empty; reused for its memory.
    buffer: Vec<Completion>,
    dead: bool,
}

#[derive(Debug)]
struct Inside {
    tag: u64,
    /// The failed write, while the wrapped device has a loan of its first part.
    torn: Option<Op>,
}

/// A request on its way to the wrapped device.
#[derive(Debug)]
struct Late {
    tag: u64,
    op: Op,
    /// See [`Inside::torn`].
    torn: Option<Op>,
}

impl FaultQueue {
    fn in_flight(&self) -> usize {
        self.before.len() + self.inside.len() + self.outside.len() + self.lost.len()
    }

    fn forward(&mut self, tag: u64, op: Op, torn: Option<Op>) -> Result<(), Request> {
        if let Err(Request { op, .. }) = self.within.push(Request { tag: self.next, op }) {
            return Err(Request { tag, op: torn.unwrap_or(op) });
        }
        self.inside.insert(self.next, Inside { tag, torn });
        self.next += 1;
        Ok(())
    }

    /// Passes a request to the wrapped device, now or later.
    fn execute(&mut self, tag: u64, op: Op, torn: Option<Op>) -> Result<(), Request> {
        let delay = self.rng.below(u64::from(self.faults.delay_max) + 1) as u32;
        if delay == 0 || self.rng.chance(0.5) {
            return self.forward(tag, op, torn);
        }
        self.before.push((delay, Late { tag, op, torn }));
        Ok(())
    }

    /// Passes delayed requests to the wrapped device.
    fn forward_late(&mut self) {
        let mut n = 0;
        while n < self.before.len() {
            if self.before[n].0 > 1 {
                self.before[n].0 -= 1;
                n += 1;
                continue;
            }
            let Late { tag, op, torn } = self.before.swap_remove(n).1;
            let is_torn = torn.is_some();
            match self.forward(tag, op, torn) {
                Ok(()) => {}
                // The wrapped device is full. This is the whole write, and none of it was written.
                Err(Request { tag, op }) if is_torn => self.hold(tag, op, Err(Error::Io)),
                Err(Request { tag, op }) => return self.before.push((1, Late { tag, op, torn: None })),
            }
        }
    }

    /// Ends a request with an error that fits it, without the wrapped device.
    fn fail(&mut self, tag: u64, mut op: Op) {
        let error = match &mut op {
            // A consumer must not rely on the content of the buffer.
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

    /// Delays a completion.
    fn hold(&mut self, tag: u64, op: Op, result: Result<(), Error>) {
        let delay = self.rng.below(u64::from(self.faults.delay_max) + 1) as u32;
        self.outside.push((delay, Completion { tag, op, result }));
    }

    /// Takes completions from the wrapped device.
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
        let late =
            std::mem::take(&mut self.before).into_iter().map(|(_, late)| (late.tag, late.torn.unwrap_or(late.op)));
        self.outside = withheld.chain(lost).chain(late).map(|(tag, op)| (0, gone(tag, op))).collect();
        // The owner may be asleep, or about to sleep.
        self.wake.ring();
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

/// The device has died with this request, and may use its memory forever: it fills the memory, or writes data to the disk that
/// the next owner put there.
fn gone(tag: u64, op: Op) -> Completion {
    Request { tag, op }.lose()
}

impl Shared {
    fn die(&self) {
        self.dead.store(true, Ordering::Release);
        for wake in self.wakes.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            wake.ring();
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
            // The device never had this request, so it does not use its memory.
            self.outside.push((0, Completion { tag, op, result: Err(Error::Gone) }));
        } else if self.rng.chance(self.faults.lost) {
            self.lost.push(Request { tag, op });
        } else if self.rng.chance(error) {
            match &op {
                Op::Write { at, buf, fua } if self.faults.torn && buf.len() > self.block => {
                    let blocks = self.rng.range(1, (buf.len() / self.block) as u64) as usize;
                    let front = Op::Write { at: *at, buf: buf.lend(0, blocks * self.block), fua: *fua };
                    self.execute(tag, front, Some(op))?;
                }
                _ => self.fail(tag, op),
            }
        } else {
            self.execute(tag, op, None)?;
        }
        self.shared.requests.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn kick(&mut self) {
        self.may_panic();
        self.within.kick();
    }

    fn reap(&mut self, done: &mut Vec<Completion>) {
        // If there is nothing to read, no wake-up came from it.
        self.wake.clear();
        if self.device_is_dead() {
            self.die();
        }
        self.forward_late();
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

    /// The descriptor of the wrapped device, if it has one. Then delayed requests and completions make [`arm`](Queue::arm) return `false`.
    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        self.within.wake_fd().or_else(|| Some(self.wake.as_fd()))
    }

    fn arm(&mut self) -> bool {
        self.may_panic();
        if self.dead != self.device_is_dead() || self.rng.chance(self.faults.unready) || !self.within.arm() {
            return false;
        }
        if self.before.is_empty() && self.outside.is_empty() {
            return true;
        }
        // A delayed request or completion causes no event of its own: either return `false`, or cause an event.
        if self.within.wake_fd().is_some() || !self.rng.chance(0.5) {
            return false;
        }
        self.wake.ring();
        true
    }

    fn give_up(&mut self) {
        self.may_panic();
        self.die();
    }

    fn is_dead(&self) -> bool {
        self.dead || self.device_is_dead()
    }
}

/// A small pseudo-random number generator (splitmix64): the same seed gives the same numbers on every machine.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// Any seed is equally good.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// Returns a random number.
    #[expect(clippy::should_implement_trait, reason = "it never ends")]
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Returns a number below `end`.
    ///
    /// # Panics
    /// If `end` is 0.
    pub fn below(&mut self, end: u64) -> u64 {
        assert!(end > 0, "there is no number below 0");
        ((u128::from(self.next()) * u128::from(end)) >> 64) as u64
    }

    /// Returns a number from `start` to `end`, without `end`.
    ///
    /// # Panics
    /// If there is none.
    pub fn range(&mut self, start: u64, end: u64) -> u64 {
        start + self.below(end - start)
    }

    /// Returns `true` with this probability.
    pub fn chance(&mut self, probability: f64) -> bool {
        // If the probability is 0, draw no number, so that a fault that is off has no effect on others.
        probability > 0.0 && ((self.next() >> 11) as f64) < probability * (1u64 << 53) as f64
    }

    /// Returns a random element.
    ///
    /// # Panics
    /// If there is none.
    pub fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len() as u64) as usize]
    }

    /// Fills `bytes` with random numbers.
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

    /// Pushes `count` writes of 4 KiB, each to its own place, and reaps until nothing more comes. All memory has come back,
    /// except that in use by a device that died.
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
    fn out_of_order_but_complete_and_reproducible() {
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
    fn death_ends_requests_in_flight_and_later_ones() {
        let (_, order) = writes(&Faults { delay_max: 0, death: Some(3), ..Faults::new(1) }, 5);
        assert_eq!(order.len(), 5);
        assert!(order.iter().all(|done| done.1 == Err(Error::Gone)));
    }

    #[test]
    fn lost_requests_end_with_the_queue_without_the_memory_of_reads() {
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
    fn the_death_wakes_other_queues() {
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
