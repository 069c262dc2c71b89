//! [`Passthrough`]: a namespace through the kernel's NVMe driver, bypassing the block layer.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd},
        unix::fs::{FileTypeExt, MetadataExt},
    },
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering},
    },
    time::Duration,
};

use blkdev::{Completion, Context, Device, Error, Info, Mapping, Op, PAGE, Queue, Request, Source};
use blkdev_ring::Ring;

use crate::{
    flight::Flight,
    limits::{Disk, IdentifyData, Shape, check, invalid, settle, unusable},
    spec::{Controller, Limits, Namespace, RANGES_MAX, Status, cns},
    sys,
};

/// Settings for opening a namespace's character device. There may be more fields later.
#[derive(Debug)]
#[non_exhaustive]
pub struct PassthroughOptions {
    /// The device's path or descriptor.
    pub source: Source,
    /// Refuses writes. The device is then opened for reading only, for which the kernel requires `CAP_SYS_ADMIN`.
    pub read_only: bool,
    /// Depth of the deepest queue, in requests, 1 to 4096. Default: 128.
    pub entries: u16,
    /// Polls for completions (`IOPOLL`): such queues have no wake-up descriptor. The kernel's driver must have poll queues
    /// (`nvme.poll_queues`).
    pub polled: bool,
    /// Longest time for a request before the device is declared dead; `None`: forever.
    ///
    /// Half of it is the time-out of each command in the kernel's driver. The kernel measures the age of a command from its
    /// submission to the controller. It aborts a command of that age, even if the controller still completes others. After the
    /// same time again the kernel resets the controller. Its time-out for block I/O (`nvme_core.io_timeout`, 30 s) works in the
    /// same way. A slow controller with a deep queue needs a longer time-out, or fewer [`entries`](Self::entries).
    pub timeout: Option<Duration>,
}

impl PassthroughOptions {
    /// The default options for the device at `path`.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self::from(Source::Path(path.into()))
    }
}

impl From<Source> for PassthroughOptions {
    fn from(source: Source) -> Self {
        Self { source, read_only: false, entries: 128, polled: false, timeout: Some(Duration::from_secs(30)) }
    }
}

/// Most queues open at a time: each is a ring with locked memory and a descriptor.
const QUEUES_MAX: u16 = 256;

/// Longest transfer in bytes, if the kernel reports none.
const TRANSFER_MAX: u64 = 128 << 10;

/// A namespace behind the kernel's NVMe driver.
#[derive(Debug)]
pub struct Passthrough {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    file: File,
    info: Info,
    disk: Disk,
    capacity: AtomicU64,
    sysfs: Sysfs,
    polled: bool,
    queues: AtomicU16,
    mappings: Mutex<Vec<Arc<Mapping>>>,
    /// Queues register memory with the kernel, which pins it.
    pins: AtomicBool,
}

impl Passthrough {
    /// Opens a namespace's character device.
    ///
    /// # Errors
    /// The text names the reason and the remedy.
    ///
    /// - [`NotFound`](io::ErrorKind::NotFound): there is no such device.
    /// - [`PermissionDenied`](io::ErrorKind::PermissionDenied): this user may not open it, or may not send commands to it.
    /// - [`InvalidInput`](io::ErrorKind::InvalidInput): it is not the character device of an NVMe namespace.
    /// - [`Unsupported`](io::ErrorKind::Unsupported): the format of the namespace is not supported, or the controller refuses
    ///   to identify it.
    ///
    /// Whether the kernel supports passthrough shows at [`open_queue`](Device::open_queue). Any other error of the system has
    /// its own kind; [`Context::os_error`](blkdev::Context::os_error) returns its errno.
    pub fn open(options: PassthroughOptions) -> io::Result<Self> {
        let PassthroughOptions { source, read_only, entries, polled, timeout } = options;
        let (name, file) = match source {
            Source::Path(path) => {
                let name = path.display().to_string();
                // Check the type first: opening a pipe waits, and opening a tape rewinds it. Open for writing, which the kernel
                // requires of processes that are not root (Linux 6.2).
                let meta = fs::metadata(&path).and_then(|meta| check_type(&meta));
                (name, meta.and_then(|()| OpenOptions::new().read(true).write(!read_only).open(path)))
            }
            Source::Fd(fd) => (format!("fd {}", fd.as_raw_fd()), Ok(File::from(fd))),
        };
        let wish = Wish { read_only, entries, polled, timeout };
        let shared = file.and_then(|file| open(file, &wish, &name));
        let shared = shared.map_err(|e| Context::wrap(format!("{name}: {e}"), e))?;
        Ok(Self { shared: Arc::new(shared) })
    }
}

/// [`PassthroughOptions`] without the source.
struct Wish {
    read_only: bool,
    entries: u16,
    polled: bool,
    timeout: Option<Duration>,
}

fn check_type(meta: &fs::Metadata) -> io::Result<()> {
    if meta.file_type().is_char_device() {
        return Ok(());
    }
    Err(invalid("it is not a character device; NVMe passthrough needs /dev/ngXnY, not /dev/nvmeXnY".to_owned()))
}

/// Checks that the file is a supported namespace, and determines its limits.
fn open(file: File, options: &Wish, name: &str) -> io::Result<Shared> {
    let meta = file.metadata()?;
    check_type(&meta)?;
    let data = find(&file, options.read_only)?;
    let sysfs = Sysfs::new(&meta)?;
    if sysfs.text("zoned").is_some_and(|zoned| zoned != "none") {
        return Err(unusable("the namespace is zoned, which is not supported"));
    }
    // The kernel uses a controller page of at least 4096 bytes; sysfs already accounts for MDTS.
    let transfer_max = data.transfer_max(PAGE as u64, sysfs.transfer_max().min(32 << 20))?;
    let shape = Shape {
        driver: "nvme-io_uring",
        target: name.to_owned(),
        page: PAGE as u64,
        transfer_max,
        ranges: RANGES_MAX,
        queues: QUEUES_MAX,
        depth: options.entries.clamp(1, 4096),
        read_only: options.read_only,
        timeout: options.timeout,
    };
    let (info, disk) = data.describe(shape);
    Ok(Shared {
        capacity: AtomicU64::new(data.namespace.blocks << data.namespace.block_shift),
        sysfs,
        file,
        info,
        disk,
        polled: options.polled,
        queues: AtomicU16::new(0),
        mappings: Mutex::default(),
        pins: AtomicBool::new(true),
    })
}

/// Identifies the namespace and its controller.
fn find(file: &File, read_only: bool) -> io::Result<IdentifyData> {
    let nsid = sys::nsid(file).map_err(|e| {
        let text = format!("it is not an NVMe namespace: {e}");
        Context::with_kind(io::ErrorKind::InvalidInput, text, e)
    })?;
    let identify = |cns, nsid| {
        sys::identify(file, cns, nsid).map_err(|e| {
            let remedy = match e.raw_os_error() {
                Some(libc::EACCES | libc::EPERM) if read_only => ": read-only access needs CAP_SYS_ADMIN",
                Some(libc::EACCES | libc::EPERM) => ": before Linux 6.2 this needs CAP_SYS_ADMIN",
                _ => "",
            };
            Context::wrap(format!("Identify: {e}{remedy}"), e)
        })
    };
    let refused = |status: Status| unusable(format!("Identify: {status}"));
    let controller = Controller::parse(&identify(cns::CONTROLLER, 0)?.map_err(refused)?);
    let namespace = Namespace::parse(&identify(cns::NAMESPACE, nsid)?.map_err(refused)?);
    check(&namespace, nsid)?;
    // Older controllers do not support it.
    let limits = identify(cns::CONTROLLER_OF_COMMAND_SET, 0)?.map_or_else(|_| Limits::default(), |b| Limits::parse(&b));
    Ok(IdentifyData { controller, limits, nsid, namespace })
}

/// The sysfs directory of the block device that belongs to a character device.
#[derive(Debug)]
struct Sysfs(PathBuf);

impl Sysfs {
    fn new(meta: &fs::Metadata) -> io::Result<Self> {
        let (major, minor) = (libc::major(meta.rdev()), libc::minor(meta.rdev()));
        let path = fs::canonicalize(format!("/sys/dev/char/{major}:{minor}"))?;
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let digits = name.strip_prefix("ng").ok_or_else(|| invalid(format!("{name} is not an NVMe namespace")))?;
        Ok(Self(PathBuf::from(format!("/sys/class/block/nvme{digits}/queue"))))
    }

    fn text(&self, name: &str) -> Option<String> {
        fs::read_to_string(self.0.join(name)).ok().map(|text| text.trim().to_owned())
    }

    fn number(&self, name: &str) -> Option<u64> {
        self.text(name)?.parse().ok()
    }

    /// Longest command in bytes. The kernel does not split passthrough commands: it refuses those that are too long or have too
    /// many segments.
    fn transfer_max(&self) -> u64 {
        let max = self.number("max_hw_sectors_kb").map_or(TRANSFER_MAX, |kib| kib.saturating_mul(1 << 10));
        let segments = self.number("max_segments").unwrap_or(u64::MAX);
        // An unaligned start needs one more page.
        max.min(segments.saturating_sub(1).max(1).saturating_mul(PAGE as u64))
    }

    /// The size in bytes, in whole blocks of `2^shift`; `None`: the size is unknown or invalid.
    fn size(&self, shift: u8) -> Option<u64> {
        // In sectors of 512 bytes, whatever the block size.
        let bytes = self.number("../size")?.checked_mul(512)?;
        (bytes > 0 && bytes <= i64::MAX as u64).then_some(bytes >> shift << shift)
    }
}

impl Device for Passthrough {
    fn info(&self) -> &Info {
        &self.shared.info
    }

    fn capacity(&self) -> u64 {
        self.shared.capacity.load(Ordering::Relaxed)
    }

    /// The controller reports a new size to the kernel's driver. A query to the controller itself could take long.
    fn refresh(&self) {
        let Shared { sysfs, disk, capacity, .. } = &*self.shared;
        // 0: the device was removed. Its requests must fail with EIO, not because of their range.
        if let Some(size) = sysfs.size(disk.block_shift).filter(|&size| size > 0) {
            capacity.store(size, Ordering::Relaxed);
        }
    }

    fn register(&self, mapping: &Arc<Mapping>) -> io::Result<()> {
        self.shared.mappings.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::clone(mapping));
        Ok(())
    }

    fn unregister(&self, mapping: &Arc<Mapping>) {
        let mut mappings = self.shared.mappings.lock().unwrap_or_else(PoisonError::into_inner);
        mappings.retain(|known| !Arc::ptr_eq(known, mapping));
    }

    fn pins_memory(&self) -> bool {
        self.shared.pins.load(Ordering::Relaxed)
    }

    fn open_queue(&self, depth: u16) -> io::Result<Box<dyn Queue>> {
        let shared = &self.shared;
        let max = shared.info.queues_max;
        let claim = |open: u16| (open < max).then_some(open + 1);
        if shared.queues.fetch_update(Ordering::Relaxed, Ordering::Relaxed, claim).is_err() {
            let text = format!("{}: all {max} queues are open; close one first", shared.info.target);
            return Err(io::Error::new(io::ErrorKind::ResourceBusy, text));
        }
        // A channel opens its queues after it has registered its memory. So this queue will use the latest mapping.
        let known = shared.mappings.lock().unwrap_or_else(PoisonError::into_inner).last().cloned();
        let depth = depth.clamp(1, shared.info.depth_max);
        let timeout = shared.info.timeout.map(|timeout| u32::try_from((timeout / 2).as_millis()).unwrap_or(u32::MAX));
        match Ring::passthrough(depth, shared.file.as_fd(), shared.polled, known) {
            Ok(ring) => {
                let fixed = ring.has_registered();
                if !fixed {
                    shared.pins.store(false, Ordering::Relaxed);
                }
                let (shared, timeout_ms) = (Arc::clone(shared), timeout.map_or(u32::MAX, |ms| ms.max(1)));
                Ok(Box::new(PassthroughQueue { ring, shared, done: Vec::new(), fixed, timeout_ms, gone: false }))
            }
            Err(e) => {
                shared.queues.fetch_sub(1, Ordering::Relaxed);
                Err(Context::wrap(format!("{}: {e}", shared.info.target), e))
            }
        }
    }
}

#[derive(Debug)]
struct PassthroughQueue {
    /// Before the file that it uses: fields are dropped in declaration order.
    ring: Ring<Flight, blkdev_ring::Passthrough>,
    shared: Arc<Shared>,
    /// Requests that ended without the kernel.
    done: Vec<Completion>,
    /// Requests may use registered memory.
    fixed: bool,
    timeout_ms: u32,
    gone: bool,
}

impl Queue for PassthroughQueue {
    #[inline]
    fn push(&mut self, request: Request) -> Result<(), Request> {
        let refusal = match &request.op {
            _ if self.gone => Some(Error::Gone),
            // Not among this device's `Caps`, so a caller never pushes it.
            Op::Status { .. } | Op::Prefetch { .. } => Some(Error::NotSupported),
            _ => None,
        };
        if let Some(error) = refusal {
            self.done.push(request.refuse(error));
            return Ok(());
        }
        let disk = &self.shared.disk;
        let command = disk.command(&request.op);
        let ranges = match &request.op {
            Op::Discard { at, len } => disk.ranges(*at, *len).collect(),
            _ => Box::default(),
        };
        let (fixed, timeout_ms) = (self.fixed && ranges.is_empty(), self.timeout_ms);
        self.ring.push(Flight { request, command, ranges, fixed, timeout_ms }).map_err(|flight| flight.request)
    }

    #[inline]
    fn kick(&mut self) {
        self.ring.kick();
    }

    #[inline]
    fn reap(&mut self, done: &mut Vec<Completion>) {
        if self.ring.is_broken() {
            self.give_up();
        }
        done.append(&mut self.done);
        let fixed = &mut self.fixed;
        self.ring.reap(|flight, answer| {
            if answer == Err(libc::EINVAL) && flight.fixed {
                // Registered memory came with Linux 6.1: where it is not known, the command was not looked at.
                *fixed = false;
                return Some(Flight { fixed: false, ..flight });
            }
            let Request { tag, op } = flight.request;
            let result = match answer {
                Ok(status) => settle(&op, Status(status as u16)),
                Err(errno) => Err(Error::from_errno(errno)),
            };
            done.push(Completion { tag, op, result });
            None
        });
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        (!self.shared.polled).then(|| self.ring.as_fd())
    }

    fn arm(&mut self) -> bool {
        self.done.is_empty() && (self.ring.arm() || self.gone)
    }

    fn give_up(&mut self) {
        if !self.gone {
            let count = self.ring.in_flight();
            log::error!(
                "{}: abandoned with {count} requests in flight; the device is declared dead",
                self.shared.info.target
            );
        }
        self.gone = true;
        let done = &mut self.done;
        self.ring.give_up(|flight| done.push(flight.request.refuse(Error::Gone)));
    }

    fn describe(&self) -> String {
        format!("ring: {} commands at the kernel", self.ring.in_flight())
    }

    fn is_dead(&self) -> bool {
        self.gone || self.ring.is_broken()
    }
}

impl Drop for PassthroughQueue {
    fn drop(&mut self) {
        self.shared.queues.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_the_kernel_are_checked() {
        let dir = std::env::temp_dir().join(format!("blkdev-nvme-sysfs-{}", std::process::id()));
        fs::create_dir_all(dir.join("queue")).unwrap();
        let sysfs = Sysfs(dir.join("queue"));
        let check = |text: &str, shift, size| {
            fs::write(dir.join("size"), text).unwrap();
            assert_eq!(sysfs.size(shift), size, "{text:?}");
        };
        check("2048\n", 9, Some(1 << 20));
        check("2049\n", 12, Some(1 << 20));
        for wrong in ["0\n", "", "x", "-1", "18446744073709551615", "18014398509481984", "36028797018963968"] {
            check(wrong, 9, None);
        }
        fs::remove_dir_all(&dir).unwrap();
        assert_eq!(sysfs.size(9), None);
    }
}
