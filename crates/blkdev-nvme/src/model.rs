//! A model of an NVMe controller within this process, as a [`PciDevice`]: conforming, or with an injected fault.
//!
//! It checks every command against the specification. If the driver violates it (memory that is not mapped, misaligned lists, a
//! queue overflow), the model's thread panics, so that requests no longer complete.
#![allow(unsafe_code)]

use std::{
    collections::{BTreeMap, VecDeque},
    fmt, io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    ptr,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use blkdev::{Mapping, fault::Rng};
use blkdev_vfio::{Bar, PciDevice};

use crate::spec::{COMMAND_LEN, COMPLETION_LEN, Completion, IDENTIFY_LEN, RANGE_LEN, Status, admin, cns, io as nvm};

/// Properties of the model controller.
#[derive(Clone, Debug)]
pub struct Spec {
    /// Size of the namespace in blocks.
    pub blocks: u64,
    /// Block size of the namespace, as a power of two.
    pub block_shift: u8,
    /// Identifier of the namespace.
    pub nsid: u32,
    /// Longest transfer, as a power of two of memory pages; 0: no limit.
    pub mdts: u8,
    /// Offer SGLs.
    pub sgl: bool,
    /// Smallest memory page, as a power of two.
    pub page_shift: u8,
    /// Number of I/O queue pairs.
    pub queues: u16,
    /// Entries of the largest queue.
    pub queue_size: u16,
    /// Most blocks in one range of Dataset Management; 0: no limit.
    pub range_max: u32,
    /// Bytes of metadata for each block.
    pub metadata: u8,
    /// Whether the namespace is write protected.
    pub write_protected: bool,
    /// Supported optional commands (`ONCS`).
    pub oncs: u16,
    /// Whether there is a volatile write cache.
    pub cache: bool,
    /// The fault to inject, if any.
    pub fault: Option<Fault>,
    /// The I/O command, counted from 0, at which the fault starts.
    pub after: u64,
    /// Value of the capabilities register; `None`: a valid one.
    pub cap: Option<u64>,
    /// Length of the registers in bytes; `None`: the required length.
    pub bar_len: Option<usize>,
    /// Number of MSI-X vectors; `None`: enough for all queues.
    pub vectors: Option<u16>,
    /// Seed of a noisy controller: registers, data structures, results and completions have pseudo-random values, each
    /// occasionally or always.
    pub noise: Option<u64>,
}

impl Spec {
    /// A conforming controller with `bytes` bytes in blocks of 512 bytes.
    pub fn new(bytes: u64) -> Self {
        Self {
            blocks: bytes >> 9,
            block_shift: 9,
            nsid: 1,
            mdts: 5,
            sgl: false,
            page_shift: 12,
            queues: 4,
            queue_size: 1024,
            range_max: 0,
            metadata: 0,
            write_protected: false,
            oncs: 1 << 2 | 1 << 3,
            cache: true,
            fault: None,
            after: 0,
            cap: None,
            bar_len: None,
            vectors: None,
            noise: None,
        }
    }

    /// Sets the block size.
    #[must_use]
    pub fn block_shift(self, shift: u8) -> Self {
        Self { blocks: self.blocks << self.block_shift >> shift, block_shift: shift, ..self }
    }

    /// Sets the length of the registers.
    #[must_use]
    pub fn bar_len(self, len: usize) -> Self {
        Self { bar_len: Some(len), ..self }
    }

    /// Injects a fault, from the given I/O command on.
    #[must_use]
    pub fn fault(self, fault: Fault, after: u64) -> Self {
        Self { fault: Some(fault), after, ..self }
    }

    /// The capabilities register: NVM and I/O command sets, 1 second to become ready, contiguous queues.
    fn capabilities(&self) -> u64 {
        self.cap.unwrap_or(
            (1 << 37 | 1 << 43)
                | u64::from(self.page_shift - 12) << 48
                | u64::from(self.page_shift - 12) << 52
                | 1 << 32
                | 2 << 24
                | 1 << 16
                | u64::from(self.queue_size - 1),
        )
    }

    /// Distance between doorbells in bytes.
    fn stride(&self) -> usize {
        4 << (self.capabilities() >> 32 & 0xf)
    }
}

/// Faults to inject.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// One command is never completed, until it is aborted.
    Lost,
    /// No I/O command is completed any more, and none can be aborted, until the controller is reset.
    Hung,
    /// As [`Hung`](Self::Hung), and no admin command is completed either.
    Deaf,
    /// No I/O command is completed any more, none can be aborted, and the controller cannot be reset.
    Silent,
    /// One completion arrives twice.
    Doubled,
    /// Completions have identifiers of commands that were not sent.
    WrongId,
    /// The controller fails (`CSTS.CFS`), until it is reset.
    FatalOnce,
    /// The controller fails at each command.
    Fatal,
    /// The device is removed: all registers read as ones.
    Removed,
    /// Commands end with this status.
    Status(Status),
    /// I/O commands are completed in order, one at a time, each after a pause.
    Slow(Duration),
    /// A read of the status register panics, as a bug in the driver's thread would.
    Unreadable,
    /// As [`Slow`](Self::Slow), and one command is never completed, until it is aborted.
    SlowLost(Duration),
}

/// A model controller, for [`Nvme::open`](crate::Nvme::open).
#[derive(Debug)]
pub struct Model {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    spec: Spec,
    state: Mutex<State>,
    changed: Condvar,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").field("spec", &self.spec).finish_non_exhaustive()
    }
}

struct State {
    config: u32,
    status: u32,
    aqa: u32,
    asq: u64,
    acq: u64,
    submission: BTreeMap<u16, Submission>,
    completion: BTreeMap<u16, CompletionQueue>,
    vectors: Vec<OwnedFd>,
    removal: Option<OwnedFd>,
    memory: Vec<Arc<Mapping>>,
    command: u16,
    disk: Vec<u8>,
    blocks: u64,
    /// Commands that are not completed.
    held: Vec<(u16, u16)>,
    /// Commands that are completed later, in order.
    paced: VecDeque<(u16, u16)>,
    /// Identifiers of pending event requests.
    waiting: Vec<u16>,
    events: Vec<u32>,
    /// Number of I/O commands so far.
    count: u64,
    removed: bool,
    /// Number of resets after the fault has started.
    resets: u32,
    /// Number of Abort commands.
    aborts: u32,
    noise: Option<Noise>,
    stopping: bool,
    shut_down: bool,
    rng: Rng,
}

#[derive(Debug, Default)]
struct Submission {
    address: u64,
    size: u16,
    head: u16,
    tail: u16,
}

#[derive(Debug)]
struct CompletionQueue {
    address: u64,
    size: u16,
    head: u16,
    tail: u16,
    phase: bool,
    vector: u16,
}

impl CompletionQueue {
    fn new(address: u64, size: u16, vector: u16) -> Self {
        Self { address, size, head: 0, tail: 0, phase: true, vector }
    }
}

/// The model's serial number.
pub const SERIAL: &str = "MODEL-1";

/// Bus master bit of the command register.
const BUS_MASTER: u16 = 1 << 2;

impl Model {
    /// Creates and starts a controller.
    pub fn new(spec: Spec) -> Arc<Self> {
        let state = State {
            config: 0,
            status: 0,
            aqa: 0,
            asq: 0,
            acq: 0,
            submission: BTreeMap::new(),
            completion: BTreeMap::new(),
            vectors: Vec::new(),
            removal: None,
            memory: Vec::new(),
            command: 0,
            disk: vec![0; (spec.blocks << spec.block_shift) as usize],
            blocks: spec.blocks,
            held: Vec::new(),
            paced: VecDeque::new(),
            waiting: Vec::new(),
            events: Vec::new(),
            count: 0,
            removed: false,
            resets: 0,
            aborts: 0,
            noise: spec.noise.map(Noise::new),
            stopping: false,
            shut_down: false,
            rng: Rng::new(1),
        };
        let shared = Arc::new(Shared { spec, state: Mutex::new(state), changed: Condvar::new() });
        let worker = Arc::clone(&shared);
        let thread = thread::Builder::new().name("nvme-model".to_owned()).spawn(move || worker.run());
        Arc::new(Self { shared, thread: Some(thread.expect("a thread")) })
    }

    /// Changes the namespace's size, and reports it if the driver has requested events.
    pub fn resize(&self, blocks: u64) {
        let mut state = self.shared.lock();
        state.blocks = blocks;
        state.disk.resize((blocks << self.shared.spec.block_shift) as usize, 0);
        // Asynchronous event: notice, namespace attribute changed, log page 4.
        state.events.push(2 | 4 << 16);
        self.shared.changed.notify_all();
    }

    /// Requests the device back, as the kernel does before a removal.
    pub fn ask_back(&self) {
        if let Some(fd) = &self.shared.lock().removal {
            blkdev::wake::ring(fd.as_fd());
        }
    }

    /// Removes the device at once.
    pub fn remove(&self) {
        self.shared.lock().removed = true;
    }

    /// Whether the controller is enabled.
    pub fn is_enabled(&self) -> bool {
        self.shared.lock().config & 1 != 0
    }

    /// Whether it can access memory.
    pub fn is_bus_master(&self) -> bool {
        self.shared.lock().command & BUS_MASTER != 0
    }

    /// Whether it was shut down properly.
    pub fn was_shut_down(&self) -> bool {
        self.shared.lock().shut_down
    }

    /// Number of mappings that it can access.
    pub fn mappings(&self) -> usize {
        self.shared.lock().memory.len()
    }

    /// Number of resets after the fault had started.
    pub fn resets(&self) -> u32 {
        self.shared.lock().resets
    }

    /// Number of Abort commands.
    pub fn aborts(&self) -> u32 {
        self.shared.lock().aborts
    }

    /// Number of I/O commands so far.
    pub fn commands(&self) -> u64 {
        self.shared.lock().count
    }
}

impl Drop for Model {
    fn drop(&mut self) {
        self.shared.lock().stopping = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
            && !thread::panicking()
        {
            panic!("the model detected a driver error");
        }
    }
}

impl PciDevice for Model {
    fn address(&self) -> &str {
        "model"
    }

    fn read_config(&self, at: u16, bytes: &mut [u8]) -> io::Result<()> {
        let state = self.shared.lock();
        let mut space = [0; 256];
        space[4..6].copy_from_slice(&state.command.to_le_bytes());
        space[9..12].copy_from_slice(&[2, 8, 1]);
        if state.removed {
            space.fill(0xff);
        }
        bytes.copy_from_slice(&space[at.into()..usize::from(at) + bytes.len()]);
        Ok(())
    }

    fn write_config(&self, at: u16, bytes: &[u8]) -> io::Result<()> {
        if let (4, &[low, high]) = (at, bytes) {
            self.shared.lock().command = u16::from_le_bytes([low, high]);
        }
        Ok(())
    }

    fn bar(&self, index: u8) -> io::Result<Arc<dyn Bar>> {
        assert_eq!(index, 0, "an NVMe controller's registers are in BAR 0");
        Ok(Arc::clone(&self.shared) as Arc<dyn Bar>)
    }

    fn dma_map(&self, mapping: &Arc<Mapping>) -> io::Result<()> {
        let mut state = self.shared.lock();
        if !state.memory.iter().any(|known| Arc::ptr_eq(known, mapping)) {
            state.memory.push(Arc::clone(mapping));
        }
        Ok(())
    }

    fn dma_unmap(&self, mapping: &Arc<Mapping>) -> io::Result<()> {
        self.shared.lock().memory.retain(|known| !Arc::ptr_eq(known, mapping));
        Ok(())
    }

    fn vectors(&self) -> u16 {
        self.shared.spec.vectors.unwrap_or(self.shared.spec.queues + 1)
    }

    fn enable_vectors(&self, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let fds = fds.iter().map(BorrowedFd::try_clone_to_owned).collect::<io::Result<_>>()?;
        self.shared.lock().vectors = fds;
        Ok(())
    }

    fn set_vector(&self, _index: u16, _fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn watch_removal(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        self.shared.lock().removal = Some(fd.try_clone_to_owned()?);
        Ok(())
    }

    fn reset(&self) -> io::Result<()> {
        self.shared.lock().disable(&self.shared.spec);
        Ok(())
    }
}

impl Bar for Shared {
    fn len(&self) -> usize {
        self.spec.bar_len.unwrap_or(0x1000 + 2 * self.spec.stride() * (usize::from(self.spec.queues) + 1))
    }

    fn read8(&self, _at: usize) -> u8 {
        panic!("NVMe has no registers of 8 bits")
    }

    fn read16(&self, _at: usize) -> u16 {
        panic!("NVMe has no registers of 16 bits")
    }

    fn read32(&self, at: usize) -> u32 {
        let mut state = self.lock();
        assert!(at + 4 <= self.len(), "the register lies in the BAR");
        if state.removed {
            return u32::MAX;
        }
        let is_wrong = self.spec.fault == Some(Fault::Unreadable) && state.count > self.spec.after;
        assert!(!is_wrong || at != 0x1c, "the status register was to panic");
        let cap = self.spec.capabilities();
        let value = match at {
            0x00 => cap as u32,
            0x04 => (cap >> 32) as u32,
            0x08 => 2 << 16,
            0x14 => state.config,
            0x1c => state.status,
            _ => panic!("register {at:#x} is not read"),
        };
        match &mut state.noise {
            // Ready and shutdown bits stay true, because the driver waits for them.
            Some(noise) if at == 0x1c => value | noise.status(),
            Some(noise) if at == 0x08 => noise.word(value),
            _ => value,
        }
    }

    fn read64(&self, at: usize) -> u64 {
        u64::from(self.read32(at)) | u64::from(self.read32(at + 4)) << 32
    }

    fn write8(&self, _at: usize, _value: u8) {
        panic!("NVMe has no registers of 8 bits")
    }

    fn write16(&self, _at: usize, _value: u16) {
        panic!("NVMe has no registers of 16 bits")
    }

    fn write32(&self, at: usize, value: u32) {
        let mut state = self.lock();
        assert!(at + 4 <= self.len(), "the register lies in the BAR");
        if state.removed {
            return;
        }
        let low = |old: u64| old >> 32 << 32 | u64::from(value);
        let high = |old: u64| old & 0xffff_ffff | u64::from(value) << 32;
        match at {
            0x14 => state.configure(value, &self.spec),
            0x24 => state.aqa = value,
            0x28 => state.asq = low(state.asq),
            0x2c => state.asq = high(state.asq),
            0x30 => state.acq = low(state.acq),
            0x34 => state.acq = high(state.acq),
            0x1000.. => {
                let (bell, value) = ((at - 0x1000) / self.spec.stride(), value as u16);
                let id = bell as u16 / 2;
                if state.config & 1 == 0 || state.noise.is_some() && !state.submission.contains_key(&id) {
                    // The driver has not noticed the reset yet, or believes a false value.
                } else if bell.is_multiple_of(2) {
                    let queue = state.submission.get_mut(&id).expect("the doorbell of an existing queue");
                    assert!(value < queue.size, "the tail lies in the queue");
                    queue.tail = value;
                } else {
                    let queue = state.completion.get_mut(&id).expect("the doorbell of an existing queue");
                    assert!(value < queue.size, "the head lies in the queue");
                    queue.head = value;
                }
            }
            _ => panic!("register {at:#x} is not written"),
        }
        drop(state);
        self.changed.notify_all();
    }

    fn write64(&self, at: usize, value: u64) {
        self.write32(at, value as u32);
        self.write32(at + 4, (value >> 32) as u32);
    }
}

impl State {
    /// Whether the next reply to an admin command is valid. Most are, because otherwise no driver would get far.
    fn noise_passes(&mut self) -> bool {
        self.noise.as_mut().is_none_or(|noise| noise.rng.below(16) != 0 || !noise.is_wrong())
    }

    fn configure(&mut self, value: u32, spec: &Spec) {
        let before = std::mem::replace(&mut self.config, value);
        if value & 1 == 0 {
            return self.disable(spec);
        }
        if before & 1 == 0 {
            assert!(!self.vectors.is_empty(), "vectors are set before the controller is enabled");
            assert!(self.command & BUS_MASTER != 0, "bus mastering is on when it is enabled");
            assert_eq!(value >> 16 & 0xff, 0x46, "entries of 64 and 16 bytes");
            assert_eq!(value >> 7 & 0xf, (spec.capabilities() >> 48) as u32 & 0xf, "a supported page size");
            let (submission, completion) = ((self.aqa & 0xfff) as u16 + 1, (self.aqa >> 16) as u16 + 1);
            self.submission.insert(0, Submission { address: self.asq, size: submission, ..Submission::default() });
            self.completion.insert(0, CompletionQueue::new(self.acq, completion, 0));
            self.status = 1;
        }
        if value >> 14 & 3 != 0 {
            self.status |= 2 << 2;
            self.shut_down = true;
        }
    }

    fn disable(&mut self, spec: &Spec) {
        if spec.fault.is_some() && self.count > spec.after && self.status & 1 != 0 {
            self.resets += 1;
            if spec.fault == Some(Fault::Silent) {
                return;
            }
        }
        (self.config, self.status) = (0, 0);
        self.submission.clear();
        self.completion.clear();
        self.held.clear();
        self.paced.clear();
        self.waiting.clear();
    }

    /// Calls `act` with the memory of this process at device address `address`.
    fn at<T>(&self, address: u64, len: usize, act: impl FnOnce(*mut u8) -> T) -> T {
        assert!(self.command & BUS_MASTER != 0, "memory access needs bus mastering");
        let offset = |m: &Arc<Mapping>| address.checked_sub(m.iova().get()).filter(|at| *at < m.len() as u64);
        let (mapping, at) =
            self.memory.iter().find_map(|m| offset(m).map(|at| (m, at as usize))).expect("the memory is mapped");
        assert!(len <= mapping.len() - at, "the memory lies within one mapping");
        act(mapping.as_ptr().wrapping_add(at))
    }

    fn read(&self, address: u64, bytes: &mut [u8]) {
        // SAFETY: `at` checked that the memory belongs to a mapping, which `self` keeps; `bytes` is ours.
        self.at(address, bytes.len(), |from| unsafe {
            ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), bytes.len());
        });
    }

    fn write(&self, address: u64, bytes: &[u8]) {
        // SAFETY: as in `read`.
        self.at(address, bytes.len(), |to| unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) });
    }

    fn store(&self, address: u64, value: u64, order: Ordering) {
        assert!(address.is_multiple_of(8), "an entry is aligned");
        // SAFETY: as in `read`; the driver also accesses this memory by atomics only.
        self.at(address, 8, |to| unsafe { AtomicU64::from_ptr(to.cast()) }.store(value.to_le(), order));
    }

    fn complete(&mut self, sq: u16, cq: u16, id: u16, status: Status, result: u32) {
        self.put(cq, Completion { result, sq_head: 0, sq, id, status }, false);
    }

    /// Writes a completion queue entry. The submission queue head is the valid one unless it was `told`.
    fn put(&mut self, cq: u16, mut entry: Completion, told: bool) {
        if !told {
            entry.sq_head = self.submission.get(&entry.sq).map_or(0, |queue| queue.head);
        }
        let Some(queue) = self.completion.get_mut(&cq) else { panic!("completion queue {cq}") };
        let next = (queue.tail + 1) % queue.size;
        if self.noise.is_some() && next == queue.head {
            return;
        }
        assert_ne!(next, queue.head, "completions are acknowledged before the queue is full");
        let (low, high) = entry.halves(queue.phase);
        let (address, vector) = (queue.address + u64::from(queue.tail) * COMPLETION_LEN as u64, queue.vector);
        queue.tail = next;
        if next == 0 {
            queue.phase = !queue.phase;
        }
        self.store(address, low, Ordering::Relaxed);
        self.store(address + 8, high, Ordering::Release);
        // If the counter is full, the eventfd is readable already.
        blkdev::wake::ring(self.vectors[usize::from(vector)].as_fd());
    }
}

/// Pseudo-random replies of a hostile controller.
struct Noise {
    rng: Rng,
    /// One of this many replies is invalid.
    rarity: u64,
}

impl Noise {
    fn new(seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let rarity = [1, 2, 8, 32][rng.below(4) as usize];
        Self { rng, rarity }
    }

    fn is_wrong(&mut self) -> bool {
        self.rng.below(self.rarity) == 0
    }

    /// An extreme value that a driver may not expect.
    fn extreme(&mut self) -> u64 {
        match self.rng.below(4) {
            0 => 0,
            1 => u64::MAX,
            2 => 1 << self.rng.below(64),
            _ => self.rng.next(),
        }
    }

    fn word(&mut self, right: u32) -> u32 {
        if self.is_wrong() { self.extreme() as u32 } else { right }
    }

    /// Extra bits of the status register: failure, or reserved bits.
    fn status(&mut self) -> u32 {
        match self.rng.below(64 * self.rarity) {
            0 => 2,
            1 => u32::MAX,
            _ => self.rng.next() as u32 & !0xf,
        }
    }

    /// Changes fields that a driver reads, or all bytes.
    fn structure(&mut self, bytes: &mut [u8; IDENTIFY_LEN]) {
        if self.rng.below(64) == 0 {
            return bytes.fill_with(|| self.rng.next() as u8);
        }
        while self.is_wrong() && self.rng.below(8) != 0 {
            let at = [0, 1, 3, 4, 8, 24, 25, 26, 27, 29, 33, 64, 68, 77, 88, 92, 99, 128, 130, 516, 520, 525, 536]
                [self.rng.below(23) as usize];
            let len = [1, 2, 4, 8][self.rng.below(4) as usize];
            let value = self.extreme().to_le_bytes();
            bytes[at..at + len].copy_from_slice(&value[..len]);
        }
    }
}

/// A command as it was sent.
struct Sent {
    words: [u32; 16],
}

impl Sent {
    fn opcode(&self) -> u8 {
        self.words[0] as u8
    }

    fn id(&self) -> u16 {
        (self.words[0] >> 16) as u16
    }

    fn prp(&self, n: usize) -> u64 {
        u64::from(self.words[6 + 2 * n]) | u64::from(self.words[7 + 2 * n]) << 32
    }

    fn block(&self) -> u64 {
        u64::from(self.words[10]) | u64::from(self.words[11]) << 32
    }
}

/// Reply to a command: a status and a result, or `None` for no reply now.
type Answer = Option<(Status, u32)>;

const OK: Answer = Some((Status::SUCCESS, 0));
const INVALID_FIELD: Answer = Some((Status::new(0, 2), 0));

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self) {
        let mut state = self.lock();
        while !state.stopping {
            if let Some(pause) = self.pace(&state) {
                drop(state);
                thread::sleep(pause);
                state = self.lock();
                if let Some((sq, id)) = state.paced.pop_front() {
                    state.complete(sq, sq, id, Status::SUCCESS, 0);
                }
            }
            if !self.step(&mut state) && state.paced.is_empty() {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            } else if state.rng.below(4) == 0 {
                // Give the driver a turn.
                drop(state);
                thread::yield_now();
                state = self.lock();
            }
        }
    }

    /// Delay of the next delayed command.
    fn pace(&self, state: &State) -> Option<Duration> {
        match self.spec.fault {
            Some(Fault::Slow(pause) | Fault::SlowLost(pause)) if !state.paced.is_empty() => Some(pause),
            _ => None,
        }
    }

    /// Takes a few commands of one queue, and completes them in any order. `false`: nothing to do.
    fn step(&self, state: &mut State) -> bool {
        if state.removed || state.status & 1 == 0 || state.status & 2 != 0 {
            return false;
        }
        if let (Some(&id), Some(&event)) = (state.waiting.first(), state.events.first()) {
            state.waiting.remove(0);
            state.events.remove(0);
            state.complete(0, 0, id, Status::SUCCESS, event);
            return true;
        }
        let busy: Vec<u16> = state.submission.iter().filter(|(_, q)| q.head != q.tail).map(|(id, _)| *id).collect();
        if busy.is_empty() {
            return false;
        }
        let sq = busy[state.rng.below(busy.len() as u64) as usize];
        let mut taken = Vec::new();
        for _ in 0..=state.rng.below(8) {
            let queue = state.submission.get_mut(&sq).expect("the queue was chosen among them");
            if queue.head == queue.tail {
                break;
            }
            let at = queue.address + u64::from(queue.head) * COMMAND_LEN as u64;
            queue.head = (queue.head + 1) % queue.size;
            let mut bytes = [0; COMMAND_LEN];
            state.read(at, &mut bytes);
            let word = |n: usize| u32::from_le_bytes(bytes[4 * n..4 * n + 4].try_into().expect("four bytes"));
            taken.push(Sent { words: std::array::from_fn(word) });
        }
        while !taken.is_empty() && !state.removed && state.status & 2 == 0 && state.status & 1 != 0 {
            if sq == 0 && self.spec.fault == Some(Fault::Deaf) && state.count > self.spec.after && state.resets == 0 {
                taken.clear();
                break;
            }
            let chosen = if sq == 0 { 0 } else { state.rng.below(taken.len() as u64) as usize };
            let command = taken.remove(chosen);
            if sq == 0 {
                if let Some((status, result)) = self.administer(state, &command) {
                    if state.noise.is_some() && !state.noise_passes() {
                        self.babble(state, 0, command.id());
                    } else {
                        state.complete(0, 0, command.id(), status, result);
                    }
                }
            } else {
                self.io(state, sq, &command);
            }
        }
        true
    }

    fn io(&self, state: &mut State, sq: u16, command: &Sent) {
        let fault = self.spec.fault.filter(|_| state.count >= self.spec.after);
        let first = state.count == self.spec.after;
        state.count += 1;
        let id = command.id();
        match fault {
            Some(Fault::Lost) if first => return state.held.push((sq, id)),
            Some(Fault::Hung | Fault::Deaf) if state.resets == 0 => return state.held.push((sq, id)),
            Some(Fault::Silent) => return state.held.push((sq, id)),
            Some(Fault::FatalOnce) if state.resets == 0 => return state.status |= 2,
            Some(Fault::Fatal) => return state.status |= 2,
            Some(Fault::Removed) => return state.removed = true,
            Some(Fault::Status(status)) => return state.complete(sq, sq, id, status, 0),
            Some(Fault::SlowLost(_)) if first => return state.held.push((sq, id)),
            Some(Fault::Slow(_) | Fault::SlowLost(_)) => return state.paced.push_back((sq, id)),
            _ => {}
        }
        if state.noise.is_some() {
            return self.babble(state, sq, id);
        }
        let (status, result) = self.execute(state, command).expect("an I/O command completes at once");
        match fault {
            // Only once: the queue has no room for more completions than commands.
            Some(Fault::Doubled) if first => {
                state.complete(sq, sq, id, status, result);
                state.complete(sq, sq, id, status, result);
            }
            Some(Fault::WrongId) => state.complete(sq, sq, id ^ 0x0155, status, result),
            _ => state.complete(sq, sq, id, status, result),
        }
    }

    fn administer(&self, state: &mut State, command: &Sent) -> Answer {
        let words = &command.words;
        let (id, size) = (words[10] as u16, ((words[10] >> 16) + 1) as u16);
        match command.opcode() {
            admin::IDENTIFY => {
                let mut bytes = [0; IDENTIFY_LEN];
                match words[10] as u8 {
                    cns::CONTROLLER => self.controller(&mut bytes),
                    cns::NAMESPACE if words[1] == self.spec.nsid || state.noise.is_some() => {
                        self.namespace(state, &mut bytes);
                    }
                    cns::NAMESPACE => return Some((Status::new(0, 0x0b), 0)),
                    cns::ACTIVE_NAMESPACES => bytes[..4].copy_from_slice(&self.spec.nsid.to_le_bytes()),
                    cns::CONTROLLER_OF_COMMAND_SET => bytes[4..8].copy_from_slice(&self.spec.range_max.to_le_bytes()),
                    _ => return INVALID_FIELD,
                }
                if let Some(noise) = &mut state.noise {
                    noise.structure(&mut bytes);
                }
                state.write(command.prp(0), &bytes);
            }
            admin::SET_FEATURES if words[10] == 7 => {
                let count = u32::from(self.spec.queues - 1);
                let granted = count | count << 16;
                return Some((Status::SUCCESS, state.noise.as_mut().map_or(granted, |noise| noise.word(granted))));
            }
            admin::SET_FEATURES => {}
            admin::GET_LOG_PAGE => {
                let len = ((words[10] >> 16) as usize + 1) * 4;
                state.write(command.prp(0), &vec![0; len]);
            }
            admin::CREATE_CQ => {
                assert!(words[11] & 3 == 3 && size > 1 && size <= self.spec.queue_size, "the queue is contiguous");
                if state.noise.is_some() && (words[11] >> 16) as usize >= state.vectors.len() {
                    return INVALID_FIELD;
                }
                let is_new = id <= self.spec.queues && !state.completion.contains_key(&id);
                // A driver that read false values may be wrong here.
                assert!(id > 0 && (is_new || state.noise.is_some()), "the queue is new");
                let queue = CompletionQueue::new(command.prp(0), size, (words[11] >> 16) as u16);
                state.completion.insert(id, queue);
            }
            admin::CREATE_SQ => {
                assert_eq!(
                    (words[11] & 1, words[11] >> 16),
                    (1, id.into()),
                    "the queue is contiguous, with its own completion queue"
                );
                let is_new = state.completion.contains_key(&id) && !state.submission.contains_key(&id);
                assert!(is_new || state.noise.is_some(), "the queue is new");
                let queue = Submission { address: command.prp(0), size, ..Submission::default() };
                state.submission.insert(id, queue);
            }
            admin::DELETE_SQ | admin::DELETE_CQ if state.noise.is_some() => {
                state.submission.remove(&id);
                state.held.retain(|(sq, _)| *sq != id);
                if command.opcode() == admin::DELETE_CQ {
                    state.completion.remove(&id);
                }
            }
            admin::DELETE_SQ => {
                state.submission.remove(&id).expect("the queue exists");
                assert!(!state.held.iter().any(|(sq, _)| *sq == id), "a deleted queue has nothing in flight");
            }
            admin::DELETE_CQ => {
                assert!(!state.submission.contains_key(&id), "submission queues are deleted before completion queues");
                state.completion.remove(&id).expect("the queue exists");
            }
            admin::ABORT => {
                let which = (words[10] as u16, (words[10] >> 16) as u16);
                state.aborts += 1;
                let found = state.held.iter().position(|held| *held == which);
                return match (found, self.spec.fault) {
                    (Some(at), Some(Fault::Lost | Fault::SlowLost(_))) => {
                        let (sq, id) = state.held.remove(at);
                        state.complete(sq, sq, id, Status::new(0, 7), 0);
                        OK
                    }
                    _ => Some((Status::SUCCESS, 1)),
                };
            }
            admin::ASYNC_EVENT_REQUEST => {
                state.waiting.push(command.id());
                return None;
            }
            opcode => panic!("admin command {opcode:#x}"),
        }
        OK
    }

    /// Completes a command in a possibly invalid way, or not at all.
    fn babble(&self, state: &mut State, sq: u16, id: u16) {
        let Some(noise) = &mut state.noise else { return };
        let (rng, mut entry) = (&mut noise.rng, Completion { result: 0, sq_head: 0, sq, id, status: Status::SUCCESS });
        match rng.below(12) {
            0 => entry.id = rng.next() as u16,
            1 => entry.status = Status(rng.next() as u16 & 0x7fff),
            2 => return state.held.push((sq, id)),
            3 => (entry.result, entry.sq_head) = (rng.next() as u32, rng.next() as u16),
            4 => entry.sq = rng.next() as u16,
            _ => {}
        }
        let told = entry.sq_head != 0 || entry.sq != sq;
        state.put(sq, entry, told);
    }

    fn controller(&self, bytes: &mut [u8; IDENTIFY_LEN]) {
        bytes[4..24].fill(b' ');
        bytes[4..4 + SERIAL.len()].copy_from_slice(SERIAL.as_bytes());
        bytes[24..64].fill(b' ');
        bytes[77] = self.spec.mdts;
        bytes[92..96].copy_from_slice(&(1u32 << 8).to_le_bytes());
        bytes[516] = 1;
        bytes[520..522].copy_from_slice(&self.spec.oncs.to_le_bytes());
        bytes[525] = self.spec.cache.into();
        bytes[536] = self.spec.sgl.into();
    }

    fn namespace(&self, state: &State, bytes: &mut [u8; IDENTIFY_LEN]) {
        bytes[..8].copy_from_slice(&state.blocks.to_le_bytes());
        // Reports preferred granularities: 8 blocks for writes and for deallocation.
        bytes[24] = 1 << 4;
        (bytes[64], bytes[68]) = (7, 7);
        bytes[33] = 1 | 1 << 3;
        bytes[99] = self.spec.write_protected.into();
        (bytes[128], bytes[130]) = (self.spec.metadata, self.spec.block_shift);
    }

    fn execute(&self, state: &mut State, command: &Sent) -> Answer {
        let shift = self.spec.block_shift;
        let blocks = u64::from(command.words[12] & 0xffff) + 1;
        assert_eq!(command.words[1], self.spec.nsid, "the opened namespace");
        let changes = !matches!(command.opcode(), nvm::READ | nvm::FLUSH);
        assert!(!(changes && self.spec.write_protected), "no writes to a write-protected namespace");
        let range = |state: &State, block: u64, blocks: u64| {
            let fits = block.checked_add(blocks).is_some_and(|end| end <= state.blocks);
            fits.then(|| (block << shift) as usize..((block + blocks) << shift) as usize)
        };
        let out_of_range = Some((Status::new(0, 0x80), 0));
        match command.opcode() {
            nvm::FLUSH => {}
            opcode @ (nvm::READ | nvm::WRITE) => {
                let Some(range) = range(state, command.block(), blocks) else { return out_of_range };
                if self.spec.mdts > 0 && range.len() > 1 << (self.spec.page_shift + self.spec.mdts) {
                    return INVALID_FIELD;
                }
                let mut at = range.start;
                for (address, len) in self.pieces(state, command, range.len()) {
                    if opcode == nvm::READ {
                        state.write(address, &state.disk[at..at + len]);
                    } else {
                        let mut bytes = vec![0; len];
                        state.read(address, &mut bytes);
                        state.disk[at..at + len].copy_from_slice(&bytes);
                    }
                    at += len;
                }
                assert_eq!(at, range.end, "the memory covers the whole transfer");
            }
            nvm::WRITE_ZEROES if self.spec.oncs & 1 << 3 != 0 => {
                let Some(range) = range(state, command.block(), blocks) else { return out_of_range };
                state.disk[range].fill(0);
            }
            nvm::DATASET_MANAGEMENT if self.spec.oncs & 1 << 2 != 0 => {
                let count = (command.words[10] & 0xff) as usize + 1;
                assert_eq!(command.words[11], 1 << 2, "the attribute is deallocation");
                let mut list = vec![0; count * RANGE_LEN];
                let page = 1u64 << self.spec.page_shift;
                assert!(command.prp(0) % page + list.len() as u64 <= page, "the list lies in one page");
                state.read(command.prp(0), &mut list);
                for entry in list.chunks_exact(RANGE_LEN) {
                    let blocks = u32::from_le_bytes(entry[4..8].try_into().expect("four bytes"));
                    let block = u64::from_le_bytes(entry[8..].try_into().expect("eight bytes"));
                    let Some(range) = range(state, block, blocks.into()) else { return out_of_range };
                    if self.spec.range_max > 0 && blocks > self.spec.range_max {
                        return INVALID_FIELD;
                    }
                    state.disk[range].fill(0);
                }
            }
            _ => return Some((Status::new(0, 1), 0)),
        }
        OK
    }

    /// The memory of a transfer, checked against the specification (base, 4.1).
    fn pieces(&self, state: &State, command: &Sent, len: usize) -> Vec<(u64, usize)> {
        let page = 1u64 << self.spec.page_shift;
        if command.words[0] >> 14 & 3 == 1 {
            assert!(self.spec.sgl, "SGLs are used only if offered");
            assert_eq!(
                (command.words[8] as usize, command.words[9]),
                (len, 0),
                "one data block descriptor covers the transfer"
            );
            return vec![(command.prp(0), len)];
        }
        let (first, second) = (command.prp(0), command.prp(1));
        assert!(first.is_multiple_of(4), "a PRP is aligned to 4 bytes");
        let mut pieces = vec![(first, len.min((page - first % page) as usize))];
        let mut left = len - pieces[0].1;
        if left > page as usize {
            let entries = left.div_ceil(page as usize);
            assert!(
                second.is_multiple_of(8) && second % page + 8 * entries as u64 <= page,
                "the list lies in one page"
            );
            for n in 0..entries {
                let mut entry = [0; 8];
                state.read(second + 8 * n as u64, &mut entry);
                pieces.push((u64::from_le_bytes(entry), left.min(page as usize)));
                left -= left.min(page as usize);
            }
        } else if left > 0 {
            pieces.push((second, left));
        }
        assert!(pieces[1..].iter().all(|(at, _)| at.is_multiple_of(page)), "all pages but the first are aligned");
        pieces
    }
}
