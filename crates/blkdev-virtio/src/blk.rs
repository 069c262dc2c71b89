//! [`VirtioBlk`]: a virtio-blk device (virtio 1.2, 5.2) as a [`blkdev::Device`].

use std::{
    fmt, io,
    os::fd::{AsFd, BorrowedFd},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, AtomicU64, Ordering, fence},
    },
    time::{Duration, Instant},
};

use blkdev::{Caps, Completion, Device, Error, Info, Mapping, Op, Request};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use virtio_bindings::{
    virtio_blk::{
        VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
        VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
        VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
    },
    virtio_config::{VIRTIO_F_RING_PACKED, VIRTIO_F_VERSION_1},
    virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC},
};

use crate::{
    config::{self, Config, SECTOR, WRITEBACK, has},
    life::Life,
    notifier::Notifier,
    packed::Packed,
    ring::{Chain, Data, Layout, Place, Used, Virtqueue},
    shared::Shared,
    slots::Slots,
    split::Split,
    transport::{Doorbell, Format, Ring, Transport},
    watch::Watch,
};

/// The largest ring of the specification (2.7).
const RING_MAX: u16 = 1 << 15;

/// Queues that are opened at most. Ring memory is set aside for each.
const QUEUES_MAX: u16 = 256;

/// Memory for the requests that are sent while the device is opened: room for the largest block.
const PROBE: usize = 65536;

/// How long a queue that is dropped waits for what is in flight.
const DRAIN: Duration = Duration::from_secs(5);

/// How often a thread that waits for the device looks whether it is dead.
const GLANCE: Duration = Duration::from_millis(200);

/// What the user can choose.
#[derive(Clone, Debug)]
pub struct Options {
    /// Queues to use; `None`: as many as the device has. More than it has is an error.
    pub queues: Option<u16>,
    /// Descriptors in a ring, at most: a power of two, 4 to 32768. With indirect descriptors, which most devices take, this
    /// is the number of requests in flight; without it is about three times that.
    pub queue_size: u16,
    /// The format of the rings; `None`: packed where the device offers it.
    pub ring: Option<Format>,
    /// Switches the device's write cache, which then stays so; `None`: left as it is. Asking for it is an error where the
    /// device cannot be switched.
    pub write_cache: Option<WriteCache>,
    /// Never write, even if the device would allow it.
    pub read_only: bool,
    /// How long a request may take before the device is given up; `None`: for ever.
    pub timeout: Option<Duration>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            queues: None,
            queue_size: 256,
            ring: None,
            write_cache: None,
            read_only: false,
            timeout: Some(Duration::from_secs(30)),
        }
    }
}

/// What a device does with writes (virtio 1.2, 5.2.6.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WriteCache {
    /// They are complete when they are in the cache, and durable after a flush.
    Writeback,
    /// They are durable when they are complete.
    Writethrough,
}

/// A virtio-blk device, opened.
#[derive(Debug)]
pub struct VirtioBlk<T: Transport> {
    core: Arc<Core<T>>,
    /// Reads the configuration again when it may have changed.
    watch: Watch,
}

/// What the device and its queues share.
pub(crate) struct Core<T: Transport> {
    // First: with it goes the device's hold on the memory below.
    transport: T,
    life: Arc<Life>,
    info: Info,
    config: Config,
    /// Bytes, a multiple of the block size.
    capacity: AtomicU64,
    /// The device's latest report.
    block_size: AtomicU32,
    format: Format,
    indirect: bool,
    event_idx: bool,
    queue_size: u16,
    /// The device does not tell how much it has written: memory for reads is cleared first.
    clear_reads: bool,
    /// Ring memory: [`PROBE`] bytes, then as many for each queue as the largest layout takes.
    rings: Arc<Mapping>,
    /// One for each queue.
    stations: Mutex<Vec<Station<T::Doorbell>>>,
}

/// A queue of the device, open or not.
#[derive(Debug)]
struct Station<D> {
    open: bool,
    /// Where queues cannot be restarted: what stays as it is when the queue is closed and opened again.
    fixed: Option<Fixed<D>>,
}

/// A queue that was started for good.
#[derive(Clone, Debug)]
struct Fixed<D> {
    bell: D,
    call: Arc<Notifier>,
    /// How far it had got when it was closed.
    place: Place,
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
        let all = 0..transport.queues_max().clamp(1, QUEUES_MAX);
        let ring_max = all.map(|index| transport.ring_max(index)).min().unwrap_or(0).max(1);
        let queue_size = options.queue_size.min(1 << ring_max.ilog2());

        let offered = transport.features();
        let unsupported = |why: &str| Err(io::Error::new(io::ErrorKind::Unsupported, why));
        if !has(offered, VIRTIO_F_VERSION_1) {
            return unsupported("the device is older than virtio 1.0 (it does not offer VIRTIO_F_VERSION_1)");
        }
        let mut bytes = [0; config::LEN];
        let len = transport.read_config(&mut bytes, config::needed(offered))?;
        let format = match options.ring {
            Some(Format::Packed) if !has(offered, VIRTIO_F_RING_PACKED) => {
                return unsupported("the device has no packed rings (it does not offer VIRTIO_F_RING_PACKED)");
            }
            Some(format) => format,
            None if has(offered, VIRTIO_F_RING_PACKED) => Format::Packed,
            None => Format::Split,
        };
        let mut ring_bits = 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << VIRTIO_RING_F_EVENT_IDX;
        if format == Format::Packed {
            ring_bits |= 1 << VIRTIO_F_RING_PACKED;
        }
        let features = config::usable(offered, len) | offered & ring_bits;
        if options.write_cache.is_some() && !has(features, VIRTIO_BLK_F_CONFIG_WCE) {
            return unsupported(
                "the device's write cache cannot be switched (it does not offer VIRTIO_BLK_F_CONFIG_WCE)",
            );
        }
        let mut config = Config::parse(&bytes[..len], features, queue_size)?;
        config.limit(T::TRANSFER_MAX);
        let (indirect, event_idx) =
            (has(features, VIRTIO_RING_F_INDIRECT_DESC), has(features, VIRTIO_RING_F_EVENT_IDX));

        let queues_max = config.queues.min(transport.queues_max()).min(QUEUES_MAX);
        let queues = options.queues.unwrap_or(queues_max);
        if queues == 0 || queues > queues_max {
            return Err(invalid(format!("{queues} queues asked for, the device has {queues_max}")));
        }
        transport.accept(features)?;

        let layout = Layout::new(format, queue_size, config.segments, indirect);
        let len = PROBE + usize::from(queues) * layout.len();
        let rings = if transport.shares_memory() { Mapping::shared(len) } else { Mapping::new(len) }?;
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
        let mut core = Core {
            transport,
            life,
            info,
            capacity: AtomicU64::new(config.capacity),
            block_size: AtomicU32::new(config.block_size),
            config,
            format,
            indirect,
            event_idx,
            queue_size,
            clear_reads: false,
            rings,
            stations: Mutex::new((0..queues).map(|_| Station { open: false, fixed: None }).collect()),
        };
        if !T::RESTARTS {
            for index in 0..queues {
                core.fix(index)?;
            }
        }
        core.transport.run()?;
        if let Some(mode) = options.write_cache {
            core.switch_cache(mode)?;
        }
        let probe = match format {
            Format::Split => core.probe::<Split<Request>>()?,
            Format::Packed => core.probe::<Packed<Request>>()?,
        };
        core.info.serial = probe.serial;
        core.clear_reads = !probe.tells_len;
        if core.clear_reads {
            log::warn!(
                "{} {}: the device does not tell how much it has read: memory is cleared before each read",
                core.info.driver,
                core.info.target
            );
        }
        let core = Arc::new(core);
        let watch = Watch::new(&core)?;
        Ok(Self { core, watch })
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
        self.core.capacity.load(Ordering::Relaxed)
    }

    fn register(&self, mapping: &Arc<Mapping>) -> io::Result<()> {
        self.core.transport.register(mapping)
    }

    fn unregister(&self, mapping: &Arc<Mapping>) {
        if let Err(e) = self.core.transport.unregister(mapping) {
            let (driver, target) = (self.core.info.driver, &self.core.info.target);
            log::warn!("{driver} {target}: cannot remove {} MiB of memory: {e}", mapping.len() >> 20);
        }
    }

    fn shares_memory(&self) -> bool {
        self.core.transport.shares_memory()
    }

    /// An IOMMU holds on to the pages; so does a back end in another process that maps them for hardware of its own, as SPDK
    /// does. It would go on with the old pages where we see new ones.
    fn pins_memory(&self) -> bool {
        true
    }

    fn refresh(&self) {
        if self.core.transport.config_changes().is_none() && !self.core.life.is_dead() {
            self.watch.refresh();
        }
    }

    fn is_replaced(&self) -> bool {
        self.core.transport.is_replaced()
    }

    fn open_queue(&self, depth: u16) -> io::Result<Box<dyn blkdev::Queue>> {
        match self.core.format {
            Format::Split => Queue::<T, Split<Request>>::open(&self.core, depth),
            Format::Packed => Queue::<T, Packed<Request>>::open(&self.core, depth),
        }
    }
}

/// A started queue: its ring, its doorbell, and the eventfd that the device writes to.
type Started<T, V> = (V, <T as Transport>::Doorbell, Arc<Notifier>);

/// What the requests that are sent at open told.
struct Probe {
    serial: String,
    tells_len: bool,
}

impl<T: Transport> Core<T> {
    pub(crate) fn transport(&self) -> &T {
        &self.transport
    }

    pub(crate) fn life(&self) -> &Life {
        &self.life
    }

    fn stations(&self) -> MutexGuard<'_, Vec<Station<T::Doorbell>>> {
        self.stations.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn claim(&self) -> io::Result<u16> {
        let mut stations = self.stations();
        let index = stations.iter().position(|station| !station.open).ok_or_else(|| {
            io::Error::new(io::ErrorKind::ResourceBusy, format!("all {} queues of the device are open", stations.len()))
        })?;
        stations[index].open = true;
        Ok(index as u16)
    }

    fn release(&self, index: u16) {
        self.stations()[usize::from(index)].open = false;
    }

    /// Room for the largest layout, and thus for every other.
    fn most(&self) -> Layout {
        Layout::new(self.format, self.queue_size, self.config.segments, self.indirect)
    }

    fn ring_at(&self, index: u16) -> usize {
        PROBE + usize::from(index) * self.most().len()
    }

    /// Makes the device begin to work on new rings.
    fn begin(&self, index: u16, layout: &Layout) -> io::Result<(T::Doorbell, Arc<Notifier>)> {
        let call = Arc::new(Notifier::new()?);
        let [descriptors, driver, device] = layout.addresses(&self.rings, self.ring_at(index));
        let ring = Ring { format: self.format, size: layout.size, descriptors, driver, device, call: call.as_fd() };
        let bell = self.transport.start_queue(index, &ring)?;
        Ok((bell, call))
    }

    /// Starts a queue for good.
    fn fix(&self, index: u16) -> io::Result<()> {
        let (bell, call) = self.begin(index, &self.most())?;
        let place = Place::start(self.format);
        self.stations()[usize::from(index)].fixed = Some(Fixed { bell, call, place });
        Ok(())
    }

    fn start<V: Virtqueue<Request>>(&self, index: u16, depth: u16) -> io::Result<Started<T, V>> {
        if self.life.is_dead() {
            return Err(io::Error::new(io::ErrorKind::NotConnected, "the device is gone"));
        }
        let depth = depth.clamp(1, self.most().slots());
        let fixed = self.stations()[usize::from(index)].fixed.clone();
        let (layout, memory, place);
        let (bell, call) = if let Some(fixed) = fixed {
            (layout, place) = (self.most(), fixed.place);
            memory = Shared::window(&self.rings, self.ring_at(index), layout.len());
            (fixed.bell, fixed.call)
        } else {
            layout = Layout::fitting(self.format, depth, self.config.segments, self.indirect, self.queue_size);
            place = Place::start(self.format);
            memory = Shared::zeroed(&self.rings, self.ring_at(index), layout.len());
            self.begin(index, &layout)?
        };
        let slots = Slots::new(memory, layout, self.config.segment_max, depth);
        self.life.watch(&call);
        Ok((V::resume(slots, self.event_idx, place), bell, call))
    }

    /// Closes a queue that nothing is in flight in.
    fn stop<V: Virtqueue<Request>>(&self, index: u16, ring: &V) -> io::Result<()> {
        if T::RESTARTS {
            return self.transport.stop_queue(index);
        }
        if let Some(fixed) = &mut self.stations()[usize::from(index)].fixed {
            fixed.place = ring.place();
        }
        Ok(())
    }

    /// Reads the capacity again, because the device says that its configuration has changed.
    pub(crate) fn config_changed(&self) {
        let name = format_args!("{} {}", self.info.driver, self.info.target);
        let mut bytes = [0; config::LEN];
        let now = match self.transport.read_config(&mut bytes, 8) {
            Ok(len) => {
                self.compare_blocks(&bytes[..len]);
                config::capacity(&bytes[..len], self.config.block_size)
            }
            Err(e) => {
                return self.end(&format!("after a change of configuration: {e}; the device is not used any more"));
            }
        };
        match now {
            Ok(now) => {
                let before = self.capacity.swap(now, Ordering::Relaxed);
                if before != now {
                    log::info!("{name}: the capacity has changed from {before} to {now} bytes");
                }
            }
            Err(e) => log::warn!("{name}: a change of configuration is left alone: {e}"),
        }
    }

    /// Callers rely on the block size, so a new one counts only for callers that open the device from now on.
    fn compare_blocks(&self, bytes: &[u8]) {
        let Some(now) = config::block_size(bytes).filter(|_| self.config.tells_block_size) else { return };
        if self.block_size.swap(now, Ordering::Relaxed) != now && now != self.config.block_size {
            log::warn!(
                "{} {}: the block size has changed from {} to {now} bytes; open the device again to use it",
                self.info.driver,
                self.info.target,
                self.config.block_size
            );
        }
    }

    /// Switches the write cache, and looks whether the device has done it.
    fn switch_cache(&self, mode: WriteCache) -> io::Result<()> {
        let wanted = u8::from(mode == WriteCache::Writeback);
        self.transport.write_config(WRITEBACK, &[wanted])?;
        let mut bytes = [0; config::LEN];
        let len = self.transport.read_config(&mut bytes, WRITEBACK + 1)?;
        if len <= WRITEBACK || bytes[WRITEBACK] != wanted {
            let why = format!("the device was asked to switch its write cache to {mode:?}, and has not done it");
            return Err(io::Error::other(why.to_lowercase()));
        }
        Ok(())
    }

    fn end(&self, why: &str) {
        self.life.end(why);
        self.transport.cut_off();
    }

    /// Asks for the serial number, and reads the first block to see whether the device tells how much it has written.
    fn probe<V: Virtqueue<Request>>(&self) -> io::Result<Probe> {
        let (mut ring, bell, call) = self.start::<V>(0, 1)?;
        let memory = Shared::zeroed(&self.rings, 0, PROBE);
        let mut ask = |kind: u32, len: u32| {
            let chain = Chain { header: [u64::from(kind), 0], data: Data::In(memory.iova(0), len) };
            // Nobody's: only what the device makes of it is asked for.
            ring.push(&chain, Request { tag: 0, op: Op::Flush }).expect("the queue is empty");
            if ring.publish() {
                bell.ring();
            }
            let deadline = Instant::now() + self.info.timeout.unwrap_or(DRAIN);
            loop {
                match ring.pop() {
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
                call.drain();
                if ring.arm() && !self.life.is_dead() && !wait(&call, &self.life, deadline) {
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
            Ok(probe) => self.stop(0, &ring).map(|()| probe),
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

/// Waits until `call` is readable or the device has died. `false`: neither was so in time.
fn wait(call: &Notifier, life: &Life, deadline: Instant) -> bool {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        // A peer that shares the eventfd can take the wake-up away, so `life` is looked at now and then. Rounded up: a wait of
        // 0 ms just before the deadline would spin.
        let timeout = PollTimeout::try_from(left.min(GLANCE) + Duration::from_micros(999)).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(call.as_fd(), PollFlags::POLLIN)], timeout) {
            Ok(0) | Err(nix::errno::Errno::EINTR) if life.is_dead() => return true,
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
struct Queue<T: Transport, V: Virtqueue<Request>> {
    core: Arc<Core<T>>,
    index: u16,
    ring: V,
    bell: T::Doorbell,
    call: Arc<Notifier>,
    /// The eventfd may have been written to: since it was last emptied, the queue has been armed.
    drain_call: bool,
    /// What ended when it was pushed.
    ended: Vec<Completion>,
}

impl<T: Transport, V: Virtqueue<Request>> Queue<T, V> {
    fn open(core: &Arc<Core<T>>, depth: u16) -> io::Result<Box<dyn blkdev::Queue>> {
        let index = core.claim()?;
        let (ring, bell, call) = core.start::<V>(index, depth).inspect_err(|_| core.release(index))?;
        let core = Arc::clone(core);
        // Whoever had the queue before may have left the eventfd written to.
        Ok(Box::new(Self { core, index, ring, bell, call, drain_call: true, ended: Vec::new() }))
    }

    /// The device is dead: what is in flight ends now, without its memory. Reads because the device may still write to it;
    /// writes, too, because one that is still under way, in a back end that is only slow, would otherwise put on its disk
    /// whatever the memory is used for next.
    #[cold]
    fn finish(&mut self, done: &mut Vec<Completion>) {
        done.extend(self.ring.take_all().map(|Request { tag, mut op }| {
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

impl<T: Transport, V: Virtqueue<Request>> blkdev::Queue for Queue<T, V> {
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
        self.ring.push(&Chain { header: [u64::from(kind), sector(at)], data }, request)
    }

    #[inline]
    fn kick(&mut self) {
        if self.ring.publish() {
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
            match self.ring.pop() {
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
            self.call.drain();
            self.drain_call = false;
        }
        // After the eventfd was emptied: `Life::end` marks first and writes then.
        fence(Ordering::SeqCst);
        if self.core.life.is_dead() {
            // With nothing to finish there is nothing to wake up for; see `Queue::push` for what comes later.
            return self.ring.in_flight() == 0 && self.ended.is_empty();
        }
        self.drain_call = true;
        self.ended.is_empty() && self.ring.arm()
    }

    fn give_up(&mut self) {
        self.core.end(&format!(
            "queue {}: given up with {} requests in flight; the device is not used any more",
            self.index,
            self.ring.in_flight()
        ));
    }

    fn is_dead(&self) -> bool {
        self.core.life.is_dead()
    }
}

/// `struct virtio_blk_discard_write_zeroes` (5.2.6).
#[inline]
fn range(at: u64, len: u64, flags: u32) -> Data {
    Data::Segment([at / SECTOR, (len / SECTOR) | (u64::from(flags) << 32)])
}

#[inline(always)]
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

impl<T: Transport, V: Virtqueue<Request>> Drop for Queue<T, V> {
    fn drop(&mut self) {
        let mut done = Vec::new();
        let deadline = Instant::now() + self.core.info.timeout.map_or(DRAIN, |t| t.min(DRAIN));
        blkdev::Queue::kick(self);
        loop {
            blkdev::Queue::reap(self, &mut done);
            done.clear();
            if self.ring.in_flight() == 0 || self.core.life.is_dead() {
                break;
            }
            if blkdev::Queue::arm(self) && !wait(&self.call, &self.core.life, deadline) {
                blkdev::Queue::give_up(self);
            }
        }
        self.core.life.unwatch(&self.call);
        if self.core.life.is_dead() {
            // Its ring memory is not used again either: the queue stays taken.
            return;
        }
        match self.core.stop(self.index, &self.ring) {
            Ok(()) => self.core.release(self.index),
            Err(e) => self.core.end(&format!("queue {} could not be stopped: {e}", self.index)),
        }
    }
}
