//! [`Pair`]: a submission queue with its completion queue, and the commands that are in them.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU8, AtomicU16, AtomicU32, Ordering},
    },
};

use blkdev::Mapping;
use blkdev_vfio::{Bar, Translation};

use crate::{
    spec::{COMMAND_LEN, COMPLETION_LEN, Command, Completion},
    window::Window,
};

/// A queue pair as the driver has it. `T` owns whatever a command needs, and comes back when the command has ended.
#[derive(Debug)]
pub(crate) struct Pair<T> {
    id: u16,
    layout: Layout,
    window: Window,
    addresses: Addresses,
    bells: Bells,
    /// Where the next command goes.
    tail: u16,
    /// The tail that the controller knows.
    rung: u16,
    /// Where the next completion comes.
    head: u16,
    /// The head that the controller knows.
    acknowledged: u16,
    /// The phase tag of completions that are new.
    phase: bool,
    slots: Box<[Slot<T>]>,
    /// Slots that are free, last used on top.
    free: Vec<u16>,
    flights: Arc<Flights>,
}

#[derive(Debug)]
struct Slot<T> {
    /// Counts the commands that this slot has had.
    sequence: u16,
    /// What it holds was sent before the controller was reset, too.
    again: bool,
    owner: Option<T>,
}

/// A command identifier is the slot in its lower bits and the slot's count above, so that a completion that comes twice, or
/// after its command was given up, is known for what it is.
const SLOT_BITS: u32 = 10;

/// The largest queue. With one place left free, an identifier is never 0xffff, which the error log uses for "none".
pub(crate) const SIZE_MAX: u16 = 1 << SLOT_BITS;

/// How the memory of a pair is divided: commands, completions, and for each command memory for a list of pages or ranges.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Layout {
    /// Places in each queue, 2 to [`SIZE_MAX`]. One less can be in use.
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

/// From addresses of this process to those that the device wants.
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

/// A pair's two doorbells.
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

    /// Where the doorbells of the first `count` pairs end.
    pub(crate) fn end(count: u16, stride: usize) -> usize {
        0x1000 + 2 * usize::from(count) * stride
    }
}

/// What is in flight, for a thread that looks after commands that take too long: for each slot 0, or the time when the
/// command was pushed (never 0) and its identifier.
#[derive(Debug)]
pub(crate) struct Flights {
    /// Ticks; its owner counts them.
    pub(crate) now: Arc<AtomicU32>,
    slots: Box<[AtomicU32]>,
    stage: AtomicU8,
    /// After a reset, commands that have taken this many ticks are not sent again.
    old: AtomicU16,
}

/// What a thread that looks at a pair's [`Flights`] at every tick knows of them.
#[derive(Debug, Default)]
pub(crate) struct Pace {
    /// The flights at the last look.
    seen: Vec<u32>,
    silent: u16,
}

impl Pace {
    /// To be called at every tick: for how many ticks commands have been in flight and none has ended.
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
            // A slot that is used again has another identifier or time.
            has_moved |= *seen != 0 && *seen != now;
            *seen = now;
        }
        self.silent = match (is_busy, has_moved) {
            (false, _) | (true, true) => 0,
            // What was pushed since the last look has waited for a part of a tick.
            (true, false) if !was_busy => 1,
            (true, false) => self.silent.saturating_add(1),
        };
        self.silent
    }

    /// What [`look`](Self::look) returned last.
    pub(crate) fn silent(&self) -> u16 {
        self.silent
    }
}

/// What a pair's owner may do with it, while the controller is reset and afterwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// All is well.
    Running,
    /// Nothing: the controller is being reset. So says whoever resets it.
    Stopped,
    /// The controller is up again, and knows of no pair: its owner has to [restart](Pair::restart) it.
    Cleared,
    /// So its owner has, and the controller is to be told of it; then it runs.
    Ready,
}

impl Flights {
    #[inline]
    pub(crate) fn stage(&self) -> Stage {
        // Acquire: what was done before the stage was reached can be relied upon.
        match self.stage.load(Ordering::Acquire) {
            0 => Stage::Running,
            1 => Stage::Stopped,
            2 => Stage::Cleared,
            _ => Stage::Ready,
        }
    }

    pub(crate) fn reach(&self, stage: Stage) {
        // SeqCst: a queue that goes to sleep first empties its eventfd and then looks at the stage.
        self.stage.store(stage as u8, Ordering::SeqCst);
    }

    /// Sets the age, in ticks, from which commands are not sent again after a reset. Before [`Stage::Cleared`].
    pub(crate) fn retire(&self, old: u16) {
        self.old.store(old, Ordering::Relaxed);
    }

    /// What was [set](Self::retire).
    pub(crate) fn old(&self) -> u16 {
        self.old.load(Ordering::Relaxed)
    }

    /// Commands that were pushed at least `age` ticks ago: identifiers.
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

/// What a completion queue entry said that cannot be.
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
    /// An empty pair in `mapping`, which has room for `layout` and which the device can reach.
    pub(crate) fn new(
        id: u16,
        layout: Layout,
        mapping: &Arc<Mapping>,
        addresses: &Addresses,
        bells: Bells,
        now: &Arc<AtomicU32>,
    ) -> Self {
        assert!((2..=SIZE_MAX).contains(&layout.size) && layout.len() <= mapping.len(), "a pair fits its memory");
        let slots = layout.slots();
        Self {
            id,
            layout,
            window: Window::zeroed(mapping),
            addresses: addresses.clone(),
            bells,
            tail: 0,
            rung: 0,
            head: 0,
            acknowledged: 0,
            phase: true,
            slots: (0..slots).map(|_| Slot { sequence: 0, again: false, owner: None }).collect(),
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

    /// Where commands and completions lie, for the device.
    pub(crate) fn addresses(&self) -> (u64, u64) {
        let bus = |at| self.addresses.bus(self.window.iova(at));
        (bus(0), bus(self.layout.completions()))
    }

    pub(crate) fn mapping(&self) -> &Arc<Mapping> {
        self.window.mapping()
    }

    pub(crate) fn flights(&self) -> &Arc<Flights> {
        &self.flights
    }

    #[inline]
    pub(crate) fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Takes a command, which `describe` makes; it can use the slot's list memory. The controller hears of it at the next
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
        let Slot { sequence, again, owner: place } = &mut self.slots[usize::from(slot)];
        *sequence = sequence.wrapping_add(1);
        *again = false;
        *place = Some(owner);
        let id = slot | *sequence << SLOT_BITS;
        let now = self.flights.now.load(Ordering::Relaxed) as u16;
        self.flights.slots[usize::from(slot)].store(u32::from(now) | u32::from(id) << 16, Ordering::Relaxed);

        let entry = usize::from(self.tail) * COMMAND_LEN;
        let command = command.id(id);
        for (n, pair) in command.0.chunks_exact(2).enumerate() {
            self.window.store64(entry + 8 * n, u64::from(pair[0]) | u64::from(pair[1]) << 32);
        }
        // There is room: fewer commands are in flight than the queue has places, and the controller reads them in order.
        self.tail = if self.tail + 1 == self.layout.size { 0 } else { self.tail + 1 };
        Ok(id)
    }

    /// Rings the doorbell for everything pushed since the last time.
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

    /// Whether a completion waits.
    #[inline]
    pub(crate) fn has_completion(&self) -> bool {
        Completion::phase(self.window.load64(self.next() + 8, Ordering::Acquire)) == self.phase
    }

    /// The next command that has ended. To be [acknowledged](Self::acknowledge) at the end of a batch.
    #[inline]
    pub(crate) fn pop(&mut self) -> Result<Option<(T, Completion)>, Nonsense> {
        let at = self.next();
        // The half with the phase tag first, so that the other one is at least as new.
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

    /// Gives the places of completions that were popped back to the controller.
    #[inline]
    pub(crate) fn acknowledge(&mut self) {
        if self.head != self.acknowledged {
            self.acknowledged = self.head;
            self.bells.bar.write32(self.bells.completion, self.head.into());
        }
    }

    /// Everything that is in flight, for good.
    pub(crate) fn take_all(&mut self) -> impl Iterator<Item = T> {
        for flight in &self.flights.slots {
            flight.store(0, Ordering::Relaxed);
        }
        self.free = (0..self.layout.slots()).rev().collect();
        self.slots.iter_mut().filter_map(|slot| slot.owner.take())
    }

    /// Begins anew, as a controller that was reset does. What was in flight comes back, and whether it is worth being sent
    /// once more: not when it has taken `old` ticks or has been sent twice.
    pub(crate) fn restart(&mut self, old: u16) -> Vec<(T, bool)> {
        (self.tail, self.rung, self.head, self.acknowledged, self.phase) = (0, 0, 0, 0, true);
        for at in (self.layout.completions()..self.layout.lists()).step_by(8) {
            self.window.store64(at, 0);
        }
        let old: Vec<u16> = self.flights.older(old).map(|id| id & (SIZE_MAX - 1)).collect();
        let slots = self.slots.iter_mut().zip(0..);
        let back = slots.filter_map(|(slot, n)| Some((slot.owner.take()?, !slot.again && !old.contains(&n)))).collect();
        self.take_all().for_each(drop);
        back
    }

    /// As [`push`](Self::push), for what [`restart`](Self::restart) gave back.
    pub(crate) fn push_again(&mut self, owner: T, describe: impl FnOnce(&T, List<'_>) -> Command) {
        let Ok(id) = self.push(owner, describe) else { unreachable!("there is room for what was in flight before") };
        self.slots[usize::from(id & (SIZE_MAX - 1))].again = true;
    }

    fn list(&self, slot: u16) -> usize {
        self.layout.lists() + usize::from(slot) * self.layout.list_len
    }

    /// A copy of the list memory of a command that has ended, where the controller may have put something.
    pub(crate) fn answer<const N: usize>(&self, id: u16) -> [u8; N] {
        assert!(N <= self.layout.list_len, "an answer fits list memory");
        self.window.read(self.list(id & (SIZE_MAX - 1)))
    }
}

/// Memory for what a command is too small for.
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
        self.addresses.bus(self.window.iova(self.at))
    }

    /// Puts 64 bits, little-endian.
    #[inline]
    pub(crate) fn put(&self, index: usize, value: u64) {
        assert!(8 * index < self.len, "a list has room");
        self.window.store64(self.at + 8 * index, value);
    }

    /// Points the command at `len` bytes of payload from `address` on: in the command itself as far as they lie in two
    /// pages, otherwise with a list (base, 4.1.1), or with one descriptor where `sgl` says that the controller takes it.
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
