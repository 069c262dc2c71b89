//! PCI devices in user space: the interface for drivers ([`PciDevice`]), and its implementation on Linux ([`Vfio`]).
//!
//! A driver written against [`PciDevice`] runs on real hardware through VFIO, and in tests against a model of its device in the
//! same process.
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
//! The device must be bound to the kernel driver `vfio-pci`; otherwise the error of [`Vfio::open`] shows the commands. With an
//! IOMMU the process needs only access to the files in `/dev/vfio` and enough locked memory (`RLIMIT_MEMLOCK`).
//!
//! # Kernel interfaces
//! Preferred: the device's own file with iommufd (`/dev/vfio/devices/vfioN` and `/dev/iommu`, Linux 6.6), if both exist and can
//! be opened. Otherwise: the IOMMU group with a type 1 container (`/dev/vfio/N`, `/dev/vfio/vfio`). A device without an IOMMU
//! is used only with [`Options::no_iommu`], because it can write to all of the machine's memory.
//!
//! # Addresses
//! A device sees a [`Mapping`](blkdev::Mapping) at its virtual address. It lies below 2^38, so it needs no translation and fits
//! behind IOMMUs with 39 address bits. Only without an IOMMU there is a [`Translation`].

mod bar;
mod dma;
mod locate;
mod pci;
mod sys;
mod translation;
mod vfio;

pub use blkdev;
pub use pci::{Bar, PciDevice};
pub use translation::Translation;
pub use vfio::{Options, Vfio};

/// The examples of the readme are tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
