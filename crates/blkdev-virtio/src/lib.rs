//! The driver side of virtio-blk over any [`Transport`]: virtqueues, request layout, and a [`blkdev::Device`] on top.
//!
//! A transport (vhost-user, vhost-vdpa, PCI over VFIO) moves feature bits, configuration bytes, ring addresses and doorbells.
//! [`VirtioBlk::open`] negotiates over it. This crate does the rest.
//!
//! The device shares memory with the driver and is not trusted:
//! - The driver reads ring memory by atomic access only.
//! - The state of its own requests lies in private memory.
//! - An invalid index, descriptor id or length ends the device, never the process: all requests in flight complete with
//!   [`Error::Gone`](blkdev::Error::Gone).

mod blk;
mod config;
mod core;
mod layout;
mod liveness;
#[cfg(feature = "model")]
pub mod model;
mod notifier;
mod options;
mod packed;
mod queue;
mod ring;
mod slots;
mod split;
mod transport;
mod watch;

pub use blk::VirtioBlk;
pub use blkdev;
pub use liveness::{Liveness, unblock};
pub use notifier::Notifier;
pub use options::{Options, WriteCache};
pub use transport::{Doorbell, Format, Ring, Transport};

/// The examples of the readme are tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
