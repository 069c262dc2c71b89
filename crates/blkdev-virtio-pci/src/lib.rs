//! virtio-blk devices on the PCI bus, driven from user space through VFIO, as a [`blkdev::Device`].
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
//! Requirements: virtio 1.0 or later, VIRTIO_F_ACCESS_PLATFORM, MSI-X, and a device bound to `vfio-pci`. Each queue has its own
//! interrupt vector if there are enough; otherwise all queues share one. A change of the capacity is detected while the device
//! is open. The device is reset at open and at close.

mod control;
mod layout;
mod watch;

use std::{io, sync::Arc};

pub use blkdev;
use blkdev::{Context, Device, Info, Mapping, Queue};
pub use blkdev_vfio;
use blkdev_vfio::{PciDevice, Vfio};
pub use blkdev_virtio;
use blkdev_virtio::VirtioBlk;
pub use blkdev_virtio::{Format, WriteCache};

use control::Control;

/// Which device to open, and its settings. There may be more fields later.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Options {
    /// The device's PCI address (`0000:00:07.0`) or its path in sysfs.
    pub address: String,
    /// Most interrupt vectors to use. Queues share one vector if there are fewer vectors than the device's queues plus one.
    pub vectors: u16,
    /// What all virtio-blk devices have: queues, rings, write cache, time-out.
    pub virtio: blkdev_virtio::Options,
}

impl Options {
    /// The default options for the device at `address`.
    pub fn new(address: impl Into<String>) -> Self {
        Self { address: address.into(), vectors: u16::MAX, virtio: blkdev_virtio::Options::default() }
    }
}

/// An open device.
#[derive(Debug)]
pub struct VirtioPci {
    device: VirtioBlk<Control>,
}

impl VirtioPci {
    /// Opens the device through VFIO, resets it, and reads its limits.
    ///
    /// # Errors
    /// Those of [`Vfio::open`] and [`drive`](Self::drive). The text names the reason and the remedy.
    pub fn open(options: &Options) -> io::Result<Self> {
        let pci = Vfio::open(&options.address, &blkdev_vfio::Options::default());
        let pci = pci.map_err(|e| named(&options.address, e))?;
        Self::drive(Arc::new(pci), options)
    }

    /// As [`open`](Self::open), for any implementation of [`PciDevice`].
    ///
    /// # Errors
    /// - [`InvalidInput`](io::ErrorKind::InvalidInput): it is not a virtio block device, an option is out of range, or it has
    ///   fewer queues than requested.
    /// - [`InvalidData`](io::ErrorKind::InvalidData): its registers or its configuration are invalid.
    /// - [`Unsupported`](io::ErrorKind::Unsupported): it lacks a feature that is required or requested, or there is no IOMMU.
    /// - [`TimedOut`](io::ErrorKind::TimedOut): it does not complete a reset, or does not answer.
    /// - [`NotConnected`](io::ErrorKind::NotConnected): it has failed or was removed.
    ///
    /// Any other error of the system has its own kind; [`Context::os_error`](blkdev::Context::os_error) returns its errno.
    pub fn drive(pci: Arc<dyn PciDevice>, options: &Options) -> io::Result<Self> {
        let control = Control::open(pci, options.vectors).map_err(|e| named(&options.address, e))?;
        let device = VirtioBlk::open(control, &options.virtio)?;
        Ok(Self { device })
    }
}

fn named(address: &str, error: io::Error) -> io::Error {
    Context::wrap(format!("virtio-pci {address}: {error}"), error)
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
