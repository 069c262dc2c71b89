//! Sans-IO codec of the Network Block Device protocol, for servers and clients. It turns bytes into events, and replies into
//! bytes. It has no socket, clock, thread or block device, and never panics on data from a peer.
//!
//! ```text
//!              bytes in                                            bytes out
//!                 │                                                    ▲
//!                 ▼                                                    │
//!   Handshake::next(&mut input, &catalog, &mut out) ─────────────── out: replies to options
//!                 │ Step::Done(Negotiated { export, terms, contexts, .. })
//!                 ▼
//!   Receiver::next(&mut input) ──► Event ──► (the device) ──► Replier::read_head / done / error / status
//! ```
//!
//! # The server side
//!
//! - [`Handshake`]: `new(offer, out)` writes the greeting; `next(&mut input, catalog, out) -> Result<Step, Fatal>`; [`Step`] is
//!   `More`, `StartTls`, `Done(Box<Negotiated>)` or `Closed`. The owner describes its exports through [`Catalog`] (`list`,
//!   `find`).
//! - [`Negotiated`]: the [`Export`], the selected contexts with their ids (the id is the position in [`Export::contexts`]), and
//!   the [`Terms`], which are small and `Copy`.
//! - [`Receiver`]: `new(terms)`; `next(&mut input) -> Result<Option<Event>, Fatal>`; [`Event`] is `Command(cookie, command)`,
//!   `Write(cookie, write)`, `Payload(&[u8])`, `Reject(cookie, rejection)` or `Disconnect`. `payload_left`/`payload_placed(n)`:
//!   the caller can receive the rest of a payload directly into its buffer. `skip_payload()`/`reject_payload(error, text)`: the
//!   receiver discards the rest. `set_size(size)`.
//! - [`Replier`]: `Copy`, `new(terms)`; `read_head(out, cookie, at, len)`, followed by exactly `len` bytes; or in parts
//!   `data_chunk`, `hole_chunk`, `error_offset`; `done(out, cookie, at, kind)`; `error(out, cookie, at, error, text)`;
//!   `status(out, cookie, at, context, extents, last)`. `out` is any type that implements [`Put`].
//! - [`Fatal`]: drop the connection.
//!
//! The client side is in [`client`].
//!
//! The input of every `next` is a slice, which it shortens by the bytes it took. Bytes may arrive in pieces of any size: the
//! events are the same. Incomplete messages are kept inside, never by the caller.
//!
//! # Decisions where the protocol leaves a choice
//!
//! - A request of no bytes is valid and succeeds, except a status, which gets EINVAL: no extent may be empty.
//! - FLUSH with an offset or a length is a FLUSH. FUA is valid with every command, once advertised.
//! - A refused request is reported after its payload. A payload up to [`limits::SWALLOW_MAX`] keeps the stream in step.
//! - A WRITE with an extended header is valid without the mandatory flag PAYLOAD_LEN: QEMU 10.0 does not set it.
//! - A command that was not advertised gets EINVAL. On a read-only export, a command that writes gets EPERM, advertised or not.
//! - LIST_META_CONTEXT gets a reply without structured replies too. A query without a colon gets `ERR_INVALID`.
//! - STARTTLS without TLS gets `ERR_POLICY`.
#![forbid(unsafe_code)]
#![warn(clippy::cast_possible_truncation)]

pub mod client;
mod command;
mod handshake;
pub mod limits;
mod reader;
mod receiver;
mod replier;
mod terms;
pub mod wire;

pub use command::{Command, Rejection, Write};
pub use handshake::{Handshake, Step};
pub use receiver::{Event, Position, Receiver};
pub use replier::{Extent, Put, Replier};
pub use terms::{BlockSizes, Catalog, ContextSet, Export, Fatal, Negotiated, Offer, Refusal, Terms, Tls};
pub use wire::{Cookie, Mode, WireError};

/// The examples of the readme are tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
