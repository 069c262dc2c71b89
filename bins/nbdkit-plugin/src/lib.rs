//! The nbdkit plugin `nbdblk`: a drop-in for nbdkit-blkio-plugin that keeps many requests in flight.
//!
//! ```text
//!   nbdkit's threads, blocking          callbacks.rs   C to Rust and back; a panic ends one request
//!        │ pread, pwrite, …              affinity.rs    keeps the threads of a busy connection on one CPU
//!      Pool, its Lanes                  pool.rs        callers share Channels; one of them waits for all
//!        │ Io / Done
//!      Channel                          blkdev
//! ```
//!
//! The callbacks in nbdkit's life cycle: `config` collects parameters; `config_complete` checks them; `get_ready` opens the
//! device. If nbdkit then forks, `before_fork` closes the device, because neither threads nor rings survive a fork, and
//! `after_fork` opens it again in the serving process. All connections share it.

mod abi;
mod affinity;
mod callbacks;
mod config;
mod host;
mod options;
mod plugin;
mod pool;
mod stats;
