//! [`VirtioBlk`]: a virtio-blk device (virtio 1.2, 5.2) as a [`blkdev::Device`].

use std::{
    fmt, io,
    os::fd::{AsFd, BorrowedFd},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{Ordering, fence},
    },
    time::{Duration, Instant},
};

use blkdev::{Caps, Completion, Device, Error, Info, Mapping, Op, Request};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::eventfd::{EfdFlags, EventFd},
};
use virtio_bindings::{
    virtio_blk::{
        VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
        VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
        VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
    },
    virtio_config::VIRTIO_F_VERSION_1,
    virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC},
};

use crate::{
    Doorbell, Life, Ring, Transport,
    config::{self, Config, SECTOR, has},
    shared::Shared,
    split::{Chain, Data, Layout, Split, Used},
};

/// The largest ring of the specification (2.7).
const RING_MAX: u16 = 1 << 15;

/// Queues that are opened at most. Ring memory is set aside for each.
const QUEUES_MAX: u16 = 256;

/// Memory for the requests that are sent while the device is opened: room for the largest block.
const PROBE: usize = 65536;

/// How long a queue that is dropped waits for what is in flight.
const DRAIN: Duration = Duration::from_secs(5);

/// What the user can choose.
#[derive(Clone, Debug)]
pub struct Options {
    /// Queues to use; `None`: as many as the device has. More than it has is an error.
    pub queues: Option<u16>,
    /// Descriptors in a ring, at most: a power of two, 4 to 32768. With indirect descriptors, which most devices take, this
    /// is the number of requests in flight; without it is about three times that.
    pub queue_size: u16,
    /// Never write, even if the device would allow it.
    pub read_only: bool,
    /// How long a request may take before the device is given up; `None`: for ever.
    pub timeout: Option<Duration>,
}

impl Default for Options {
    fn default() -> Self {
        Self { queues: None, queue_size: 256, read_only: false, timeout: Some(Duration::from_secs(30)) }
    }
}

/// A virtio-blk device, opened.
#[derive(Debug)]
pub struct VirtioBlk<T: Transport> {
    core: Arc<Core<T>>,
}

/// What the device and its queues share.
struct Core<T: Transport> {
    transport: T,
    life: Arc<Life>,
    info: Info,
    config: Config,
    indirect: bool,
    event_idx: bool,
    queue_size: u16,
    /// The device does not tell how much it has written: memory for reads is cleared first.
    clear_reads: bool,
    /// Ring memory: [`PROBE`] bytes, then as many for each queue as the largest layout takes.
    rings: Arc<Mapping>,
    /// Which queues are open.
    open: Mutex<Vec<bool>>,
}

impl<T: Transport> VirtioBlk<T> {
    /// Negotiates with the device, and asks it for its serial number and its first block.
    ///
    /// # Errors
    /// The options are out of range, the device cannot be driven, or does not answer.
    pub fn open(transport: T, options: &Options) -> io::Result<Self> {
        let name = format!("{} {}", transport.driver(), transport.target());
        Self::negotiate(transport, options).map_err(|e| io::Error::new(e.kind(), format!("{name}: {e}")))
    }

    fn negotiate(transport: T, options: &Options) -> io::Result<Self> {
        let invalid = |why: String| io::Error::new(io::ErrorKind::InvalidInput, why);
        if !options.queue_size.is_power_of_two() || !(4..=RING_MAX).contains(&options.queue_size) {
            return Err(invalid(format!("queue size {}, not a power of two from 4 to {RING_MAX}", options.queue_size)));
        }
        let ring_max = transport.ring_max(0).max(1);
        let queue_size = options.queue_size.min(1 << ring_max.ilog2());

        let offered = transport.features();
        if !has(offered, VIRTIO_F_VERSION_1) {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "the device is older than virtio 1.0 (it does not offer VIRTIO_F_VERSION_1)",
            ));
        }
        let mut bytes = [0; config::LEN];
        let len = transport.read_config(&mut bytes, config::needed(offered))?;
        let ring_bits = 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << VIRTIO_RING_F_EVENT_IDX;
        let features = config::usable(offered, len) | offered & ring_bits;
        let config = Config::parse(&bytes[..len], features, queue_size)?;
        let (indirect, event_idx) =
            (has(features, VIRTIO_RING_F_INDIRECT_DESC), has(features, VIRTIO_RING_F_EVENT_IDX));

        let queues_max = config.queues.min(transport.queues_max()).min(QUEUES_MAX);
        let queues = options.queues.unwrap_or(queues_max);
        if queues == 0 || queues > queues_max {
            return Err(invalid(format!("{queues} queues asked for, the device has {queues_max}")));
        }
        transport.accept(features)?;

        let layout = Layout::new(queue_size, config.segments, indirect);
        let rings = Mapping::new(PROBE + usize::from(queues) * layout.len())?;
        transport.register(&rings)?;

        let read_only = options.read_only || config.read_only;
        let info = Info {
            driver: transport.driver(),
            target: transport.target().to_owned(),
            serial: String::new(),
            queues_max: queues,
            depth_max: layout.slots(),
            block_size: config.block_size,
            preferred_block_size: config.preferred_block_size,
            transfer_max: config.transfer_max,
            zero_max: config.zero_max.unwrap_or(u64::from(config.block_size)),
            discard_max: config.discard_max.unwrap_or(u64::from(config.discard_alignment)),
            discard_alignment: config.discard_alignment,
            timeout: options.timeout,
            caps: Caps {
                read_only,
                flush: config.flush,
                zero: config.zero_max.is_some() && !read_only,
                discard: config.discard_max.is_some() && !read_only,
                ..Caps::default()
            },
        };
        let life = Arc::clone(transport.life());
        let open = Mutex::new(vec![false; usize::from(queues)]);
        let mut core =
            Core { transport, life, info, config, indirect, event_idx, queue_size, clear_reads: false, rings, open };
        let probe = core.probe()?;
        core.info.serial = probe.serial;
        core.clear_reads = !probe.tells_len;
        if core.clear_reads {
            log::warn!(
                "{} {}: the device does not tell how much it has read: memory is cleared before each read",
                core.info.driver,
                core.info.target
            );
        }
        Ok(Self { core: Arc::new(core) })
    }

    /// The way to the device.
    pub fn transport(&self) -> &T {
        &self.core.transport
    }
}

impl<T: Transport> Device for VirtioBlk<T> {
    fn info(&self) -> &Info {
        &self.core.info
    }

    fn capacity(&self) -> u64 {
        self.core.config.capacity
    }

    fn register(&self, mapping: &Arc<Mapping>) -> io::Result<()> {
        self.core.transport.register(mapping)
    }

    fn open_queue(&self, depth: u16) -> io::Result<Box<dyn blkdev::Queue>> {
        let core = &self.core;
        let index = core.claim()?;
        match core.start(index, depth) {
            Ok((split, bell, call)) => Ok(Box::new(Queue {
                core: Arc::clone(core),
                index,
                split,
                bell,
                call,
                drain_call: false,
                ended: Vec::new(),
            })),
            Err(e) => {
                core.release(index);
                Err(e)
            }
        }
    }
}

/// A started queue: its ring, its doorbell, and the eventfd that the device writes to.
type Started<T, O> = (Split<O>, <T as Transport>::Doorbell, Arc<EventFd>);

/// What the requests that are sent at open told.
struct Probe {
    serial: String,
    tells_len: bool,
}

impl<T: Transport> Core<T> {
    fn claim(&self) -> io::Result<u16> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let index = open.iter().position(|taken| !taken).ok_or_else(|| {
            io::Error::new(io::ErrorKind::ResourceBusy, format!("all {} queues of the device are open", open.len()))
        })?;
        open[index] = true;
        Ok(index as u16)
    }

    fn release(&self, index: u16) {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)[usize::from(index)] = false;
    }

    fn start<O>(&self, index: u16, depth: u16) -> io::Result<Started<T, O>> {
        if self.life.is_dead() {
            return Err(io::Error::new(io::ErrorKind::NotConnected, "the device is gone"));
        }
        let segments = self.config.segments;
        let most = Layout::new(self.queue_size, segments, self.indirect);
        let depth = depth.clamp(1, most.slots());
        let layout = Layout::fitting(depth, segments, self.indirect, self.queue_size);
        let at = PROBE + usize::from(index) * most.len();
        let split = Split::new(&self.rings, at, layout, self.config.segment_max, depth, self.event_idx);
        let call = Arc::new(EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?);
        let [descriptors, available, used] = split.addresses();
        let ring = Ring { size: split.size(), descriptors, available, used, call: call.as_fd() };
        let bell = self.transport.start_queue(index, &ring)?;
        self.life.watch(&call);
        Ok((split, bell, call))
    }

    fn end(&self, why: &str) {
        self.life.end(why);
        self.transport.cut_off();
    }

    /// Asks for the serial number, and reads the first block to see whether the device tells how much it has written.
    fn probe(&self) -> io::Result<Probe> {
        let (mut split, bell, call) = self.start::<()>(0, 1)?;
        let memory = Shared::zeroed(&self.rings, 0, PROBE);
        let mut ask = |kind: u32, len: u32| {
            let chain = Chain { header: [u64::from(kind), 0], data: Data::In(memory.iova(0), len) };
            split.push(&chain, ()).expect("the queue is empty");
            if split.publish() {
                bell.ring();
            }
            let deadline = Instant::now() + self.info.timeout.unwrap_or(DRAIN);
            loop {
                match split.pop() {
                    Ok(Some(used)) => return Ok(used),
                    Err(nonsense) => return Err(io::Error::new(io::ErrorKind::InvalidData, nonsense.to_string())),
                    Ok(None) if self.life.is_dead() => {
                        return Err(io::Error::new(
                            io::ErrorKind::NotConnected,
                            "the device went away while it was opened",
                        ));
                    }
                    Ok(None) => {}
                }
                let _ = call.read();
                if split.arm() && !self.life.is_dead() && !wait(&call, deadline) {
                    let why = "the device does not answer a request for its serial number or its first block";
                    return Err(io::Error::new(io::ErrorKind::TimedOut, why));
                }
            }
        };
        let probe = ask(VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_ID_BYTES).and_then(|id| {
            let serial = match u32::from(id.status) {
                VIRTIO_BLK_S_OK => text(&memory, VIRTIO_BLK_ID_BYTES as usize),
                _ => String::new(),
            };
            let block = self.config.block_size;
            let tells_len = self.config.capacity == 0 || {
                let read = ask(VIRTIO_BLK_T_IN, block)?;
                u32::from(read.status) != VIRTIO_BLK_S_OK || read.len >= block
            };
            Ok(Probe { serial, tells_len })
        });
        self.life.unwatch(&call);
        match probe {
            Ok(probe) => self.transport.stop_queue(0).map(|()| probe),
            Err(e) => {
                self.transport.cut_off();
                Err(e)
            }
        }
    }
}

/// The text in the first `len` bytes: up to the first NUL, without blanks around it and without control characters.
fn text(memory: &Shared, len: usize) -> String {
    let bytes: Vec<u8> = (0..len).map(|at| memory.load8(at, Ordering::Relaxed)).take_while(|b| *b != 0).collect();
    String::from_utf8_lossy(&bytes).trim().chars().filter(|c| !c.is_control()).collect()
}

/// Waits until `call` is readable. `false`: it was not in time.
fn wait(call: &EventFd, deadline: Instant) -> bool {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        // Rounded up: a wait of 0 ms just before the deadline would spin.
        let timeout = PollTimeout::try_from(left + Duration::from_micros(999)).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(call.as_fd(), PollFlags::POLLIN)], timeout) {
            Ok(0) if left.is_zero() => return false,
            Ok(0) | Err(nix::errno::Errno::EINTR) => {}
            Ok(_) => return true,
            Err(_) => return false,
        }
    }
}

impl<T: Transport> fmt::Debug for Core<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Core").field("info", &self.info).field("config", &self.config).finish_non_exhaustive()
    }
}

/// One open queue.
struct Queue<T: Transport> {
    core: Arc<Core<T>>,
    index: u16,
    split: Split<Request>,
    bell: T::Doorbell,
    call: Arc<EventFd>,
    /// The eventfd may have been written to: since it was last emptied, the queue has been armed.
    drain_call: bool,
    /// What ended when it was pushed.
    ended: Vec<Completion>,
}

impl<T: Transport> Queue<T> {
    /// The device is dead: what is in flight ends now, without its memory. Reads because the device may still write to it;
    /// writes, too, because one that is still under way, in a back end that is only slow, would otherwise put on its disk
    /// whatever the memory is used for next.
    #[cold]
    fn finish(&mut self, done: &mut Vec<Completion>) {
        done.extend(self.split.take_all().map(|Request { tag, mut op }| {
            if let Op::Read { buf, .. } | Op::Write { buf, .. } = &mut op {
                buf.abandon();
            }
            Completion { tag, op, result: Err(Error::Gone) }
        }));
    }

    /// Ends a request that the device is not asked for.
    #[cold]
    fn refuse(&mut self, request: Request, error: Error) -> Result<(), Request> {
        self.ended.push(Completion { tag: request.tag, op: request.op, result: Err(error) });
        Ok(())
    }
}

impl<T: Transport> blkdev::Queue for Queue<T> {
    #[inline]
    fn push(&mut self, mut request: Request) -> Result<(), Request> {
        if self.core.life.is_dead() {
            return self.refuse(request, Error::Gone);
        }
        let sector = |at: u64| at / SECTOR;
        let (kind, at, data) = match &mut request.op {
            Op::Read { at, buf } => {
                if self.core.clear_reads {
                    buf.zero(0, buf.len());
                }
                (VIRTIO_BLK_T_IN, *at, Data::In(buf.iova(), buf.len() as u32))
            }
            Op::Write { at, buf, .. } => (VIRTIO_BLK_T_OUT, *at, Data::Out(buf.iova(), buf.len() as u32)),
            Op::Zero { at, len, unmap } => {
                let unmap = *unmap && self.core.config.zero_may_unmap;
                let flags = if unmap { VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP } else { 0 };
                (VIRTIO_BLK_T_WRITE_ZEROES, 0, range(*at, *len, flags))
            }
            Op::Discard { at, len } => (VIRTIO_BLK_T_DISCARD, 0, range(*at, *len, 0)),
            Op::Flush => (VIRTIO_BLK_T_FLUSH, 0, Data::None),
            // Not among this device's Caps, so never asked for.
            Op::Status { .. } | Op::Prefetch { .. } => return self.refuse(request, Error::NotSupported),
        };
        self.split.push(&Chain { header: [u64::from(kind), sector(at)], data }, request)
    }

    #[inline]
    fn kick(&mut self) {
        if self.split.publish() {
            self.bell.ring();
        }
    }

    #[inline]
    fn reap(&mut self, done: &mut Vec<Completion>) {
        done.append(&mut self.ended);
        if self.core.life.is_dead() {
            return self.finish(done);
        }
        loop {
            match self.split.pop() {
                Ok(Some(used)) => done.push(complete(used, self.core.clear_reads)),
                Ok(None) => return,
                Err(nonsense) => {
                    self.core.end(&format!("queue {}: {nonsense}; the device is not used any more", self.index));
                    return self.finish(done);
                }
            }
        }
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.call.as_fd())
    }

    fn arm(&mut self) -> bool {
        if self.drain_call {
            // EAGAIN: nobody had written.
            let _ = self.call.read();
            self.drain_call = false;
        }
        // After the eventfd was emptied: `Life::end` marks first and writes then.
        fence(Ordering::SeqCst);
        if self.core.life.is_dead() {
            // With nothing to finish there is nothing to wake up for; see `Queue::push` for what comes later.
            return self.split.in_flight() == 0 && self.ended.is_empty();
        }
        self.drain_call = true;
        self.ended.is_empty() && self.split.arm()
    }

    fn give_up(&mut self) {
        self.core.end(&format!(
            "queue {}: given up with {} requests in flight; the device is not used any more",
            self.index,
            self.split.in_flight()
        ));
    }
}

/// `struct virtio_blk_discard_write_zeroes` (5.2.6).
#[inline]
fn range(at: u64, len: u64, flags: u32) -> Data {
    Data::Segment([at / SECTOR, (len / SECTOR) | (u64::from(flags) << 32)])
}

#[inline]
fn complete(used: Used<Request>, cleared: bool) -> Completion {
    let Request { tag, op } = used.owner;
    let result = match u32::from(used.status) {
        VIRTIO_BLK_S_OK => match &op {
            // What the device did not write is somebody else's old data.
            Op::Read { buf, .. } if (used.len as usize) < buf.len() && !cleared => Err(Error::Io),
            _ => Ok(()),
        },
        VIRTIO_BLK_S_UNSUPP => Err(Error::NotSupported),
        VIRTIO_BLK_S_IOERR => Err(Error::Io),
        _ => Err(Error::Io),
    };
    Completion { tag, op, result }
}

impl<T: Transport> Drop for Queue<T> {
    fn drop(&mut self) {
        let mut done = Vec::new();
        let deadline = Instant::now() + self.core.info.timeout.map_or(DRAIN, |t| t.min(DRAIN));
        blkdev::Queue::kick(self);
        loop {
            blkdev::Queue::reap(self, &mut done);
            done.clear();
            if self.split.in_flight() == 0 || self.core.life.is_dead() {
                break;
            }
            if blkdev::Queue::arm(self) && !wait(&self.call, deadline) {
                blkdev::Queue::give_up(self);
            }
        }
        self.core.life.unwatch(&self.call);
        if self.core.life.is_dead() {
            // Its ring memory is not used again either: the queue stays taken.
            return;
        }
        match self.core.transport.stop_queue(self.index) {
            Ok(()) => self.core.release(self.index),
            Err(e) => self.core.end(&format!("queue {} could not be stopped: {e}", self.index)),
        }
    }
}
