//! PCI devices in user space: what a driver needs of one ([`PciDevice`]), and how Linux gives it ([`Vfio`]).
//!
//! A driver written against [`PciDevice`] runs on real hardware through VFIO and, in tests, against a model of its device
//! in the same process.
//!
//! ```no_run
//! use blkdev_vfio::{Options, PciDevice, Vfio};
//!
//! let device = Vfio::open("0000:01:00.0", &Options::default())?;
//! let bar = device.bar(0)?;
//! println!("first register: {:#x}", bar.read32(0));
//! # Ok::<(), std::io::Error>(())
//! ```
//!
//! # Preparing a device
//! It has to be bound to the kernel's driver `vfio-pci`; the error that [`Vfio::open`] gives says how. With an IOMMU no
//! privilege is needed beyond access to the files in `/dev/vfio` and enough locked memory (`RLIMIT_MEMLOCK`).
//!
//! # Ways into the kernel
//! The device's own file with iommufd (`/dev/vfio/devices/vfioN` and `/dev/iommu`, Linux 6.6) where both are there and can
//! be opened, otherwise the IOMMU group with a type 1 container (`/dev/vfio/N`, `/dev/vfio/vfio`). Without an IOMMU only
//! when [`Options::no_iommu`] asks for it, since the device can then write to all of the machine's memory.
//!
//! # Addresses
//! A device sees a [`Mapping`](blkdev::Mapping) at its virtual address, which lies below 2^38, so nothing has to be
//! translated, and it fits behind IOMMUs of 39 bits. Only without an IOMMU there is a [`Translation`].

mod bar;
mod dma;
mod locate;
mod pci;
mod sys;
mod translation;
mod vfio;

pub use pci::{Bar, PciDevice};
pub use translation::Translation;
pub use vfio::{Options, Vfio};

/// The examples of the readme are tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
