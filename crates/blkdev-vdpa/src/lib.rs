//! virtio-blk devices behind the kernel's vhost-vdpa (`/dev/vhost-vdpa-N`), as a [`blkdev::Device`]: hardware with a virtio
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
//! A device has one user at a time. It is reset at open and at close, so requests of a killed user do no harm. A change of the
//! capacity is detected while the device is open. A VDUSE device is dead when the process behind it ends.

mod control;
mod maker;
mod place;
mod remains;
mod sys;
mod vduse;
mod watch;

use std::{
    fs::{self, File, Metadata, OpenOptions},
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::{FileTypeExt, MetadataExt},
    },
    path::{Path, PathBuf},
    sync::Arc,
};

pub use blkdev;
pub use blkdev::Source;
use blkdev::{Context, Device, Info, Mapping, Queue};
pub use blkdev_virtio;
use blkdev_virtio::VirtioBlk;
pub use blkdev_virtio::{Format, WriteCache};

use control::Control;

/// Which device to open, and its settings. There may be more fields later.
#[derive(Debug)]
#[non_exhaustive]
pub struct Options {
    /// The character device, `/dev/vhost-vdpa-0`, or a descriptor that was opened for reading and writing.
    pub source: Source,
    /// What all virtio-blk devices have: queues, rings, write cache, time-out.
    pub virtio: blkdev_virtio::Options,
}

impl Options {
    /// The default options for `source`.
    pub fn new(source: Source) -> Self {
        Self { source, virtio: blkdev_virtio::Options::default() }
    }
}

/// An open device.
#[derive(Debug)]
pub struct Vdpa {
    device: VirtioBlk<Control>,
    /// Path and identity, if the device was opened by name.
    name: Option<(PathBuf, Identity)>,
}

/// File system, inode and device number of a character device.
type Identity = (u64, u64, u64);

fn identity(file: &Metadata) -> Identity {
    (file.dev(), file.ino(), file.rdev())
}

impl Vdpa {
    /// Opens the device, resets it, and reads its limits.
    ///
    /// # Errors
    /// The text names the reason and the remedy.
    ///
    /// - [`NotFound`](io::ErrorKind::NotFound): there is no such device.
    /// - [`PermissionDenied`](io::ErrorKind::PermissionDenied): this user may not open it for reading and writing.
    /// - [`ResourceBusy`](io::ErrorKind::ResourceBusy): another process uses it.
    /// - [`InvalidInput`](io::ErrorKind::InvalidInput): it is not a vhost-vdpa device, or not a block device; an option is
    ///   out of range; or it has fewer queues than requested.
    /// - [`InvalidData`](io::ErrorKind::InvalidData): its configuration is invalid.
    /// - [`Unsupported`](io::ErrorKind::Unsupported): it lacks a feature that is required or requested.
    /// - [`TimedOut`](io::ErrorKind::TimedOut): it does not complete a reset, or does not answer.
    /// - [`NotConnected`](io::ErrorKind::NotConnected): it has failed.
    ///
    /// Any other error of the system has its own kind; [`Context::os_error`](blkdev::Context::os_error) returns its errno.
    pub fn open(options: Options) -> io::Result<Self> {
        let target = match &options.source {
            Source::Path(path) => path.display().to_string(),
            Source::Fd(fd) => format!("fd {}", fd.as_raw_fd()),
        };
        let named = |e: io::Error| Context::wrap(format!("vdpa {target}: {e}"), e);
        let (fd, name) = match options.source {
            Source::Path(path) => {
                let file = open(&path).map_err(named)?;
                let is = identity(&file.metadata().map_err(named)?);
                (OwnedFd::from(file), Some((path, is)))
            }
            Source::Fd(fd) => (fd, None),
        };
        let control = Control::open(fd, target.clone()).map_err(named)?;
        let device = VirtioBlk::open(control, &options.virtio)?;
        Ok(Self { device, name })
    }
}

const EIO: i32 = nix::errno::Errno::EIO as i32;
const EISDIR: i32 = nix::errno::Errno::EISDIR as i32;
const ENXIO: i32 = nix::errno::Errno::ENXIO as i32;

fn is_device(file: &Metadata) -> bool {
    file.file_type().is_char_device()
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open(path).map_err(|e| {
        let hint = match e.kind() {
            io::ErrorKind::ResourceBusy => {
                format!("a process has it open; find it with fuser -v {}", path.display())
            }
            io::ErrorKind::NotFound => {
                "load the module vhost_vdpa, and bind a device to it (see vdpa dev show)".to_owned()
            }
            io::ErrorKind::PermissionDenied => "this user needs read and write access".to_owned(),
            // EIO: a user-space device whose process is gone.
            _ if e.raw_os_error() == Some(EIO) => {
                "the device cannot be reset; is the process behind it (VDUSE) alive?".to_owned()
            }
            // A directory or a socket.
            _ if matches!(e.raw_os_error(), Some(EISDIR | ENXIO))
                && fs::metadata(path).is_ok_and(|file| !is_device(&file)) =>
            {
                return Context::with_kind(io::ErrorKind::InvalidInput, e.to_string(), e);
            }
            _ => return e,
        };
        Context::wrap(format!("{e}; {hint}"), e)
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

    fn peer(&self) -> Option<Arc<blkdev::Peer>> {
        self.device.peer()
    }

    fn ring_at_death(&self, bell: &Arc<blkdev::wake::Wake>) {
        self.device.ring_at_death(bell);
    }

    fn details(&self) -> Vec<(&'static str, String)> {
        self.device.details()
    }

    fn state(&self) -> blkdev::State {
        self.device.state()
    }

    fn open_queue(&self, depth: u16) -> io::Result<Box<dyn Queue>> {
        self.device.open_queue(depth)
    }
}

/// The examples of the readme are tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
