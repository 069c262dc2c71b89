//! virtio-blk devices behind the kernel's vhost-vdpa (`/dev/vhost-vdpa-N`) as a [`blkdev::Device`]: hardware with a virtio
//! data path, or software such as VDUSE.
//!
//! ```no_run
//! # fn main() -> std::io::Result<()> {
//! use blkdev::Device;
//! use blkdev_vdpa::{Options, Source, Vdpa};
//!
//! let device = Vdpa::open(Options::new(Source::Path("/dev/vhost-vdpa-0".into())))?;
//! println!("{} bytes in blocks of {}", device.capacity(), device.info().block_size);
//! # Ok(())
//! # }
//! ```
//!
//! A device has one user at a time. It is reset when it is opened and when it is let go of, so whatever the last user was
//! doing when it was killed does no harm. A change of the device's size is noticed while it is open.

mod control;
mod sys;

use std::{
    fs::{self, File, Metadata, OpenOptions},
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

pub use blkdev::Source;
use blkdev::{Device, Info, Mapping, Queue};
use blkdev_virtio::VirtioBlk;
pub use blkdev_virtio::{Format, WriteCache};

use control::Control;

/// What to open, and how to use it.
#[derive(Debug)]
pub struct Options {
    /// The character device, `/dev/vhost-vdpa-0`; one that is open already was opened for reading and writing.
    pub source: Source,
    /// Never write, even if the device would allow it.
    pub read_only: bool,
    /// Queues to use; `None`: as many as the device has. More than it has is an error.
    pub num_queues: Option<u16>,
    /// Descriptors in a ring, at most: a power of two, 4 to 32768. 256.
    pub queue_size: u16,
    /// The format of the rings; `None`: packed where the device offers it.
    pub ring: Option<Format>,
    /// Switches the device's write cache; `None`: left as it is.
    pub write_cache: Option<WriteCache>,
    /// How long a request may take before the device is given up. 30 s.
    pub request_timeout: Duration,
}

impl Options {
    /// The defaults.
    pub fn new(source: Source) -> Self {
        Self {
            source,
            read_only: false,
            num_queues: None,
            queue_size: 256,
            ring: None,
            write_cache: None,
            request_timeout: Duration::from_secs(30),
        }
    }
}

/// An open device.
#[derive(Debug)]
pub struct Vdpa {
    device: VirtioBlk<Control>,
    /// Where it was opened by its name.
    name: Option<(PathBuf, Identity)>,
}

/// File system, file and device number of a character device.
type Identity = (u64, u64, u64);

fn identity(file: &Metadata) -> Identity {
    (file.dev(), file.ino(), file.rdev())
}

impl Vdpa {
    /// Opens the device, resets it, and reads what it is.
    ///
    /// # Errors
    /// There is no such device, it is not a virtio-blk device, somebody else has it open, it cannot be driven, or the options
    /// are out of range. The text says which, and what to do.
    pub fn open(options: Options) -> io::Result<Self> {
        let target = match &options.source {
            Source::Path(path) => path.display().to_string(),
            Source::Fd(fd) => format!("fd {}", fd.as_raw_fd()),
        };
        let named = |e: io::Error| io::Error::new(e.kind(), format!("vdpa {target}: {e}"));
        let (fd, name) = match options.source {
            Source::Path(path) => {
                let file = open(&path).map_err(named)?;
                let is = identity(&file.metadata().map_err(named)?);
                (OwnedFd::from(file), Some((path, is)))
            }
            Source::Fd(fd) => (fd, None),
        };
        let control = Control::open(fd, target.clone()).map_err(named)?;
        let device = VirtioBlk::open(
            control,
            &blkdev_virtio::Options {
                queues: options.num_queues,
                queue_size: options.queue_size,
                ring: options.ring,
                write_cache: options.write_cache,
                read_only: options.read_only,
                timeout: Some(options.request_timeout),
            },
        )?;
        Ok(Self { device, name })
    }
}

const EIO: i32 = nix::errno::Errno::EIO as i32;

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open(path).map_err(|e| {
        let hint = match e.kind() {
            io::ErrorKind::ResourceBusy => format!("somebody else has it open; fuser -v {} tells who", path.display()),
            io::ErrorKind::NotFound => {
                "is the module vhost_vdpa loaded, and a device bound to it (vdpa dev show)?".to_owned()
            }
            io::ErrorKind::PermissionDenied => "reading and writing must be allowed to this user".to_owned(),
            // From a device in user space that is not there any more.
            _ if e.raw_os_error() == Some(EIO) => {
                "the device does not let itself be reset; is the process behind it (VDUSE) alive?".to_owned()
            }
            _ => return e,
        };
        io::Error::new(e.kind(), format!("{e}; {hint}"))
    })
}

impl Device for Vdpa {
    fn info(&self) -> &Info {
        self.device.info()
    }

    fn capacity(&self) -> u64 {
        self.device.capacity()
    }

    fn register(&self, mapping: &Arc<Mapping>) -> io::Result<()> {
        self.device.register(mapping)
    }

    fn unregister(&self, mapping: &Arc<Mapping>) {
        self.device.unregister(mapping);
    }

    fn pins_memory(&self) -> bool {
        self.device.pins_memory()
    }

    fn refresh(&self) {
        self.device.refresh();
    }

    fn is_replaced(&self) -> bool {
        let named = |(path, was): &(PathBuf, Identity)| fs::metadata(path).is_ok_and(|now| identity(&now) != *was);
        self.name.as_ref().is_some_and(named)
    }

    fn open_queue(&self, depth: u16) -> io::Result<Box<dyn Queue>> {
        self.device.open_queue(depth)
    }
}

/// The examples of the readme are tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
