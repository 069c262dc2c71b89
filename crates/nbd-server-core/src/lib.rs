//! An NBD server over any [`blkdev::Device`]: exports, sessions, workers.
//!
//! ```text
//!   listeners ──► door (handshakes, one thread) ──► workers (one thread each, one Channel per export) ──► devices
//! ```
//!
//! - [`Export`] is policy: a device under a name, with the properties that the handshake reports.
//! - [`Peer`] describes a client: its address, its process, its TLS identity. [`Access`] holds the rules for clients that may
//!   open an export. Other clients cannot see the export.
//! - [`Session`] is one connection's transmission phase. It turns client bytes into block requests, and completions into replies.
//!   It has no socket and no clock, so any event loop can drive it, and a test can simulate it.
//! - [`Turns`] is the policy of a worker: it decides which connection has the next turn, and which one gets memory ([`Lines`]).
//!   It has no socket and no clock either.
//! - [`Server`] is the event loop: it accepts connections, does their handshakes, and moves each to a worker that owns a queue of
//!   its export's device.
//!
//! A minimal server:
//!
//! ```no_run
//! # fn main() -> std::io::Result<()> {
//! use std::{net::TcpListener, sync::Arc};
//!
//! use nbd_server_core::{Export, Limits, Server};
//!
//! let device = Arc::new(blkdev::memory::Memory::new(1 << 30));
//! let listener = TcpListener::bind("127.0.0.1:10809")?;
//! let server = Server::start(vec![Export::new("", device)], vec![listener.into()], None, Limits::default())?;
//! Err(server.wait())
//! # }
//! ```
//!
//! The caller opens a device once; all connections share it. Exports can be added, changed and removed while the server runs
//! ([`Server::add`], [`Server::remove`], [`Server::replace`]); clients of other exports do not notice. Payload memory is bounded
//! by [`Limits::memory`] for each worker and export. A request that does not fit waits in the socket.
#![forbid(unsafe_code)]

mod access;
mod coalesce;
mod continuation;
mod decaying_max;
mod door;
mod end;
mod export;
mod handover;
mod limits;
mod lines;
mod listener;
mod observe;
mod outbox;
mod pace;
mod peer;
mod poll;
mod received;
mod removal;
mod roster;
mod seat;
mod server;
mod session;
mod spin;
mod stream;
mod threads;
#[cfg_attr(not(feature = "tls"), path = "tls/absent.rs")]
pub mod tls;
mod turns;
mod worker;

pub use blkdev;
pub use nbd_proto;

pub use access::{Access, Rule};
pub use continuation::{Continuation, Read, Unsent};
pub use end::End;
pub use export::{Export, Exports, Seen};
pub use handover::{Connection, Greeted, Handover, KernelTls, Paused};
pub use limits::Limits;
pub use lines::{Grant, Lines, Part};
pub use listener::Listener;
pub use observe::{ClientView, DeviceView, ExportView, MemoryView, Observation, QueueView, Traffic, WorkerView};
pub use outbox::Outbox;
pub use pace::Progress;
pub use peer::{Identity, Origin, Peer};
pub use removal::Removal;
pub use roster::Status;
pub use server::Server;
pub use session::{Session, Stall};
pub use turns::{Connections, Fed, Turns};

/// The examples of the readme are tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
