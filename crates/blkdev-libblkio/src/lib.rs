//! Every driver of libblkio (the crate `blkio`) as a [`blkdev::Device`]: as an alternative, for comparison, and for benchmarks.
//!
//! ```no_run
//! # fn main() -> std::io::Result<()> {
//! use blkdev::Device;
//! use blkdev_libblkio::Libblkio;
//!
//! let properties = [("path".into(), "/dev/vdb".into()), ("direct".into(), "true".into())];
//! let device = Libblkio::open("io_uring", &properties)?;
//! println!("{} bytes in blocks of {}", device.capacity(), device.info().block_size);
//! # Ok(())
//! # }
//! ```
//!
//! Drivers, properties and their values are those of libblkio. This crate works around known defects of libblkio 1.5 (blkio
//! 0.5.1):
//! - **io_uring never discards**: every kernel refuses the flags that libblkio uses. [`Caps::discard`](blkdev::Caps::discard) is false there.
//! - **A request that does not fit in the ring blocks its virtio queue permanently.** Requests have one segment and are no
//!   longer than the device's limit. No more are in flight than the ring has descriptors for: three each, so 85 on a queue of
//!   256.
//! - **The longest transfer of an NVMe device is made up.** Transfers there have at most 128 KiB.
//! - **The death of a back end is never detected.** Requests to virtio devices time out ([`Libblkio::timeout`], 60 s).
//! - **A read-only virtio device does not start** unless opened read-only. It is opened again, read-only.
//! - **Each query of a vhost-user device's capacity is a message to its back end.** The capacity is queried once, at the start:
//!   a device that grows is not detected.
//! - **An invalid completion panics** (or loops) inside libblkio. A panic there ends its queue, not the process. Still, back
//!   ends must be trusted.

mod queue;

use std::{
    io,
    os::fd::{AsFd, AsRawFd},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

pub use blkdev;
use blkdev::{Context, Device, Info, Mapping, PAGE, Queue};
use blkio::{Blkio, Blkioq, Errno, MemoryRegion};

use queue::Home;

/// A device of libblkio.
#[derive(Debug)]
pub struct Libblkio {
    info: Info,
    capacity: u64,
    /// libblkio, or the peer, may pin registered memory.
    pins: bool,
    home: Arc<Home>,
}

/// Properties set before connecting; all others are set after it.
const EARLY: [&str; 4] = ["path", "fd", "direct", "read-only"];

/// Longest transfer if libblkio has no limit: that of the longest request.
const TRANSFER_MAX: u64 = 32 << 20;

/// An NVMe controller reports its longest transfer (MDTS), but libblkio does not read it. Few controllers have less than this.
const TRANSFER_MAX_NVME: u64 = 128 << 10;

/// QEMU declares a device behind an IOMMU broken if a request has more than 1024 memory pieces; each 4 KiB page can be one.
const TRANSFER_MAX_PCI: u64 = 2 << 20;

/// Descriptors of a request in a virtqueue: header, data, status.
const DESCRIPTORS: u16 = 3;

impl Libblkio {
    /// Creates, connects and starts a device. `properties` are set before or after connecting, as libblkio requires.
    ///
    /// All queues are created now: `num-queues` of them, by default one for each CPU if the device has as many.
    ///
    /// # Errors
    /// The error of libblkio, with the driver, the property and its value.
    pub fn open(driver: &str, properties: &[(String, String)]) -> io::Result<Self> {
        match Self::start(driver, properties) {
            Err((errno, _)) if errno == Errno::ROFS => {
                let mut properties = properties.to_vec();
                properties.push(("read-only".into(), "true".into()));
                Self::start(driver, &properties)
            }
            outcome => outcome,
        }
        .map_err(|(_, error)| error)
    }

    fn start(driver: &str, properties: &[(String, String)]) -> Result<Self, (Errno, io::Error)> {
        let fail = |what: String| {
            move |error: blkio::Error| {
                let cause = io::Error::from_raw_os_error(error.errno().raw_os_error());
                let text = format!("libblkio {driver}: {what}: {}", error.message());
                (error.errno(), Context::with_kind(cause.kind(), text, cause))
            }
        };
        let set = |blkio: &mut Blkio, early: bool| {
            for (name, value) in properties.iter().filter(|(name, _)| EARLY.contains(&name.as_str()) == early) {
                blkio.set_str(name, value).map_err(fail(format!("{name}={value}")))?;
            }
            Ok(())
        };
        let mut blkio = Blkio::new(driver).map_err(fail("no such driver".into()))?;
        set(&mut blkio, true)?;
        let target = target(properties);
        blkio.connect().map_err(fail(format!("cannot connect to {target}")))?;
        set(&mut blkio, false)?;
        let has = |name: &str| properties.iter().any(|(given, _)| given == name);
        if !has("num-queues") && !has("num-poll-queues") {
            let processors = std::thread::available_parallelism().map_or(1, |n| i32::try_from(n.get()).unwrap_or(1));
            let count = blkio.get_i32("max-queues").map_or(1, |max| max.min(processors)).max(1);
            blkio.set_i32("num-queues", count).map_err(fail(format!("num-queues={count}")))?;
        }
        let started = blkio.start().map_err(fail(format!("cannot start {target}")))?;
        let mut queues = started.queues;
        queues.extend(started.poll_queues);
        let (info, capacity) =
            describe(driver, &target, &blkio, &queues).map_err(|text| (Errno::INVAL, io::Error::other(text)))?;
        let pins = blkio.get_bool("may-pin-mem-regions").unwrap_or(true);
        Ok(Self { info, capacity, pins, home: Arc::new(Home::new(blkio, queues)) })
    }

    /// Sets the longest time for a request before the device is declared dead; `None`: forever. Must be set before channels are
    /// opened.
    #[must_use]
    pub fn timeout(mut self, timeout: Option<Duration>) -> Self {
        self.info.timeout = timeout;
        self
    }

    /// A property, in libblkio's text form. For people and for tests.
    ///
    /// # Errors
    /// libblkio has no property of that name.
    pub fn property(&self, name: &str) -> io::Result<String> {
        lock(&self.home.blkio).get_str(name).map_err(|error| io::Error::other(format!("{name}: {error}")))
    }
}

fn target(properties: &[(String, String)]) -> String {
    let named = |wanted: &str| properties.iter().find(|(name, _)| name == wanted).map(|(_, value)| value);
    match (named("path"), named("fd")) {
        (Some(path), _) => path.clone(),
        (None, Some(fd)) => format!("fd {fd}"),
        (None, None) => "nothing (set path or fd)".into(),
    }
}

/// Reads the limits and capabilities from the properties of a started device. The error is a text.
fn describe(driver: &str, target: &str, blkio: &Blkio, queues: &[Blkioq]) -> Result<(Info, u64), String> {
    let properties = Properties { driver, blkio };
    let is_virtio = driver.starts_with("virtio-blk");
    let is_io_uring = driver == "io_uring";

    let block = properties.block_size()?;
    let transfer_max = properties.transfer_max(block)?;
    // On io_uring 0 means no limit, elsewhere that the operation is not supported.
    let zero_max = properties.number("max-write-zeroes-len")?;
    let discard_max = properties.number("max-discard-len")?;
    let unit = match properties.number("discard-alignment")? {
        granularity if granularity >= block && granularity.is_multiple_of(block) => granularity,
        _ => block,
    };
    let (depth_name, each) = if is_virtio { ("queue-size", DESCRIPTORS) } else { ("num-entries", 1) };
    let depth_max = u16::try_from(properties.number(depth_name)?).unwrap_or(u16::MAX) / each;
    let preferred = properties.number("optimal-io-alignment")?.max(block).max(512).next_power_of_two().min(1 << 20);
    let mut info = Info::new("libblkio", format!("{driver} {target}"));
    info.queues_max = u16::try_from(queues.len()).unwrap_or(u16::MAX);
    info.depth_max = depth_max.max(1);
    info.block_size = properties.small(block)?;
    info.preferred_block_size = properties.small(preferred)?;
    info.transfer_max = properties.small(transfer_max)?;
    info.zero_max = if zero_max == 0 { u64::MAX } else { down(zero_max, block) };
    info.discard_max = down(discard_max, unit);
    info.discard_alignment = properties.small(unit)?;
    info.timeout = is_virtio.then_some(Duration::from_secs(60));
    info.caps.read_only = properties.flag("read-only")?;
    // Back ends may report that they need no flush although they do (qemu-storage-daemon). If none is needed, libblkio's flush
    // is free.
    info.caps.flush = is_virtio || properties.flag("flush-needed")?;
    // io_uring writes with RWF_DSYNC. On virtio libblkio would write and then flush, as `Channel` does.
    info.caps.fua = is_io_uring || properties.flag("supports-fua-natively")?;
    info.caps.zero = is_io_uring || down(zero_max, block) > 0;
    info.caps.discard = !is_io_uring && down(discard_max, unit) > 0;
    Ok((info, down(properties.number("capacity")?, block)))
}

/// The properties of a started device. Errors are texts.
struct Properties<'a> {
    driver: &'a str,
    blkio: &'a Blkio,
}

impl Properties<'_> {
    fn number(&self, name: &str) -> Result<u64, String> {
        let value = self.blkio.get_str(name).map_err(|error| self.error(&format!("{name}: {error}")))?;
        // -1 and other invalid values mean the same as 0 for these properties.
        Ok(value.parse().unwrap_or(0))
    }

    fn flag(&self, name: &str) -> Result<bool, String> {
        self.blkio.get_bool(name).map_err(|error| self.error(&format!("{name}: {error}")))
    }

    /// The block size. It must be one that this crate supports, with buffers that it can align.
    fn block_size(&self) -> Result<u64, String> {
        let block = self.number("request-alignment")?.max(1);
        if !block.is_power_of_two() || block > 65536 {
            return Err(self.error(&format!("blocks of {block} bytes are not supported")));
        }
        let needs = self.number("buf-alignment")?;
        if needs > PAGE as u64 && needs > block {
            return Err(self.error(&format!("buffers aligned to {needs} bytes are not supported")));
        }
        Ok(block)
    }

    /// Longest transfer in bytes, in whole blocks.
    fn transfer_max(&self, block: u64) -> Result<u64, String> {
        let own = match self.driver {
            "nvme-io_uring" => TRANSFER_MAX_NVME,
            "virtio-blk-vfio-pci" | "virtio-blk-vhost-vdpa" => TRANSFER_MAX_PCI,
            _ => TRANSFER_MAX,
        };
        // 0: no limit. Requests have one segment, so the segment limit applies to requests.
        let limits = [self.number("max-transfer")?, self.number("max-segment-len")?, own];
        let max = down(limits.into_iter().filter(|max| *max > 0).min().unwrap_or(own), block);
        if max < PAGE as u64 {
            return Err(self.error(&format!("transfers of at most {max} bytes are not supported")));
        }
        Ok(max)
    }

    /// Checks that a limit fits in 32 bits.
    fn small(&self, n: u64) -> Result<u32, String> {
        u32::try_from(n).map_err(|_| self.error(&format!("a limit of {n} bytes is not supported")))
    }

    fn error(&self, text: &str) -> String {
        format!("libblkio {}: {text}", self.driver)
    }
}

/// Rounds a length down to whole units.
fn down(len: u64, unit: u64) -> u64 {
    len / unit * unit
}

impl Device for Libblkio {
    fn info(&self) -> &Info {
        &self.info
    }

    fn capacity(&self) -> u64 {
        self.capacity
    }

    fn register(&self, mapping: &Arc<Mapping>) -> io::Result<()> {
        let mut blkio = lock(&self.home.blkio);
        if !mapping.is_shareable() && blkio.get_bool("needs-mem-region-fd").unwrap_or(true) {
            let (target, len) = (&self.info.target, mapping.len());
            return Err(io::Error::other(format!(
                "libblkio {target}: {len} bytes of memory cannot be shared with the back end: a file of that size exceeds \
                 ulimit -f (LimitFSIZE=); raise that, or use less memory (--memory)"
            )));
        }
        blkio.map_mem_region(&region(mapping)).map_err(|error| {
            let (target, len) = (&self.info.target, mapping.len());
            io::Error::other(format!("libblkio {target}: cannot register {len} bytes of memory: {error}"))
        })?;
        lock(&self.home.mappings).push(Arc::clone(mapping));
        Ok(())
    }

    fn unregister(&self, mapping: &Arc<Mapping>) {
        if self.home.is_lost() {
            // The device may still use the memory, and libblkio would wait for an unresponsive back end.
            return;
        }
        // libblkio ignores memory that was never registered.
        lock(&self.home.blkio).unmap_mem_region(&region(mapping));
        lock(&self.home.mappings).retain(|known| !Arc::ptr_eq(known, mapping));
    }

    fn pins_memory(&self) -> bool {
        self.pins
    }

    /// One of its drivers shares memory with another process; this function does not know which driver it is.
    fn shares_memory(&self) -> bool {
        true
    }

    fn open_queue(&self, depth: u16) -> io::Result<Box<dyn Queue>> {
        let Some(queue) = lock(&self.home.queues).pop() else {
            let max = self.info.queues_max;
            let text = format!("libblkio {}: all {max} queues are open or abandoned: set num-queues", self.info.target);
            return Err(io::Error::new(io::ErrorKind::ResourceBusy, text));
        };
        Ok(Box::new(queue::LibblkioQueue::new(&self.home, queue, depth.clamp(1, self.info.depth_max))))
    }
}

/// A whole mapping as a memory region of libblkio.
fn region(mapping: &Mapping) -> MemoryRegion {
    MemoryRegion {
        addr: mapping.as_ptr() as usize,
        iova: 0,
        len: mapping.len(),
        fd: mapping.as_fd().as_raw_fd(),
        fd_offset: 0,
        flags: 0,
    }
}

/// A panic never leaves the data behind these locks half changed.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The examples of the readme are tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
