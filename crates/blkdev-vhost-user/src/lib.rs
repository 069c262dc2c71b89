//! vhost-user-blk back ends (qemu-storage-daemon, SPDK, DPDK, ...) as a [`blkdev::Device`]. This side is the front end.
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
//! The back end needs virtio 1.0 and the protocol feature CONFIG, without which nobody knows the capacity. MQ, REPLY_ACK,
//! CONFIGURE_MEM_SLOTS and BACKEND_REQ, by which the back end tells that its size has changed, are used where offered. Nothing here waits without an end: a back end that does not answer, is busy
//! with another front end, or dies is an error in bounded time, on the control socket as on every queue.
//!
//! The back end is not trusted, though it shares the memory and the eventfds: whatever it does with them costs only this device.

mod connect;
mod control;
mod requests;
mod watch;

use std::{
    io,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use blkdev::{Device, Info, Mapping, Queue};
use blkdev_virtio::VirtioBlk;
pub use blkdev_virtio::{Format, WriteCache};

use control::Control;

/// How to reach a back end, and how to use it.
#[derive(Clone, Debug)]
pub struct Options {
    /// The back end's socket, at most 107 bytes long.
    pub path: PathBuf,
    /// The format of the rings; `None`: packed where the back end offers it.
    pub ring: Option<Format>,
    /// Switches the back end's write cache; `None`: left as it is.
    pub write_cache: Option<WriteCache>,
    /// Never write, even if the back end would allow it.
    pub read_only: bool,
    /// Queues to use; `None`: as many as the back end has. More than it has is an error.
    pub num_queues: Option<u16>,
    /// Descriptors in a ring, at most: a power of two, 4 to 32768. 256.
    pub queue_size: u16,
    /// How long connecting may take, and each control message after that. 5 s.
    pub connect_timeout: Duration,
    /// How long a request may take before the back end is given up. 30 s.
    pub request_timeout: Duration,
    /// Use the reserved huge pages, where there are enough of them, for memory that is shared with the back end. SPDK needs
    /// them where there is no IOMMU. The back end is trusted then: with a hole in the memory it could end this process by
    /// SIGBUS. Default: no.
    pub huge_pages: bool,
}

impl Options {
    /// The defaults, for the back end at `path`.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            ring: None,
            write_cache: None,
            read_only: false,
            num_queues: None,
            queue_size: 256,
            connect_timeout: Duration::from_secs(5),
            request_timeout: Duration::from_secs(30),
            huge_pages: false,
        }
    }
}

/// A connected back end.
#[derive(Debug)]
pub struct VhostUser {
    device: VirtioBlk<Control>,
}

impl VhostUser {
    /// Connects, negotiates, and reads what the device is.
    ///
    /// # Errors
    /// There is no back end at the path, it is busy with another front end, did not answer within
    /// [`Options::connect_timeout`], cannot be driven, or the options are out of range. The text says which.
    pub fn connect(options: &Options) -> io::Result<Self> {
        let begin = Instant::now();
        let target = options.path.display().to_string();
        let named = |e: io::Error| io::Error::new(e.kind(), format!("vhost-user {target}: {e}"));
        let name = connect::Name::new(&options.path);
        let stream = connect::connect(&options.path, options.connect_timeout).map_err(named)?;
        let left = options.connect_timeout.saturating_sub(begin.elapsed());
        let (timeout, huge_pages) = (options.connect_timeout, options.huge_pages);
        let control = Control::negotiate(stream, target.clone(), name, left, timeout, huge_pages);
        let control = control.map_err(named)?;
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

    fn open_queue(&self, depth: u16) -> io::Result<Box<dyn Queue>> {
        self.device.open_queue(depth)
    }
}

/// The examples of the readme are tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
