//! [`Observation`]: what a server does now and has done so far, as plain data.
//!
//! Each worker writes its own counters and gauges, and any thread reads them without a lock. Those that take time to compute, such as
//! the age of the oldest request, are as of the worker's last patrol, at most a second ago.

mod book;
mod client;
mod gauge;
mod lane;
mod views;
mod worker;

pub(crate) use book::{Book, Entry};
pub(crate) use lane::LaneGauges;
pub(crate) use views::protocol;
pub use views::{ClientView, DeviceView, ExportView, MemoryView, Observation, Traffic, WorkerView};
pub(crate) use worker::WorkerGauges;
