//! Support for fuzz targets of drivers: a client and a device whose decisions come from the same bytes.
//!
//! A target has two sides. The [`Client`] opens queues of the driver and uses them as its rules allow. The device, which the
//! target implements below the driver, is correct or wrong, as the [`Script`] decides. The [`Ledger`] knows what both did, and so
//! which results are right. It panics if the driver
//!
//! - completes a request twice, never, or with other memory,
//! - reports success for a request that the device did not answer, or returns wrong data,
//! - sends a request that the client did not make, or that the client has back already,
//! - returns memory for reuse that a dead device may still access.
//!
//! One thread does all that, in a time of its own: the [`Clock`]. [`replay`] runs a target's corpus in an ordinary test.

mod client;
pub(crate) mod clock;
mod dma;
mod ledger;
mod replay;
mod script;
pub(crate) mod spare;

pub use client::Client;
pub use clock::{Clock, Entered};
pub use dma::Dma;
pub use ledger::{Kind, Ledger};
pub use replay::replay;
pub use script::Script;
