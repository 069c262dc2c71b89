//! [`Channel`]: one queue, its memory and the requests in flight; the only way consumers reach a device.
//!
//! What every driver would otherwise write again is here, once: checks of range and read-only, splits by every limit,
//! read-modify-write of partial blocks, FUA by a flush, zeroes by writes, holding back what does not fit the queue,
//! withdrawing and timing out requests.
//!
//! A request that the device can take as it is goes straight through ([`Slot::Direct`]); any other becomes a [`Job`].

use std::{
    collections::VecDeque,
    io,
    os::fd::BorrowedFd,
    sync::Arc,
    time::{Duration, Instant},
};

use crate::{
    Arena, Buf, Completion, Device, Error, Extent, Info, Mapping, Op, Queue, Request,
    gate::{Gate, Pass},
    job::{Job, Way, margins},
    slots::{Ages, NEVER, Slot, Slots},
};

/// How to open channels on a device.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Payload memory of each channel, in bytes: the bound on what its requests can hold at a time. Some 128 KiB and two
    /// blocks more are mapped for the channel's own use.
    pub memory: usize,
    /// Requests that the queue should hold; the device may offer less.
    pub depth: u16,
}

impl Default for Plan {
    fn default() -> Self {
        Self { memory: 64 << 20, depth: 256 }
    }
}

impl Plan {
    /// Opens `count` channels, each on a queue of its own, with memory that the device knows.
    ///
    /// # Errors
    /// More channels than the device has queues, no memory, or what the device said.
    pub fn open(&self, device: &Arc<dyn Device>, count: usize) -> io::Result<Vec<Channel>> {
        let info = device.info();
        if count == 0 || count > usize::from(info.queues_max) {
            let text = format!("{}: {count} queues asked for, the device has {}", info.target, info.queues_max);
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        let each = (self.memory + reserve(info)).next_multiple_of(crate::PAGE);
        let mapping = Mapping::new(each * count)?;
        device.register(&mapping)?;
        let (arenas, passes) = (mapping.arenas(count), Gate::passes(count));
        let depth = self.depth.clamp(1, info.depth_max);
        arenas.into_iter().zip(passes).map(|(arena, pass)| Channel::open(device, arena, pass, depth)).collect()
    }
}

/// Memory that a channel needs beside what was asked for: its own buffers, and margins for the longest request.
fn reserve(info: &Info) -> usize {
    zeroes_len(info).next_multiple_of(crate::PAGE) + 2 * edges_len(info)
}

/// Two blocks: those that an unaligned request covers in part.
fn edges_len(info: &Info) -> usize {
    (2 * info.block_size as usize).next_multiple_of(crate::PAGE)
}

fn zeroes_len(info: &Info) -> usize {
    // A multiple of any block size, and as long as one transfer may be.
    (128 << 10).min(info.transfer_max as usize / info.block_size as usize * info.block_size as usize)
}

/// What a consumer asks for. Offsets and lengths are bytes and need no alignment; `at` is the first byte.
#[derive(Debug)]
pub enum Io {
    /// Fills `buf`, which [`Channel::alloc`] gave for the same `at`.
    Read {
        /// First byte on the device.
        at: u64,
        /// As long as the request.
        buf: Buf,
    },
    /// Writes `buf`, which [`Channel::alloc`] gave for the same `at`.
    Write {
        /// First byte on the device.
        at: u64,
        /// As long as the request.
        buf: Buf,
        /// Durable before it is done.
        fua: bool,
    },
    /// Makes a range read as zeroes.
    Zero {
        /// First byte on the device.
        at: u64,
        /// Length in bytes.
        len: u64,
        /// Durable before it is done.
        fua: bool,
        /// The space may be given back.
        unmap: bool,
        /// Fail with [`Error::NotSupported`] rather than write zeroes one by one.
        fast: bool,
    },
    /// Hints that a range is not needed any more. Only whole blocks inside the range are touched.
    Discard {
        /// First byte on the device.
        at: u64,
        /// Length in bytes.
        len: u64,
        /// What it changed is durable before it is done.
        fua: bool,
    },
    /// Everything that was done before becomes durable.
    Flush,
    /// Asks what a range holds. The answer starts at `at`, has no gaps and ends within the range, perhaps before its end.
    Status {
        /// First byte on the device.
        at: u64,
        /// Length in bytes.
        len: u64,
        /// The answer, once done.
        extents: Vec<Extent>,
    },
    /// Hints that a range will be read soon.
    Prefetch {
        /// First byte on the device.
        at: u64,
        /// Length in bytes.
        len: u64,
    },
}

/// A request that has ended.
#[derive(Debug)]
pub struct Done {
    /// That of [`Channel::submit`].
    pub tag: u64,
    /// The request, its buffer included; after an error the buffer may be empty ([`Buf::abandon`]).
    pub io: Io,
    /// How it ended.
    pub result: Result<(), Error>,
}

/// One queue of a device, with memory and the requests in flight. Has one owner and never blocks.
///
/// A turn of its owner's loop: [`tick`](Self::tick), any number of [`submit`](Self::submit)s, one
/// [`kick`](Self::kick), [`reap`](Self::reap); before sleeping [`arm`](Self::arm), then wait for
/// [`wake_fd`](Self::wake_fd), at most as long as [`due`](Self::due) says.
#[derive(Debug)]
pub struct Channel {
    /// Before the memory it uses: fields are dropped in this order, and a queue drains when dropped.
    queue: Box<dyn Queue>,
    device: Arc<dyn Device>,
    info: Info,
    arena: Arena,
    zeroes: Buf,
    edges: Buf,
    pass: Pass,
    slots: Slots,
    /// What the queue had no room for, in order.
    held: VecDeque<Request>,
    /// Jobs that wait for the gate, in order.
    waiting: VecDeque<u32>,
    /// The job that has the whole device, and `edges`, to itself.
    alone: Option<u32>,
    /// Finished without the queue, to be told at the next `reap`.
    ready: Vec<Done>,
    completions: Vec<Completion>,
    ages: Ages,
    pushed: bool,
    /// Something was submitted since the last `reap`.
    asked: bool,
    prompt: bool,
}

/// Pieces of one job that are under way at a time: enough to keep a device busy, few enough for others to get in between.
const PIECES: u32 = 16;

impl Channel {
    fn open(device: &Arc<dyn Device>, mut arena: Arena, pass: Pass, depth: u16) -> io::Result<Self> {
        let info = device.info().clone();
        assert!(
            info.block_size.is_power_of_two() && info.block_size <= 1 << 16,
            "block size is a power of two up to 64 KiB"
        );
        assert!(
            info.transfer_max as usize >= crate::PAGE.max(info.block_size as usize),
            "a page or a block can be moved"
        );
        let reserved =
            || io::Error::new(io::ErrorKind::InvalidInput, "too little payload memory for the channel itself");
        let zeroes = arena.alloc(zeroes_len(&info)).ok_or_else(reserved)?;
        let edges = arena.alloc(edges_len(&info)).ok_or_else(reserved)?;
        Ok(Self {
            queue: device.open_queue(depth)?,
            device: Arc::clone(device),
            arena,
            zeroes,
            edges,
            pass,
            slots: Slots::default(),
            held: VecDeque::new(),
            waiting: VecDeque::new(),
            alone: None,
            ready: Vec::new(),
            completions: Vec::with_capacity(depth.into()),
            ages: Ages::new(info.timeout),
            pushed: false,
            asked: false,
            prompt: false,
            info,
        })
    }

    /// Limits and capabilities of the device underneath.
    pub fn info(&self) -> &Info {
        &self.info
    }

    /// Size of the device in bytes, now.
    pub fn capacity(&self) -> u64 {
        self.device.capacity()
    }

    /// Payload memory that no request holds now, in bytes.
    pub fn memory_free(&self) -> usize {
        self.arena.free().saturating_sub(edges_len(&self.info))
    }

    /// Payload memory in all, in bytes. The longest request that ever gets a buffer is as long.
    pub fn memory(&self) -> usize {
        self.arena.capacity() - reserve(&self.info)
    }

    /// Requests that are not done yet.
    pub fn in_flight(&self) -> usize {
        self.slots.in_use
    }

    /// Whether everything had ended at the last [`reap`](Self::reap) after a [`submit`](Self::submit): the device does its
    /// work while it is asked, as a RAM disk does, and a file in the page cache. To ask it for much at a time gains nothing.
    #[inline]
    pub fn is_prompt(&self) -> bool {
        self.prompt
    }

    /// A buffer for a `Read` or `Write` of `len` bytes at `at`, with room around it for the blocks that it covers only in
    /// part. `None`: no memory left now; go on when some request is done and its buffer dropped.
    #[inline]
    pub fn alloc(&mut self, at: u64, len: usize) -> Option<Buf> {
        let (before, after) = margins(at, len as u64, self.info.block_size);
        self.arena.alloc_with_margins(before, len, after)
    }

    /// Starts a request. It always ends as a [`Done`] with the same tag, whatever happens to it.
    #[inline]
    pub fn submit(&mut self, tag: u64, io: Io) {
        self.asked = true;
        if let Some(result) = self.verdict(&io) {
            return self.ready.push(Done { tag, io, result });
        }
        let op = match io {
            Io::Read { at, buf } if self.fits(at, &buf) => Op::Read { at, buf },
            Io::Write { at, buf, fua } if self.fits(at, &buf) && self.can_write_directly(fua) => {
                let fua = fua && self.info.caps.fua;
                if self.is_gated() && !self.enter() {
                    return self.start(tag, Io::Write { at, buf, fua });
                }
                Op::Write { at, buf, fua }
            }
            Io::Flush => Op::Flush,
            io => return self.start(tag, io),
        };
        let slot = self.slots.insert(Slot::Direct { tag, born: NEVER });
        self.issue(Request { tag: slot.into(), op });
    }

    /// One doorbell for everything since the last one.
    #[inline]
    pub fn kick(&mut self) {
        if self.pushed {
            self.pushed = false;
            self.queue.kick();
        }
    }

    /// Appends what has ended since the last call, and sets going what waited for it.
    #[inline]
    pub fn reap(&mut self, done: &mut Vec<Done>) {
        done.append(&mut self.ready);
        self.queue.reap(&mut self.completions);
        if !self.completions.is_empty() {
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
            self.admit();
        }
        self.kick();
        done.append(&mut self.ready);
        if std::mem::take(&mut self.asked) {
            self.prompt = self.slots.in_use == 0;
        }
    }

    /// Readable when the channel was [armed](Self::arm) and something has ended. `None`: it can only be polled.
    pub fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        self.queue.wake_fd()
    }

    /// Asks for a wake-up. `false`: something has ended already, reap first.
    pub fn arm(&mut self) -> bool {
        self.ready.is_empty() && self.queue.arm()
    }

    /// Come back after this time at the latest, woken or not. `None`: only a wake-up matters.
    pub fn due(&self) -> Option<Duration> {
        if !self.waiting.is_empty() {
            // What we wait for may happen on another channel, which wakes nobody here.
            return Some(Duration::from_millis(1));
        }
        if self.slots.in_use == 0 { None } else { self.ages.unit }
    }

    /// Tells the time, at every turn. A request that has taken longer than [`Info::timeout`] makes the channel give the
    /// device up: everything in flight ends with [`Error::Gone`].
    #[inline]
    pub fn tick(&mut self, now: Instant) {
        if self.ages.tick(now) {
            self.queue.give_up();
        }
    }

    /// Whether the device is dead for good: whatever is submitted ends with [`Error::Gone`].
    pub fn is_dead(&self) -> bool {
        self.queue.is_dead()
    }

    /// Gives the device up at once: everything in flight ends with [`Error::Gone`], at the next `reap`s.
    pub fn give_up(&mut self) {
        self.queue.give_up();
    }

    /// Withdraws the requests whose tags `which` picks: nothing of them reaches the device that has not yet. They end with
    /// [`Error::Cancelled`], or as the device says when it already has them.
    pub fn cancel(&mut self, which: impl Fn(u64) -> bool) {
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
                Slot::Direct { tag, .. } => *tag,
                Slot::Job(job) => job.tag,
                Slot::Free { .. } => unreachable!("a held request has a slot"),
            };
            if which(tag) {
                let Request { tag, op } = request;
                self.complete(Completion { tag, op, result: Err(Error::Cancelled) }, &mut done);
            } else {
                self.held.push_back(request);
            }
        }
        self.ready.append(&mut done);
    }

    /// How the request ends if that needs no device.
    #[inline]
    fn verdict(&self, io: &Io) -> Option<Result<(), Error>> {
        let caps = &self.info.caps;
        let (at, len, changes) = match io {
            Io::Read { at, buf } => (*at, buf.len() as u64, false),
            Io::Write { at, buf, .. } => (*at, buf.len() as u64, true),
            Io::Zero { at, len, .. } | Io::Discard { at, len, .. } => (*at, *len, true),
            Io::Status { at, len, .. } | Io::Prefetch { at, len } => (*at, *len, false),
            Io::Flush => return (!caps.flush).then_some(Ok(())),
        };
        if changes && caps.read_only {
            return Some(Err(Error::ReadOnly));
        }
        if at.checked_add(len).is_none_or(|end| end > self.device.capacity()) {
            return Some(Err(Error::OutOfRange));
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

    /// Whether a read or write can go to the device as it is.
    #[inline]
    fn fits(&self, at: u64, buf: &Buf) -> bool {
        let mask = u64::from(self.info.block_size) - 1;
        (at | buf.len() as u64) & mask == 0 && buf.len() <= self.info.transfer_max as usize
    }

    #[inline]
    fn can_write_directly(&self, fua: bool) -> bool {
        !fua || self.info.caps.fua || !self.info.caps.flush
    }

    /// Whether changes must be counted, because somebody may have to merge into a block.
    #[inline]
    fn is_gated(&self) -> bool {
        self.info.block_size > 1
    }

    /// Begins a change that covers whole blocks, unless somebody merges or waits to.
    #[inline]
    fn enter(&self) -> bool {
        self.waiting.is_empty() && self.pass.enter()
    }

    /// Makes a job of what cannot go straight through.
    #[cold]
    fn start(&mut self, tag: u64, io: Io) {
        let job = match Job::new(tag, io, &self.info) {
            Ok(job) => job,
            Err(done) => return self.ready.push(*done),
        };
        let way = job.way;
        let slot = self.slots.insert(Slot::Job(job));
        if way == Way::Free || !self.is_gated() {
            return self.run(slot);
        }
        self.waiting.push_back(slot);
        self.admit();
    }

    /// Lets waiting jobs through the gate, in order.
    #[cold]
    fn admit(&mut self) {
        while let Some(&slot) = self.waiting.front() {
            let job = self.slots.job(slot);
            if job.error.is_some() {
                // Withdrawn while it waited: nobody may go on finding the gate closed for its sake.
                if self.alone.is_none() {
                    self.pass.open();
                }
            } else if job.way == Way::Alone {
                if self.alone.is_some() || !self.pass.close() || !self.pass.is_quiet() {
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
    }

    /// Sends pieces of a job's stage, and goes to the next stage when all have come back.
    fn run(&mut self, slot: u32) {
        loop {
            let job = self.slots.job(slot);
            while job.error.is_none() && job.out < PIECES {
                let Some(op) = job.piece(&self.info, &self.zeroes, &self.edges) else { break };
                job.out += 1;
                let request = Request { tag: slot.into(), op };
                // `issue`, spelled out: `job` borrows the slots.
                if self.held.is_empty() {
                    self.ages.renew(&mut job.born);
                    self.pushed = true;
                    if let Err(request) = self.queue.push(request) {
                        self.held.push_back(request);
                    }
                } else {
                    self.held.push_back(request);
                }
            }
            if job.out > 0 {
                return;
            }
            if job.error.is_some() || !job.next_stage(&self.info, &mut self.edges) {
                return self.finish(slot);
            }
        }
    }

    fn finish(&mut self, slot: u32) {
        let Slot::Job(job) = self.slots.remove(slot) else { unreachable!("only jobs finish here") };
        self.ages.end(job.born);
        if job.inside {
            self.pass.leave();
        }
        if self.alone == Some(slot) {
            self.alone = None;
            self.pass.open();
        }
        self.ready.push(job.done(self.info.block_size));
    }

    /// Pushes a request of a new direct slot, or holds it back.
    #[inline]
    fn issue(&mut self, request: Request) {
        if !self.held.is_empty() {
            return self.held.push_back(request);
        }
        if let Slot::Direct { born, .. } = &mut self.slots.list[request.tag as usize] {
            self.ages.renew(born);
        }
        self.pushed = true;
        if let Err(request) = self.queue.push(request) {
            self.held.push_back(request);
        }
    }

    #[cold]
    fn push_held(&mut self) {
        while let Some(request) = self.held.pop_front() {
            let slot = request.tag as usize;
            if let Err(request) = self.queue.push(request) {
                return self.held.push_front(request);
            }
            self.pushed = true;
            // Its time starts now: what waits for a slow device is not what the device has lost.
            match &mut self.slots.list[slot] {
                Slot::Direct { born, .. } => self.ages.renew(born),
                Slot::Job(job) => self.ages.renew(&mut job.born),
                Slot::Free { .. } => unreachable!("a held request has a slot"),
            }
        }
    }

    #[inline]
    fn complete(&mut self, completion: Completion, done: &mut Vec<Done>) {
        let Completion { tag, op, result } = completion;
        let slot = tag as u32;
        match &mut self.slots.list[tag as usize] {
            Slot::Direct { tag, born } => {
                let tag = *tag;
                self.ages.end(*born);
                self.slots.remove(slot);
                let io = match op {
                    Op::Read { at, buf } => Io::Read { at, buf },
                    Op::Write { at, buf, fua } => {
                        if self.is_gated() {
                            self.pass.leave();
                        }
                        Io::Write { at, buf, fua }
                    }
                    Op::Flush => Io::Flush,
                    op => unreachable!("{op:?} is never direct"),
                };
                done.push(Done { tag, io, result });
            }
            Slot::Job(job) => {
                job.out -= 1;
                self.ages.renew(&mut job.born);
                let memory_lost = job.take_back(op, result);
                if memory_lost {
                    // The device is given up and may still write to what was lent to it.
                    self.edges.abandon();
                    self.zeroes.abandon();
                }
                self.run(slot);
            }
            Slot::Free { .. } => panic!("a queue completes each request once, with its own tag"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        fault::{Fault, Faults},
        memory::Memory,
    };

    fn open(device: impl Device + 'static, depth: u16) -> Channel {
        let device: Arc<dyn Device> = Arc::new(device);
        Plan { memory: 1 << 20, depth }.open(&device, 1).unwrap().remove(0)
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

    #[test]
    fn a_request_that_is_never_answered_ends_when_its_time_is_up() {
        let mut channel = open(Fault::new(awkward(), Faults { lost: 1.0, ..Faults::new(1) }), 8);
        let start = Instant::now();
        channel.tick(start);
        let buf = channel.alloc(0, 4096).unwrap();
        channel.submit(0, Io::Read { at: 0, buf });
        let mut done = Vec::new();
        // However long nobody looked (the process was stopped, the machine slept), that is not held against the device.
        channel.tick(start + Duration::from_secs(3600));
        channel.reap(&mut done);
        assert!(done.is_empty());
        for second in 1..7 {
            channel.tick(start + Duration::from_secs(3600 + second));
        }
        channel.reap(&mut done);
        assert!(done.is_empty());
        for second in 7..12 {
            channel.tick(start + Duration::from_secs(3600 + second));
        }
        channel.reap(&mut done);
        assert_eq!(done[0].result, Err(Error::Gone));
    }

    #[test]
    fn what_is_withdrawn_before_it_reaches_the_device_never_does() {
        let device: Arc<dyn Device> =
            Arc::new(Fault::new(Memory::new(1 << 20), Faults { delay_max: 3, ..Faults::new(7) }));
        let mut channel = Plan { memory: 1 << 20, depth: 1 }.open(&device, 1).unwrap().remove(0);
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
