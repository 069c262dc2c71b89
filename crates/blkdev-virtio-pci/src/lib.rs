//! virtio-blk devices on the PCI bus, driven from user space over VFIO, as a [`blkdev::Device`].
//!
//! ```no_run
//! # fn main() -> std::io::Result<()> {
//! use blkdev::Device;
//! use blkdev_virtio_pci::{Options, VirtioPci};
//!
//! let device = VirtioPci::open(&Options::new("0000:00:07.0"))?;
//! println!("{} bytes in blocks of {}", device.capacity(), device.info().block_size);
//! # Ok(())
//! # }
//! ```
//!
//! The device is of virtio 1.0 or later, offers VIRTIO_F_ACCESS_PLATFORM and has MSI-X; it is bound to `vfio-pci`. Each
//! queue has an interrupt vector of its own where there are enough; otherwise they share one. A change of the device's size
//! is noticed while it is open. The device is reset when it is opened and when it is let go of.

mod control;
mod eventfd;
mod layout;
mod watch;

use std::{io, sync::Arc, time::Duration};

use blkdev::{Device, Info, Mapping, Queue};
use blkdev_vfio::{PciDevice, Vfio};
use blkdev_virtio::VirtioBlk;
pub use blkdev_virtio::{Format, WriteCache};

use control::Control;

/// What to open, and how to use it.
#[derive(Clone, Debug)]
pub struct Options {
    /// The device's PCI address (`0000:00:07.0`) or its path in sysfs.
    pub address: String,
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
    /// Interrupt vectors to use, at most; with fewer than one more than the device has queues, queues share one.
    pub vectors: u16,
    /// How long a request may take before the device is given up. 30 s.
    pub request_timeout: Duration,
}

impl Options {
    /// The defaults, for the device at `address`.
    pub fn new(address: impl Into<String>) -> Self {
        Self {
            address: address.into(),
            read_only: false,
            num_queues: None,
            queue_size: 256,
            ring: None,
            write_cache: None,
            vectors: u16::MAX,
            request_timeout: Duration::from_secs(30),
        }
    }
}

/// An open device.
#[derive(Debug)]
pub struct VirtioPci {
    device: VirtioBlk<Control>,
}

impl VirtioPci {
    /// Opens the device over VFIO, resets it, and reads what it is.
    ///
    /// # Errors
    /// There is no such device, it is not bound to `vfio-pci`, somebody else uses it, it is no virtio-blk device that can be
    /// driven, or the options are out of range. The text says which, and what to do.
    pub fn open(options: &Options) -> io::Result<Self> {
        let pci = Vfio::open(&options.address, &blkdev_vfio::Options::default());
        let pci = pci.map_err(|e| named(&options.address, &e))?;
        Self::drive(Arc::new(pci), options)
    }

    /// As [`open`](Self::open), for a PCI device that is reached in another way.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn drive(pci: Arc<dyn PciDevice>, options: &Options) -> io::Result<Self> {
        let control = Control::open(pci, options.vectors).map_err(|e| named(&options.address, &e))?;
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
        Ok(Self { device })
    }
}

fn named(address: &str, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("virtio-pci {address}: {error}"))
}

impl Device for VirtioPci {
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
