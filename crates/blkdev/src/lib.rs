//! The boundary between block devices and whoever uses them.
//!
//! A driver implements [`Device`] and [`Queue`]; a consumer (an NBD server, an nbdkit plugin, a test) sees only
//! `Channel`. Drivers are dumb: they move aligned requests within their limits. Everything that would otherwise be
//! written once a driver lives in [`Channel`]: range checks, splitting, read-modify-write, emulated FUA and zeroes,
//! back-pressure and time-outs.
//!
//! ```text
//!   consumer --submit(Io)--> Channel --push(Request)--> Queue --> device
//!   consumer <--reap(Done)-- Channel <--reap(Completion)-- Queue
//! ```
//!
//! Memory for payload is a [`Mapping`] that the device has been told of once ([`Device::register`]); an [`Arena`] hands
//! out page runs of it as [`Buf`]s. A `Buf` moves into the request, stays with it while the device works, and comes back
//! in the completion: what goes in comes out, whether the request was done, failed or did not fit.
//!
//! There is no runtime in here: a queue has a file descriptor that becomes readable ([`Queue::wake_fd`]) and a mode
//! without one ([`Queue::reap`] in a loop), so epoll, an async runtime, a spin loop or plain threads can drive it.

mod ages;
mod arena;
mod channel;
mod device;
mod error;
mod extent;
mod gate;
mod io;
mod job;
mod mem;
mod slots;
pub mod socket;
mod source;

#[cfg(feature = "conformance")]
pub mod conformance;
pub mod fault;
pub mod memory;
pub mod null;

pub use arena::{Arena, Buf, PAGE};
pub use channel::{Channel, Plan};
pub use device::{Caps, Completion, Device, Info, Op, Queue, Request};
pub use error::Error;
pub use extent::{Extent, ExtentKind};
pub use io::{Done, Io};
pub use mem::{Iova, Mapping};
pub use source::Source;
