//! A virtio-blk device in memory, conforming or hostile. For tests of drivers and transports.
//!
//! [`Model`] is a device behind any transport; [`Local`] is a transport within this process. Each queue is a thread that takes
//! requests in order and completes them in a pseudo-random order from a seed. A driver error (a chain that the specification
//! forbids, a descriptor still in use) panics that thread.
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

/// The serial number that GET_ID returns.
pub const SERIAL: &str = "model-0001";

/// Properties of a model device.
#[derive(Clone, Debug)]
pub struct Spec {
    /// Offered feature bits.
    pub features: u64,
    /// Content of the configuration space.
    pub config: Vec<u8>,
    /// Seed of the completion order.
    pub seed: u64,
    /// The fault to inject, if any.
    pub fault: Option<Fault>,
    /// Number of requests taken before the fault starts.
    pub after: u64,
}

/// Faults to inject. They affect all requests from the first faulty one on, unless stated otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Returns an id that no request has.
    WrongId,
    /// Returns an id twice.
    SameIdTwice,
    /// Moves the used index past the available index. No effect in a packed ring, which has no index.
    IndexJump,
    /// Reports more bytes written than the whole request has.
    LengthTooLong,
    /// Completes a read successfully with fewer bytes written than requested.
    LengthTooShort,
    /// Reports zero bytes written, whatever it wrote.
    NoLengths,
    /// Writes a status that the specification does not define.
    Status(u8),
    /// Completes requests without a status.
    NoStatus,
    /// Takes requests and never completes them.
    Silent,
    /// Fills descriptors and available ring with ones, and takes no further requests.
    Scribble,
    /// Writes pseudo-random numbers over the ring and the slots, notifies, and completes no request deliberately.
    Chaos,
}

impl Spec {
    /// A device of `capacity` bytes with four queues and every feature of the driver except packed rings.
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

    /// Sets the four configuration bytes from `at` on to `value`.
    #[must_use]
    pub fn field(mut self, at: usize, value: u32) -> Self {
        self.config[at..at + 4].copy_from_slice(&value.to_le_bytes());
        self
    }

    /// Removes a feature bit.
    #[must_use]
    pub fn without(mut self, bit: u32) -> Self {
        self.features &= !(1 << bit);
        self
    }

    /// Adds packed rings.
    #[must_use]
    pub fn packed(mut self) -> Self {
        self.features |= 1 << VIRTIO_F_RING_PACKED;
        self
    }

    /// Makes the device read-only.
    #[must_use]
    pub fn read_only(mut self) -> Self {
        self.features |= 1 << VIRTIO_BLK_F_RO;
        self
    }

    /// Limits descriptors to `size` bytes, and requests to `count` data descriptors.
    #[must_use]
    pub fn segments(mut self, size: u32, count: u32) -> Self {
        self.features |= 1 << VIRTIO_BLK_F_SIZE_MAX;
        self.field(8, size).field(12, count)
    }

    /// Injects a fault after `after` requests.
    #[must_use]
    pub fn fault(mut self, fault: Fault, after: u64) -> Self {
        (self.fault, self.after) = (Some(fault), after);
        self
    }
}

/// A range of the driver's memory, mapped a second time.
#[derive(Debug)]
struct Region {
    iova: u64,
    len: usize,
    at: *mut u8,
}

// SAFETY: the mapping is not tied to a thread, and its owner unmaps it once.
unsafe impl Send for Region {}
// SAFETY: `&self` gives access only to the address.
unsafe impl Sync for Region {}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: mapped in `Model::map`. Every access holds the lock of the list, from which this region is now removed.
        unsafe { libc::munmap(self.at.cast(), self.len) };
    }
}

/// A device: its disk, and the driver's registered memory.
#[derive(Debug)]
pub struct Model {
    spec: Spec,
    /// The current configuration space.
    config: Mutex<Vec<u8>>,
    /// Written after every configuration change.
    config_changes: EventFd,
    accepted: AtomicU64,
    memory: RwLock<Vec<Region>>,
    disk: Mutex<Vec<u8>>,
    taken: AtomicU64,
    completed: AtomicU64,
    notifications: AtomicU64,
}

/// The addresses of a ring, as announced by the driver.
#[derive(Clone, Copy, Debug, Default)]
pub struct Addresses {
    /// Number of descriptors.
    pub size: u16,
    /// Descriptor table, or packed ring.
    pub descriptors: u64,
    /// Driver area: available ring, or event suppression.
    pub driver: u64,
    /// Device area: used ring, or event suppression.
    pub device: u64,
    /// Where to begin: the available index. In a packed ring: position and wrap counter of the available side in the low 16
    /// bits, of the used side in the high 16 bits.
    pub base: u32,
}

impl Model {
    /// Creates a device with a zeroed disk.
    ///
    /// # Panics
    /// If no eventfd can be created.
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

    /// The properties the device was created with.
    pub fn spec(&self) -> &Spec {
        &self.spec
    }

    /// The current configuration space.
    pub fn config(&self) -> Vec<u8> {
        self.config.lock().unwrap().clone()
    }

    /// Handles a driver's write to the configuration space. It changes only the write cache byte.
    pub fn write_config(&self, at: usize, bytes: &[u8]) {
        if let (WRITEBACK, [mode]) = (at, bytes) {
            self.config.lock().unwrap()[WRITEBACK] = *mode;
        }
    }

    /// Changes the size of the disk, in bytes, and notifies the driver.
    pub fn resize(&self, capacity: u64) {
        self.disk.lock().unwrap().resize(capacity as usize, 0);
        self.config.lock().unwrap()[..8].copy_from_slice(&(capacity / 512).to_le_bytes());
        let _ = self.config_changes.write(1);
    }

    /// Sets four bytes of the configuration from byte `at` on, and notifies the driver.
    ///
    /// # Panics
    /// If the configuration is too short.
    pub fn reconfigure(&self, at: usize, value: u32) {
        self.config.lock().unwrap()[at..at + 4].copy_from_slice(&value.to_le_bytes());
        let _ = self.config_changes.write(1);
    }

    /// Becomes readable when the configuration has changed.
    pub fn config_changes(&self) -> BorrowedFd<'_> {
        self.config_changes.as_fd()
    }

    /// Records the driver's accepted features.
    pub fn accept(&self, features: u64) {
        self.accepted.store(features, Ordering::Relaxed);
    }

    /// Number of notifications sent to the driver.
    pub fn notifications(&self) -> u64 {
        self.notifications.load(Ordering::Relaxed)
    }

    /// Number of requests taken.
    pub fn taken(&self) -> u64 {
        self.taken.load(Ordering::Relaxed)
    }

    /// Number of requests completed.
    pub fn completed(&self) -> u64 {
        self.completed.load(Ordering::Acquire)
    }

    /// Maps a range of the driver's memory.
    ///
    /// # Errors
    /// That of mmap(2).
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

    /// Unmaps the memory at an address. Returns whether there was any.
    ///
    /// # Panics
    /// If another thread has panicked.
    pub fn unmap(&self, iova: u64) -> bool {
        let mut memory = self.memory.write().unwrap();
        let before = memory.len();
        memory.retain(|region| region.iova != iova);
        memory.len() < before
    }

    /// Number of mapped ranges of the driver's memory.
    ///
    /// # Panics
    /// If another thread has panicked.
    pub fn regions(&self) -> usize {
        self.memory.read().unwrap().len()
    }

    /// Unmaps all memory.
    pub fn unmap_all(&self) {
        self.memory.write().unwrap().clear();
    }

    /// Starts a queue.
    ///
    /// # Errors
    /// No thread or eventfd can be created.
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

    /// Calls `act` with the address of `len` bytes of the driver's memory.
    fn at<R>(&self, iova: u64, len: usize, act: impl FnOnce(*mut u8) -> R) -> R {
        let memory = self.memory.read().unwrap();
        let region = memory
            .iter()
            .find(|r| iova >= r.iova && iova - r.iova < r.len as u64 && len as u64 <= r.len as u64 - (iova - r.iova))
            .unwrap_or_else(|| panic!("{len} bytes at {iova:#x} are not in registered memory"));
        act(region.at.wrapping_add((iova - region.iova) as usize))
    }

    fn read<const N: usize>(&self, iova: u64) -> [u8; N] {
        let mut bytes = [0; N];
        // SAFETY: `at` checked the range, and `bytes` is a local array of the same length.
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
    // SAFETY: a plain system call on a descriptor that we own.
    if unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, libc::O_NONBLOCK) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(fd)
}

/// A running queue.
#[derive(Debug)]
pub struct Running {
    wake: Arc<EventFd>,
    /// The stop flag, and the position to resume from.
    shared: Arc<(AtomicBool, AtomicU32)>,
    thread: Option<JoinHandle<()>>,
}

impl Running {
    /// Completes the requests taken so far and stops. Returns the position to resume from (see [`Addresses::base`]).
    ///
    /// # Panics
    /// If the driver violated the specification.
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

/// A request that was taken.
#[derive(Debug)]
struct Chain {
    /// Head index, or buffer id.
    head: u16,
    kind: u32,
    sector: u64,
    /// Data descriptors: address, length, whether the device writes.
    data: Vec<(u64, u32, bool)>,
    status: u64,
    /// Descriptors of the ring that it occupies. In a packed ring only their number matters.
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
    /// Indices; in a packed ring positions, with the wrap counter in bit 15.
    next: u16,
    used: u16,
    /// Distance that `used` moved since the last notification check.
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
                // Read only if readable: a test may have made the eventfd blocking.
                if fds[0].any() == Some(true) {
                    let _ = nix::unistd::read(&self.kick, &mut [0; 8]);
                }
            }
        }
    }

    fn is_silent(&self) -> bool {
        matches!(self.fault(), Some(Fault::Silent | Fault::Scribble | Fault::Chaos))
    }

    /// The fault, once it is due.
    fn fault(&self) -> Option<Fault> {
        self.model.spec.fault.filter(|_| self.model.taken() > self.model.spec.after)
    }

    /// A pseudo-random number below `end`; 0 if `end` is 0.
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
            assert!(waiting <= size, "at most one ring of requests is available");
            if waiting == 0 {
                return None;
            }
            let entry = self.ring.driver + 4 + 2 * u64::from(self.next % size);
            let head = model.load16(entry, Ordering::Relaxed);
            assert!(head < size, "the head lies in the ring");
            self.next = self.next.wrapping_add(1);
            self.walk(head)
        };
        if self.packed {
            let busy: usize = self.pending.iter().map(|c| c.occupied.len()).sum();
            assert!(busy + chain.occupied.len() <= usize::from(size), "no descriptor in use is overwritten");
            assert!(self.pending.iter().all(|c| c.head != chain.head), "an id belongs to one request at a time");
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

    /// Writes numbers over the ring and the slots behind it. Every second number is plausible in its place.
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
            // Small values for the used index, because the driver rejects almost all others.
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

    /// Address of a descriptor of a packed ring.
    fn packed_at(&self, place: u16) -> u64 {
        self.ring.descriptors + u64::from(place & 0x7fff) * 16
    }

    /// The position `by` descriptors further on in a packed ring.
    fn further(&self, place: u16, by: u16) -> u16 {
        let at = (place & 0x7fff) + by;
        if at < self.ring.size { place + by } else { (place ^ 0x8000) & 0x8000 | (at - self.ring.size) }
    }

    /// Takes the next chain of a packed ring, and checks it against virtio 1.2, 2.8.
    fn follow(&mut self) -> Chain {
        let (mut parts, mut occupied) = (Vec::new(), Vec::new());
        loop {
            assert!(self.is_available(), "a chain is available as a whole");
            let bytes: [u8; 16] = self.model.read(self.packed_at(self.next));
            let (address, len, id, flags) = packed(bytes);
            occupied.push(self.next & 0x7fff);
            self.next = self.further(self.next, 1);
            assert!(len > 0, "a descriptor is not empty");
            if flags & VRING_DESC_F_INDIRECT != 0 {
                assert!(self.indirect && parts.is_empty(), "an indirect descriptor is negotiated and stands alone");
                assert!(
                    flags & VRING_DESC_F_NEXT == 0 && len.is_multiple_of(16),
                    "an indirect table is a single multiple of 16 bytes"
                );
                for n in 0..len / 16 {
                    let (address, len, _, flags) = packed(self.model.read(address + u64::from(n) * 16));
                    assert!(len > 0 && flags & !VRING_DESC_F_WRITE == 0, "in a table only the WRITE flag is valid");
                    parts.push((address, len, flags & VRING_DESC_F_WRITE != 0));
                }
            } else {
                parts.push((address, len, flags & VRING_DESC_F_WRITE != 0));
            }
            assert!(parts.len() <= usize::from(self.ring.size), "a chain is not longer than the ring");
            if flags & VRING_DESC_F_NEXT == 0 {
                return self.chain(id, parts, occupied);
            }
        }
    }

    /// Follows a chain, and checks it against virtio 1.2, 2.7.5 and 5.2.6.
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
                    "an indirect descriptor is negotiated and stands alone"
                );
                assert!(
                    flags & VRING_DESC_F_NEXT == 0 && len > 0 && len.is_multiple_of(16),
                    "an indirect table is a single multiple of 16 bytes"
                );
                (table, size, at, in_ring) = (address, len / 16, 0, false);
                continue;
            }
            assert!(len > 0, "a descriptor is not empty");
            parts.push((address, len, flags & VRING_DESC_F_WRITE != 0));
            assert!(parts.len() <= usize::from(self.ring.size), "a chain is not longer than the ring");
            if flags & VRING_DESC_F_NEXT == 0 {
                break;
            }
            at = u16::from_le_bytes(bytes[14..].try_into().unwrap());
        }
        self.chain(head, parts, occupied)
    }

    /// Builds a request from its descriptors: address, length, whether the device writes.
    fn chain(&self, head: u16, mut parts: Vec<(u64, u32, bool)>, occupied: Vec<u16>) -> Chain {
        assert!(parts.is_sorted_by_key(|(_, _, write)| *write), "device-readable descriptors come first");
        let (address, len, write) = parts.remove(0);
        assert!(len == 16 && !write, "the header has 16 readable bytes");
        let header: [u8; 16] = self.model.read(address);
        let (status, len, write) = parts.pop().expect("a chain ends with a status");
        assert!(len == 1 && write, "the status is one writable byte");
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
                // Only once in a batch: a lapped packed ring would look as if nothing had been used.
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

    /// Writes a used element. In a split ring the caller updates the index.
    fn give(&mut self, id: u16, len: u32, descriptors: u16) {
        if self.packed {
            let at = self.packed_at(self.used);
            self.model.write(at + 8, &len.to_le_bytes());
            self.model.write(at + 12, &id.to_le_bytes());
            // Some devices leave out the WRITE flag, which marks the length as valid.
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

    /// Executes a request. Returns the status and the number of data bytes written.
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
                assert!(chain.data.iter().all(|(_, _, write)| *write), "the buffer of a read is device-writable");
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
                assert!(chain.data.iter().all(|(_, _, write)| !write), "the buffer of a write is device-readable");
                let Some(range) = range(chain.sector, len) else { return (VIRTIO_BLK_S_IOERR, 0) };
                let mut into = &mut disk[range];
                for (address, len, _) in &chain.data {
                    let (now, rest) = into.split_at_mut(*len as usize);
                    // SAFETY: `at` checked the range, and `now` is a slice of our disk of the same length.
                    model.at(*address, now.len(), |at| unsafe {
                        ptr::copy_nonoverlapping(at, now.as_mut_ptr(), now.len());
                    });
                    into = rest;
                }
                (VIRTIO_BLK_S_OK, 0)
            }
            VIRTIO_BLK_T_FLUSH => (VIRTIO_BLK_S_OK, 0),
            VIRTIO_BLK_T_WRITE_ZEROES | VIRTIO_BLK_T_DISCARD if !read_only => {
                assert!(len == 16 && chain.data.len() == 1, "a range request has one segment of 16 bytes");
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
                assert!(len == 20 && chain.data.len() == 1, "GET_ID has one buffer of 20 bytes");
                let mut id = [0; 20];
                id[..SERIAL.len()].copy_from_slice(SERIAL.as_bytes());
                model.write(chain.data[0].0, &id);
                (VIRTIO_BLK_S_OK, 20)
            }
            _ if read_only => (VIRTIO_BLK_S_IOERR, 0),
            _ => (VIRTIO_BLK_S_UNSUPP, 0),
        }
    }

    /// Notifies the driver, if it requested that (2.7.7.2, 2.7.10, 2.8.10).
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
                    assert!(self.event_idx && at & 0x7fff < self.ring.size, "the event offset lies in the ring");
                    // Whether the requested descriptor is among those used since the last check.
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

    /// Requests notifications from the driver. `false`: more requests became available meanwhile.
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

/// Address, length, id and flags of a packed descriptor.
fn packed(bytes: [u8; 16]) -> (u64, u32, u16, u32) {
    let [low, high] = [0, 8].map(|at| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap()));
    (low, high as u32, (high >> 32) as u16, (high >> 48) as u32)
}

/// A transport to a [`Model`] within this process. `RESTARTS`: whether queues can be restarted.
#[derive(Debug)]
pub struct Local<const RESTARTS: bool = true> {
    model: Arc<Model>,
    life: Arc<Liveness>,
    running: Mutex<BTreeMap<u16, Running>>,
    memory: Mutex<Vec<Arc<Mapping>>>,
}

impl Local<true> {
    /// A transport to `model` whose queues can be started and stopped at any time, as in vhost-user.
    pub fn new(model: &Arc<Model>) -> Self {
        Self::to(model)
    }
}

impl Local<false> {
    /// A transport to `model` whose queues are started once and never stopped, as in vDPA and PCI.
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
        assert_eq!(features & !self.model.spec.features, 0, "a driver accepts only offered features");
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
        assert_eq!(packed, ring.format == Format::Packed, "the ring has the negotiated format");
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
        assert!(RESTARTS, "these queues cannot be stopped");
        let running = self.running.lock().unwrap().remove(&index);
        running.map(Running::stop);
        Ok(())
    }

    fn cut_off(&self) {}
}

/// The kick eventfd of a queue of a [`Local`] transport.
#[derive(Clone, Debug)]
pub struct Bell(Arc<EventFd>);

impl Doorbell for Bell {
    fn ring(&self) {
        let _ = self.0.write(1);
    }
}
