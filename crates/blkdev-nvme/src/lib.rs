//! NVMe controllers in user space, and NVMe namespaces through the kernel's passthrough, as [`blkdev::Device`]s.
//!
//! [`Nvme`] drives a controller directly: real hardware through VFIO, or any other [`PciDevice`]. Each queue of the device is
//! an I/O queue pair of the controller, with its own interrupt vector.
//!
//! ```no_run
//! use blkdev::Device;
//! use blkdev_nvme::{Nvme, Options, Target, VfioOptions};
//!
//! let target: Target = "0000:01:00.0/2".parse()?;
//! let disk = Nvme::open_vfio(&target, &VfioOptions::default(), &Options::default())?;
//! println!("{} bytes, serial number {}", disk.capacity(), disk.info().serial);
//! # Ok::<(), std::io::Error>(())
//! ```
//!
//! [`Passthrough`] uses the kernel's NVMe driver, but bypasses the block layer: each queue is an io_uring on `/dev/ngXnY`.
//!
//! [`PciDevice`]: blkdev_vfio::PciDevice
//!
//! # Unresponsive controllers
//! The driver watches the progress of a queue, not the age of single commands. As long as the queue completes commands, the
//! others may wait. If it completes none for half of [`Options::timeout`], the overdue commands are aborted, and fail. After
//! three quarters of the time-out, the controller is reset. If one command is lost while others of its queue complete, it is
//! aborted after 10 times the time-out.
//!
//! If nothing helps, the queue's owner declares the device dead: the controller is disabled, all requests in flight end with
//! [`Error::Gone`](blkdev::Error::Gone), and memory that the controller may still write to is never reused. The same happens if
//! the controller sends an invalid completion, is removed, or fails (`CSTS.CFS`) again after several resets.
//!
//! No value from the controller or the kernel is trusted: an invalid one fails the open, or ends the device later.

mod admin;
mod bring_up;
mod core;
mod device;
mod flight;
mod limits;
#[cfg(feature = "model")]
pub mod model;
mod options;
mod owner;
mod pair;
mod passthrough;
mod queue;
mod registers;
pub mod spec;
mod sys;
mod target;
mod watch;

pub use blkdev;
pub use blkdev::Source;
pub use blkdev_vfio;
pub use blkdev_vfio::Options as VfioOptions;
pub use device::Nvme;
pub use options::Options;
pub use passthrough::{Passthrough, PassthroughOptions};
pub use target::Target;

/// The examples of the readme are tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
