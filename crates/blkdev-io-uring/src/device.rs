//! [`IoUring`]: opens a file, and determines its limits and capabilities.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt},
    },
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU16, AtomicU64},
    },
};

use blkdev::{Context, Device, Info, Mapping, PAGE, Queue, Source};
use blkdev_ring::Ring;
use nix::fcntl::{FcntlArg, OFlag, fcntl};

use crate::{
    failures::Failures,
    file::{self, Target},
    flight::Flight,
    handle::{Bounded, Handle, Identity},
    lock::{self, Kin},
    queue::FileQueue,
    shared::{Shared, annotate},
    status::Helper,
};

/// Which file or block device to open, and its settings. There may be more fields later.
#[derive(Debug)]
#[non_exhaustive]
pub struct Options {
    /// The file, opened for reading and writing unless [`read_only`](Self::read_only). For an open descriptor its mode counts:
    /// a read-only one needs `read_only`, and one with `O_DIRECT` is direct. Its file offset is not used, but changes.
    pub source: Source,
    /// Bypasses the page cache (`O_DIRECT`). Default: false.
    pub direct: bool,
    /// Refuses writes. Default: false; a file that cannot be written is then an error.
    pub read_only: bool,
    /// Depth of the deepest queue, in requests, 1 to 32768. Default: 128.
    pub entries: u16,
    /// Opens the file without locks, even if another process has it open for writing or excludes writers. Default: false: an
    /// image that QEMU has open is refused, and so is a mounted block device unless read-only; and QEMU refuses files that are
    /// open here.
    pub force_share: bool,
}

impl Options {
    /// The default options for the file at `path`.
    pub fn path(path: impl Into<PathBuf>) -> Self {
        Self::from(Source::Path(path.into()))
    }

    /// The default options for the open file `fd`.
    pub fn fd(fd: OwnedFd) -> Self {
        Self::from(Source::Fd(fd))
    }
}

impl From<Source> for Options {
    fn from(source: Source) -> Self {
        Self { source, direct: false, read_only: false, entries: 128, force_share: false }
    }
}

/// Most queues open at a time: each is a ring with locked memory and a descriptor.
const QUEUES_MAX: u16 = 256;

/// Longest transfer in bytes: NBD's largest payload, 32 MiB.
const TRANSFER_MAX: u32 = 32 << 20;

/// An open regular file or kernel block device.
#[derive(Debug)]
pub struct IoUring {
    shared: Arc<Shared>,
}

impl IoUring {
    /// Opens a file or block device.
    ///
    /// # Errors
    /// The text names the reason and the remedy.
    ///
    /// - [`NotFound`](io::ErrorKind::NotFound): there is no such file, or no device behind it.
    /// - [`PermissionDenied`](io::ErrorKind::PermissionDenied): this user may not open it, or io_uring is forbidden.
    /// - [`ReadOnlyFilesystem`](io::ErrorKind::ReadOnlyFilesystem) or
    ///   [`ExecutableFileBusy`](io::ErrorKind::ExecutableFileBusy): it cannot be written, and [`Options::read_only`] is not
    ///   set.
    /// - [`ResourceBusy`](io::ErrorKind::ResourceBusy): it is in use, and [`Options::force_share`] is not set.
    /// - [`InvalidInput`](io::ErrorKind::InvalidInput): it is neither a regular file nor a block device; the mode of a
    ///   descriptor does not fit the options; or the size is not a multiple of the block size.
    /// - [`Unsupported`](io::ErrorKind::Unsupported): it does not support [`Options::direct`], or the kernel has no suitable
    ///   io_uring.
    ///
    /// Any other error of the system has its own kind; [`Context::os_error`](blkdev::Context::os_error) returns its errno.
    pub fn open(options: Options) -> io::Result<Self> {
        let Options { source, direct, read_only, entries, force_share } = options;
        let OpenFile { file, name, path, direct, kin } = match source {
            Source::Path(path) => open(path, direct, read_only, force_share)?,
            Source::Fd(fd) => adopt(fd, direct, read_only, force_share)?,
        };
        let mut target = Target::new(&file, &name, direct, read_only)?;
        if !force_share {
            lock::acquire(&file, &name, read_only, kin.as_ref())?;
        }
        // Queues need a ring like this. If io_uring is forbidden, fail now.
        let mut keeper = Ring::new(1, file.as_fd()).map_err(|e| annotate(e, "cannot open", &name))?;
        let discard_command = target.is_disk && target.discard && Flight::probe_discard(&mut keeper);
        if target.is_disk && !discard_command {
            // Only PUNCH_HOLE is left, which needs hardware support for zeroes.
            target.discard &= target.zero_mode == file::PUNCH;
        }
        let identity = path.map(|path| Identity::new(path, &file)).transpose()?;
        let handle = match identity {
            Some(_) => Handle::new(file, access(direct, read_only), keeper),
            // The process that passed the descriptor holds it, too.
            None => Handle::shared(file),
        };
        let shared = Shared {
            handle,
            info: info(&target, name, direct, read_only, entries),
            target,
            discard_command,
            zero_range_fails: AtomicBool::new(false),
            queues: AtomicU16::new(0),
            failures: Failures::default(),
            helper: Helper::default(),
            identity,
            size_question: Bounded::default(),
            identity_question: Bounded::default(),
            capacity: AtomicU64::new(0),
            mappings: Mutex::new(Vec::new()),
            _kin: kin,
        };
        check_size(shared.measure()?, &shared.info)?;
        Ok(Self { shared: Arc::new(shared) })
    }
}

/// The flags to open the file again.
fn access(direct: bool, read_only: bool) -> OFlag {
    let access = if read_only { OFlag::O_RDONLY } else { OFlag::O_RDWR };
    let direct = if direct { OFlag::O_DIRECT } else { OFlag::empty() };
    access | direct
}

/// The limits and capabilities of the file or block device.
fn info(target: &Target, name: String, direct: bool, read_only: bool, entries: u16) -> Info {
    let mut info = Info::new("io_uring", name);
    info.serial = target.serial.clone();
    info.queues_max = QUEUES_MAX;
    info.depth_max = entries.clamp(1, 32768);
    info.block_size = target.block_size;
    info.preferred_block_size = target.preferred_block_size;
    info.transfer_max = TRANSFER_MAX;
    info.discard_alignment = target.discard_alignment;
    info.caps.read_only = read_only;
    info.caps.rotational = target.rotational;
    info.caps.flush = !target.write_through;
    info.caps.fua = true;
    info.caps.zero = target.zero;
    info.caps.discard = target.discard;
    info.caps.status = target.status;
    info.caps.prefetch = !direct;
    info
}

/// Refuses a size that is not a multiple of the block size: the end would not be accessible.
fn check_size(size: u64, info: &Info) -> io::Result<()> {
    let Info { target, block_size, .. } = info;
    if size.is_multiple_of((*block_size).into()) {
        return Ok(());
    }
    let text = format!(
        "{target} has {size} bytes, but direct transfers use units of {block_size}: its end is not accessible; leave out \
         direct=true, or make the size a multiple of {block_size} (truncate --size=%{block_size})"
    );
    Err(io::Error::new(io::ErrorKind::InvalidInput, text))
}

impl Device for IoUring {
    fn info(&self) -> &Info {
        &self.shared.info
    }

    /// The size at open, or at the last [`refresh`](Device::refresh), in whole blocks.
    fn capacity(&self) -> u64 {
        self.shared.capacity()
    }

    fn register(&self, mapping: &Arc<Mapping>) -> io::Result<()> {
        self.shared.mappings().push(Arc::clone(mapping));
        Ok(())
    }

    fn unregister(&self, mapping: &Arc<Mapping>) {
        self.shared.mappings().retain(|known| !Arc::ptr_eq(known, mapping));
    }

    /// The kernel pins pages only while a request is in flight.
    fn pins_memory(&self) -> bool {
        false
    }

    fn refresh(&self) {
        let shared = Arc::clone(&self.shared);
        let ask = move || {
            if let Err(e) = shared.measure() {
                shared.failures.report(&shared.info.target, "stat", 0, 0, e.raw_os_error().unwrap_or(libc::EIO));
            }
        };
        if self.shared.handle.is_far() {
            // A later reply takes effect when it arrives.
            let _ = self.shared.size_question.ask(ask);
        } else {
            ask();
        }
    }

    fn is_replaced(&self) -> bool {
        let Some(identity) = &self.shared.identity else { return false };
        if !self.shared.handle.is_far() {
            return identity.is_replaced();
        }
        let identity = identity.clone();
        self.shared.identity_question.ask(move || identity.is_replaced()).unwrap_or(false)
    }

    fn open_queue(&self, depth: u16) -> io::Result<Box<dyn Queue>> {
        self.refresh();
        FileQueue::open(&self.shared, depth).map(|queue| Box::new(queue) as Box<dyn Queue>)
    }
}

/// A file that was just opened, or passed as a descriptor.
struct OpenFile {
    file: File,
    name: String,
    /// Path and identity, if it was opened by path.
    path: Option<PathBuf>,
    direct: bool,
    /// Another opening of the file by this process.
    kin: Option<Kin>,
}

/// Opens the file at `path`, and claims a block device.
fn open(path: PathBuf, direct: bool, read_only: bool, force_share: bool) -> io::Result<OpenFile> {
    let name = path.display().to_string();
    // Check the type first: opening a tape rewinds it.
    let meta = fs::metadata(&path).map_err(|e| annotate(e, "cannot open", &name))?;
    file::check_type(&meta, &name)?;
    let kin = if force_share { None } else { lock::kin(meta.dev(), meta.ino()) };
    let is_disk = meta.file_type().is_block_device();
    // Claims a block device, so that it is not mounted at the same time.
    let claim = is_disk && !read_only && !force_share;
    let flags = [
        (direct, libc::O_DIRECT),
        (claim, libc::O_EXCL),
        // If the path names a pipe by now, the open does not wait.
        (!is_disk, libc::O_NONBLOCK),
    ];
    let flags = flags.into_iter().filter(|(wanted, _)| *wanted).fold(0, |all, (_, flag)| all | flag);
    let attempt = |flags: i32| OpenOptions::new().read(true).write(!read_only).custom_flags(flags).open(&path);
    let is_busy = |e: &io::Error| claim && e.raw_os_error() == Some(libc::EBUSY);
    let file = match attempt(flags) {
        // This process holds the claim already, and keeps it.
        Err(e) if is_busy(&e) && kin.is_some() => attempt(flags & !libc::O_EXCL),
        Err(e) if is_busy(&e) => match lock::retry(is_busy, || attempt(flags)) {
            Err(e) if is_busy(&e) => return Err(lock::claimed(&name)),
            result => result,
        },
        result => result,
    };
    let file = file.map_err(|e| cannot_open(e, &name, direct, read_only))?;
    // With O_NONBLOCK io_uring would let requests fail instead of wait.
    let set = OFlag::from_bits_retain(fcntl(&file, FcntlArg::F_GETFL)?);
    fcntl(&file, FcntlArg::F_SETFL(set - OFlag::O_NONBLOCK))?;
    Ok(OpenFile { file, name, path: Some(path), direct, kin })
}

/// The error of a failed open, with the remedy if it is known.
fn cannot_open(error: io::Error, name: &str, direct: bool, read_only: bool) -> io::Error {
    let remedy = match error.raw_os_error() {
        Some(libc::EROFS | libc::EACCES | libc::EPERM) if !read_only => {
            "it is not writable; change its permissions, or use read-only=true"
        }
        Some(libc::EINVAL) if direct => {
            let text = format!(
                "cannot open {name}: {error}: it does not support direct access (O_DIRECT); leave out direct=true"
            );
            return Context::with_kind(io::ErrorKind::Unsupported, text, error);
        }
        Some(libc::ETXTBSY) => "it is a running program; end it, or use read-only=true",
        _ => return annotate(error, "cannot open", name),
    };
    Context::wrap(format!("cannot open {name}: {error}: {remedy}"), error)
}

/// Takes a descriptor from the caller, whose mode must fit the options.
fn adopt(fd: OwnedFd, direct: bool, read_only: bool, force_share: bool) -> io::Result<OpenFile> {
    let name = fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))
        .map_or_else(|_| format!("fd {}", fd.as_raw_fd()), |path| path.display().to_string());
    let flags = OFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFL)?);
    let refuse = |text: &str| {
        let text = format!("file descriptor {} ({name}) {text}", fd.as_raw_fd());
        Err(io::Error::new(io::ErrorKind::InvalidInput, text))
    };
    match flags & OFlag::O_ACCMODE {
        OFlag::O_WRONLY => return refuse("is open for writing only; open it for reading, too"),
        OFlag::O_RDONLY if !read_only => return refuse("is open for reading only; use read-only=true"),
        _ if flags.contains(OFlag::O_APPEND) => return refuse("is open for appending; open it without O_APPEND"),
        _ => {}
    }
    let is_direct = flags.contains(OFlag::O_DIRECT);
    if direct && !is_direct {
        return refuse("is not open for direct access; open it with O_DIRECT, or leave out direct=true");
    }
    if flags.contains(OFlag::O_NONBLOCK) {
        return refuse("is non-blocking; open it without O_NONBLOCK");
    }
    let file = File::from(fd);
    let kin = match file.metadata() {
        Ok(meta) if !force_share => lock::kin(meta.dev(), meta.ino()),
        _ => None,
    };
    Ok(OpenFile { file, name, path: None, direct: is_direct, kin })
}

const _: () = assert!(TRANSFER_MAX.is_multiple_of(65536) && TRANSFER_MAX as usize >= PAGE);
