//! [`Channel`]: one queue, its memory and its requests in flight. Consumers reach a device only through channels.
//!
//! A channel implements once what all drivers need: checks of range and write protection, splitting by every limit,
//! read-modify-write of partial blocks, FUA by a flush, zeroes by writes, back-pressure, cancellation, and time-outs.
//!
//! A request that the device can take unchanged goes directly to the queue ([`Slot::Direct`]). Any other becomes a [`Job`].

mod counting;

use std::{
    collections::VecDeque,
    io,
    os::fd::BorrowedFd,
    sync::Arc,
    time::{Duration, Instant},
};

use crate::{
    ages::{Ages, NEVER, Verdict},
    arena::{Arena, Buf},
    counters::{Counters, Operation},
    device::{Completion, Device, Info, Op, Request},
    driver::{Driver, Registered, catch},
    error::Error,
    gate::{Gate, Pass},
    io::{Done, Io},
    job::{Job, Way, margins},
    slots::{Kind, Overdue, Slot, Slots},
    stamp::{Clock, Stamp},
};

/// Parameters for opening channels. There may be more fields later.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Plan {
    /// Payload memory of each channel, in bytes: the most that its requests can hold at a time. The channel maps some 128 KiB and
    /// two blocks in addition for its own use.
    pub memory: usize,
    /// Additional memory in bytes, rounded up to 256 KiB, which only [`Channel::alloc_reserved`] hands out.
    pub reserve: usize,
    /// Depth of the queue, in requests; the device may offer less.
    pub depth: u16,
}

impl Default for Plan {
    fn default() -> Self {
        Self { memory: 64 << 20, reserve: 0, depth: 256 }
    }
}

impl Plan {
    /// The default plan with `memory` bytes of payload memory for each channel.
    pub fn new(memory: usize) -> Self {
        Self { memory, ..Self::default() }
    }

    /// Opens `count` channels, each with its own queue, and with memory that is registered with the device.
    ///
    /// # Errors
    /// The device has fewer queues, no memory is left, the device reported an error, or its [`Info`] is invalid.
    pub fn open(&self, device: &Arc<dyn Device>, count: usize) -> io::Result<Vec<Channel>> {
        let info = device.info();
        if count == 0 || count > usize::from(info.queues_max) {
            let text = format!("{}: {count} queues requested, but the device has {}", info.target, info.queues_max);
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        check(info, catch(|| device.capacity())?)?;
        let too_much = || io::Error::new(io::ErrorKind::OutOfMemory, "the payload memory exceeds the address space");
        // The reserved part ends where a word of the arena's bitmap does. It includes the channel's own buffers.
        let aside =
            self.reserve.checked_add(own(info)).and_then(|n| n.checked_next_multiple_of(ASIDE)).ok_or_else(too_much)?;
        let each =
            self.memory.checked_add(margins_max(info)).and_then(|n| n.checked_next_multiple_of(crate::arena::PAGE));
        let each = each.and_then(|n| n.checked_add(aside)).ok_or_else(too_much)?;
        let len = each.checked_mul(count).ok_or_else(too_much)?;
        let mapping = catch(|| device.new_memory(len))??;
        let registered = Registered::new(device, &mapping)?;
        let passes = Gate::passes(count)?;
        let depth = self.depth.clamp(1, info.depth_max);
        let open = |(arena, pass)| Channel::open(&registered, arena, aside, pass, depth);
        mapping.arenas(count).into_iter().zip(passes).map(open).collect()
    }
}

/// Checks what a driver reports of its device.
///
/// # Errors
/// It is not what [`Info`] promises.
fn check(info: &Info, capacity: u64) -> io::Result<()> {
    let Info { driver, target, block_size, transfer_max, .. } = info;
    let fault = if !block_size.is_power_of_two() || *block_size > 1 << 16 {
        format!("its block size of {block_size} bytes is not a power of two up to 65536")
    } else if (*transfer_max as usize) < crate::arena::PAGE.max(*block_size as usize) {
        format!("its longest transfer of {transfer_max} bytes is less than a block or a page")
    } else if capacity & u64::from(block_size - 1) != 0 {
        format!("its capacity of {capacity} bytes is not a multiple of its block size, {block_size}")
    } else {
        return Ok(());
    };
    Err(io::Error::new(io::ErrorKind::InvalidData, format!("{driver} {target}: the driver is faulty: {fault}")))
}

/// The channel's own buffers: zeroes, and edges.
fn own_buffers(arena: &mut Arena, info: &Info) -> Option<(Buf, Buf)> {
    let zeroes = arena.alloc_reserved(0, zeroes_len(info), 0)?;
    let edges = arena.alloc_reserved(0, edges_len(info), 0)?;
    arena.keep();
    Some((zeroes, edges))
}

/// The reserved part is a multiple of this.
const ASIDE: usize = 64 * crate::arena::PAGE;

/// Bytes for the channel's own buffers.
fn own(info: &Info) -> usize {
    zeroes_len(info).next_multiple_of(crate::arena::PAGE) + edges_len(info)
}

/// Largest memory of a request beyond its length.
fn margins_max(info: &Info) -> usize {
    edges_len(info)
}

/// Two blocks: those that an unaligned request may cover in part.
fn edges_len(info: &Info) -> usize {
    (2 * info.block_size as usize).next_multiple_of(crate::arena::PAGE)
}

fn zeroes_len(info: &Info) -> usize {
    // A multiple of any block size, and no longer than a transfer may be.
    (128 << 10).min(info.transfer_max as usize / info.block_size as usize * info.block_size as usize)
}

/// One queue of a device, with its memory and its requests in flight. Has one owner and never blocks.
///
/// In each turn, its owner calls [`tick`](Self::tick), any number of [`submit`](Self::submit)s, one [`kick`](Self::kick), and
/// [`reap`](Self::reap). To sleep, it calls [`arm`](Self::arm), then waits for [`wake_fd`](Self::wake_fd), at most for the time
/// that [`due`](Self::due) returns.
#[derive(Debug)]
pub struct Channel {
    /// Declared before the memory that it uses: fields are dropped in this order, and a queue drains when dropped.
    driver: Driver,
    info: Info,
    /// See [`memory`](Self::memory).
    memory: usize,
    /// The device's capacity at the first `submit` since the last `reap`.
    capacity: u64,
    arena: Arena,
    zeroes: Buf,
    edges: Buf,
    pass: Pass,
    depth: usize,
    slots: Slots,
    /// Requests that did not fit into the queue, in order.
    held: VecDeque<Request>,
    /// Jobs that wait for the gate, in order.
    waiting: VecDeque<u32>,
    /// The job that has exclusive use of the device, and of `edges`.
    alone: Option<u32>,
    /// Requests that have ended without the queue; the next `reap` returns them.
    ready: Vec<Done>,
    completions: Vec<Completion>,
    ages: Ages,
    clock: Clock,
    counters: Arc<Counters>,
    pushed: bool,
    /// A request was submitted since the last `reap`.
    asked: bool,
    prompt: bool,
    /// The device has completed nothing for the whole time-out. It is used again when it has returned all its requests.
    stalled: bool,
    /// The device was stalled or dead at the last `reap`.
    refuses: bool,
    /// The queue returns memory soon, though no request is in flight: see [`Queue::relieve`](crate::Queue::relieve).
    relieved: bool,
    /// Payload memory of overdue requests.
    overdue_bytes: u64,
}

/// Interval of checks for a turn at the gate without a wake-up.
const TURN: Duration = Duration::from_millis(10);

/// Most pieces of one job in flight: enough to keep a device busy, few enough to let other requests in between.
const PIECES: u32 = 16;

impl Channel {
    fn open(registered: &Arc<Registered>, mut arena: Arena, aside: usize, pass: Pass, depth: u16) -> io::Result<Self> {
        let info = registered.device().info().clone();
        arena.reserve(aside);
        let (zeroes, edges) = own_buffers(&mut arena, &info).ok_or_else(|| {
            io::Error::new(io::ErrorKind::InvalidInput, "too little payload memory for the channel itself")
        })?;
        let driver = Driver::open(registered, depth, arena.empty())?;
        Ok(Self {
            capacity: driver.capacity().unwrap_or(0),
            driver,
            memory: arena.capacity().saturating_sub(margins_max(&info)),
            arena,
            zeroes,
            edges,
            pass,
            depth: depth.into(),
            slots: Slots::default(),
            held: VecDeque::new(),
            waiting: VecDeque::new(),
            alone: None,
            ready: Vec::new(),
            completions: Vec::with_capacity(depth.into()),
            ages: Ages::new(info.timeout),
            clock: Clock::default(),
            counters: Arc::default(),
            pushed: false,
            asked: false,
            prompt: false,
            stalled: false,
            refuses: false,
            relieved: false,
            overdue_bytes: 0,
            info,
        })
    }

    /// Limits and capabilities of the device.
    pub fn info(&self) -> &Info {
        &self.info
    }

    /// Present size of the device, in bytes.
    pub fn capacity(&self) -> u64 {
        self.driver.capacity().unwrap_or(0)
    }

    /// Payload memory that no request holds, in bytes, without the [reserve](Plan::reserve).
    pub fn memory_free(&self) -> usize {
        self.arena.free().saturating_sub(margins_max(&self.info))
    }

    /// Total payload memory, in bytes, without the [reserve](Plan::reserve). This is also the longest request that can get a
    /// buffer.
    #[inline]
    pub fn memory(&self) -> usize {
        self.memory
    }

    /// Payload memory that no request holds, in bytes, including the [reserve](Plan::reserve): not 0 even if there is none for a
    /// request.
    pub fn memory_unused(&self) -> usize {
        self.arena.unused()
    }

    /// Number of requests that have not ended.
    pub fn in_flight(&self) -> usize {
        self.slots.in_use
    }

    /// Whether the device may still complete something: requests in flight, and requests that were reported as failed because it
    /// had not completed them in time. Or [`alloc`](Self::alloc) failed, and the queue will return memory.
    pub fn awaits_device(&self) -> bool {
        (self.slots.in_use + self.slots.overdue > 0 || self.relieved) && !self.driver.is_retired()
    }

    /// Whether the device is dead: every request ends with [`Error::Gone`].
    pub fn is_dead(&self) -> bool {
        self.driver.is_dead()
    }

    /// Whether every request ends with [`Error::Gone`] at once, so that it is useless to wait for memory: the device was dead or
    /// stalled at the last [`reap`](Self::reap).
    #[inline]
    pub fn refuses(&self) -> bool {
        self.refuses
    }

    /// Whether all requests had ended at the last [`reap`](Self::reap) after a [`submit`](Self::submit). Then the device works
    /// synchronously, as a RAM disk does, or a file in the page cache. Many requests at a time gain nothing on it.
    #[inline]
    pub fn is_prompt(&self) -> bool {
        self.prompt
    }

    /// Returns a buffer for a `Read` or `Write` of `len` bytes at `at`, with room around it for the blocks that it covers only in
    /// part. `None`: no memory is free now; try again when a request has ended and its buffer was dropped.
    #[inline]
    pub fn alloc(&mut self, at: u64, len: usize) -> Option<Buf> {
        let (before, after) = margins(at, len as u64, self.info.block_size);
        let buf = self.arena.alloc_with_margins(before, len, after);
        if buf.is_none() {
            self.relieve();
        }
        buf
    }

    /// Asks the queue to make durable the changes that it keeps, and to return their memory: see
    /// [`Queue::relieve`](crate::Queue::relieve). Returns `false` if it keeps none.
    #[cold]
    pub fn relieve(&mut self) -> bool {
        self.relieved = self.driver.relieve();
        self.relieved
    }

    /// Whether [`alloc`](Self::alloc) failed, or [`relieve`](Self::relieve) was called, and the queue will return memory. [`reap`](Self::reap) takes it back.
    pub fn awaits_memory(&self) -> bool {
        self.relieved
    }

    /// How often the device has lost changes that had completed: see [`Queue::losses`](crate::Queue::losses).
    pub fn losses(&self) -> u32 {
        self.driver.losses()
    }

    /// As [`alloc`](Self::alloc), from the [reserve](Plan::reserve).
    #[inline]
    pub fn alloc_reserved(&mut self, at: u64, len: usize) -> Option<Buf> {
        let (before, after) = margins(at, len as u64, self.info.block_size);
        let buf = self.arena.alloc_reserved(before, len, after);
        if buf.is_none() {
            self.relieve();
        }
        buf
    }

    /// Returns payload memory to the system that was not used since the last call, if the device allows it
    /// ([`Device::pins_memory`]). Returns whether there is more, for a call some seconds later.
    pub fn trim(&mut self) -> bool {
        !self.driver.pins_memory() && self.arena.trim()
    }

    /// Starts a request. It always ends as a [`Done`] with the same tag, whatever happens.
    #[inline]
    pub fn submit(&mut self, tag: u64, io: Io) {
        self.enter_turn();
        self.counters.begin(Operation::of(&io));
        self.submit_since(tag, self.clock.stamp(), io);
    }

    /// As [`submit`](Self::submit), but without counting it: it repeats a part of a request that is counted already
    /// (see [`counters`](Self::counters)).
    pub fn submit_again(&mut self, tag: u64, io: Io) {
        self.enter_turn();
        self.submit_since(tag, Stamp::NONE, io);
    }

    #[inline]
    fn submit_since(&mut self, tag: u64, since: Stamp, io: Io) {
        if let Some(result) = self.verdict(&io) {
            return self.conclude(since, Done { tag, io, result });
        }
        match io {
            Io::Read { at, buf } if self.fits(at, &buf) => {
                let slot = self.claim(tag, since, Kind::Read, at, buf.len());
                self.issue(slot, Op::Read { at, buf });
            }
            Io::Write { at, buf, fua } if self.fits(at, &buf) && self.can_write_directly(fua) => {
                let fua = fua && self.info.caps.fua;
                if self.is_gated() && !self.enter() {
                    return self.start(tag, since, Io::Write { at, buf, fua });
                }
                let slot = self.claim(tag, since, Kind::Write, at, buf.len());
                self.issue(slot, Op::Write { at, buf, fua });
            }
            Io::Flush => {
                let slot = self.claim(tag, since, Kind::Flush, 0, 0);
                self.issue(slot, Op::Flush);
            }
            io => self.start(tag, since, io),
        }
    }

    /// Whether the device has stalled: see [`tick`](Self::tick).
    pub fn is_stalled(&self) -> bool {
        self.stalled
    }

    #[inline]
    fn enter_turn(&mut self) {
        if !self.asked {
            self.begin_turn();
        }
    }

    /// Begins a turn: the first `submit` since the last `reap`.
    #[cold]
    fn begin_turn(&mut self) {
        self.asked = true;
        self.clock.read();
        if let Some(capacity) = self.driver.capacity() {
            // Whole blocks only, should it have changed.
            self.capacity = capacity & !u64::from(self.info.block_size - 1);
        }
    }

    /// Returns a slot for a request that goes to the queue unchanged.
    #[inline(always)]
    fn claim(&mut self, tag: u64, since: Stamp, kind: Kind, at: u64, len: usize) -> u32 {
        let born = if self.held.is_empty() { self.ages.now() } else { NEVER };
        self.slots.insert(Slot::Direct { tag, since, born, kind, len: len as u32, at })
    }

    /// Rings the doorbell once for all requests since the last call.
    #[inline]
    pub fn kick(&mut self) {
        if self.pushed {
            self.pushed = false;
            self.driver.kick();
        }
    }

    /// Depth of the queue, in requests.
    pub fn depth(&self) -> usize {
        self.depth
    }

    /// Whether more requests are in flight than the queue takes: some of them wait in the channel.
    #[inline]
    pub fn is_full(&self) -> bool {
        self.slots.in_use > self.depth
    }

    /// Appends the requests that have ended since the last call, and starts requests that waited for them.
    #[inline]
    pub fn reap(&mut self, done: &mut Vec<Done>) {
        done.append(&mut self.ready);
        self.driver.reap(&mut self.completions);
        if self.driver.has_failed() {
            self.retire();
        }
        if self.arena.is_retired() {
            self.move_memory();
        }
        self.refuses = self.stalled || self.driver.is_dead();
        if self.relieved {
            self.relieved = self.driver.relieves();
        }
        if !self.completions.is_empty() {
            self.ages.advance();
            self.clock.read();
            let mut completions = std::mem::take(&mut self.completions);
            for completion in completions.drain(..) {
                self.complete(completion, done);
            }
            self.completions = completions;
        }
        if !self.held.is_empty() {
            self.push_held();
        }
        if !self.waiting.is_empty() {
            self.clock.read();
            self.pass.disarm();
            self.admit();
        }
        self.kick();
        done.append(&mut self.ready);
        if std::mem::take(&mut self.asked) {
            self.prompt = self.slots.in_use == 0;
        }
    }

    /// Readable when the channel was [armed](Self::arm) and something has ended. `None`: the channel can only be polled.
    ///
    /// The descriptor stays the same until the channel is dropped, so an event loop registers it once. It works level- and
    /// edge-triggered, because [`arm`](Self::arm) returns `false` instead of missing an event. Sleep only after `arm` has returned
    /// `true`, and call [`reap`](Self::reap) after each wake-up. The descriptor may be readable without need. Never read from it.
    ///
    /// A channel is `Send` but not `Sync`. It can move to another thread, the registration included, but only one thread uses it
    /// at a time. Give each thread or task its own channel.
    ///
    /// Under epoll:
    ///
    /// ```
    /// use std::{sync::Arc, time::Instant};
    ///
    /// use blkdev::{Device, Io, Plan};
    /// use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
    ///
    /// # use blkdev::{fault::{Fault, Faults}, memory::Memory};
    /// # let device = Fault::new(Memory::new(1 << 20), Faults::new(1));
    /// # let device: Arc<dyn Device> = Arc::new(device);
    /// let mut channel = Plan::default().open(&device, 1)?.remove(0);
    /// let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    /// let flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLET;
    /// epoll.add(channel.wake_fd().expect("a device with a descriptor"), EpollEvent::new(flags, 0))?;
    ///
    /// channel.submit(1, Io::Flush);
    /// let mut done = Vec::new();
    /// while channel.in_flight() > 0 {
    ///     channel.tick(Instant::now());
    ///     channel.kick();
    ///     channel.reap(&mut done);
    ///     if done.is_empty() && channel.arm() {
    ///         let due = channel.due().map_or(EpollTimeout::NONE, |due| due.try_into().unwrap_or(EpollTimeout::MAX));
    ///         epoll.wait(&mut [EpollEvent::empty(); 8], due)?;
    ///     }
    ///     for ended in done.drain(..) {
    ///         ended.result?;
    ///     }
    /// }
    /// # std::io::Result::Ok(())
    /// ```
    ///
    /// Under tokio, make an `AsyncFd` of a duplicate (`try_clone_to_owned`), since one of the borrowed descriptor would keep the
    /// channel borrowed. When `readable()` returns, call `clear_ready()` first and then `reap`. The example `tokio` of
    /// `blkdev-io-uring` is a whole program.
    pub fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        self.driver.wake_fd()
    }

    /// Requests a wake-up. `false`: something has ended already; call `reap` first.
    pub fn arm(&mut self) -> bool {
        self.ready.is_empty() && self.driver.arm()
    }

    /// Readable when requests that wait for those of another channel can continue. Watch it in addition to
    /// [`wake_fd`](Self::wake_fd). `None`: no request ever waits so.
    pub fn turn_fd(&self) -> Option<BorrowedFd<'_>> {
        if self.is_gated() { self.pass.turn_fd() } else { None }
    }

    /// Whether a request waits for those of another channel, so that [`turn_fd`](Self::turn_fd) matters. Otherwise it may be
    /// readable without need.
    pub fn waits_for_turn(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Longest time until the next turn, with or without a wake-up. `None`: only a wake-up matters.
    pub fn due(&self) -> Option<Duration> {
        if self.waits_for_turn() && self.pass.turn_fd().is_some() {
            // For owners that do not watch `turn_fd`.
            return Some(TURN);
        }
        if self.slots.in_use == 0 { None } else { self.ages.unit }
    }

    /// Advances the clock. Call it at every turn.
    ///
    /// A device is stalled if it completes nothing for [`Info::timeout`] although it has an older request. All its requests end
    /// with [`Error::Gone`], and so does every new one, until the device has returned all of them; their results are discarded.
    /// While other requests complete, a single request ends so after ten times that time.
    #[inline]
    pub fn tick(&mut self, now: Instant) {
        self.clock.set(now);
        if self.ages.tick(now) && self.slots.in_use > 0 {
            self.judge();
        }
    }

    /// Ends requests that have taken too long.
    #[cold]
    fn judge(&mut self) {
        self.clock.read();
        let born = |slot: &Slot| match slot {
            Slot::Direct { born, .. } => Some(*born),
            Slot::Job(job) if job.out > 0 => Some(job.born),
            _ => None,
        };
        let now = self.ages.now();
        let ages = self.slots.list.iter().filter_map(born).filter(|&born| born != NEVER);
        let Some(oldest) = ages.max_by_key(|born| now.wrapping_sub(*born)) else { return };
        let verdict = self.ages.judge(oldest);
        if verdict != Verdict::Fine && self.driver.recover() {
            return self.rejuvenate();
        }
        match verdict {
            Verdict::Fine => return,
            Verdict::Stalled => return self.stall(),
            Verdict::Lost => {}
        }
        for slot in 0..self.slots.list.len() as u32 {
            if born(&self.slots.list[slot as usize]).is_some_and(|born| born != NEVER && self.ages.is_lost(born)) {
                log::error!(
                    "{} {}: a request is lost: it was not completed in ten times the time-out, though others were",
                    self.info.driver,
                    self.info.target
                );
                self.expire(slot);
            }
        }
        // Requests that the device never returns must not leave others without memory.
        if self.overdue_bytes > self.memory() as u64 / 4 {
            self.stall();
        }
    }

    /// The queue sends all requests again, so they are as young as new ones.
    #[cold]
    fn rejuvenate(&mut self) {
        self.ages.advance();
        let now = self.ages.now();
        for slot in &mut self.slots.list {
            match slot {
                Slot::Direct { born, .. } if *born != NEVER => *born = now,
                Slot::Job(job) if job.born != NEVER => job.born = now,
                _ => {}
            }
        }
    }

    /// Ends all requests, because the device does not answer.
    #[cold]
    fn stall(&mut self) {
        self.stalled = true;
        self.counters.stalls.add(1);
        let (count, state) = (self.slots.in_use, self.describe());
        self.fail_all();
        log::error!(
            "{} {}: nothing was completed within the time-out{state}; {count} requests fail, and so does every new one until \
             the device has answered all of them",
            self.info.driver,
            self.info.target
        );
    }

    /// Stops using the queue, because the driver is faulty.
    #[cold]
    fn retire(&mut self) {
        self.clock.read();
        self.driver.retire();
        // These completions may be false.
        self.completions.drain(..).for_each(|mut completion| completion.op.abandon());
        self.fail_all();
    }

    /// Ends all requests.
    fn fail_all(&mut self) {
        self.refuses = true;
        for request in std::mem::take(&mut self.held) {
            let mut done = Vec::new();
            let Request { tag, op } = request;
            self.complete(Completion { tag, op, result: Err(Error::Gone) }, &mut done);
            self.ready.append(&mut done);
        }
        for slot in 0..self.slots.list.len() as u32 {
            match &mut self.slots.list[slot as usize] {
                Slot::Job(job) if job.out == 0 => {
                    job.error.get_or_insert(Error::Gone);
                }
                Slot::Direct { .. } | Slot::Job(_) => self.expire(slot),
                Slot::Free { .. } | Slot::Overdue(_) => {}
            }
        }
        // Ends jobs that wait for the gate.
        self.admit();
    }

    /// Ends a request that the device has. Its memory stays in use until the device returns it.
    fn expire(&mut self, number: u32) {
        let empty = self.arena.empty();
        let slot = &mut self.slots.list[number as usize];
        let (done, overdue) = match std::mem::replace(slot, Slot::Free { next: NEVER }) {
            Slot::Direct { tag, since, kind, len, at, .. } => {
                self.count(kind.operation(), since, len.into(), Err(Error::Gone));
                let (io, changes) = match kind {
                    Kind::Read => (Io::Read { at, buf: empty }, None),
                    Kind::Write => (Io::Write { at, buf: empty, fua: false }, Some((at, u64::from(len)))),
                    Kind::Flush => (Io::Flush, None),
                };
                if kind == Kind::Write && self.is_gated() {
                    self.pass.leave();
                }
                (
                    Done { tag, io, result: Err(Error::Gone) },
                    Overdue { changes, held: len.into(), job: None, edges: None },
                )
            }
            Slot::Job(mut job) => {
                self.count(job.operation(), job.since, job.len, Err(Error::Gone));
                if job.inside {
                    self.pass.leave();
                }
                let (changes, held) = (job.changes(self.info.block_size), job.held());
                let mut edges = None;
                if self.alone == Some(number) {
                    self.alone = None;
                    self.pass.open();
                    self.pass.end_turn(!self.waiting.is_empty());
                    // The device may still read or write these edges.
                    let fresh =
                        self.arena.alloc_reserved(0, edges_len(&self.info), 0).unwrap_or_else(|| self.arena.empty());
                    edges = Some(std::mem::replace(&mut self.edges, fresh));
                }
                (job.overdue(empty), Overdue { changes, held, job: Some(job), edges })
            }
            Slot::Free { .. } | Slot::Overdue(_) => unreachable!("only what is in flight expires"),
        };
        self.overdue_bytes += overdue.held;
        if let Some((at, len)) = overdue.changes {
            self.pass.add_overdue(at, len);
        }
        self.slots.list[number as usize] = Slot::Overdue(Box::new(overdue));
        self.slots.in_use -= 1;
        self.slots.overdue += 1;
        self.ready.push(done);
    }

    /// Takes back a part of an overdue request, or all of it.
    #[cold]
    fn forget(&mut self, number: u32, op: Op) {
        let lost = op.has_lost_memory();
        // Drop a loan before its original.
        drop(op);
        let Slot::Overdue(overdue) = &mut self.slots.list[number as usize] else {
            unreachable!("only overdue requests are forgotten")
        };
        if let Some(job) = &mut overdue.job {
            job.lost |= lost;
            job.out -= 1;
            if job.out > 0 {
                return;
            }
            let edges = overdue.edges.take_if(|_| job.lost);
            for mut memory in job.take_lost().into_iter().chain(edges) {
                memory.abandon();
            }
        }
        self.overdue_bytes -= overdue.held;
        if let Some((at, len)) = overdue.changes {
            self.pass.remove_overdue(at, len);
        }
        if let Some(edges) = overdue.edges.take()
            && self.edges.is_empty()
        {
            self.edges = edges;
            self.check_edges();
        }
        self.slots.overdue -= 1;
        self.slots.in_use += 1;
        self.slots.remove(number);
        if self.stalled && self.slots.overdue == 0 {
            (self.stalled, self.refuses) = (false, self.driver.is_dead());
            log::warn!("{} {}: the device answers again and is back in use", self.info.driver, self.info.target);
        }
    }

    /// Keeps ended requests for the next [`reap`](Self::reap).
    pub(crate) fn put_back(&mut self, done: Vec<Done>) {
        self.ready.extend(done);
    }

    /// Declares the device dead: everything in flight ends with [`Error::Gone`], at the next `reap`s.
    pub fn give_up(&mut self) {
        self.driver.give_up();
    }

    /// Cancels the requests whose tags `which` selects: the parts that the device does not have yet never reach it. They end with
    /// [`Error::Cancelled`], or with the device's result if it already has them.
    pub fn cancel(&mut self, which: impl Fn(u64) -> bool) {
        self.clock.read();
        for slot in 0..self.slots.list.len() {
            if let Slot::Job(job) = &mut self.slots.list[slot]
                && which(job.tag)
            {
                job.error.get_or_insert(Error::Cancelled);
            }
        }
        let mut done = Vec::new();
        // A job whose last piece comes back here ends in `ready`.
        for request in std::mem::take(&mut self.held) {
            let tag = match &self.slots.list[request.tag as usize] {
                Slot::Direct { tag, .. } => Some(*tag),
                Slot::Job(job) => Some(job.tag),
                // See `push_held`.
                Slot::Free { .. } | Slot::Overdue(_) => None,
            };
            if tag.is_some_and(&which) {
                let Request { tag, op } = request;
                self.complete(Completion { tag, op, result: Err(Error::Cancelled) }, &mut done);
            } else {
                self.held.push_back(request);
            }
        }
        self.ready.append(&mut done);
        if !self.waiting.is_empty() {
            self.admit();
        }
    }

    /// The result of a request that does not need the device.
    #[inline]
    fn verdict(&self, io: &Io) -> Option<Result<(), Error>> {
        let caps = &self.info.caps;
        let (at, len, changes) = match io {
            Io::Read { at, buf } => (*at, buf.len() as u64, false),
            Io::Write { at, buf, .. } => (*at, buf.len() as u64, true),
            Io::Zero { at, len, .. } | Io::Discard { at, len, .. } => (*at, *len, true),
            Io::Status { at, len, .. } | Io::Prefetch { at, len } => (*at, *len, false),
            Io::Flush if self.refuses => return Some(Err(Error::Gone)),
            Io::Flush => return (!caps.flush).then_some(Ok(())),
        };
        if changes && caps.read_only {
            return Some(Err(Error::ReadOnly));
        }
        if at.checked_add(len).is_none_or(|end| end > self.capacity && end > self.capacity()) {
            return Some(Err(Error::OutOfRange));
        }
        if self.refuses || (changes && self.pass.is_overdue(at, len)) {
            return Some(Err(Error::Gone));
        }
        let supported = match io {
            Io::Discard { .. } => caps.discard,
            Io::Prefetch { .. } => caps.prefetch,
            Io::Zero { fast, .. } => caps.zero || !fast,
            _ => true,
        };
        if !supported {
            return Some(Err(Error::NotSupported));
        }
        (len == 0).then_some(Ok(()))
    }

    /// Whether a read or write can go to the device unchanged.
    #[inline]
    fn fits(&self, at: u64, buf: &Buf) -> bool {
        let mask = u64::from(self.info.block_size) - 1;
        (at | buf.len() as u64) & mask == 0 && buf.len() <= self.info.transfer_max as usize
    }

    #[inline]
    fn can_write_directly(&self, fua: bool) -> bool {
        !fua || self.info.caps.fua || !self.info.caps.flush
    }

    /// Whether changes must be counted, because a channel may have to merge into a block.
    #[inline]
    fn is_gated(&self) -> bool {
        self.info.block_size > 1
    }

    /// Begins a change of whole blocks, unless a channel merges or waits to merge.
    #[inline]
    fn enter(&self) -> bool {
        self.waiting.is_empty() && self.pass.enter()
    }

    /// Makes a job of a request that cannot go directly to the queue.
    #[cold]
    fn start(&mut self, tag: u64, since: Stamp, io: Io) {
        let job = match Job::new(tag, since, io, &self.info) {
            Ok(job) => job,
            Err(done) => return self.conclude(since, *done),
        };
        let way = job.way;
        let slot = self.slots.insert(Slot::Job(Box::new(job)));
        if way == Way::Free || !self.is_gated() {
            return self.run(slot);
        }
        self.waiting.push_back(slot);
        self.admit();
    }

    /// Lets waiting jobs pass the gate, in order, while the channel has its turn.
    #[cold]
    fn admit(&mut self) {
        while let Some(&slot) = self.waiting.front() {
            if self.alone.is_some() {
                return;
            }
            let job = self.slots.job(slot);
            if job.changes(self.info.block_size).is_some_and(|(at, len)| self.pass.is_overdue(at, len)) {
                job.error.get_or_insert(Error::Gone);
            }
            if job.error.is_some() {
                // It was cancelled while it waited, perhaps for the gate to become quiet.
                self.pass.open();
            } else if !self.pass.has_turn() {
                return;
            } else if job.way == Way::Alone {
                self.pass.close();
                if !self.pass.is_quiet() {
                    return;
                }
                self.alone = Some(slot);
            } else {
                if !self.pass.enter() {
                    return;
                }
                job.inside = true;
            }
            self.waiting.pop_front();
            self.run(slot);
        }
        if self.alone.is_none() {
            self.pass.end_turn(false);
        }
    }

    /// Sends pieces of a job's stage, and enters the next stage when all have come back.
    fn run(&mut self, slot: u32) {
        loop {
            let job = self.slots.job(slot);
            while job.error.is_none() && job.out < PIECES {
                let Some(op) = job.piece(&self.info, &self.zeroes, &self.edges) else { break };
                job.out += 1;
                let request = Request { tag: slot.into(), op };
                // As `issue`, inlined because `job` borrows the slots.
                if self.held.is_empty() {
                    job.born = self.ages.now();
                    self.pushed = true;
                    if let Err(request) = self.driver.push(request) {
                        self.held.push_back(request);
                    }
                } else {
                    self.held.push_back(request);
                }
            }
            if job.out > 0 {
                return;
            }
            if job.lost && self.restart(slot) {
                continue;
            }
            let job = self.slots.job(slot);
            if job.error.is_some() || !job.next_stage(&self.info, &mut self.edges) {
                return self.finish(slot);
            }
        }
    }

    /// Lets a job whose reads have lost their memory read again, into other memory. `false`: the device is dead, or no memory is
    /// free.
    #[cold]
    fn restart(&mut self, slot: u32) -> bool {
        let job = self.slots.job(slot);
        if self.refuses || self.driver.is_dead() || !job.reads() {
            return false;
        }
        let fresh = match (job.operation(), job.at, job.len as usize) {
            (Operation::Read, at, len) => self.alloc(at, len),
            // Only blocks that it covers in part; the channel has other memory for them already.
            _ => Some(self.arena.empty()),
        };
        let Some(fresh) = fresh else { return false };
        self.slots.job(slot).restart(fresh, &self.info);
        true
    }

    fn finish(&mut self, slot: u32) {
        let Slot::Job(mut job) = self.slots.remove(slot) else { unreachable!("only jobs finish here") };
        if let Some(mut memory) = job.take_lost() {
            memory.abandon();
        }
        if job.inside {
            self.pass.leave();
        }
        if self.alone == Some(slot) {
            self.alone = None;
            self.pass.open();
            self.pass.end_turn(!self.waiting.is_empty());
            self.check_edges();
        }
        self.count_job(&job);
        self.ready.push(job.done(self.info.block_size));
    }

    /// Pushes a request of a new direct slot, or holds it back.
    #[inline(always)]
    fn issue(&mut self, slot: u32, op: Op) {
        let request = Request { tag: slot.into(), op };
        if !self.held.is_empty() {
            return self.held.push_back(request);
        }
        self.pushed = true;
        if let Err(request) = self.driver.push(request) {
            self.hold(request);
        }
    }

    /// Keeps a request that did not fit into the queue.
    #[cold]
    fn hold(&mut self, request: Request) {
        if let Slot::Direct { born, .. } = &mut self.slots.list[request.tag as usize] {
            *born = NEVER;
        }
        self.held.push_back(request);
    }

    #[cold]
    fn push_held(&mut self) {
        while let Some(request) = self.held.pop_front() {
            let slot = request.tag as u32;
            match &self.slots.list[slot as usize] {
                Slot::Direct { .. } | Slot::Job(_) => {}
                // The rest of a job that is overdue.
                Slot::Overdue(_) => {
                    self.forget(slot, request.op);
                    continue;
                }
                Slot::Free { .. } => return self.doubt(request),
            }
            if let Err(request) = self.driver.push(request) {
                return self.held.push_front(request);
            }
            self.pushed = true;
            // Its time starts now: time in the channel does not count against the device.
            match &mut self.slots.list[slot as usize] {
                Slot::Direct { born, .. } => *born = self.ages.now(),
                Slot::Job(job) => job.born = self.ages.now(),
                Slot::Free { .. } | Slot::Overdue(_) => {}
            }
        }
    }

    #[inline]
    fn complete(&mut self, completion: Completion, done: &mut Vec<Done>) {
        let Completion { tag, op, result } = completion;
        let slot = tag as u32;
        match (self.slots.list.get_mut(tag as usize), op) {
            (Some(Slot::Direct { tag, since, born, kind: Kind::Read, len, at: asked }), Op::Read { at, buf })
                if at == *asked && (buf.len() == *len as usize || result.is_err()) =>
            {
                let (tag, since, len) = (*tag, *since, u64::from(*len));
                self.ages.completed(*born);
                self.slots.remove_direct(slot);
                self.count(Operation::Read, since, len, result);
                done.push(Done { tag, io: Io::Read { at, buf }, result });
            }
            (
                Some(Slot::Direct { tag, since, born, kind: Kind::Write, len, at: asked }),
                Op::Write { at, buf, fua },
            ) if at == *asked => {
                let (tag, since, len) = (*tag, *since, u64::from(*len));
                self.ages.completed(*born);
                self.slots.remove_direct(slot);
                self.count(Operation::Write, since, len, result);
                if self.is_gated() {
                    self.pass.leave();
                }
                done.push(Done { tag, io: Io::Write { at, buf, fua }, result });
            }
            (Some(Slot::Direct { tag, since, born, kind: Kind::Flush, .. }), Op::Flush) => {
                let (tag, since) = (*tag, *since);
                self.ages.completed(*born);
                self.slots.remove_direct(slot);
                self.count(Operation::Flush, since, 0, result);
                done.push(Done { tag, io: Io::Flush, result });
            }
            (Some(Slot::Job(job)), op) if job.out > 0 && job.awaits(&op) => {
                job.out -= 1;
                job.born = self.ages.now();
                if job.take_back(op, result) && job.uses_edges() {
                    self.replace_edges();
                }
                self.run(slot);
            }
            (Some(Slot::Overdue(_)), op) => self.forget(slot, op),
            (_, op) => self.doubt(Request { tag, op }),
        }
    }

    /// Allocates from other memory from now on: a process behind a device that has died may still access the present one. What is
    /// in use there stays until it is dropped, and is never used again.
    #[cold]
    fn move_memory(&mut self) {
        self.arena.move_on();
        self.driver.follow(self.arena.mapping(), self.arena.empty());
        // The new memory is as large as the old, and reads as zeroes.
        let Some((zeroes, edges)) = own_buffers(&mut self.arena, &self.info) else { return };
        self.zeroes = zeroes;
        // A job that is alone may be using the others.
        if self.alone.is_none() {
            self.edges = edges;
        }
    }

    /// Replaces the buffer for edges if the channel has moved to other memory meanwhile.
    fn check_edges(&mut self) {
        if !self.edges.is_of(&self.arena) {
            self.replace_edges();
        }
    }

    /// Replaces the buffer for edges, if there is memory: the device has died, and may still access it.
    #[cold]
    fn replace_edges(&mut self) {
        let len = edges_len(&self.info);
        let fresh = self.arena.alloc_reserved(0, len, 0).or_else(|| self.arena.alloc(len));
        let mut edges = std::mem::replace(&mut self.edges, fresh.unwrap_or_else(|| self.arena.empty()));
        edges.abandon();
    }

    /// The driver has completed a request that it did not have, so it is not trusted any more: [`reap`](Self::reap) ends
    /// everything.
    #[cold]
    fn doubt(&self, Request { tag, mut op }: Request) {
        self.driver.fail(format_args!(
            "the driver is faulty: it completed {op:?} with the tag {tag}, but has no such request in flight"
        ));
        op.abandon();
    }
}

impl Drop for Channel {
    /// Dropping a queue waits for its requests. That is pointless if the device does not answer.
    fn drop(&mut self) {
        if self.stalled {
            self.driver.give_up();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    };

    use super::*;
    use crate::{
        device::Queue,
        fault::{Bug, Fault, Faults, Rng},
        mem::Mapping,
        memory::Memory,
    };

    fn open(device: impl Device + 'static, depth: u16) -> Channel {
        let device: Arc<dyn Device> = Arc::new(device);
        Plan { memory: 1 << 20, depth, ..Plan::default() }.open(&device, 1).unwrap().remove(0)
    }

    fn awkward() -> Memory {
        Memory::new(1 << 24).with(|info| {
            info.block_size = 4096;
            info.timeout = Some(Duration::from_secs(8));
        })
    }

    fn drain(channel: &mut Channel) -> Vec<Done> {
        let mut done = Vec::new();
        while channel.in_flight() > 0 {
            channel.reap(&mut done);
        }
        done
    }

    #[test]
    fn the_longest_request_fits_wherever_it_starts() {
        let mut channel = open(awkward(), 8);
        let len = channel.memory();
        let buf = channel.alloc(4095, len).expect("nothing else holds memory");
        channel.submit(0, Io::Write { at: 4095, buf, fua: false });
        assert!(drain(&mut channel)[0].result.is_ok());
        assert_eq!(channel.memory_free(), channel.memory());
    }

    #[test]
    fn a_buffer_for_elsewhere_is_refused() {
        let mut channel = open(awkward(), 8);
        let buf = channel.alloc(0, 4096).unwrap();
        channel.submit(0, Io::Write { at: 7, buf, fua: false });
        let mut done = Vec::new();
        channel.reap(&mut done);
        assert_eq!(done[0].result, Err(Error::Invalid));
    }

    /// A device whose completions a test controls.
    #[derive(Debug)]
    struct Slow {
        memory: Memory,
        shared: Arc<Mutex<VecDeque<Completion>>>,
        /// Number of requests that may complete.
        credit: Arc<AtomicUsize>,
        mappings: Arc<AtomicUsize>,
    }

    struct SlowQueue(Box<dyn Queue>, Arc<Mutex<VecDeque<Completion>>>, usize, Arc<AtomicUsize>);

    impl From<Memory> for Slow {
        fn from(memory: Memory) -> Self {
            Self { memory, shared: Arc::default(), credit: Arc::default(), mappings: Arc::default() }
        }
    }

    impl Device for Slow {
        fn info(&self) -> &Info {
            self.memory.info()
        }

        fn capacity(&self) -> u64 {
            self.memory.capacity()
        }

        fn register(&self, _: &Arc<Mapping>) -> io::Result<()> {
            self.mappings.fetch_add(1, Ordering::Relaxed);
            Ok(())
        }

        fn unregister(&self, _: &Arc<Mapping>) {
            self.mappings.fetch_sub(1, Ordering::Relaxed);
        }

        fn open_queue(&self, depth: u16) -> io::Result<Box<dyn Queue>> {
            let queue = self.memory.open_queue(depth)?;
            Ok(Box::new(SlowQueue(queue, Arc::clone(&self.shared), usize::from(depth), Arc::clone(&self.credit))))
        }
    }

    impl Queue for SlowQueue {
        fn push(&mut self, request: Request) -> Result<(), Request> {
            let mut waiting = self.1.lock().unwrap();
            if waiting.len() == self.2 {
                return Err(request);
            }
            // Writes take effect when they complete.
            waiting.push_back(Completion { tag: request.tag, op: request.op, result: Ok(()) });
            Ok(())
        }

        fn kick(&mut self) {}

        fn reap(&mut self, done: &mut Vec<Completion>) {
            while self.3.load(Ordering::Relaxed) > 0
                && let Some(Completion { tag, op, .. }) = self.1.lock().unwrap().pop_front()
            {
                self.3.fetch_sub(1, Ordering::Relaxed);
                self.0.push(Request { tag, op }).unwrap();
                self.0.reap(done);
            }
        }

        fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
            None
        }

        fn arm(&mut self) -> bool {
            true
        }

        fn give_up(&mut self) {
            self.0.give_up();
        }
    }

    fn slow(depth: u16) -> (Channel, Arc<AtomicUsize>) {
        let slow = Slow::from(awkward());
        let credit = Arc::clone(&slow.credit);
        let device: Arc<dyn Device> = Arc::new(slow);
        (Plan { memory: 1 << 20, depth, ..Plan::default() }.open(&device, 1).unwrap().remove(0), credit)
    }

    fn write(channel: &mut Channel, tag: u64, at: u64, byte: u8) {
        let mut buf = channel.alloc(at, 4096).unwrap();
        buf.copy_from(0, &[byte; 4096]);
        channel.submit(tag, Io::Write { at, buf, fua: false });
    }

    /// The tags and results of ended requests.
    fn ends(channel: &mut Channel) -> Vec<(u64, Result<(), Error>)> {
        let mut done = Vec::new();
        channel.reap(&mut done);
        done.iter().map(|done| (done.tag, done.result)).collect()
    }

    #[test]
    fn a_device_that_completes_something_is_alive_however_long_other_requests_wait() {
        let (mut channel, credit) = slow(64);
        let start = Instant::now();
        channel.tick(start);
        (0..60).for_each(|tag| write(&mut channel, tag, tag * 4096, 1));
        // The time-out is 8 seconds, and one request completes every 7 seconds.
        for second in 1..=7 * 60 {
            channel.tick(start + Duration::from_secs(second));
            if second % 7 == 0 {
                credit.store(1, Ordering::Relaxed);
                assert_eq!(ends(&mut channel), [(second / 7 - 1, Ok(()))]);
            }
        }
        assert_eq!(channel.in_flight(), 0);
    }

    #[test]
    fn a_device_that_completes_nothing_is_stalled_until_it_has_returned_everything() {
        // Requests for parts of blocks, for whole blocks, and for more than the queue takes, in two orders.
        for order in [[0, 9000, 65536, 131_072], [9000, 0, 65536, 131_072]] {
            let (mut channel, credit) = slow(1);
            let start = Instant::now();
            channel.tick(start);
            (0..4).for_each(|tag| write(&mut channel, tag, order[tag as usize], 1));
            // A long time without calls (a stopped process, a sleeping machine) does not count against the device.
            channel.tick(start + Duration::from_secs(3600));
            assert_eq!(ends(&mut channel), []);
            for second in 1..=12 {
                channel.tick(start + Duration::from_secs(3600 + second));
            }
            let mut ended = ends(&mut channel);
            ended.sort_by_key(|end| end.0);
            assert_eq!(ended, [0, 1, 2, 3].map(|tag| (tag, Err(Error::Gone))));
            assert!(channel.refuses() && channel.in_flight() == 0 && channel.awaits_device());
            assert!(channel.memory_free() < channel.memory(), "the device may still use the memory");
            channel.submit(4, Io::Flush);
            assert_eq!(ends(&mut channel), [(4, Err(Error::Gone))]);
            // The device completes late, one request after the other. The results are discarded.
            for _ in 0..10 {
                credit.store(1, Ordering::Relaxed);
                assert_eq!(ends(&mut channel), []);
            }
            assert!(!channel.refuses() && !channel.awaits_device());
            assert_eq!(channel.memory_free(), channel.memory());
            credit.store(100, Ordering::Relaxed);
            write(&mut channel, 5, 9000, 2);
            assert_eq!(drain(&mut channel)[0].result, Ok(()));
            let buf = channel.alloc(9000, 4096).unwrap();
            channel.submit(6, Io::Read { at: 9000, buf });
            let Io::Read { buf, .. } = &drain(&mut channel)[0].io else { panic!("a read comes back") };
            assert_eq!(buf.to_vec(), [2; 4096]);
        }
    }

    #[test]
    fn a_lost_request_ends_alone_and_keeps_others_off_its_range() {
        let lost = Faults { lost: 1.0, delay_max: 0, full: 0.0, unready: 0.0, ..Faults::new(1) };
        let device: Arc<dyn Device> = Arc::new(Fault::new(awkward(), lost));
        let mut channel = Plan { memory: 1 << 20, depth: 8, ..Plan::default() }.open(&device, 1).unwrap().remove(0);
        let start = Instant::now();
        channel.tick(start);
        write(&mut channel, 0, 0, 1);
        channel.kick();
        assert_eq!(ends(&mut channel), []);
        for second in 1..=90 {
            assert_eq!(channel.in_flight(), usize::from(second <= 81), "second {second}");
            channel.tick(start + Duration::from_secs(second));
            // As if others had completed, each sent just before.
            channel.ages.advance();
            channel.ages.completed(channel.ages.now());
        }
        assert_eq!(ends(&mut channel), [(0, Err(Error::Gone))]);
        assert!(!channel.refuses(), "others go on");
        // The old write could overwrite a new write of that range.
        write(&mut channel, 1, 0, 2);
        channel.submit(2, Io::Zero { at: 0, len: 1, fua: false, unmap: false, fast: false });
        assert_eq!(ends(&mut channel), [(1, Err(Error::Gone)), (2, Err(Error::Gone))]);
        write(&mut channel, 3, 4096, 2);
        assert_eq!(channel.in_flight(), 1);
    }

    #[test]
    fn a_request_that_is_lost_in_part_ends_with_its_unsent_parts() {
        let device = Slow::from(awkward().with(|info| info.transfer_max = 4096));
        let credit = Arc::clone(&device.credit);
        let mut channel = open(device, 1);
        let buf = channel.alloc(0, 16384).unwrap();
        channel.submit(7, Io::Read { at: 0, buf });
        assert_eq!(channel.held.len(), 3);
        channel.expire(0);
        channel.cancel(|_| true);
        assert_eq!(ends(&mut channel), [(7, Err(Error::Gone))]);
        assert!(channel.awaits_device());
        credit.store(1, Ordering::Relaxed);
        assert_eq!(ends(&mut channel), []);
        assert!(!channel.awaits_device());
        assert_eq!(channel.memory_free(), channel.memory());
    }

    #[test]
    fn what_a_driver_reports_is_checked() {
        let faulty: [fn(&mut Info); 4] = [
            |info| info.block_size = 3,
            |info| info.block_size = 1 << 17,
            |info| info.transfer_max = 512,
            |info| (info.block_size, info.transfer_max) = (8192, 4096),
        ];
        for change in faulty {
            let mut info = Info::new("test", "faulty");
            change(&mut info);
            assert!(check(&info, 1 << 20).is_err(), "{info:?}");
        }
        let mut info = Info::new("test", "sound");
        info.block_size = 512;
        assert!(check(&info, 1 << 20).is_ok() && check(&info, (1 << 20) + 1).is_err());
    }

    #[test]
    fn a_faulty_driver_ends_its_device_and_nothing_else() {
        for seed in 0..500 {
            let mut rng = Rng::new(seed);
            let bug = *rng.pick(&[Bug::Panic, Bug::PanicOfDevice, Bug::WrongTag, Bug::Twice]);
            let faults = Faults { bug: Some((1 + rng.below(30), bug)), ..Faults::new(seed) };
            let info = |info: &mut Info| (info.queues_max, info.block_size) = (2, 512);
            let device: Arc<dyn Device> = Arc::new(Fault::new(Memory::new(1 << 20).with(info), faults));
            let mut channels = Plan { memory: 1 << 20, depth: 8, ..Plan::default() }.open(&device, 2).unwrap();
            let (mut asked, mut ended) = ([0; 2], [0; 2]);
            for tag in 0..200 {
                let n = rng.below(2) as usize;
                let (channel, at) = (&mut channels[n], rng.below(64) * 700);
                let sound = !channel.driver.has_failed();
                if let Some(buf) = channel.alloc(at, 700) {
                    let io = if rng.chance(0.5) { Io::Read { at, buf } } else { Io::Write { at, buf, fua: false } };
                    channel.submit(tag, io);
                } else {
                    channel.submit(tag, Io::Flush);
                }
                asked[n] += 1;
                if bug == Bug::Panic && sound && channel.driver.has_failed() {
                    assert!(channel.alloc(0, 1).is_none(), "seed {seed}: memory that the device may use is not reused");
                }
                if rng.chance(0.3) {
                    channel.tick(Instant::now());
                    ended[n] += ends(channel).len();
                    channel.arm();
                }
            }
            for (n, channel) in channels.iter_mut().enumerate() {
                let mut turns = 0;
                while channel.in_flight() > 0 || !channel.refuses() {
                    channel.tick(Instant::now());
                    ended[n] += ends(channel).len();
                    channel.submit(0, Io::Zero { at: 1000, len: 5000, fua: true, unmap: true, fast: false });
                    asked[n] += 1;
                    turns += 1;
                    assert!(turns < 1000, "seed {seed}: {bug:?} is noticed");
                }
                ended[n] += ends(channel).len();
                assert!(
                    channel.arm() && !channel.awaits_device() && !channel.trim(),
                    "seed {seed}: nothing is to come"
                );
            }
            assert_eq!(asked, ended, "seed {seed}: every request ends once, whatever {bug:?} does");
        }
    }

    #[test]
    fn a_completion_that_does_not_fit_its_request_ends_the_device() {
        let slow = Slow::from(awkward());
        let (waiting, credit) = (Arc::clone(&slow.shared), Arc::clone(&slow.credit));
        let mut channel = open(slow, 8);
        channel.submit(7, Io::Status { at: 0, len: 4096, extents: Vec::new() });
        let status = waiting.lock().unwrap().pop_front().expect("the device has the request");
        waiting.lock().unwrap().push_back(Completion { tag: status.tag, op: Op::Flush, result: Ok(()) });
        credit.store(1, Ordering::Relaxed);
        let mut ended = ends(&mut channel);
        ended.extend(ends(&mut channel));
        assert_eq!(ended, [(7, Err(Error::Gone))]);
        assert!(channel.refuses() && channel.is_dead());
    }

    #[test]
    fn memory_is_registered_as_long_as_a_channel_uses_it() {
        let slow = Slow::from(awkward().with(|info| info.queues_max = 2));
        let mappings = Arc::clone(&slow.mappings);
        let device: Arc<dyn Device> = Arc::new(slow);
        for _ in 0..20 {
            let mut channels = Plan { memory: 1 << 20, ..Plan::default() }.open(&device, 2).unwrap();
            drop(channels.pop());
            assert_eq!(mappings.load(Ordering::Relaxed), 1);
            drop(channels);
            assert_eq!(mappings.load(Ordering::Relaxed), 0);
        }
    }

    #[test]
    fn merges_on_one_channel_and_writes_on_another_alternate() {
        let device: Arc<dyn Device> = Arc::new(awkward().with(|info| info.queues_max = 2));
        let mut channels = Plan { memory: 1 << 20, depth: 8, ..Plan::default() }.open(&device, 2).unwrap();
        let (mut b, mut a) = (channels.pop().unwrap(), channels.pop().unwrap());
        let (mut merges, mut writes) = (0, 0);
        for _ in 0..1000 {
            // One channel always has merges waiting, the other always a write of a whole block.
            while a.in_flight() < 4 {
                write(&mut a, 0, 100, 1);
            }
            if b.in_flight() == 0 {
                write(&mut b, 0, 8192, 1);
            }
            merges += ends(&mut a).len();
            writes += ends(&mut b).len();
        }
        assert!(merges >= 200 && writes >= 200, "{merges} merges, {writes} writes");
    }

    #[test]
    fn a_request_cancelled_before_it_reaches_the_device_never_does() {
        let device: Arc<dyn Device> =
            Arc::new(Fault::new(Memory::new(1 << 20), Faults { delay_max: 3, ..Faults::new(7) }));
        let mut channel = Plan { memory: 1 << 20, depth: 1, ..Plan::default() }.open(&device, 1).unwrap().remove(0);
        for tag in 0..4u64 {
            let mut buf = channel.alloc(tag * 4096, 4096).unwrap();
            buf.copy_from(0, &[tag as u8 + 1; 4096]);
            channel.submit(tag, Io::Write { at: tag * 4096, buf, fua: false });
        }
        channel.cancel(|tag| tag % 2 == 1);
        let done = drain(&mut channel);
        let mut ends: Vec<_> = done.iter().map(|d| (d.tag, d.result)).collect();
        ends.sort_by_key(|end| end.0);
        let cancelled = Err(Error::Cancelled);
        assert_eq!(ends, [(0, Ok(())), (1, cancelled), (2, Ok(())), (3, cancelled)]);
        for tag in 0..4 {
            let buf = channel.alloc(tag * 4096, 4096).unwrap();
            channel.submit(tag, Io::Read { at: tag * 4096, buf });
            let Io::Read { buf, .. } = &drain(&mut channel)[0].io else { panic!("a read comes back") };
            assert_eq!(buf.to_vec()[0], if tag % 2 == 1 { 0 } else { tag as u8 + 1 });
        }
    }
}
