//! The interface between block devices and their users.
//!
//! **For a device of your own** implement [`Serve`], which is one method, and wrap it in [`Blocking`] or [`Inline`]. A driver of
//! hardware implements [`Device`] and [`Queue`]. **To use a device** open a [`Channel`] on it with [`Plan::open`]; simple programs
//! call [`Channel::read_at`] and [`Channel::write_at`].
//!
//! A driver implements [`Device`] and [`Queue`]. A consumer (an NBD server, an nbdkit plugin, a test) uses only [`Channel`].
//! Drivers are simple: they move aligned requests within their limits. [`Channel`] does the rest, once for all drivers: range
//! checks, splitting, read-modify-write, emulated FUA and zeroes, back-pressure and time-outs.
//!
//! ```text
//!   consumer --submit(Io)--> Channel --push(Request)--> Queue --> device
//!   consumer <--reap(Done)-- Channel <--reap(Completion)-- Queue
//! ```
//!
//! This crate has no runtime. A queue has a file descriptor that becomes readable ([`Queue::wake_fd`]), and it can be polled
//! ([`Queue::reap`] in a loop). So epoll, an async runtime, a busy loop or plain threads can drive it.
//!
//! # Memory model
//!
//! Payload memory is a [`Mapping`]: shared memory, mapped once, at an address that is also its I/O address ([`Mapping::iova`]).
//! The consumer's channel registers the mapping with the device ([`Device::register`]); direct users of a device hold a
//! [`Registration`]. An [`Arena`] hands out runs of its pages
//! as [`Buf`]s.
//!
//! - **A `Buf` has one owner.** It moves into the request, belongs to the queue while the device works, and comes back in the
//!   completion: after success, after failure, and when the queue is full. Dropping it frees its pages.
//! - **Its content is never borrowed.** The device, or another process, may write to the memory at any time. So `Buf` only copies
//!   bytes in and out, and there is never a reference to them.
//! - **A driver may pass the address of a `Buf` to the device** from [`Queue::push`] until it returns the completion, and not
//!   longer. The mapping stays registered until all queues of the device that use it are closed.
//! - **A dead device may still write.** When a driver gives up ([`Queue::give_up`]), it completes all requests with
//!   [`Error::Gone`] and [abandons](Buf::abandon) the memory that the device may still touch. Abandoned memory is never reused:
//!   late data cannot appear in another request, and a late write cannot put another request's data on the disk.
//! - **A slow device keeps its memory.** When a request fails by a time-out, its `Buf` stays with the queue until the device
//!   returns it.

mod ages;
mod arena;
mod blocking;
mod channel;
mod context;
mod counters;
mod device;
mod driver;
mod error;
mod extent;
mod gate;
mod gauge;
mod histogram;
mod inline;
mod io;
mod job;
pub mod liveness;
mod mem;
mod peer;
pub mod reconnect;
mod registration;
mod serve;
mod simple;
mod slots;
pub mod socket;
mod source;
mod stamp;
pub mod thread;
pub mod wake;
pub mod window;

#[cfg(feature = "conformance")]
pub mod conformance;
pub mod fault;
#[cfg(feature = "fuzz")]
pub mod fuzz;
pub mod memory;
pub mod null;

pub use arena::{Arena, Buf, PAGE};
pub use blocking::Blocking;
pub use channel::{Channel, Plan};
pub use context::Context;
pub use counters::{Counters, Counts, Operation, OperationCounts, Pending};
pub use device::{Caps, Completion, Device, Info, Op, Queue, Request, State};
pub use error::Error;
pub use extent::{Extent, ExtentKind};
pub use gauge::Gauge;
pub use histogram::{BUCKETS, Latency};
pub use inline::Inline;
pub use io::{Done, Io};
pub use mem::{Iova, Mapping};
pub use peer::Peer;
pub use registration::Registration;
pub use serve::Serve;
pub use source::Source;

/// The examples of the readme are tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
