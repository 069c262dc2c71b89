//! A simulation: clients of a device that dies at any point, forgets any part of what was not flushed, and may still write to the
//! memory of requests that it never answered. All of it follows from a seed.

use std::{
    collections::HashMap,
    io,
    ops::Range,
    os::fd::{AsFd, BorrowedFd},
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use super::{Options, Reconnect, Unflushed, gap::Gap, shared::Shared};
use crate::{
    arena::Buf,
    channel::{Channel, Plan},
    device::{Completion, Device, Info, Op, Queue, Request, State},
    error::Error,
    fault::Rng,
    io::{Done, Io},
    mem::Mapping,
    peer::Peer,
    wake::{self, Wake},
};

const BLOCK: usize = 512;
const BLOCKS: u64 = 24;

/// What is on the disk: in each block a number, and 0 before the first write.
#[derive(Debug, Default)]
struct Disk {
    durable: HashMap<u64, u64>,
    /// Changes that have completed, but were not flushed, in order.
    cache: Vec<(u64, u64)>,
}

impl Disk {
    fn read(&self, block: u64) -> u64 {
        let cached = self.cache.iter().rev().find(|(known, _)| *known == block);
        cached.map_or_else(|| self.durable.get(&block).copied().unwrap_or(0), |(_, value)| *value)
    }

    fn flush(&mut self) {
        self.durable.extend(self.cache.drain(..));
    }
}

/// The world behind the device.
struct World {
    rng: Rng,
    disk: Disk,
    is_there: bool,
    forgets: bool,
    /// Memory that processes may still access although they are gone as devices: its content if they would read it.
    late: Vec<(Buf, Option<Vec<u8>>, Arc<Process>)>,
    process: Arc<Process>,
    /// New processes keep memory mapped.
    keeps: bool,
    /// Dead as devices, but not ended.
    lingering: Vec<Arc<Process>>,
}

/// A process that carries out requests.
struct Process {
    id: u32,
    is_dead: AtomicBool,
    /// Readable when it has ended, as a pidfd is.
    end: Wake,
    /// Memory that it maps.
    memory: Mutex<Vec<Range<u64>>>,
    /// Keeps that memory mapped even when it has hung up.
    keeps: bool,
    kept: Mutex<Vec<Arc<Mapping>>>,
}

impl Process {
    fn memory(&self) -> MutexGuard<'_, Vec<Range<u64>>> {
        self.memory.lock().unwrap()
    }

    fn has(&self, op: &Op) -> bool {
        let (Op::Read { buf, .. } | Op::Write { buf, .. }) = op else { return true };
        self.memory().iter().any(|known| known.contains(&buf.iova().get()))
    }

    fn has_ended(&self) -> bool {
        wake::wait([self.end.as_fd()], Some(Duration::ZERO))[0]
    }
}

type Shown = Arc<Mutex<World>>;

fn look(world: &Shown) -> MutexGuard<'_, World> {
    world.lock().unwrap()
}

fn new_process(keeps: bool) -> Arc<Process> {
    static IDS: AtomicU32 = AtomicU32::new(1);
    let id = IDS.fetch_add(1, Ordering::Relaxed);
    Arc::new(Process {
        id,
        is_dead: AtomicBool::new(false),
        end: Wake::new().unwrap(),
        memory: Mutex::default(),
        keeps,
        kept: Mutex::default(),
    })
}

impl World {
    fn execute(&mut self, op: &mut Op) -> Result<(), Error> {
        match op {
            Op::Read { at, buf } => {
                for n in 0..buf.len() / BLOCK {
                    let value = self.disk.read(*at / BLOCK as u64 + n as u64);
                    buf.copy_from(n * BLOCK, &fill(value));
                }
            }
            Op::Write { at, buf, .. } => {
                for (n, bytes) in buf.to_vec().chunks_exact(BLOCK).enumerate() {
                    assert_eq!(bytes, fill(value_of(bytes)), "a write is whole");
                    self.disk.cache.push((*at / BLOCK as u64 + n as u64, value_of(bytes)));
                }
            }
            Op::Zero { at, len, .. } => {
                let blocks = *at / BLOCK as u64..(*at + *len) / BLOCK as u64;
                self.disk.cache.extend(blocks.map(|block| (block, 0)));
            }
            Op::Flush => self.disk.flush(),
            _ => return Err(Error::NotSupported),
        }
        Ok(())
    }

    /// The process dies, or only hangs up. A part of what was not flushed is gone.
    fn kill(&mut self) {
        self.process.is_dead.store(true, Ordering::Relaxed);
        self.is_there = false;
        if self.forgets {
            let rng = &mut self.rng;
            self.disk.cache.retain(|_| rng.chance(0.5));
            self.disk.flush();
        }
        if self.rng.chance(0.6) {
            self.process.end.ring();
        } else {
            self.lingering.push(Arc::clone(&self.process));
        }
    }

    /// Processes that have hung up access memory that they had.
    fn access_late(&mut self) {
        self.late.retain(|(_, _, process)| !process.has_ended());
        let rng = &mut self.rng;
        for (memory, content, _) in self.late.iter_mut().filter(|_| rng.chance(0.5)) {
            match content {
                Some(content) => assert_eq!(memory.to_vec(), *content, "a late write would write other data"),
                None => memory.copy_from(0, &vec![0xee; memory.len()]),
            }
        }
    }
}

/// A connection to the device.
struct Mortal {
    info: Info,
    world: Shown,
    process: Arc<Process>,
}

impl Mortal {
    fn open(world: &Shown) -> io::Result<Arc<dyn Device>> {
        if !look(world).is_there {
            return Err(io::ErrorKind::NotFound.into());
        }
        let process = new_process(look(world).keeps);
        look(world).process = Arc::clone(&process);
        let mut info = Info::new("mortal", "here");
        (info.block_size, info.transfer_max, info.queues_max) = (BLOCK as u32, 8 * BLOCK as u32, 4);
        (info.caps.flush, info.caps.zero) = (true, true);
        info.timeout = Some(Duration::from_secs(8));
        Ok(Arc::new(Self { info, world: Arc::clone(world), process }))
    }
}

impl Device for Mortal {
    fn info(&self) -> &Info {
        &self.info
    }

    fn capacity(&self) -> u64 {
        BLOCKS * BLOCK as u64
    }

    fn register(&self, mapping: &Arc<Mapping>) -> io::Result<()> {
        self.process.memory().push(range_of(mapping));
        if self.process.keeps {
            self.process.kept.lock().unwrap().push(Arc::clone(mapping));
        }
        Ok(())
    }

    fn unregister(&self, mapping: &Arc<Mapping>) {
        self.process.memory().retain(|known| *known != range_of(mapping));
    }

    fn peer(&self) -> Option<Arc<Peer>> {
        Some(Arc::new(Peer::new(self.process.end.as_fd().try_clone_to_owned().unwrap(), self.process.id)))
    }

    fn state(&self) -> State {
        if self.process.is_dead.load(Ordering::Relaxed) { State::Dead } else { State::Working }
    }

    fn open_queue(&self, depth: u16) -> io::Result<Box<dyn Queue>> {
        if self.state() == State::Dead {
            return Err(io::ErrorKind::NotConnected.into());
        }
        let (world, process) = (Arc::clone(&self.world), Arc::clone(&self.process));
        let (flights, done) = (Vec::new(), Vec::new());
        Ok(Box::new(MortalQueue { depth: usize::from(depth.min(4)), world, process, flights, done }))
    }
}

struct MortalQueue {
    depth: usize,
    world: Shown,
    process: Arc<Process>,
    flights: Vec<Request>,
    /// What the device has completed, and the owner has not reaped.
    done: Vec<Completion>,
}

impl MortalQueue {
    /// Carries out some requests, in any order.
    fn work(&mut self, all: bool) {
        let mut world = look(&self.world);
        while !self.flights.is_empty() && (all || world.rng.chance(0.6)) {
            let n = world.rng.below(self.flights.len() as u64) as usize;
            let Request { tag, mut op } = self.flights.remove(n);
            let result = world.execute(&mut op);
            self.done.push(Completion { tag, op, result });
        }
    }

    /// The device is dead. Some requests were carried out, but not answered; memory of all stays with the process.
    fn end(&mut self, unfinished: &mut Vec<Request>) {
        let mut world = look(&self.world);
        for mut request in self.flights.drain(..) {
            // Not if a new process has the disk.
            let is_last = !world.is_there && Arc::ptr_eq(&world.process, &self.process);
            if is_last && world.rng.chance(0.5) && !matches!(request.op, Op::Flush) {
                world.execute(&mut request.op).unwrap();
            }
            let late = match &request.op {
                Op::Read { buf, .. } => Some((buf.lend(0, buf.len()), None)),
                Op::Write { buf, .. } => Some((buf.lend(0, buf.len()), Some(buf.to_vec()))),
                _ => None,
            };
            let process = Arc::clone(&self.process);
            world.late.extend(late.map(|(memory, content)| (memory, content, process)));
            unfinished.push(request);
        }
    }
}

impl Queue for MortalQueue {
    fn push(&mut self, request: Request) -> Result<(), Request> {
        if self.is_dead() {
            self.done.push(request.refuse(Error::Gone));
        } else if self.flights.len() + self.done.len() >= self.depth {
            return Err(request);
        } else {
            assert!(self.process.has(&request.op), "the process has the memory of a request");
            self.flights.push(request);
        }
        Ok(())
    }

    fn kick(&mut self) {}

    fn reap(&mut self, done: &mut Vec<Completion>) {
        let mut unfinished = Vec::new();
        self.reap_unfinished(done, &mut unfinished);
        done.extend(unfinished.into_iter().map(Request::lose));
    }

    fn reap_unfinished(&mut self, done: &mut Vec<Completion>, unfinished: &mut Vec<Request>) {
        if self.is_dead() {
            done.append(&mut self.done);
            return self.end(unfinished);
        }
        self.work(false);
        done.append(&mut self.done);
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn arm(&mut self) -> bool {
        false
    }

    fn give_up(&mut self) {
        if !self.is_dead() {
            look(&self.world).kill();
        }
    }

    fn is_dead(&self) -> bool {
        self.process.is_dead.load(Ordering::Relaxed)
    }
}

impl Drop for MortalQueue {
    fn drop(&mut self) {
        if !self.is_dead() {
            self.work(true);
        }
    }
}

/// What clients know of a block.
#[derive(Clone, Debug)]
struct Known {
    /// What a read may return: one value, unless a change has failed or is in flight.
    possible: Vec<u64>,
    /// What may lie on the disk after a loss of power: the last value that was flushed, and all later ones. Those that were not
    /// acknowledged are marked with `false`.
    durable: Vec<(u64, bool)>,
    /// Number of values that were removed from the front of `durable`.
    removed: usize,
    busy: bool,
}

impl Known {
    fn new() -> Self {
        Self { possible: vec![0], durable: vec![(0, true)], removed: 0, busy: false }
    }

    /// Number of values so far.
    fn count(&self) -> usize {
        self.removed + self.durable.len()
    }

    /// The first `count` values were flushed.
    fn flushed(&mut self, count: usize) {
        let covered = count.saturating_sub(self.removed);
        if let Some(last) = self.durable[..covered].iter().rposition(|(_, acknowledged)| *acknowledged) {
            self.durable.drain(..last);
            self.removed += last;
        }
    }
}

enum Asked {
    /// For each block what it may have held since the request.
    Read {
        first: u64,
        held: Vec<Vec<u64>>,
    },
    Change {
        first: u64,
        values: Vec<u64>,
    },
    /// How many values of each block had been acknowledged.
    Flush(Vec<usize>),
}

struct Simulation {
    rng: Rng,
    world: Shown,
    shared: Arc<Shared>,
    gap: Option<Gap>,
    now: Instant,
    /// Time until the next step of the thread without the bell. `None`: it sleeps.
    pause: Option<Duration>,
    bell: Arc<Wake>,
    channels: Vec<Channel>,
    asked: HashMap<u64, Asked>,
    known: Vec<Known>,
    tag: u64,
    losses: u32,
    mode: Unflushed,
    errors: u64,
}

impl Simulation {
    fn new(seed: u64, mode: Unflushed) -> Self {
        let mut rng = Rng::new(seed);
        let world = Arc::new(Mutex::new(World {
            rng: Rng::new(seed ^ 0x1234),
            disk: Disk::default(),
            is_there: true,
            // A device that may be trusted forgets nothing.
            forgets: mode != Unflushed::Trust,
            late: Vec::new(),
            process: new_process(false),
            keeps: false,
            lingering: Vec::new(),
        }));
        let mut options = Options { unflushed: mode, ..Options::default() };
        options.unflushed_memory = *rng.pick(&[None, Some(0), Some(20 << 10), Some(200 << 10)]);
        let seen = Arc::clone(&world);
        let shared = Shared::new(Mortal::open(&world).unwrap(), Box::new(move || Mortal::open(&seen)), options);
        let bell = Arc::new(Wake::new().unwrap());
        shared.set_bell(Arc::clone(&bell));
        let device: Arc<dyn Device> = Arc::new(Reconnect { shared: Arc::clone(&shared), watcher: None });
        let plan = Plan { memory: 128 << 10, depth: 8, ..Plan::default() };
        let channels = plan.open(&device, 2).unwrap();
        let known = vec![Known::new(); BLOCKS as usize];
        let (asked, gap, now, pause) = (HashMap::new(), None, Instant::now(), None);
        Self { rng, world, shared, gap, now, pause, bell, channels, asked, known, tag: 1, losses: 0, mode, errors: 0 }
    }

    /// One step of the thread.
    fn step(&mut self) {
        self.bell.clear();
        self.pause = self.shared.step(&mut self.gap, self.now);
    }

    fn run(&mut self) {
        for _ in 0..self.rng.range(100, 400) {
            match self.rng.below(40) {
                0 if look(&self.world).is_there => look(&self.world).kill(),
                1..=3 => look(&self.world).is_there = true,
                4..=6 => self.step(),
                7..=9 => self.now += Duration::from_millis(self.rng.below(400)),
                10 if self.rng.chance(0.1) => self.now += Duration::from_secs(70),
                11 => look(&self.world).access_late(),
                12 if self.rng.chance(0.3) => self.end_processes(),
                13..=24 => self.submit(),
                _ => self.reap(),
            }
        }
        self.finish();
    }

    fn end_processes(&self) {
        let mut world = look(&self.world);
        world.lingering.drain(..).for_each(|process| process.end.ring());
        world.late.retain(|(_, _, process)| !process.has_ended());
    }

    /// A request for some blocks that no change is in flight for.
    fn submit(&mut self) {
        let n = self.rng.below(2) as usize;
        let tag = self.tag;
        self.tag += 1;
        let count = self.rng.range(1, 13);
        let first = self.rng.below(BLOCKS - count);
        let blocks = first as usize..(first + count) as usize;
        let (at, len) = (first * BLOCK as u64, count * BLOCK as u64);
        let is_busy = self.known[blocks.clone()].iter().any(|known| known.busy);
        match self.rng.below(10) {
            0 => {
                self.asked.insert(tag, Asked::Flush(self.known.iter().map(Known::count).collect()));
                self.channels[n].submit(tag, Io::Flush);
            }
            1..=4 => {
                let Some(buf) = self.channels[n].alloc(at, len as usize) else { return };
                let held = self.known[blocks].iter().map(|known| known.possible.clone()).collect();
                self.asked.insert(tag, Asked::Read { first, held });
                self.channels[n].submit(tag, Io::Read { at, buf });
            }
            kind if !is_busy => {
                let is_zero = kind == 5;
                let values: Vec<u64> = blocks.clone().map(|n| if is_zero { 0 } else { tag << 8 | n as u64 }).collect();
                let io = if is_zero {
                    Io::Zero { at, len, unmap: false, fast: false, fua: false }
                } else {
                    let Some(mut buf) = self.channels[n].alloc(at, len as usize) else { return };
                    buf.copy_from(0, &values.iter().flat_map(|value| fill(*value)).collect::<Vec<_>>());
                    Io::Write { at, buf, fua: self.rng.chance(0.1) }
                };
                for (n, value) in blocks.zip(&values) {
                    self.known[n].busy = true;
                    self.may_hold(n, &[*value]);
                }
                self.asked.insert(tag, Asked::Change { first, values });
                self.channels[n].submit(tag, io);
            }
            _ => {}
        }
    }

    fn reap(&mut self) {
        let n = self.rng.below(2) as usize;
        let mut done = Vec::new();
        self.channels[n].tick(self.now);
        self.channels[n].kick();
        self.channels[n].reap(&mut done);
        self.check_bell();
        if self.channels[n].losses() != self.losses {
            self.losses = self.channels[n].losses();
            assert_eq!(self.mode, Unflushed::Fail, "something was lost");
            self.lose();
        }
        for done in done {
            self.check(done);
        }
    }

    /// Present clients end. The next ones find what was durable, or something later.
    fn lose(&mut self) {
        for n in 0..self.known.len() {
            // A later flush makes durable what is left.
            self.known[n].durable[1..].iter_mut().for_each(|(_, acknowledged)| *acknowledged = false);
            let durable: Vec<_> = self.known[n].durable.iter().map(|(value, _)| *value).collect();
            self.may_hold(n, &durable);
        }
    }

    /// A block may hold other values from now on.
    fn may_hold(&mut self, block: usize, values: &[u64]) {
        self.known[block].possible.extend(values);
        for asked in self.asked.values_mut() {
            if let Asked::Read { first, held } = asked
                && let Some(held) = block.checked_sub(*first as usize).and_then(|n| held.get_mut(n))
            {
                held.extend(values);
            }
        }
    }

    fn check(&mut self, done: Done) {
        let Done { tag, io, result } = done;
        match self.asked.remove(&tag).expect("a request ends once") {
            Asked::Read { first, held } => {
                let (Io::Read { buf, .. }, Ok(())) = (&io, result) else { return self.count(result) };
                for (n, bytes) in buf.to_vec().chunks_exact(BLOCK).enumerate() {
                    let value = value_of(bytes);
                    assert_eq!(bytes, fill(value), "a block is whole");
                    assert!(held[n].contains(&value), "{value:#x} is in block {n}+{first}, not {:x?}", held[n]);
                }
            }
            Asked::Change { first, values } => {
                for (known, value) in self.known[first as usize..].iter_mut().zip(values) {
                    known.busy = false;
                    known.durable.push((value, result.is_ok()));
                    if result.is_ok() {
                        known.possible = vec![value];
                    }
                }
                self.count(result);
            }
            Asked::Flush(lens) if result.is_ok() => {
                for (known, len) in self.known.iter_mut().zip(lens) {
                    known.flushed(len);
                }
            }
            Asked::Flush(_) => self.count(result),
        }
    }

    fn count(&mut self, result: Result<(), Error>) {
        self.errors += u64::from(result.is_err());
    }
}

impl Simulation {
    /// The device is back for good: all requests end. Then its disk is as clients know it.
    fn finish(&mut self) {
        self.settle();
        if self.rng.chance(0.5) {
            return self.lose_power();
        }
        self.asked.insert(0, Asked::Flush(self.known.iter().map(Known::count).collect()));
        self.channels[0].submit(0, Io::Flush);
        self.settle();
        for (block, known) in self.known.iter().enumerate() {
            let value = look(&self.world).disk.read(block as u64);
            assert!(known.possible.contains(&value), "{value:#x} is in block {block}: {known:x?}");
        }
        self.check_memory();
    }

    /// Lets all requests end.
    fn settle(&mut self) {
        for _ in 0..10_000 {
            look(&self.world).is_there = true;
            self.end_processes();
            self.step();
            self.now += Duration::from_millis(20);
            self.reap();
            if self.asked.is_empty() && self.shared.device().is_some() {
                return;
            }
        }
        panic!("{} requests never end", self.asked.len());
    }

    fn lose_power(&mut self) {
        let mut world = look(&self.world);
        let World { rng, disk, .. } = &mut *world;
        disk.cache.retain(|_| rng.chance(0.5));
        disk.flush();
        for (block, known) in self.known.iter().enumerate() {
            let value = disk.read(block as u64);
            let is_known = known.durable.iter().any(|(durable, _)| *durable == value);
            assert!(is_known || known.possible.contains(&value), "{value:#x} is in block {block}: {known:x?}");
        }
    }

    /// Checks that the thread wakes up while memory waits for the end of a process.
    fn check_bell(&self) {
        let state = self.shared.state();
        let waits = state.memories.waits();
        let is_rung = wake::wait([self.bell.as_fd()], Some(Duration::ZERO))[0];
        assert!(!waits || self.pause.is_some() || is_rung, "memory waits, and the thread sleeps");
    }

    /// After a flush no memory is kept, and the device has none that took the place of other memory.
    fn check_memory(&mut self) {
        self.end_processes();
        self.step();
        for channel in &mut self.channels {
            channel.reap(&mut Vec::new());
            let lost = channel.memory() - channel.memory_free();
            assert_eq!(lost, 0, "memory does not come back");
        }
        self.step();
        let registered = self.shared.state().memories.count();
        assert_eq!(look(&self.world).process.memory().len(), registered, "the device has memory that is not in use");
    }
}

/// Runs seeds of a mode: 2,000, or as many as `RECONNECT_SEEDS` says.
fn simulate(mode: Unflushed) {
    let seeds = std::env::var("RECONNECT_SEEDS").map_or(2000, |seeds| seeds.parse().expect("a number"));
    for seed in 0..seeds {
        let caught = std::panic::catch_unwind(|| Simulation::new(seed, mode).run());
        assert!(caught.is_ok(), "seed {seed} of {mode:?}");
    }
}

#[test]
fn kept_changes_survive_the_device() {
    simulate(Unflushed::Keep);
}

#[test]
fn a_loss_is_reported() {
    simulate(Unflushed::Fail);
}

#[test]
fn a_trusted_device_loses_nothing() {
    simulate(Unflushed::Trust);
}

fn range_of(mapping: &Mapping) -> Range<u64> {
    let start = mapping.iova().get();
    start..start + mapping.len() as u64
}

/// A block that holds a number.
fn fill(value: u64) -> [u8; BLOCK] {
    let mut bytes = [0; BLOCK];
    bytes.chunks_exact_mut(8).for_each(|word| word.copy_from_slice(&value.to_le_bytes()));
    bytes
}

fn value_of(bytes: &[u8]) -> u64 {
    u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes"))
}

/// An abandoned queue ends all requests at once, also those that wait for the device to come back.
#[test]
fn an_abandoned_queue_does_not_wait() {
    let mut simulation = Simulation::new(1, Unflushed::Keep);
    for _ in 0..20 {
        simulation.submit();
    }
    for channel in &mut simulation.channels {
        channel.give_up();
        let mut done = Vec::new();
        (0..3).for_each(|_| channel.reap(&mut done));
        assert_eq!(channel.in_flight(), 0);
    }
}

/// A process hangs up again and again with all memory in flight, and lives on. New requests always get all memory.
#[test]
fn a_process_that_lives_on_takes_no_memory_from_others() {
    let mut simulation = Simulation::new(1, Unflushed::Trust);
    for _ in 0..20 {
        simulation.hang_with_all_memory();
        simulation.return_to_work().unwrap();
    }
}

/// As above, but the processes keep the memory mapped, without a use for it. That has a bound; then the device stays away until
/// they have ended.
#[test]
fn a_process_that_keeps_memory_mapped_keeps_the_device_away() {
    let mut simulation = Simulation::new(1, Unflushed::Trust);
    look(&simulation.world).keeps = true;
    let mut returns = 0;
    let why = loop {
        simulation.hang_with_all_memory();
        match simulation.return_to_work() {
            Ok(()) => returns += 1,
            Err(why) => break why,
        }
        assert!(returns < 20, "there is a bound");
    };
    assert!(returns >= 3, "{returns}");
    assert!(why.contains("still maps the memory"), "{why}");
    for process in std::mem::take(&mut look(&simulation.world).lingering) {
        process.kept.lock().unwrap().clear();
        process.end.ring();
    }
    simulation.return_to_work().unwrap();
}

impl Simulation {
    /// Fills the memory of a channel with requests, and kills the device as a device.
    fn hang_with_all_memory(&mut self) {
        // The model of the disk knows only whole blocks of one value.
        look(&self.world).disk.durable.extend((0..BLOCKS).map(|block| (block, u64::from_ne_bytes([0x11; 8]))));
        let channel = &mut self.channels[0];
        assert_eq!(channel.memory_free(), channel.memory());
        loop {
            // Some reads are longer than a transfer, and some requests cover blocks in part.
            let (at, len) = match self.tag % 4 {
                2 => (100, 12 * BLOCK),
                3 => (BLOCK as u64 + 8, 16),
                _ => (0, BLOCK),
            };
            let Some(mut buf) = channel.alloc(at, len) else { break };
            let io = if self.tag.is_multiple_of(2) {
                Io::Read { at, buf }
            } else {
                let data = [0x11; BLOCK];
                buf.copy_from(0, &data[..len]);
                Io::Write { at, buf, fua: false }
            };
            channel.submit(self.tag, io);
            self.tag += 1;
        }
        channel.kick();
        let mut world = look(&self.world);
        let process = Arc::clone(&world.process);
        process.is_dead.store(true, Ordering::Relaxed);
        world.is_there = false;
        world.lingering.push(process);
    }

    /// Lets the device return, and all requests end well.
    fn return_to_work(&mut self) -> Result<(), String> {
        look(&self.world).is_there = true;
        for _ in 0..1000 {
            self.step();
            self.now += Duration::from_millis(20);
            let mut done = Vec::new();
            self.channels.iter_mut().for_each(|channel| channel.reap(&mut done));
            look(&self.world).late.clear();
            assert!(done.iter().all(|done| done.result.is_ok()), "{done:?}");
            drop(done);
            if self.channels[0].in_flight() == 0 && self.shared.device().is_some() {
                return Ok(());
            }
        }
        Err(self.gap.as_ref().map(|gap| gap.why().to_owned()).unwrap_or_default())
    }
}
