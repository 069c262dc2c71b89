//! NVMe controllers in user space, and namespaces through the kernel's passthrough, as [`blkdev::Device`]s.
//!
//! [`Nvme`] drives a controller by itself: over VFIO on real hardware, or over any other [`PciDevice`]. Each
//! queue of the device is a queue pair of the controller's, with an interrupt vector of its own.
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
//! [`Passthrough`] leaves the controller to the kernel's driver, and sends it commands past the block layer: each queue is an
//! io_uring on `/dev/ngXnY`.
//!
//! [`PciDevice`]: blkdev_vfio::PciDevice
//!
//! # A device that does not answer
//! A controller is judged by its progress, not by the age of a command. As long as it completes commands of a queue, the
//! others in that queue may wait their turn. When it completes none of them for half of [`Options::timeout`], the
//! overdue ones are aborted, and fail. After three quarters of it, the controller is reset. One command that is lost while
//! others of its queue complete is aborted alone, after 10 times the time-out.
//!
//! When none of that helps, the queue's owner declares the device dead: the controller is disabled, everything in flight ends
//! with [`Error::Gone`](blkdev::Error::Gone), and memory that it may still have been writing to is not used again. The same
//! happens when the controller answers what was not asked, is taken away, or fails (`CSTS.CFS`) again after several resets.
//!
//! No value that a controller or the kernel reports is trusted: one that makes no sense is an error when the device is opened,
//! or ends it later.

mod admin;
mod bring_up;
mod core;
mod device;
mod flight;
mod limits;
mod liveness;
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
mod window;

pub use blkdev::Source;
pub use blkdev_vfio::Options as VfioOptions;
pub use device::Nvme;
pub use options::Options;
pub use passthrough::{Passthrough, PassthroughOptions};
pub use target::Target;

/// The examples of the readme are tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
