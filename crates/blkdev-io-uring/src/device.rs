//! [`IoUring`]: opens the file, and says what it can do.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Seek, SeekFrom},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering},
    },
};

use blkdev::{Caps, Device, Info, Mapping, PAGE, Queue};
use nix::fcntl::{FcntlArg, OFlag, fcntl};

use crate::{
    file::{self, Target},
    queue::{FileQueue, Flight},
};

/// Where the file comes from.
#[derive(Debug)]
pub enum Source {
    /// It is opened, for reading and writing unless [`Options::read_only`].
    Path(PathBuf),
    /// It is open already, in a mode that decides: a descriptor that was opened for reading only needs
    /// [`Options::read_only`], and one with `O_DIRECT` is direct. Its file offset is not used, but moves.
    Fd(OwnedFd),
}

/// How to open a file or block device.
#[derive(Debug)]
pub struct Options {
    /// The file.
    pub source: Source,
    /// Past the page cache (`O_DIRECT`). Default: false.
    pub direct: bool,
    /// Nothing can be written. Default: false, and then a file that cannot be written is an error.
    pub read_only: bool,
    /// The deepest queue that can be opened, in requests, 1 to 32768. Default: 128.
    pub entries: u16,
}

impl Options {
    /// The file at `path`, and the defaults.
    pub fn path(path: impl Into<PathBuf>) -> Self {
        Self::from(Source::Path(path.into()))
    }

    /// The open file `fd`, and the defaults.
    pub fn fd(fd: OwnedFd) -> Self {
        Self::from(Source::Fd(fd))
    }
}

impl From<Source> for Options {
    fn from(source: Source) -> Self {
        Self { source, direct: false, read_only: false, entries: 128 }
    }
}

/// Queues that can be open at a time: each is a ring with locked memory and a descriptor.
const QUEUES_MAX: u16 = 256;

/// Longest transfer, in bytes: NBD's largest payload. 32 MiB.
const TRANSFER_MAX: u32 = 32 << 20;

/// A regular file or a block device of the kernel's.
#[derive(Debug)]
pub struct IoUring {
    shared: Arc<Shared>,
}

/// What the device and its queues have in common.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) file: File,
    pub(crate) info: Info,
    pub(crate) target: Target,
    /// Discards go through `BLOCK_URING_CMD_DISCARD`.
    pub(crate) discard_command: bool,
    /// `FALLOC_FL_ZERO_RANGE` was refused once.
    pub(crate) zero_range_fails: AtomicBool,
    pub(crate) queues: AtomicU16,
    capacity: AtomicU64,
    mappings: Mutex<Vec<Arc<Mapping>>>,
}

impl IoUring {
    /// Opens a file or block device.
    ///
    /// # Errors
    /// It cannot be opened, is neither a regular file nor a block device, cannot be written though
    /// [`Options::read_only`] is not set, or cannot do what [`Options::direct`] asks for; or there is no io_uring. The
    /// text says which and what to do.
    pub fn open(options: Options) -> io::Result<Self> {
        let Options { source, direct, read_only, entries } = options;
        let (file, name, direct) = match source {
            Source::Path(path) => (open(&path, direct, read_only)?, path.display().to_string(), direct),
            Source::Fd(fd) => adopt(fd, direct, read_only)?,
        };
        let mut target = Target::new(&file, &name, direct, read_only)?;
        let discard_command = target.is_disk && target.discard && Flight::probe_discard(&file)?;
        if target.is_disk && !discard_command {
            // What is left is PUNCH_HOLE, which needs hardware for zeroes.
            target.discard &= target.zero_mode == file::PUNCH;
        }
        let info = Info {
            driver: "io_uring",
            target: name,
            serial: target.serial.clone(),
            queues_max: QUEUES_MAX,
            depth_max: entries.clamp(1, 32768),
            block_size: target.block_size,
            preferred_block_size: target.preferred_block_size,
            transfer_max: TRANSFER_MAX,
            zero_max: u64::MAX,
            discard_max: u64::MAX,
            discard_alignment: target.discard_alignment,
            timeout: None,
            caps: Caps {
                read_only,
                rotational: target.rotational,
                flush: !target.write_through,
                fua: true,
                zero: target.zero,
                discard: target.discard,
                status: target.status,
                prefetch: !direct,
            },
        };
        let shared = Shared {
            file,
            info,
            target,
            discard_command,
            zero_range_fails: AtomicBool::new(false),
            queues: AtomicU16::new(0),
            capacity: AtomicU64::new(0),
            mappings: Mutex::new(Vec::new()),
        };
        let size = shared.refresh()?;
        let capacity = shared.capacity.load(Ordering::Relaxed);
        if size != capacity {
            let Info { target, block_size, .. } = &shared.info;
            log::warn!("{target}: the last {} of {size} bytes are no block of {block_size}: left out", size - capacity);
        }
        Ok(Self { shared: Arc::new(shared) })
    }

    /// Asks for the file's size anew; [`capacity`](Device::capacity) tells it from now on. Opening a queue does so too.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn refresh(&self) -> io::Result<()> {
        self.shared.refresh().map(drop)
    }
}

impl Device for IoUring {
    fn info(&self) -> &Info {
        &self.shared.info
    }

    /// The size when the device was opened, or at the last [`refresh`](IoUring::refresh); whole blocks.
    fn capacity(&self) -> u64 {
        self.shared.capacity.load(Ordering::Relaxed)
    }

    fn register(&self, mapping: &Arc<Mapping>) -> io::Result<()> {
        self.shared.mappings.lock().unwrap_or_else(|e| e.into_inner()).push(Arc::clone(mapping));
        Ok(())
    }

    fn open_queue(&self, depth: u16) -> io::Result<Box<dyn Queue>> {
        self.refresh()?;
        FileQueue::open(&self.shared, depth).map(|queue| Box::new(queue) as Box<dyn Queue>)
    }
}

impl Shared {
    /// The size in bytes, all of them; the capacity is set to the whole blocks of it.
    fn refresh(&self) -> io::Result<u64> {
        // The end, since a block device's metadata has no size. Every transfer names its offset, so it harms nobody.
        let size = (&self.file)
            .seek(SeekFrom::End(0))
            .map_err(|e| annotate(&e, "asking for the size of", &self.info.target))?;
        let block = u64::from(self.info.block_size);
        self.capacity.store(size / block * block, Ordering::Relaxed);
        Ok(size)
    }
}

fn annotate(error: &io::Error, doing: &str, name: &str) -> io::Error {
    io::Error::new(error.kind(), format!("{doing} {name}: {error}"))
}

fn open(path: &Path, direct: bool, read_only: bool) -> io::Result<File> {
    let name = path.display().to_string();
    let opening = |e: &io::Error| annotate(e, "opening", &name);
    // Looked at first: to open a pipe may block, and to open a tape winds it.
    file::check_type(&fs::metadata(path).map_err(|e| opening(&e))?, &name)?;
    let flags = if direct { libc::O_DIRECT } else { 0 };
    OpenOptions::new().read(true).write(!read_only).custom_flags(flags).open(path).map_err(|e| {
        let remedy = match e.raw_os_error() {
            Some(libc::EROFS | libc::EACCES | libc::EPERM) if !read_only => {
                "it cannot be written; change that, or give read-only=true"
            }
            Some(libc::EINVAL) if direct => "it cannot be accessed past the page cache; leave out direct=true",
            _ => return opening(&e),
        };
        io::Error::new(e.kind(), format!("opening {name}: {e}: {remedy}"))
    })
}

/// A descriptor from elsewhere: its mode must allow what is asked.
fn adopt(fd: OwnedFd, direct: bool, read_only: bool) -> io::Result<(File, String, bool)> {
    let name = fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))
        .map_or_else(|_| format!("fd {}", fd.as_raw_fd()), |path| path.display().to_string());
    let flags = OFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFL)?);
    let refuse = |text: &str| {
        let text = format!("file descriptor {} ({name}) {text}", fd.as_raw_fd());
        Err(io::Error::new(io::ErrorKind::InvalidInput, text))
    };
    match flags & OFlag::O_ACCMODE {
        OFlag::O_WRONLY => return refuse("is open for writing only; open it for reading too"),
        OFlag::O_RDONLY if !read_only => return refuse("is open for reading only; give read-only=true"),
        _ if flags.contains(OFlag::O_APPEND) => return refuse("appends whatever the offset; open it without O_APPEND"),
        _ => {}
    }
    let is_direct = flags.contains(OFlag::O_DIRECT);
    if direct && !is_direct {
        return refuse("is not open for direct access; open it with O_DIRECT, or leave out direct=true");
    }
    Ok((File::from(fd), name, is_direct))
}

const _: () = assert!(TRANSFER_MAX.is_multiple_of(65536) && TRANSFER_MAX as usize >= PAGE);
