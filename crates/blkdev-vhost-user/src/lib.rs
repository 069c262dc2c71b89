//! vhost-user-blk back ends (qemu-storage-daemon, SPDK, DPDK, ...) as a [`blkdev::Device`]. This crate is the front end.
//!
//! ```no_run
//! # fn main() -> std::io::Result<()> {
//! use blkdev::Device;
//! use blkdev_vhost_user::{Options, VhostUser};
//!
//! let device = VhostUser::connect(&Options::new("/run/vhost.sock"))?;
//! println!("{} bytes in blocks of {}", device.capacity(), device.info().block_size);
//! # Ok(())
//! # }
//! ```
//!
//! The back end must support virtio 1.0 and the protocol feature CONFIG, which reports the capacity. MQ, REPLY_ACK,
//! CONFIGURE_MEM_SLOTS and BACKEND_REQ (which reports capacity changes) are used if offered.
//!
//! All waits are bounded. A back end that does not reply, is busy with another front end, or dies causes an error in bounded
//! time, on the control socket and on every queue.
//!
//! The back end is not trusted, although it shares the memory and the eventfds: a hostile back end can only break this device.

mod connect;
mod control;
mod requests;
mod watch;

use std::{io, path::PathBuf, sync::Arc, time::Duration};

pub use blkdev;
use blkdev::{Context, Device, Info, Mapping, Queue, wake::now};
pub use blkdev_virtio;
use blkdev_virtio::VirtioBlk;
pub use blkdev_virtio::{Format, WriteCache};

use control::Control;

/// Which back end to connect to, and its settings. There may be more fields later.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Options {
    /// Path of the back end's socket, at most 107 bytes.
    pub path: PathBuf,
    /// Longest time to connect, and longest time for each control message after that. Default: 5 s.
    pub connect_timeout: Duration,
    /// Use reserved huge pages, if there are enough, for memory shared with the back end. SPDK needs them without an IOMMU. The
    /// back end must be trusted then: by punching a hole into the memory it could kill this process with SIGBUS. Default: no.
    pub huge_pages: bool,
    /// What all virtio-blk devices have: queues, rings, write cache, time-out.
    pub virtio: blkdev_virtio::Options,
}

impl Options {
    /// The default options for the back end at `path`.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            connect_timeout: Duration::from_secs(5),
            huge_pages: false,
            virtio: blkdev_virtio::Options::default(),
        }
    }
}

/// A connected back end.
#[derive(Debug)]
pub struct VhostUser {
    device: VirtioBlk<Control>,
}

impl VhostUser {
    /// Connects to the back end, negotiates, and reads the device's limits.
    ///
    /// # Errors
    /// The text names the reason and the remedy.
    ///
    /// - [`NotFound`](io::ErrorKind::NotFound): there is no such socket.
    /// - [`PermissionDenied`](io::ErrorKind::PermissionDenied): this user may not connect to it.
    /// - [`ConnectionRefused`](io::ErrorKind::ConnectionRefused): no process listens on it.
    /// - [`TimedOut`](io::ErrorKind::TimedOut): the back end does not accept or does not reply within
    ///   [`Options::connect_timeout`]. Most back ends do this while they serve another front end.
    /// - [`ConnectionReset`](io::ErrorKind::ConnectionReset): the process behind the socket closed the connection.
    /// - [`InvalidInput`](io::ErrorKind::InvalidInput): the path is too long or not a socket, an option is out of range, or
    ///   the back end has fewer queues than requested.
    /// - [`InvalidData`](io::ErrorKind::InvalidData): the process behind the socket is not a vhost-user back end, or violates
    ///   the protocol.
    /// - [`Unsupported`](io::ErrorKind::Unsupported): the back end lacks a feature that is required or requested.
    /// - [`NotConnected`](io::ErrorKind::NotConnected): the device died while it was opened.
    /// - [`Other`](io::ErrorKind::Other): the back end refuses a message. The protocol has no reasons.
    ///
    /// Any other error of the system has its own kind; [`Context::os_error`](blkdev::Context::os_error) returns its errno.
    pub fn connect(options: &Options) -> io::Result<Self> {
        let begin = now();
        let target = options.path.display().to_string();
        let named = |e: io::Error| Context::wrap(format!("vhost-user {target}: {e}"), e);
        let name = connect::Name::new(&options.path);
        let stream = connect::connect(&options.path, options.connect_timeout).map_err(named)?;
        let left = options.connect_timeout.saturating_sub(now().saturating_duration_since(begin));
        let (timeout, huge_pages) = (options.connect_timeout, options.huge_pages);
        let control = Control::negotiate(stream, target.clone(), name, left, timeout, huge_pages);
        let control = control.map_err(named)?;
        let device = VirtioBlk::open(control, &options.virtio)?;
        device.transport().established()?;
        Ok(Self { device })
    }
}

impl Device for VhostUser {
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

    fn shares_memory(&self) -> bool {
        self.device.shares_memory()
    }

    fn refresh(&self) {
        self.device.refresh();
    }

    fn is_replaced(&self) -> bool {
        self.device.is_replaced()
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
