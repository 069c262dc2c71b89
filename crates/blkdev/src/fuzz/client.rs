//! [`Client`]: uses a driver as its rules allow, and checks what it returns.

use std::{cell::RefCell, sync::Arc};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::{
    ledger::{Flight, Kind, Ledger},
    script::Script,
};
use crate::{
    arena::{Arena, Buf, PAGE},
    conformance,
    device::{Device, Op, Queue, Request},
    mem::Mapping,
};

/// Payload memory, in bytes.
const MEMORY: usize = 2 << 20;

/// Longest request with memory, in bytes, where the device supports it: some pages more than fit without a list.
const LONGEST: u64 = 32 << 10;

/// Most actions of a client.
const ACTIONS: usize = 300;

/// Most queues that a client has open.
const QUEUES: usize = 3;

/// Most attempts of a client to open a queue. Each takes as long as many requests, and the first ones show what the others do.
const OPENS: u32 = 10;

thread_local! {
    /// The memory of the last client of this thread, because a mapping costs more than most clients.
    static SPARE: RefCell<Option<Arena>> = const { RefCell::new(None) };
}

/// A user of a device who follows the rules.
#[derive(Debug)]
pub struct Client {
    device: Arc<dyn Device>,
    script: Script,
    ledger: Arc<Ledger>,
    mapping: Arc<Mapping>,
    arena: Option<Arena>,
    queues: Vec<Open>,
    /// Number of queues and requests so far.
    count: u64,
    /// Number of attempts to open a queue.
    opens: u32,
    /// Has refreshed the device. Once is enough: a driver may wait before it does so again.
    has_refreshed: bool,
}

#[derive(Debug)]
struct Open {
    id: u32,
    queue: Box<dyn Queue>,
    /// The driver has promised a wake-up.
    armed: bool,
}

impl Client {
    /// A client with memory that the device knows. `None`: the device refused the memory.
    ///
    /// # Panics
    /// If the device breaks a promise of [`Info`](crate::Info), or the system has no memory.
    pub fn new(device: Arc<dyn Device>, script: &Script, ledger: &Arc<Ledger>) -> Option<Self> {
        conformance::promises(device.info(), device.capacity());
        let spare = SPARE.take().filter(|arena| arena.free() > arena.capacity() / 2);
        let mut arena = spare.unwrap_or_else(|| Mapping::shared(MEMORY).expect("memory").arenas(1).remove(0));
        let mapping = Arc::clone(arena.alloc(1).expect("half of it is free").mapping());
        if device.register(&mapping).is_err() {
            SPARE.set(Some(arena));
            return None;
        }
        ledger.open(device.info().block_size);
        let (script, ledger, arena) = (script.clone(), Arc::clone(ledger), Some(arena));
        Some(Self {
            device,
            script,
            ledger,
            mapping,
            arena,
            queues: Vec::new(),
            count: 0,
            opens: 0,
            has_refreshed: false,
        })
    }

    /// Acts until the script is over, and lets the device act by calling `step`. Closes everything at the end.
    ///
    /// # Panics
    /// If the driver is wrong.
    pub fn run(mut self, step: &mut dyn FnMut()) {
        for _ in 0..ACTIONS {
            if self.script.is_over() || self.queues.is_empty() && self.opens == OPENS {
                break;
            }
            let n = self.script.below(self.queues.len() as u64) as usize;
            match self.script.below(20) {
                _ if self.queues.is_empty() => self.open(),
                0..=6 => self.push(n),
                7 | 8 => self.queues[n].queue.kick(),
                9..=11 => self.reap(n),
                12 => self.arm(n),
                13..=15 => step(),
                16 => self.look(),
                17 if self.queues.len() < QUEUES && self.opens < OPENS => self.open(),
                17 | 18 => self.close(n),
                _ => self.rare(n),
            }
            self.queues.iter().for_each(|open| open.check_wake(&self.ledger));
        }
        self.finish(step);
    }

    fn finish(&mut self, step: &mut dyn FnMut()) {
        for open in &mut self.queues {
            open.queue.kick();
        }
        step();
        for n in 0..self.queues.len() {
            self.reap(n);
        }
        while !self.queues.is_empty() {
            self.close(0);
        }
        self.look();
        self.device.unregister(&self.mapping);
    }

    fn open(&mut self) {
        self.opens += 1;
        let depth = *self.script.pick(&[4, 1, 2, 32, 1024]);
        // The device may refuse, or be dead.
        if let Ok(queue) = self.device.open_queue(depth) {
            self.count += 1;
            self.queues.push(Open { id: self.count as u32, queue, armed: false });
        }
    }

    fn close(&mut self, n: usize) {
        let Open { id, queue, .. } = self.queues.remove(n);
        drop(queue);
        self.ledger.close(id);
    }

    fn rare(&mut self, n: usize) {
        match self.script.below(8) {
            7 => self.queues[n].queue.give_up(),
            6 if !self.has_refreshed => {
                self.has_refreshed = true;
                self.device.refresh();
            }
            _ => self.reap(n),
        }
    }

    /// Allocates memory and checks that nothing else uses it.
    fn alloc(&mut self, len: u64) -> Option<Buf> {
        let buf = self.arena.as_mut()?.alloc(len as usize)?;
        let pages = buf.len().next_multiple_of(PAGE) as u64;
        self.ledger.check_free(&(buf.iova().get()..buf.iova().get() + pages));
        Some(buf)
    }

    /// Checks all free memory.
    fn look(&mut self) {
        let mut all = Vec::new();
        for len in [64 * PAGE, 8 * PAGE, PAGE] {
            all.extend(std::iter::from_fn(|| self.alloc(len as u64)));
        }
    }

    fn push(&mut self, n: usize) {
        let tag = 1000 + self.count;
        let Some((op, mut flight)) = self.draw(tag) else { return };
        self.count += 1;
        let Open { id, queue, .. } = &mut self.queues[n];
        (flight.queue, flight.too_late) = (*id, queue.is_dead());
        if self.ledger.has_twin(&flight) {
            return;
        }
        self.ledger.push(flight);
        match queue.push(Request { tag, op }) {
            Ok(()) if queue.is_dead() => self.ledger.push_was_too_late(tag),
            Ok(()) => {}
            Err(request) => {
                assert_eq!(request.tag, tag, "a full queue returns the request");
                self.ledger.unpush();
            }
        }
    }

    /// A request within the limits of the device.
    fn draw(&mut self, tag: u64) -> Option<(Op, Flight)> {
        let device = Arc::clone(&self.device);
        let (info, kind) = (device.info(), self.draw_kind());
        let (block, capacity) = (u64::from(info.block_size), device.capacity());
        let longest = match kind {
            Kind::Read | Kind::Write => u64::from(info.transfer_max).min(LONGEST.max(block)),
            Kind::Zero => info.zero_max,
            Kind::Discard => info.discard_max,
            Kind::Flush => 0,
        };
        let blocks_max = longest.min(capacity) / block;
        if blocks_max == 0 && kind != Kind::Flush {
            return None;
        }
        let blocks = match self.script.below(8) {
            0..=4 => 1,
            5 | 6 => 1 + self.script.below(blocks_max.min(4)),
            _ => blocks_max - self.script.below(blocks_max.min(4)),
        };
        let len = if kind == Kind::Flush { 0 } else { blocks.min(blocks_max) * block };
        let last = (capacity - len) / block;
        let first = self.script.below((last + 1).min(12));
        let at = if kind == Kind::Flush { 0 } else { block * if first == 11 { last } else { first } };
        let (mut memory, mut bytes) = (0..0, Arc::default());
        let op = match kind {
            Kind::Read | Kind::Write => {
                let mut buf = self.alloc(len)?;
                memory = buf.iova().get()..buf.iova().get() + len;
                if kind == Kind::Write {
                    bytes = content(tag, len as usize);
                    buf.copy_from(0, &bytes);
                    Op::Write { at, buf, fua: info.caps.fua && self.script.one_in(2) }
                } else {
                    Op::Read { at, buf }
                }
            }
            Kind::Zero => Op::Zero { at, len, unmap: self.script.one_in(2) },
            Kind::Discard => Op::Discard { at, len },
            Kind::Flush => Op::Flush,
        };
        let (too_late, taken, answer) = (false, false, None);
        Some((op, Flight { queue: 0, tag, kind, at, len, memory, bytes, too_late, taken, answer }))
    }

    fn draw_kind(&self) -> Kind {
        let caps = self.device.info().caps;
        match self.script.below(8) {
            3..=5 if !caps.read_only => Kind::Write,
            6 if caps.flush => Kind::Flush,
            7 if caps.zero && !caps.read_only && (!caps.discard || self.script.one_in(2)) => Kind::Zero,
            7 if caps.discard && !caps.read_only => Kind::Discard,
            _ => Kind::Read,
        }
    }

    fn reap(&mut self, n: usize) {
        let open = &mut self.queues[n];
        let (was_dead, mut done) = (open.queue.is_dead(), Vec::new());
        open.queue.reap(&mut done);
        for completion in &done {
            self.ledger.complete(open.id, completion);
        }
        open.armed &= done.is_empty();
        let (in_flight, answered) = self.ledger.in_flight(open.id);
        assert!(!was_dead || in_flight == 0, "{in_flight} requests stay in flight at a dead device");
        assert!(answered == 0 || self.ledger.may_wait(), "{answered} answered requests were not completed");
    }

    fn arm(&mut self, n: usize) {
        let open = &mut self.queues[n];
        open.armed = open.queue.arm();
    }
}

/// What a write writes: whole sectors.
fn content(tag: u64, len: usize) -> Arc<[u8]> {
    let word = |n: u64| (tag << 32 | n).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes();
    let bytes = (0..len as u64 / 8).map(word).collect::<Vec<_>>().into_flattened();
    bytes.into()
}

impl Open {
    /// Checks that an armed queue has its wake-up if the device has answered.
    fn check_wake(&self, ledger: &Ledger) {
        if !self.armed || self.queue.is_dead() || ledger.may_wait() || ledger.in_flight(self.id).1 == 0 {
            return;
        }
        let Some(fd) = self.queue.wake_fd() else { return };
        let woken = poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], PollTimeout::ZERO);
        assert_eq!(woken, Ok(1), "an armed queue sleeps although the device has answered");
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.queues.clear();
        SPARE.set(self.arena.take());
    }
}
