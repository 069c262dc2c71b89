//! [`VirtioBlk`]: a virtio-blk device (virtio 1.2, 5.2) as a [`blkdev::Device`].

use std::{
    io,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
};

use blkdev::{Context, Device, Info, Mapping, Peer, Request, State, wake::Wake};
use virtio_bindings::{
    virtio_blk::VIRTIO_BLK_F_CONFIG_WCE,
    virtio_config::{VIRTIO_F_RING_PACKED, VIRTIO_F_VERSION_1},
    virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC},
};

use crate::{
    config::{self, Config, has},
    core::{Core, PROBE, Station},
    layout::Layout,
    options::{Options, WriteCache},
    packed::Packed,
    queue::Queue,
    split::Split,
    transport::{Format, Transport},
    watch::Watch,
};

/// The largest ring size in the specification (2.7).
const RING_MAX: u16 = 1 << 15;

/// Limit on open queues. Ring memory is reserved for each.
const QUEUES_MAX: u16 = 256;

/// An open virtio-blk device.
#[derive(Debug)]
pub struct VirtioBlk<T: Transport> {
    core: Arc<Core<T>>,
    /// Reads the configuration again after a change.
    watch: Watch,
}

impl<T: Transport> VirtioBlk<T> {
    /// Negotiates with the device, and reads its serial number and its first block.
    ///
    /// # Errors
    /// The text names the driver, the target and the reason.
    ///
    /// - [`InvalidInput`](io::ErrorKind::InvalidInput): an option is out of range, or the device has fewer queues than
    ///   requested.
    /// - [`InvalidData`](io::ErrorKind::InvalidData): the configuration of the device is invalid, or it violates the
    ///   protocol.
    /// - [`Unsupported`](io::ErrorKind::Unsupported): the device lacks a feature that is required or requested.
    /// - [`TimedOut`](io::ErrorKind::TimedOut): the device does not answer.
    /// - [`NotConnected`](io::ErrorKind::NotConnected): the device is dead.
    ///
    /// An error of the transport has its own kind.
    pub fn open(transport: T, options: &Options) -> io::Result<Self> {
        let name = format!("{} {}", transport.driver(), transport.target());
        Self::negotiate(transport, options).map_err(|e| Context::wrap(format!("{name}: {e}"), e))
    }

    /// Agrees with the device on features, gives it memory for the rings, and starts it.
    fn negotiate(transport: T, options: &Options) -> io::Result<Self> {
        let Agreement { features, format, queue_size, queues, config } = Agreement::new(&transport, options)?;
        transport.accept(features)?;

        let (indirect, event_idx) =
            (has(features, VIRTIO_RING_F_INDIRECT_DESC), has(features, VIRTIO_RING_F_EVENT_IDX));
        let layout = Layout::new(format, queue_size, config.segments, indirect);
        let len = PROBE + usize::from(queues) * layout.len();
        let rings = if transport.shares_memory() { Mapping::shared(len) } else { Mapping::new(len) }?;
        transport.register(&rings)?;

        let mut core = Core {
            life: Arc::clone(transport.life()),
            info: info(&transport, &config, options, queues, layout.slots()),
            transport,
            features,
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
        start(&mut core, options.write_cache)?;
        let core = Arc::new(core);
        let watch = Watch::new(&core)?;
        Ok(Self { core, watch })
    }

    /// The transport to the device.
    pub fn transport(&self) -> &T {
        &self.core.transport
    }
}

/// The features, limits and numbers that driver and device agree on.
struct Agreement {
    features: u64,
    format: Format,
    queue_size: u16,
    queues: u16,
    config: Config,
}

impl Agreement {
    /// Chooses among the offered features, and reads the configuration. Changes nothing in the device.
    fn new<T: Transport>(transport: &T, options: &Options) -> io::Result<Self> {
        let queue_size = queue_size(transport, options.queue_size)?;
        let offered = transport.features();
        if !has(offered, VIRTIO_F_VERSION_1) {
            return unsupported("the device is older than virtio 1.0: it does not offer VIRTIO_F_VERSION_1");
        }
        let mut bytes = [0; config::LEN];
        let len = transport.read_config(&mut bytes, config::needed(offered))?;
        let format = ring_format(offered, options.ring)?;
        let features = config::usable(offered, len) | offered & ring_features(format);
        if options.write_cache.is_some() && !has(features, VIRTIO_BLK_F_CONFIG_WCE) {
            return unsupported("cannot switch the device's write cache: it does not offer VIRTIO_BLK_F_CONFIG_WCE");
        }
        let mut config = Config::parse(&bytes[..len], features, queue_size)?;
        config.limit(T::TRANSFER_MAX);

        let queues_max = config.queues.min(transport.queues_max()).min(QUEUES_MAX);
        let queues = options.queues.unwrap_or(queues_max);
        if queues == 0 || queues > queues_max {
            return Err(invalid(format!("{queues} queues requested, but the device has {queues_max}")));
        }
        Ok(Self { features, format, queue_size, queues, config })
    }
}

/// The ring size in elements: the requested one, or less if a queue of the device is smaller.
fn queue_size<T: Transport>(transport: &T, requested: u16) -> io::Result<u16> {
    if !requested.is_power_of_two() || !(4..=RING_MAX).contains(&requested) {
        return Err(invalid(format!("queue size {requested} is not a power of two from 4 to {RING_MAX}")));
    }
    let all = 0..transport.queues_max().clamp(1, QUEUES_MAX);
    let ring_max = all.map(|index| transport.ring_max(index)).min().unwrap_or(0).max(1);
    Ok(requested.min(1 << ring_max.ilog2()))
}

/// The requested ring format, which the device must offer. By default packed, if the device offers it.
fn ring_format(offered: u64, requested: Option<Format>) -> io::Result<Format> {
    let packed = has(offered, VIRTIO_F_RING_PACKED);
    match requested {
        Some(Format::Packed) if !packed => {
            unsupported("the device has no packed rings: it does not offer VIRTIO_F_RING_PACKED")
        }
        Some(format) => Ok(format),
        None if packed => Ok(Format::Packed),
        None => Ok(Format::Split),
    }
}

/// The features of the rings that this driver uses, if the device offers them.
fn ring_features(format: Format) -> u64 {
    let common = 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << VIRTIO_RING_F_EVENT_IDX;
    match format {
        Format::Split => common,
        Format::Packed => common | 1 << VIRTIO_F_RING_PACKED,
    }
}

/// The device's limits and capabilities, without its serial number, which only a running device reports.
fn info<T: Transport>(transport: &T, config: &Config, options: &Options, queues: u16, depth: u16) -> Info {
    let read_only = options.read_only || config.read_only;
    let mut info = Info::new(transport.driver(), transport.target().to_owned());
    transport.name().clone_into(&mut info.name);
    info.queues_max = queues;
    info.depth_max = depth;
    info.block_size = config.block_size;
    info.preferred_block_size = config.preferred_block_size;
    info.transfer_max = config.transfer_max;
    info.zero_max = config.zero_max.unwrap_or(u64::from(config.block_size));
    info.discard_max = config.discard_max.unwrap_or(u64::from(config.discard_alignment));
    info.discard_alignment = config.discard_alignment;
    info.timeout = options.timeout;
    info.caps.read_only = read_only;
    info.caps.flush = config.flush;
    info.caps.zero = config.zero_max.is_some() && !read_only;
    info.caps.discard = config.discard_max.is_some() && !read_only;
    info
}

/// Starts the device, switches its write cache, and sends the first requests.
fn start<T: Transport>(core: &mut Core<T>, write_cache: Option<WriteCache>) -> io::Result<()> {
    if !T::RESTARTS {
        for index in 0..core.info.queues_max {
            core.fix(index)?;
        }
    }
    core.transport.run()?;
    if let Some(mode) = write_cache {
        core.switch_cache(mode)?;
    }
    let probe = match core.format {
        Format::Split => core.probe::<Split<Request>>()?,
        Format::Packed => core.probe::<Packed<Request>>()?,
    };
    core.info.serial = probe.serial;
    core.clear_reads = !probe.tells_len;
    if core.clear_reads {
        log::warn!(
            "{} {}: the device does not report read lengths: each read buffer is cleared first",
            core.info.driver,
            core.info.target
        );
    }
    Ok(())
}

/// The error of an option that the driver or the device cannot satisfy.
fn invalid(why: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, why)
}

/// The error of a required feature that the device lacks.
fn unsupported<R>(why: &str) -> io::Result<R> {
    Err(io::Error::new(io::ErrorKind::Unsupported, why))
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
            log::warn!("{driver} {target}: cannot unregister {} MiB of memory: {e}", mapping.len() >> 20);
        }
    }

    fn shares_memory(&self) -> bool {
        self.core.transport.shares_memory()
    }

    /// An IOMMU holds on to the pages. So does a back end in another process that maps them for its own hardware, as SPDK does.
    /// After a page is replaced, it would still use the old page.
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

    fn peer(&self) -> Option<Arc<Peer>> {
        self.core.transport.peer()
    }

    fn ring_at_death(&self, bell: &Arc<Wake>) {
        self.core.life.ring_at_end(bell);
    }

    fn details(&self) -> Vec<(&'static str, String)> {
        let Core { features, format, queue_size, .. } = &*self.core;
        vec![
            ("features", format!("{features:#x}")),
            ("virtqueue format", format!("{format:?}").to_lowercase()),
            ("queue size", queue_size.to_string()),
        ]
    }

    fn state(&self) -> State {
        if self.core.life.is_dead() { State::Dead } else { State::Working }
    }

    fn open_queue(&self, depth: u16) -> io::Result<Box<dyn blkdev::Queue>> {
        match self.core.format {
            Format::Split => Queue::<T, Split<Request>>::open(&self.core, depth),
            Format::Packed => Queue::<T, Packed<Request>>::open(&self.core, depth),
        }
    }
}
