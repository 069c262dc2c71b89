//! [`Pair`]: a submission queue and its completion queue, with the commands in flight.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU8, AtomicU16, AtomicU32, Ordering},
    },
};

use blkdev::{Mapping, window::Window};
use blkdev_vfio::{Bar, Translation};

use crate::spec::{COMMAND_LEN, COMPLETION_LEN, Command, Completion};

/// The driver side of a queue pair. `T` owns the resources of a command, and comes back when the command has ended.
#[derive(Debug)]
pub(crate) struct Pair<T> {
    id: u16,
    layout: Layout,
    window: Window,
    addresses: Addresses,
    bells: Bells,
    /// Submission queue entry of the next command.
    tail: u16,
    /// The tail last written to the doorbell.
    rung: u16,
    /// Completion queue entry of the next completion.
    head: u16,
    /// The head last written to the doorbell.
    acknowledged: u16,
    /// The phase tag of new completions.
    phase: bool,
    slots: Box<[Slot<T>]>,
    /// Free slots, last used on top.
    free: Vec<u16>,
    /// Number of commands so far, modulo 2^32.
    pushed: u32,
    flights: Arc<Flights>,
}

#[derive(Debug)]
struct Slot<T> {
    /// Number of commands that this slot has had.
    sequence: u16,
    /// The command in it was also sent before the last reset of the controller.
    again: bool,
    /// Number of commands of the pair before this one, modulo 2^32.
    order: u32,
    owner: Option<T>,
}

/// A command identifier has the slot in its lower bits and the slot's sequence number above. So a completion that arrives
/// twice, or after its command was abandoned, is recognised.
const SLOT_BITS: u32 = 10;

/// The largest queue size. One entry stays free, so an identifier is never 0xffff, which the error log uses for "none".
pub(crate) const SIZE_MAX: u16 = 1 << SLOT_BITS;

/// Layout of a pair's memory: commands, completions, and list memory (PRPs or ranges) for each command.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Layout {
    /// Entries of each queue, 2 to [`SIZE_MAX`]. One entry less can be in use.
    pub(crate) size: u16,
    /// Bytes of list memory for each command: a power of two, at most a page.
    pub(crate) list_len: usize,
    /// The controller's memory page in bytes.
    pub(crate) page: usize,
}

impl Layout {
    pub(crate) fn slots(self) -> u16 {
        self.size - 1
    }

    fn completions(self) -> usize {
        (usize::from(self.size) * COMMAND_LEN).next_multiple_of(self.page)
    }

    fn lists(self) -> usize {
        self.completions() + (usize::from(self.size) * COMPLETION_LEN).next_multiple_of(self.page)
    }

    pub(crate) fn len(self) -> usize {
        self.lists() + usize::from(self.size) * self.list_len
    }
}

/// Translates addresses of this process to the addresses that the device uses.
#[derive(Clone, Debug)]
pub(crate) struct Addresses(pub(crate) Option<Arc<Translation>>);

impl Addresses {
    #[inline]
    pub(crate) fn bus(&self, address: u64) -> u64 {
        match &self.0 {
            None => address,
            Some(translation) => translation.physical(address),
        }
    }

    pub(crate) fn is_translated(&self) -> bool {
        self.0.is_some()
    }
}

/// The two doorbells of a pair.
#[derive(Debug)]
pub(crate) struct Bells {
    bar: Arc<dyn Bar>,
    submission: usize,
    completion: usize,
}

impl Bells {
    /// `stride` is the distance between doorbells in bytes.
    pub(crate) fn new(bar: &Arc<dyn Bar>, id: u16, stride: usize) -> Self {
        let submission = Self::end(id, stride);
        Self { bar: Arc::clone(bar), submission, completion: submission + stride }
    }

    /// The end of the doorbells of the first `count` pairs.
    pub(crate) fn end(count: u16, stride: usize) -> usize {
        0x1000 + 2 * usize::from(count) * stride
    }
}

/// The commands in flight, for the thread that looks for overdue commands. For each slot: 0, or the time when the command was
/// pushed (never 0) and its identifier.
#[derive(Debug)]
pub(crate) struct Flights {
    /// The current tick, updated by the watching thread.
    pub(crate) now: Arc<AtomicU32>,
    slots: Box<[AtomicU32]>,
    stage: AtomicU8,
    /// After a reset, commands of at least this age in ticks are not sent again.
    old: AtomicU16,
}

/// Progress of a pair, from a look at its [`Flights`] at every tick.
#[derive(Debug, Default)]
pub(crate) struct Pace {
    /// The flights at the last look.
    seen: Vec<u32>,
    silent: u16,
}

impl Pace {
    /// Called at every tick. Returns the number of ticks with commands in flight and without a completion.
    pub(crate) fn look(&mut self, flights: &Flights) -> u16 {
        let mut found = flights.slots.iter().map(|slot| slot.load(Ordering::Relaxed));
        if self.seen.len() != flights.slots.len() {
            self.seen = vec![0; flights.slots.len()];
        }
        let (mut was_busy, mut is_busy, mut has_moved) = (false, false, false);
        for seen in &mut self.seen {
            let now = found.next().unwrap_or(0);
            was_busy |= *seen != 0;
            is_busy |= now != 0;
            // A reused slot has another identifier or time.
            has_moved |= *seen != 0 && *seen != now;
            *seen = now;
        }
        self.silent = match (is_busy, has_moved) {
            (false, _) | (true, true) => 0,
            // A command pushed since the last look has waited for less than a tick.
            (true, false) if !was_busy => 1,
            (true, false) => self.silent.saturating_add(1),
        };
        self.silent
    }

    /// The last result of [`look`](Self::look).
    pub(crate) fn silent(&self) -> u16 {
        self.silent
    }
}

/// State of a pair during and after a reset of the controller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// Normal operation.
    Running,
    /// The controller is being reset: the owner must not touch the pair. Set by the resetting thread.
    Stopped,
    /// The controller runs again without any I/O queues: the owner must [restart](Pair::restart) the pair.
    Cleared,
    /// The owner has restarted the pair. It runs once it is created on the controller.
    Ready,
}

impl Flights {
    #[inline]
    pub(crate) fn stage(&self) -> Stage {
        // Acquire: orders accesses to the pair after those before the stage was reached.
        match self.stage.load(Ordering::Acquire) {
            0 => Stage::Running,
            1 => Stage::Stopped,
            2 => Stage::Cleared,
            _ => Stage::Ready,
        }
    }

    pub(crate) fn reach(&self, stage: Stage) {
        // SeqCst: a queue first empties its eventfd and then loads the stage before it sleeps.
        self.stage.store(stage as u8, Ordering::SeqCst);
    }

    /// Sets the age in ticks from which commands are not sent again after a reset. Called before [`Stage::Cleared`].
    pub(crate) fn retire(&self, old: u16) {
        self.old.store(old, Ordering::Relaxed);
    }

    /// Returns the age [set](Self::retire) last.
    pub(crate) fn old(&self) -> u16 {
        self.old.load(Ordering::Relaxed)
    }

    /// Identifiers of the commands that were pushed at least `age` ticks ago.
    pub(crate) fn older(&self, age: u16) -> impl Iterator<Item = u16> {
        let now = self.now.load(Ordering::Relaxed) as u16;
        self.slots.iter().filter_map(move |slot| {
            let (time, id) = split(slot.load(Ordering::Relaxed));
            (time != 0 && now.wrapping_sub(time) >= age).then_some(id)
        })
    }
}

fn split(flight: u32) -> (u16, u16) {
    (flight as u16, (flight >> 16) as u16)
}

/// An invalid completion queue entry.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Nonsense(Completion);

impl fmt::Display for Nonsense {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Completion { id, sq, sq_head, .. } = self.0;
        write!(
            f,
            "a completion of command {id:#06x}, which is not in flight or has ended before (submission queue {sq}, head \
             {sq_head})"
        )
    }
}

impl<T> Pair<T> {
    /// Creates an empty pair in `mapping`, which has room for `layout` and is mapped for DMA.
    pub(crate) fn new(
        id: u16,
        layout: Layout,
        mapping: &Arc<Mapping>,
        addresses: &Addresses,
        bells: Bells,
        now: &Arc<AtomicU32>,
    ) -> Self {
        assert!((2..=SIZE_MAX).contains(&layout.size) && layout.len() <= mapping.len(), "the pair fits in its memory");
        let slots = layout.slots();
        Self {
            id,
            layout,
            window: Window::zeroed(mapping, 0, layout.len()),
            addresses: addresses.clone(),
            bells,
            tail: 0,
            rung: 0,
            head: 0,
            acknowledged: 0,
            phase: true,
            slots: (0..slots).map(|_| Slot { sequence: 0, again: false, order: 0, owner: None }).collect(),
            pushed: 0,
            free: (0..slots).rev().collect(),
            flights: Arc::new(Flights {
                now: Arc::clone(now),
                slots: (0..slots).map(|_| AtomicU32::new(0)).collect(),
                stage: AtomicU8::new(Stage::Running as u8),
                old: AtomicU16::new(u16::MAX),
            }),
        }
    }

    pub(crate) fn id(&self) -> u16 {
        self.id
    }

    /// Device addresses of the submission and the completion queue.
    pub(crate) fn addresses(&self) -> (u64, u64) {
        let bus = |at| self.addresses.bus(self.window.iova(at).get());
        (bus(0), bus(self.layout.completions()))
    }

    pub(crate) fn mapping(&self) -> &Arc<Mapping> {
        self.window.mapping()
    }

    /// Its positions, for log messages.
    pub(crate) fn describe(&self) -> String {
        let Self { id, tail, rung, head, acknowledged, phase, flights, .. } = self;
        let (stage, count) = (flights.stage(), self.slots.len() - self.free.len());
        format!(
            "queue {id} ({stage:?}): {count} commands at the device, submission tail {tail} (doorbell {rung}), completion head \
             {head} (doorbell {acknowledged}, phase {})",
            u8::from(*phase)
        )
    }

    pub(crate) fn flights(&self) -> &Arc<Flights> {
        &self.flights
    }

    #[inline]
    pub(crate) fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Adds a command, built by `describe`, which can use the slot's list memory. The controller sees it after the next
    /// [`publish`](Self::publish).
    #[inline]
    pub(crate) fn push(&mut self, owner: T, describe: impl FnOnce(&T, List<'_>) -> Command) -> Result<u16, T> {
        let Some(slot) = self.free.pop() else { return Err(owner) };
        let at = self.list(slot);
        let command = describe(
            &owner,
            List {
                window: &self.window,
                addresses: &self.addresses,
                at,
                len: self.layout.list_len,
                page: self.layout.page,
            },
        );
        let Slot { sequence, again, order, owner: place } = &mut self.slots[usize::from(slot)];
        (*order, self.pushed) = (self.pushed, self.pushed.wrapping_add(1));
        *sequence = sequence.wrapping_add(1);
        *again = false;
        *place = Some(owner);
        let id = slot | *sequence << SLOT_BITS;
        let now = self.flights.now.load(Ordering::Relaxed) as u16;
        self.flights.slots[usize::from(slot)].store(u32::from(now) | u32::from(id) << 16, Ordering::Relaxed);

        let entry = usize::from(self.tail) * COMMAND_LEN;
        let command = command.id(id);
        for (n, pair) in command.0.chunks_exact(2).enumerate() {
            self.window.store64(entry + 8 * n, u64::from(pair[0]) | u64::from(pair[1]) << 32, Ordering::Relaxed);
        }
        // The queue has room: fewer commands are in flight than it has entries, and the controller reads them in order.
        self.tail = if self.tail + 1 == self.layout.size { 0 } else { self.tail + 1 };
        Ok(id)
    }

    /// Rings the doorbell for all commands pushed since the last call.
    #[inline]
    pub(crate) fn publish(&mut self) {
        if self.tail != self.rung {
            self.rung = self.tail;
            self.bells.bar.write32(self.bells.submission, self.tail.into());
        }
    }

    #[inline]
    fn next(&self) -> usize {
        self.layout.completions() + usize::from(self.head) * COMPLETION_LEN
    }

    /// Whether a completion is pending.
    #[inline]
    pub(crate) fn has_completion(&self) -> bool {
        Completion::phase(self.window.load64(self.next() + 8, Ordering::Acquire)) == self.phase
    }

    /// Returns the next completed command. The caller [acknowledges](Self::acknowledge) a batch at its end.
    #[inline]
    pub(crate) fn pop(&mut self) -> Result<Option<(T, Completion)>, Nonsense> {
        let at = self.next();
        // Load the half with the phase tag first, so that the other half is at least as new.
        let high = self.window.load64(at + 8, Ordering::Acquire);
        if Completion::phase(high) != self.phase {
            return Ok(None);
        }
        let completion = Completion::parse(self.window.load64(at, Ordering::Relaxed), high);
        let slot = completion.id & (SIZE_MAX - 1);
        let owner = match self.slots.get_mut(usize::from(slot)) {
            Some(Slot { sequence, owner, .. })
                if slot | *sequence << SLOT_BITS == completion.id
                    && completion.sq == self.id
                    && completion.sq_head < self.layout.size =>
            {
                owner.take()
            }
            _ => None,
        };
        let Some(owner) = owner else { return Err(Nonsense(completion)) };
        self.flights.slots[usize::from(slot)].store(0, Ordering::Relaxed);
        self.free.push(slot);
        self.head += 1;
        if self.head == self.layout.size {
            (self.head, self.phase) = (0, !self.phase);
        }
        Ok(Some((owner, completion)))
    }

    /// Returns the entries of popped completions to the controller.
    #[inline]
    pub(crate) fn acknowledge(&mut self) {
        if self.head != self.acknowledged {
            self.acknowledged = self.head;
            self.bells.bar.write32(self.bells.completion, self.head.into());
        }
    }

    /// Removes and returns all commands in flight, permanently, in the order in which they were pushed.
    pub(crate) fn take_all(&mut self) -> impl Iterator<Item = T> + use<T> {
        for flight in &self.flights.slots {
            flight.store(0, Ordering::Relaxed);
        }
        self.free = (0..self.layout.slots()).rev().collect();
        let taken: Vec<T> =
            self.in_order().into_iter().filter_map(|n| self.slots[usize::from(n)].owner.take()).collect();
        taken.into_iter()
    }

    /// Starts over after a reset of the controller. Returns the commands that were in flight, in the order in which they were
    /// pushed, each with a flag: true if it should be sent again. It should not after `old` ticks, or if it was sent twice
    /// already.
    pub(crate) fn restart(&mut self, old: u16) -> Vec<(T, bool)> {
        (self.tail, self.rung, self.head, self.acknowledged, self.phase) = (0, 0, 0, 0, true);
        let (start, end) = (self.layout.completions(), self.layout.lists());
        self.window.clear(start, (end - start) / 8);
        let old: Vec<u16> = self.flights.older(old).map(|id| id & (SIZE_MAX - 1)).collect();
        let again: Vec<bool> =
            self.in_order().into_iter().map(|n| !self.slots[usize::from(n)].again && !old.contains(&n)).collect();
        self.take_all().zip(again).collect()
    }

    /// The slots in use, in the order in which their commands were pushed.
    fn in_order(&self) -> Vec<u16> {
        let used = self.slots.iter().zip(0..).filter(|(slot, _)| slot.owner.is_some());
        let mut used: Vec<_> = used.map(|(slot, n)| (self.pushed.wrapping_sub(slot.order), n)).collect();
        used.sort_unstable_by_key(|(age, _)| std::cmp::Reverse(*age));
        used.into_iter().map(|(_, n)| n).collect()
    }

    /// As [`push`](Self::push), for a command that [`restart`](Self::restart) returned.
    pub(crate) fn push_again(&mut self, owner: T, describe: impl FnOnce(&T, List<'_>) -> Command) {
        let Ok(id) = self.push(owner, describe) else {
            unreachable!("the queue has room for commands that were in flight before")
        };
        self.slots[usize::from(id & (SIZE_MAX - 1))].again = true;
    }

    fn list(&self, slot: u16) -> usize {
        self.layout.lists() + usize::from(slot) * self.layout.list_len
    }

    /// A copy of the list memory of a completed command, where the controller may have written data.
    pub(crate) fn answer<const N: usize>(&self, id: u16) -> [u8; N] {
        assert!(N <= self.layout.list_len, "the data fits in the list memory");
        self.window.read(self.list(id & (SIZE_MAX - 1)))
    }
}

/// Memory for PRP lists or ranges of a command.
#[derive(Debug)]
pub(crate) struct List<'a> {
    window: &'a Window,
    addresses: &'a Addresses,
    at: usize,
    len: usize,
    page: usize,
}

impl List<'_> {
    /// The address of the memory, for the device.
    #[inline]
    pub(crate) fn address(&self) -> u64 {
        self.addresses.bus(self.window.iova(self.at).get())
    }

    /// Writes 64 bits, little-endian.
    #[inline]
    pub(crate) fn put(&self, index: usize, value: u64) {
        assert!(8 * index < self.len, "the list has room");
        self.window.store64(self.at + 8 * index, value, Ordering::Relaxed);
    }

    /// Clears the first `len` bytes, a multiple of 8.
    pub(crate) fn clear(&self, len: usize) {
        assert!(len <= self.len, "the list has room");
        self.window.clear(self.at, len / 8);
    }

    /// Sets the command's data pointer to `len` bytes of payload from `address` on. Up to two pages fit in the command itself;
    /// more need a PRP list (base, 4.1.1). If `sgl` is set, a single SGL descriptor is used instead.
    #[inline]
    pub(crate) fn payload(&self, command: Command, address: u64, len: usize, sgl: bool) -> Command {
        let page = self.page as u64;
        let bus = |address| self.addresses.bus(address);
        let (end, second) = (address + len as u64, (address / page + 1) * page);
        if end <= second {
            return command.prps(bus(address), 0);
        }
        if end <= second + page {
            return command.prps(bus(address), bus(second));
        }
        if sgl {
            return command.sgl(address, len as u32);
        }
        for (n, at) in (second..end).step_by(self.page).enumerate() {
            self.put(n, bus(at));
        }
        command.prps(bus(address), self.address())
    }
}
