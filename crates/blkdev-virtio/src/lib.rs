//! The driver's side of virtio-blk over any [`Transport`]: virtqueues, request layout, and a [`blkdev::Device`] on top.
//!
//! A transport (vhost-user, vhost-vdpa, PCI over VFIO) moves feature bits, configuration bytes, ring addresses and
//! doorbells. [`VirtioBlk::open`] negotiates over it and does all the rest.
//!
//! The device shares memory with us and is not trusted: ring memory is read by atomic access only, everything that the
//! driver needs to know of its own requests lives in private memory, and an index, a descriptor id or a length that cannot
//! be true ends the device ([`Error::Gone`](blkdev::Error::Gone) for all that is in flight) instead of the process.

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
mod shared;
mod slots;
mod split;
mod transport;
mod watch;

pub use blk::VirtioBlk;
pub use liveness::Liveness;
pub use notifier::Notifier;
pub use options::{Options, WriteCache};
pub use transport::{Doorbell, Format, Ring, Transport};

/// The examples of the readme are tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
