//! A virtio-blk device in memory, as the specification says it or as a hostile one would do it. For tests of drivers and
//! transports.
//!
//! [`Model`] is the device behind any transport; [`Local`] is a transport within this process. Each queue is a thread that
//! takes requests up as they come and completes them in an order drawn from a seed. What the driver does wrong (a chain that
//! the specification forbids, a descriptor that is still in use) is a panic of that thread.
#![allow(unsafe_code)]

use std::{
    collections::{BTreeMap, HashSet},
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    ptr,
    sync::{
        Arc, Mutex, PoisonError, RwLock,
        atomic::{AtomicBool, AtomicU16, AtomicU32, AtomicU64, Ordering, fence},
    },
    thread::{self, JoinHandle},
};

use blkdev::Mapping;
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::eventfd::{EfdFlags, EventFd},
};
use virtio_bindings::{
    virtio_blk::{
        VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ,
        VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_S_IOERR,
        VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID,
        VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
    },
    virtio_config::{VIRTIO_F_RING_PACKED, VIRTIO_F_VERSION_1},
    virtio_ring::{
        VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC, VRING_AVAIL_F_NO_INTERRUPT, VRING_DESC_F_INDIRECT,
        VRING_DESC_F_NEXT, VRING_DESC_F_WRITE, VRING_PACKED_DESC_F_AVAIL, VRING_PACKED_DESC_F_USED,
        VRING_PACKED_EVENT_FLAG_DESC, VRING_PACKED_EVENT_FLAG_DISABLE, VRING_PACKED_EVENT_FLAG_ENABLE,
        VRING_USED_F_NO_NOTIFY,
    },
};

use crate::{
    config::WRITEBACK,
    layout::reaches,
    liveness::Liveness,
    transport::{Doorbell, Format, Ring, Transport},
};

const AVAIL: u16 = 1 << VRING_PACKED_DESC_F_AVAIL;
const USED: u16 = 1 << VRING_PACKED_DESC_F_USED;

/// What GET_ID answers.
pub const SERIAL: &str = "model-0001";

/// What a device is like.
#[derive(Clone, Debug)]
pub struct Spec {
    /// The feature bits it offers.
    pub features: u64,
    /// Its configuration space.
    pub config: Vec<u8>,
    /// Where the order of completions comes from.
    pub seed: u64,
    /// What it does wrong,
    pub fault: Option<Fault>,
    /// and how many requests it has taken up before it does.
    pub after: u64,
}

/// What a device can do wrong. From its request on where the name does not say otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Gives back an id that no request has.
    WrongId,
    /// Gives back an id twice.
    SameIdTwice,
    /// Moves the used index by more than there is in flight. A packed ring has no index, and is left as it is.
    IndexJump,
    /// Says to have written more than the whole request has.
    LengthTooLong,
    /// Says that a read succeeded but wrote less than was asked for.
    LengthTooShort,
    /// Says to have written nothing, whatever it has written.
    NoLengths,
    /// Writes a status that the specification does not know.
    Status(u8),
    /// Completes requests without having written a status.
    NoStatus,
    /// Takes requests up and never completes them.
    Silent,
    /// Fills descriptors and available ring with ones, and takes nothing up any more.
    Scribble,
    /// Writes numbers from its seed all over the ring and the slots, notifies, and completes nothing on purpose.
    Chaos,
}

impl Spec {
    /// A device of `capacity` bytes with every feature that the driver knows but packed rings, and four queues.
    pub fn new(capacity: u64) -> Self {
        let bits = [
            VIRTIO_F_VERSION_1,
            VIRTIO_RING_F_INDIRECT_DESC,
            VIRTIO_RING_F_EVENT_IDX,
            VIRTIO_BLK_F_SEG_MAX,
            VIRTIO_BLK_F_BLK_SIZE,
            VIRTIO_BLK_F_FLUSH,
            VIRTIO_BLK_F_CONFIG_WCE,
            VIRTIO_BLK_F_MQ,
            VIRTIO_BLK_F_DISCARD,
            VIRTIO_BLK_F_WRITE_ZEROES,
        ];
        let mut config = vec![0; 60];
        config[..8].copy_from_slice(&(capacity / 512).to_le_bytes());
        let spec =
            Self { features: bits.iter().fold(0, |all, bit| all | 1 << bit), config, seed: 1, fault: None, after: 0 };
        spec.field(12, 126)
            .field(20, 512)
            .field(32, 1 | 4 << 16)
            .field(36, 8192)
            .field(40, 1)
            .field(48, 4096)
            .field(52, 1)
    }

    /// With the four configuration bytes from `at` on set to `value`.
    #[must_use]
    pub fn field(mut self, at: usize, value: u32) -> Self {
        self.config[at..at + 4].copy_from_slice(&value.to_le_bytes());
        self
    }

    /// Without a feature bit.
    #[must_use]
    pub fn without(mut self, bit: u32) -> Self {
        self.features &= !(1 << bit);
        self
    }

    /// With packed rings.
    #[must_use]
    pub fn packed(mut self) -> Self {
        self.features |= 1 << VIRTIO_F_RING_PACKED;
        self
    }

    /// Read-only.
    #[must_use]
    pub fn read_only(mut self) -> Self {
        self.features |= 1 << VIRTIO_BLK_F_RO;
        self
    }

    /// With descriptors of at most `size` bytes, and `count` of them in a request.
    #[must_use]
    pub fn segments(mut self, size: u32, count: u32) -> Self {
        self.features |= 1 << VIRTIO_BLK_F_SIZE_MAX;
        self.field(8, size).field(12, count)
    }

    /// With a fault that shows after `after` requests.
    #[must_use]
    pub fn fault(mut self, fault: Fault, after: u64) -> Self {
        (self.fault, self.after) = (Some(fault), after);
        self
    }
}

/// A stretch of the driver's memory, mapped a second time.
#[derive(Debug)]
struct Region {
    iova: u64,
    len: usize,
    at: *mut u8,
}

// SAFETY: the mapping belongs to no thread; it is unmapped once, by the owner.
unsafe impl Send for Region {}
// SAFETY: all that `&self` gives is the address.
unsafe impl Sync for Region {}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: mapped in `Model::map`; every access holds the lock on the list that this was removed from.
        unsafe { libc::munmap(self.at.cast(), self.len) };
    }
}

/// A device: its disk, and what it has been told of the driver's memory.
#[derive(Debug)]
pub struct Model {
    spec: Spec,
    /// The configuration space as it is now.
    config: Mutex<Vec<u8>>,
    /// Written to when it changes.
    config_changes: EventFd,
    accepted: AtomicU64,
    memory: RwLock<Vec<Region>>,
    disk: Mutex<Vec<u8>>,
    taken: AtomicU64,
    completed: AtomicU64,
    notifications: AtomicU64,
}

/// A ring as the driver announces it, by address.
#[derive(Clone, Copy, Debug, Default)]
pub struct Addresses {
    /// Descriptors.
    pub size: u16,
    /// Descriptors, of either format.
    pub descriptors: u64,
    /// Driver area: available ring, or event suppression.
    pub driver: u64,
    /// Device area: used ring, or event suppression.
    pub device: u64,
    /// Where to begin: the available index; of a packed ring position and wrap counter of what is available in the low 16
    /// bits, and of what is used in the high ones.
    pub base: u32,
}

impl Model {
    /// A device whose disk is zero.
    ///
    /// # Panics
    /// When there is no eventfd to be had.
    pub fn new(spec: Spec) -> Arc<Self> {
        let sectors = spec.config[..8].iter().rev().fold(0, |n, b| n << 8 | usize::from(*b));
        Arc::new(Self {
            disk: Mutex::new(vec![0; sectors * 512]),
            config: Mutex::new(spec.config.clone()),
            config_changes: EventFd::from_value_and_flags(0, EfdFlags::EFD_NONBLOCK).expect("an eventfd"),
            spec,
            accepted: AtomicU64::new(0),
            memory: RwLock::default(),
            taken: AtomicU64::new(0),
            completed: AtomicU64::new(0),
            notifications: AtomicU64::new(0),
        })
    }

    /// What it is like.
    pub fn spec(&self) -> &Spec {
        &self.spec
    }

    /// The configuration space as it is now.
    pub fn config(&self) -> Vec<u8> {
        self.config.lock().unwrap().clone()
    }

    /// Takes what the driver writes to the configuration space: the byte that switches the write cache, and nothing else.
    pub fn write_config(&self, at: usize, bytes: &[u8]) {
        if let (WRITEBACK, [mode]) = (at, bytes) {
            self.config.lock().unwrap()[WRITEBACK] = *mode;
        }
    }

    /// Gives the disk another size, in bytes, and tells the driver.
    pub fn resize(&self, capacity: u64) {
        self.disk.lock().unwrap().resize(capacity as usize, 0);
        self.config.lock().unwrap()[..8].copy_from_slice(&(capacity / 512).to_le_bytes());
        let _ = self.config_changes.write(1);
    }

    /// Sets four bytes of the configuration from byte `at` on, and notifies the driver.
    ///
    /// # Panics
    /// When the configuration does not reach so far.
    pub fn reconfigure(&self, at: usize, value: u32) {
        self.config.lock().unwrap()[at..at + 4].copy_from_slice(&value.to_le_bytes());
        let _ = self.config_changes.write(1);
    }

    /// Readable when the configuration has changed.
    pub fn config_changes(&self) -> BorrowedFd<'_> {
        self.config_changes.as_fd()
    }

    /// Takes the driver's choice of features.
    pub fn accept(&self, features: u64) {
        self.accepted.store(features, Ordering::Relaxed);
    }

    /// How many times the driver was notified.
    pub fn notifications(&self) -> u64 {
        self.notifications.load(Ordering::Relaxed)
    }

    /// How many requests were taken up.
    pub fn taken(&self) -> u64 {
        self.taken.load(Ordering::Relaxed)
    }

    /// How many were completed.
    pub fn completed(&self) -> u64 {
        self.completed.load(Ordering::Acquire)
    }

    /// Maps memory of the driver's.
    ///
    /// # Errors
    /// What mmap(2) says.
    pub fn map(&self, iova: u64, len: usize, fd: BorrowedFd<'_>, offset: u64) -> io::Result<()> {
        let offset = libc::off_t::try_from(offset).map_err(io::Error::other)?;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let at = unsafe {
            let protection = libc::PROT_READ | libc::PROT_WRITE;
            libc::mmap(ptr::null_mut(), len, protection, libc::MAP_SHARED, fd.as_raw_fd(), offset)
        };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        self.memory.write().unwrap().push(Region { iova, len, at: at.cast() });
        Ok(())
    }

    /// Forgets the memory at an address. Returns whether there was any.
    ///
    /// # Panics
    /// When another thread has panicked.
    pub fn unmap(&self, iova: u64) -> bool {
        let mut memory = self.memory.write().unwrap();
        let before = memory.len();
        memory.retain(|region| region.iova != iova);
        memory.len() < before
    }

    /// How many stretches of the driver's memory it knows.
    ///
    /// # Panics
    /// When another thread has panicked.
    pub fn regions(&self) -> usize {
        self.memory.read().unwrap().len()
    }

    /// Forgets all memory.
    pub fn unmap_all(&self) {
        self.memory.write().unwrap().clear();
    }

    /// Starts a queue.
    ///
    /// # Errors
    /// No thread to be had.
    pub fn start(self: &Arc<Self>, ring: Addresses, kick: OwnedFd, call: OwnedFd) -> io::Result<Running> {
        let accepted = self.accepted.load(Ordering::Relaxed);
        let wake = Arc::new(EventFd::from_value_and_flags(0, EfdFlags::EFD_NONBLOCK)?);
        let shared = Arc::new((AtomicBool::new(false), AtomicU32::new(ring.base)));
        let packed = accepted & (1 << VIRTIO_F_RING_PACKED) != 0;
        let next = ring.base as u16;
        let used = if packed { (ring.base >> 16) as u16 } else { next };
        let mut queue = Queue {
            model: Arc::clone(self),
            ring,
            kick: nonblocking(kick)?,
            call: nonblocking(call)?,
            wake: Arc::clone(&wake),
            shared: Arc::clone(&shared),
            packed,
            event_idx: accepted & (1 << VIRTIO_RING_F_EVENT_IDX) != 0,
            indirect: accepted & (1 << VIRTIO_RING_F_INDIRECT_DESC) != 0,
            next,
            used,
            unsignalled: 0,
            pending: Vec::new(),
            random: self.spec.seed ^ ring.descriptors | 1,
        };
        let thread = thread::Builder::new().name("model".to_owned()).spawn(move || queue.run())?;
        Ok(Running { wake, shared, thread: Some(thread) })
    }

    /// Runs `act` on the address of `len` bytes of the driver's memory.
    fn at<R>(&self, iova: u64, len: usize, act: impl FnOnce(*mut u8) -> R) -> R {
        let memory = self.memory.read().unwrap();
        let region = memory
            .iter()
            .find(|r| iova >= r.iova && iova - r.iova < r.len as u64 && len as u64 <= r.len as u64 - (iova - r.iova))
            .unwrap_or_else(|| panic!("{len} bytes at {iova:#x} lie in memory that the device was told of"));
        act(region.at.wrapping_add((iova - region.iova) as usize))
    }

    fn read<const N: usize>(&self, iova: u64) -> [u8; N] {
        let mut bytes = [0; N];
        // SAFETY: `at` checked the range; the copy is ours.
        self.at(iova, N, |at| unsafe { ptr::copy_nonoverlapping(at, bytes.as_mut_ptr(), N) });
        bytes
    }

    fn write(&self, iova: u64, bytes: &[u8]) {
        // SAFETY: as in `read`.
        self.at(iova, bytes.len(), |at| unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), at, bytes.len()) });
    }

    fn load16(&self, iova: u64, order: Ordering) -> u16 {
        assert!(iova.is_multiple_of(2), "an index is aligned");
        // SAFETY: `at` checked the range, the address is aligned, and both sides use atomics for indices.
        self.at(iova, 2, |at| unsafe { AtomicU16::from_ptr(at.cast()) }.load(order))
    }

    fn store16(&self, iova: u64, value: u16, order: Ordering) {
        assert!(iova.is_multiple_of(2), "an index is aligned");
        // SAFETY: as in `load16`.
        self.at(iova, 2, |at| unsafe { AtomicU16::from_ptr(at.cast()) }.store(value, order));
    }
}

fn nonblocking(fd: OwnedFd) -> io::Result<OwnedFd> {
    // SAFETY: plain system call on a descriptor that we own.
    if unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, libc::O_NONBLOCK) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(fd)
}

/// A queue that runs.
#[derive(Debug)]
pub struct Running {
    wake: Arc<EventFd>,
    /// Whether to stop; where to go on.
    shared: Arc<(AtomicBool, AtomicU32)>,
    thread: Option<JoinHandle<()>>,
}

impl Running {
    /// Completes what was taken up, stops, and tells where it would have gone on (see [`Addresses::base`]).
    ///
    /// # Panics
    /// When the driver has done something wrong.
    pub fn stop(mut self) -> u32 {
        self.halt();
        self.shared.1.load(Ordering::Relaxed)
    }

    fn halt(&mut self) {
        self.shared.0.store(true, Ordering::Relaxed);
        let _ = self.wake.write(1);
        if let Some(Err(panic)) = self.thread.take().map(JoinHandle::join)
            && !thread::panicking()
        {
            std::panic::resume_unwind(panic);
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.halt();
    }
}

/// A request that was taken up.
#[derive(Debug)]
struct Chain {
    /// The head, or the id.
    head: u16,
    kind: u32,
    sector: u64,
    /// Data: address, length, whether the device writes.
    data: Vec<(u64, u32, bool)>,
    status: u64,
    /// Descriptors of the ring that it occupies; of a packed ring only their number counts.
    occupied: Vec<u16>,
}

struct Queue {
    model: Arc<Model>,
    ring: Addresses,
    kick: OwnedFd,
    call: OwnedFd,
    wake: Arc<EventFd>,
    shared: Arc<(AtomicBool, AtomicU32)>,
    packed: bool,
    event_idx: bool,
    indirect: bool,
    /// Indices; of a packed ring positions, with the wrap counter in bit 15.
    next: u16,
    used: u16,
    /// How far `used` has gone since the driver was last considered for a notification.
    unsignalled: u16,
    pending: Vec<Chain>,
    random: u64,
}

impl Queue {
    fn run(&mut self) {
        loop {
            let stop = self.shared.0.load(Ordering::Relaxed);
            while !stop && let Some(chain) = self.take() {
                self.pending.push(chain);
            }
            if self.is_silent() {
                self.pending.clear();
            }
            if stop && self.fault() == Some(Fault::Chaos) {
                return;
            }
            if stop {
                while self.complete_one() {}
                self.notify();
                let used = if self.packed { u32::from(self.used) << 16 } else { 0 };
                self.shared.1.store(u32::from(self.next) | used, Ordering::Relaxed);
                return;
            }
            if self.fault() == Some(Fault::Chaos) {
                self.chaos();
                let _ = nix::unistd::write(&self.call, &1u64.to_ne_bytes());
                let _ = poll(&mut [PollFd::new(self.wake.as_fd(), PollFlags::POLLIN)], PollTimeout::from(1u8));
                continue;
            }
            let batch = self.draw(self.pending.len()) + 1;
            let mut progress = false;
            for _ in 0..batch {
                progress |= self.complete_one();
            }
            if progress {
                self.notify();
            } else if self.want_kicks() {
                let fds = [self.kick.as_fd(), self.wake.as_fd()];
                let mut fds = fds.map(|fd| PollFd::new(fd, PollFlags::POLLIN));
                let _ = poll(&mut fds, PollTimeout::NONE);
                // Not read in vain: a test may have made it block.
                if fds[0].any() == Some(true) {
                    let _ = nix::unistd::read(&self.kick, &mut [0; 8]);
                }
            }
        }
    }

    fn is_silent(&self) -> bool {
        matches!(self.fault(), Some(Fault::Silent | Fault::Scribble | Fault::Chaos))
    }

    /// The fault, if it is time for it.
    fn fault(&self) -> Option<Fault> {
        self.model.spec.fault.filter(|_| self.model.taken() > self.model.spec.after)
    }

    /// A number below `end`; 0 for an `end` of 0.
    fn draw(&mut self, end: usize) -> usize {
        self.random = self.random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.random >> 33) as usize % end.max(1)
    }

    fn take(&mut self) -> Option<Chain> {
        let model = Arc::clone(&self.model);
        let size = self.ring.size;
        if self.is_silent() {
            return None;
        }
        let chain = if self.packed {
            if !self.is_available() {
                return None;
            }
            self.follow()
        } else {
            let now = model.load16(self.ring.driver + 2, Ordering::Acquire);
            let waiting = now.wrapping_sub(self.next);
            assert!(waiting <= size, "no more is available than the ring has");
            if waiting == 0 {
                return None;
            }
            let entry = self.ring.driver + 4 + 2 * u64::from(self.next % size);
            let head = model.load16(entry, Ordering::Relaxed);
            assert!(head < size, "a head lies in the ring");
            self.next = self.next.wrapping_add(1);
            self.walk(head)
        };
        if self.packed {
            let busy: usize = self.pending.iter().map(|c| c.occupied.len()).sum();
            assert!(busy + chain.occupied.len() <= usize::from(size), "a ring is not written over itself");
            assert!(self.pending.iter().all(|c| c.head != chain.head), "an id is of one request at a time");
        } else {
            let busy: HashSet<u16> = self.pending.iter().flat_map(|c| c.occupied.iter().copied()).collect();
            assert!(chain.occupied.iter().all(|d| !busy.contains(d)), "a descriptor is in one chain at a time");
        }
        model.taken.fetch_add(1, Ordering::Relaxed);
        if self.fault() == Some(Fault::Scribble) {
            model.write(self.ring.descriptors, &vec![0xff; usize::from(size) * 16]);
            if !self.packed {
                model.write(self.ring.driver + 4, &vec![0xff; usize::from(size) * 2]);
            }
        }
        Some(chain)
    }

    /// Writes numbers all over the ring and the slots behind it, every other one such as could stand there.
    fn chaos(&mut self) {
        let (start, end) = (self.ring.descriptors, self.ring.device + 8 * u64::from(self.ring.size) + 4096);
        for _ in 0..64 {
            let at = start + self.draw((end - start) as usize / 8) as u64 * 8;
            let plausible = [0, 1, 7, 0x80, 0x8000, 0x8082, self.ring.size, u16::MAX];
            let mut value = [0; 8];
            for half in value.chunks_mut(2) {
                let any = self.draw(1 << 16) as u16;
                let number = if self.draw(2) == 0 { any } else { plausible[self.draw(plausible.len())] };
                half.copy_from_slice(&number.to_le_bytes());
            }
            self.model.write(at, &value);
            // The used index, since almost all other numbers are behind it.
            let index = self.draw(8) as u16;
            self.model.store16(self.ring.device + 2, index, Ordering::Release);
        }
    }

    /// Whether the next descriptor of a packed ring is available (2.8.1).
    fn is_available(&self) -> bool {
        let flags = self.model.load16(self.packed_at(self.next) + 14, Ordering::Acquire);
        let wrap = self.next >> 15 != 0;
        (flags & AVAIL != 0) == wrap && (flags & USED != 0) != wrap
    }

    /// Where a descriptor of a packed ring lies.
    fn packed_at(&self, place: u16) -> u64 {
        self.ring.descriptors + u64::from(place & 0x7fff) * 16
    }

    /// The place `by` descriptors further on in a packed ring.
    fn further(&self, place: u16, by: u16) -> u16 {
        let at = (place & 0x7fff) + by;
        if at < self.ring.size { place + by } else { (place ^ 0x8000) & 0x8000 | (at - self.ring.size) }
    }

    /// Takes the next chain of a packed ring, and holds it against the rules of virtio 1.2, 2.8.
    fn follow(&mut self) -> Chain {
        let (mut parts, mut occupied) = (Vec::new(), Vec::new());
        loop {
            assert!(self.is_available(), "a chain is available as a whole");
            let bytes: [u8; 16] = self.model.read(self.packed_at(self.next));
            let (address, len, id, flags) = packed(bytes);
            occupied.push(self.next & 0x7fff);
            self.next = self.further(self.next, 1);
            assert!(len > 0, "a descriptor describes something");
            if flags & VRING_DESC_F_INDIRECT != 0 {
                assert!(self.indirect && parts.is_empty(), "an indirect descriptor stands alone, where accepted");
                assert!(flags & VRING_DESC_F_NEXT == 0 && len.is_multiple_of(16), "an indirect table is one");
                for n in 0..len / 16 {
                    let (address, len, _, flags) = packed(self.model.read(address + u64::from(n) * 16));
                    assert!(len > 0 && flags & !VRING_DESC_F_WRITE == 0, "in a table only WRITE means something");
                    parts.push((address, len, flags & VRING_DESC_F_WRITE != 0));
                }
            } else {
                parts.push((address, len, flags & VRING_DESC_F_WRITE != 0));
            }
            assert!(parts.len() <= usize::from(self.ring.size), "a chain is at most as long as the ring");
            if flags & VRING_DESC_F_NEXT == 0 {
                return self.chain(id, parts, occupied);
            }
        }
    }

    /// Follows a chain, and holds it against the rules of virtio 1.2, 2.7.5 and 5.2.6.
    fn walk(&self, head: u16) -> Chain {
        let (mut table, mut size, mut at) = (self.ring.descriptors, u32::from(self.ring.size), head);
        let (mut parts, mut occupied) = (Vec::new(), Vec::new());
        let mut in_ring = true;
        loop {
            assert!(u32::from(at) < size, "a descriptor lies in its table");
            if in_ring {
                occupied.push(at);
            }
            let bytes: [u8; 16] = self.model.read(table + u64::from(at) * 16);
            let address = u64::from_le_bytes(bytes[..8].try_into().unwrap());
            let len = u32::from_le_bytes(bytes[8..12].try_into().unwrap());
            let flags = u32::from(u16::from_le_bytes(bytes[12..14].try_into().unwrap()));
            if flags & VRING_DESC_F_INDIRECT != 0 {
                assert!(
                    self.indirect && in_ring && parts.is_empty(),
                    "an indirect descriptor stands alone, where accepted"
                );
                assert!(
                    flags & VRING_DESC_F_NEXT == 0 && len > 0 && len.is_multiple_of(16),
                    "an indirect table is one"
                );
                (table, size, at, in_ring) = (address, len / 16, 0, false);
                continue;
            }
            assert!(len > 0, "a descriptor describes something");
            parts.push((address, len, flags & VRING_DESC_F_WRITE != 0));
            assert!(parts.len() <= usize::from(self.ring.size), "a chain is at most as long as the ring");
            if flags & VRING_DESC_F_NEXT == 0 {
                break;
            }
            at = u16::from_le_bytes(bytes[14..].try_into().unwrap());
        }
        self.chain(head, parts, occupied)
    }

    /// A request of these descriptors: address, length, whether the device writes.
    fn chain(&self, head: u16, mut parts: Vec<(u64, u32, bool)>, occupied: Vec<u16>) -> Chain {
        assert!(parts.is_sorted_by_key(|(_, _, write)| *write), "what the device reads comes first");
        let (address, len, write) = parts.remove(0);
        assert!(len == 16 && !write, "a header of 16 bytes");
        let header: [u8; 16] = self.model.read(address);
        let (status, len, write) = parts.pop().expect("a chain ends with a status");
        assert!(len == 1 && write, "a status of one byte");
        Chain {
            head,
            kind: u32::from_le_bytes(header[..4].try_into().unwrap()),
            sector: u64::from_le_bytes(header[8..].try_into().unwrap()),
            data: parts,
            status,
            occupied,
        }
    }

    fn complete_one(&mut self) -> bool {
        if self.pending.is_empty() {
            return false;
        }
        let chosen = self.draw(self.pending.len());
        let chain = self.pending.swap_remove(chosen);
        let (status, written) = self.execute(&chain);
        let (status, mut len) = (status as u8, written + 1);
        let fault = self.fault();
        match fault {
            Some(Fault::Status(status)) => self.model.write(chain.status, &[status]),
            Some(Fault::NoStatus) => {}
            _ => self.model.write(chain.status, &[status]),
        }
        match fault {
            Some(Fault::LengthTooLong) => len = u32::MAX,
            Some(Fault::LengthTooShort) => len = 1,
            Some(Fault::NoLengths) => len = 0,
            _ => {}
        }
        let descriptors = chain.occupied.len() as u16;
        match fault {
            Some(Fault::WrongId) => self.give(self.ring.size + 7, len, descriptors),
            Some(Fault::SameIdTwice) => {
                self.give(chain.head, len, descriptors);
                // Once for a batch, so that a packed ring is not lapped, which would look as if nothing had been used.
                if self.unsignalled <= descriptors {
                    self.give(chain.head, len, descriptors);
                }
            }
            _ => self.give(chain.head, len, descriptors),
        }
        if !self.packed {
            if fault == Some(Fault::IndexJump) {
                self.used = self.used.wrapping_add(self.ring.size + 1);
                self.unsignalled += self.ring.size + 1;
            }
            self.model.store16(self.ring.device + 2, self.used, Ordering::Release);
        }
        self.model.completed.fetch_add(1, Ordering::Release);
        true
    }

    /// Enters a used element; of a split ring the index follows.
    fn give(&mut self, id: u16, len: u32, descriptors: u16) {
        if self.packed {
            let at = self.packed_at(self.used);
            self.model.write(at + 8, &len.to_le_bytes());
            self.model.write(at + 12, &id.to_le_bytes());
            // Some devices leave the flag out that says that there is a length.
            let write = if self.draw(2) == 0 || self.fault() == Some(Fault::LengthTooLong) {
                VRING_DESC_F_WRITE as u16
            } else {
                0
            };
            let flags = if self.used >> 15 != 0 { AVAIL | USED } else { 0 };
            self.model.store16(at + 14, flags | write, Ordering::Release);
            self.used = self.further(self.used, descriptors);
            self.unsignalled += descriptors;
            return;
        }
        let entry = self.ring.device + 4 + 8 * u64::from(self.used % self.ring.size);
        self.model.write(entry, &u32::from(id).to_le_bytes());
        self.model.write(entry + 4, &len.to_le_bytes());
        self.used = self.used.wrapping_add(1);
        self.unsignalled += 1;
    }

    /// Does what a request asks for. Tells the status, and how many bytes of data were written.
    fn execute(&self, chain: &Chain) -> (u32, u32) {
        let model = &self.model;
        let mut disk = model.disk.lock().unwrap_or_else(PoisonError::into_inner);
        let len: usize = chain.data.iter().map(|(_, len, _)| *len as usize).sum();
        let read_only = model.spec.features & (1 << VIRTIO_BLK_F_RO) != 0;
        let range = |sector: u64, len: usize| {
            let at = usize::try_from(sector.checked_mul(512)?).ok()?;
            (at <= disk.len() && len <= disk.len() - at).then_some(at..at + len)
        };
        match chain.kind {
            VIRTIO_BLK_T_IN => {
                assert!(chain.data.iter().all(|(_, _, write)| *write), "a read is written");
                let Some(range) = range(chain.sector, len) else { return (VIRTIO_BLK_S_IOERR, 0) };
                let mut from = &disk[range];
                for (address, len, _) in &chain.data {
                    let (now, rest) = from.split_at(*len as usize);
                    model.write(*address, now);
                    from = rest;
                }
                (VIRTIO_BLK_S_OK, len as u32)
            }
            VIRTIO_BLK_T_OUT if !read_only => {
                assert!(chain.data.iter().all(|(_, _, write)| !write), "a write is read");
                let Some(range) = range(chain.sector, len) else { return (VIRTIO_BLK_S_IOERR, 0) };
                let mut into = &mut disk[range];
                for (address, len, _) in &chain.data {
                    let (now, rest) = into.split_at_mut(*len as usize);
                    // SAFETY: `at` checked the range; `now` is ours.
                    model.at(*address, now.len(), |at| unsafe {
                        ptr::copy_nonoverlapping(at, now.as_mut_ptr(), now.len());
                    });
                    into = rest;
                }
                (VIRTIO_BLK_S_OK, 0)
            }
            VIRTIO_BLK_T_FLUSH => (VIRTIO_BLK_S_OK, 0),
            VIRTIO_BLK_T_WRITE_ZEROES | VIRTIO_BLK_T_DISCARD if !read_only => {
                assert!(len == 16 && chain.data.len() == 1, "one segment");
                let segment: [u8; 16] = model.read(chain.data[0].0);
                let sector = u64::from_le_bytes(segment[..8].try_into().unwrap());
                let sectors = u32::from_le_bytes(segment[8..12].try_into().unwrap());
                let max = if chain.kind == VIRTIO_BLK_T_DISCARD { 36 } else { 48 };
                let max = u32::from_le_bytes(model.spec.config[max..max + 4].try_into().unwrap());
                match range(sector, sectors as usize * 512) {
                    Some(range) if sectors <= max => disk[range].fill(0),
                    _ => return (VIRTIO_BLK_S_IOERR, 0),
                }
                (VIRTIO_BLK_S_OK, 0)
            }
            VIRTIO_BLK_T_GET_ID => {
                assert!(len == 20 && chain.data.len() == 1, "20 bytes for an id");
                let mut id = [0; 20];
                id[..SERIAL.len()].copy_from_slice(SERIAL.as_bytes());
                model.write(chain.data[0].0, &id);
                (VIRTIO_BLK_S_OK, 20)
            }
            _ if read_only => (VIRTIO_BLK_S_IOERR, 0),
            _ => (VIRTIO_BLK_S_UNSUPP, 0),
        }
    }

    /// Notifies the driver, if it wants that (2.7.7.2, 2.7.10, 2.8.10).
    fn notify(&mut self) {
        fence(Ordering::SeqCst);
        let gone = std::mem::take(&mut self.unsignalled);
        let wanted = if self.packed {
            let (at, flags) = (
                self.model.load16(self.ring.driver, Ordering::Relaxed),
                u32::from(self.model.load16(self.ring.driver + 2, Ordering::Relaxed)),
            );
            assert!(flags <= VRING_PACKED_EVENT_FLAG_DESC, "event flags {flags}");
            match flags {
                VRING_PACKED_EVENT_FLAG_DESC => {
                    assert!(self.event_idx && at & 0x7fff < self.ring.size, "an event at a place of the ring");
                    // Whether one of the descriptors that were used is the one that was named.
                    let mut place = self.used;
                    let mut found = false;
                    for _ in 0..gone {
                        let back = if place & 0x7fff == 0 { (place ^ 0x8000) + self.ring.size } else { place };
                        place = back - 1;
                        found |= place == at;
                    }
                    found
                }
                flags => flags == VRING_PACKED_EVENT_FLAG_ENABLE,
            }
        } else if self.event_idx {
            let event = self.ring.driver + 4 + 2 * u64::from(self.ring.size);
            let event = self.model.load16(event, Ordering::Relaxed);
            reaches(event, self.used.wrapping_sub(gone), self.used)
        } else {
            let flags = u32::from(self.model.load16(self.ring.driver, Ordering::Relaxed));
            flags & VRING_AVAIL_F_NO_INTERRUPT == 0
        };
        if wanted {
            self.model.notifications.fetch_add(1, Ordering::Relaxed);
            let _ = nix::unistd::write(&self.call, &1u64.to_ne_bytes());
        }
    }

    /// Asks for a kick. `false`: more has become available meanwhile.
    fn want_kicks(&mut self) -> bool {
        let model = &self.model;
        if self.packed {
            let flags = if self.event_idx { VRING_PACKED_EVENT_FLAG_DESC } else { VRING_PACKED_EVENT_FLAG_ENABLE };
            model.store16(self.ring.device, self.next, Ordering::Relaxed);
            model.store16(self.ring.device + 2, flags as u16, Ordering::Release);
            fence(Ordering::SeqCst);
            if self.is_silent() || !self.is_available() {
                return true;
            }
            model.store16(self.ring.device + 2, VRING_PACKED_EVENT_FLAG_DISABLE as u16, Ordering::Relaxed);
            return false;
        }
        if self.event_idx {
            model.store16(self.ring.device + 4 + 8 * u64::from(self.ring.size), self.next, Ordering::Relaxed);
        } else {
            model.store16(self.ring.device, 0, Ordering::Relaxed);
        }
        fence(Ordering::SeqCst);
        if self.is_silent() || model.load16(self.ring.driver + 2, Ordering::Relaxed) == self.next {
            return true;
        }
        if !self.event_idx {
            model.store16(self.ring.device, VRING_USED_F_NO_NOTIFY as u16, Ordering::Relaxed);
        }
        false
    }
}

/// Address, length, id and flags of a descriptor of a packed ring.
fn packed(bytes: [u8; 16]) -> (u64, u32, u16, u32) {
    let [low, high] = [0, 8].map(|at| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap()));
    (low, high as u32, (high >> 32) as u16, (high >> 48) as u32)
}

/// A [`Model`] within this process, as a transport. `RESTARTS`: whether its queues can be restarted.
#[derive(Debug)]
pub struct Local<const RESTARTS: bool = true> {
    model: Arc<Model>,
    life: Arc<Liveness>,
    running: Mutex<BTreeMap<u16, Running>>,
    memory: Mutex<Vec<Arc<Mapping>>>,
}

impl Local<true> {
    /// The way to `model`, whose queues can be started and stopped at any time, as those of vhost-user.
    pub fn new(model: &Arc<Model>) -> Self {
        Self::to(model)
    }
}

impl Local<false> {
    /// The way to `model`, whose queues are started once and for good, as those of vDPA and PCI.
    pub fn for_good(model: &Arc<Model>) -> Self {
        Self::to(model)
    }
}

impl<const RESTARTS: bool> Local<RESTARTS> {
    fn to(model: &Arc<Model>) -> Self {
        Self {
            model: Arc::clone(model),
            life: Liveness::new("virtio model".to_owned()),
            running: Mutex::default(),
            memory: Mutex::default(),
        }
    }
}

impl<const RESTARTS: bool> Transport for Local<RESTARTS> {
    type Doorbell = Bell;

    const RESTARTS: bool = RESTARTS;

    fn driver(&self) -> &'static str {
        "virtio"
    }

    fn target(&self) -> &str {
        "model"
    }

    fn life(&self) -> &Arc<Liveness> {
        &self.life
    }

    fn features(&self) -> u64 {
        self.model.spec.features
    }

    fn accept(&self, features: u64) -> io::Result<()> {
        assert_eq!(features & !self.model.spec.features, 0, "a driver accepts what it was offered");
        self.model.accept(features);
        Ok(())
    }

    fn read_config(&self, bytes: &mut [u8], _needed: usize) -> io::Result<usize> {
        let config = self.model.config();
        let len = config.len().min(bytes.len());
        bytes[..len].copy_from_slice(&config[..len]);
        Ok(len)
    }

    fn write_config(&self, at: usize, bytes: &[u8]) -> io::Result<()> {
        self.model.write_config(at, bytes);
        Ok(())
    }

    fn config_changes(&self) -> Option<BorrowedFd<'_>> {
        Some(self.model.config_changes())
    }

    fn queues_max(&self) -> u16 {
        u16::MAX
    }

    fn ring_max(&self, _index: u16) -> u16 {
        u16::MAX
    }

    fn register(&self, mapping: &Arc<Mapping>) -> io::Result<()> {
        self.model.map(mapping.iova().get(), mapping.len(), mapping.as_fd(), 0)?;
        self.memory.lock().unwrap().push(Arc::clone(mapping));
        Ok(())
    }

    fn unregister(&self, mapping: &Arc<Mapping>) -> io::Result<()> {
        let mut memory = self.memory.lock().unwrap();
        if let Some(at) = memory.iter().position(|known| Arc::ptr_eq(known, mapping)) {
            memory.swap_remove(at);
            self.model.unmap(mapping.iova().get());
        }
        Ok(())
    }

    fn start_queue(&self, index: u16, ring: &Ring<'_>) -> io::Result<Bell> {
        let packed = self.model.accepted.load(Ordering::Relaxed) & (1 << VIRTIO_F_RING_PACKED) != 0;
        assert_eq!(packed, ring.format == Format::Packed, "the format is what was agreed on");
        let kick = EventFd::from_value_and_flags(0, EfdFlags::EFD_NONBLOCK)?;
        let addresses = Addresses {
            size: ring.size,
            descriptors: ring.descriptors.get(),
            driver: ring.driver.get(),
            device: ring.device.get(),
            base: if packed { 0x8000_8000 } else { 0 },
        };
        let call = ring.call.try_clone_to_owned()?;
        let running = self.model.start(addresses, kick.as_fd().try_clone_to_owned()?, call)?;
        let before = self.running.lock().unwrap().insert(index, running);
        assert!(before.is_none(), "a queue is started once");
        Ok(Bell(Arc::new(kick)))
    }

    fn run(&self) -> io::Result<()> {
        Ok(())
    }

    fn stop_queue(&self, index: u16) -> io::Result<()> {
        assert!(RESTARTS, "these queues run for good");
        let running = self.running.lock().unwrap().remove(&index);
        running.map(Running::stop);
        Ok(())
    }

    fn cut_off(&self) {}
}

/// The eventfd that tells a [`Local`] model to look at a queue.
#[derive(Clone, Debug)]
pub struct Bell(Arc<EventFd>);

impl Doorbell for Bell {
    fn ring(&self) {
        let _ = self.0.write(1);
    }
}
