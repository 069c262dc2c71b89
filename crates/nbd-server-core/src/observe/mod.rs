//! [`Observation`]: the state and the counters of a server, as plain data.
//!
//! Each worker writes its own counters and gauges, and any thread reads them without a lock. Figures that take time to compute, such
//! as the age of the oldest request, are as of the last patrol of the worker, at most a second ago.

mod age;
mod book;
mod client;
mod lane;
mod views;
mod worker;

pub(crate) use book::{Book, Entry};
pub(crate) use lane::LaneGauges;
pub(crate) use views::protocol;
pub use views::{ClientView, DeviceView, ExportView, MemoryView, Observation, QueueView, Traffic, WorkerView};
pub(crate) use worker::WorkerGauges;
