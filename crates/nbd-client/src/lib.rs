//! An NBD client: blocking calls, and a non-blocking engine for any event loop.
//!
//! ```text
//!   Uri + Options ──► Client    calls that wait: read, write, zero, trim, flush, cache, block_status
//!                       │
//!                     Engine    submit, interest, progress: many requests in flight, never blocks
//!                       │
//!                     Replies   checks every byte of the server against the request it answers; no I/O
//! ```
//!
//! - [`Uri`] is where an export is; [`list`] and [`info`] ask a server about its exports without opening one.
//! - [`Client`] has one request at a time. Start here.
//! - [`Engine`] has many in flight. It is a descriptor and three methods, for epoll, tokio or a loop of its own.
//! - [`Export`] is what the server reports: size, block sizes, and what may be sent.
//! - [`Error`] is why something failed.
//!
//! The client uses the newest protocol that both sides know: extended headers (64-bit lengths), structured replies, or simple
//! replies. It sends only what the export allows, splits no request, and retries nothing.
//!
//! A server is not trusted. Its replies cannot make the client panic, wait beyond the time limits, or use more memory than the
//! requests in flight need: data goes into the caller's buffers, status and lists are bounded. Replies to unknown cookies,
//! data out of range, data that comes twice and replies with missing data end the connection with [`Error::Protocol`].
//!
//! With the cargo feature `tls`, connections can use TLS with certificates (`Tls`).
#![forbid(unsafe_code)]

mod ask;
mod client;
mod cover;
mod deadline;
mod dial;
mod engine;
mod error;
mod export;
mod flights;
mod handshake;
mod options;
mod outbox;
mod replies;
mod request;
mod socket;
mod stream;
mod target;
#[cfg_attr(not(feature = "tls"), path = "tls/absent.rs")]
mod tls;
mod uri;

pub use ask::{Listed, info, list};
pub use client::Client;
pub use deadline::Interest;
pub use engine::Engine;
pub use error::Error;
pub use export::Export;
pub use nbd_proto::{
    BlockSizes, Cookie, Extent, Mode, WireError,
    wire::{AllocationFlags, BASE_ALLOCATION, Opt, Rep},
};
pub use options::Options;
pub use request::{Completion, Rejection, Request, Status};
#[cfg(feature = "tls")]
pub use tls::Certificates;
pub use tls::Tls;
pub use uri::{Address, PORT, Uri};

/// The example of the README, compiled.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
