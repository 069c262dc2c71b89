//! Sans-IO codec of the Network Block Device protocol, both halves: bytes in, meaning out, and the other way round. It
//! knows no socket, clock, thread or block device, and never panics on what a peer sent.
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
//! # The server's half
//!
//! - [`Handshake`]: `new(offer, out)` greets; `next(&mut input, catalog, out) -> Result<Step, Fatal>`; [`Step`] is
//!   `More`, `StartTls`, `Done(Box<Negotiated>)` or `Closed`. The owner describes its exports through [`Catalog`]
//!   (`list`, `find`).
//! - [`Negotiated`]: the [`Export`], the selected contexts with their ids (the id is the place in
//!   [`Export::contexts`]), and the [`Terms`], which are small and `Copy`.
//! - [`Receiver`]: `new(terms)`; `next(&mut input) -> Result<Option<Event>, Fatal>`; [`Event`] is `Command(cookie,
//!   command)`, `Write(cookie, write)`, `Payload(&[u8])`, `Reject(cookie, rejection)` or `Disconnect`.
//!   `payload_left`/`payload_placed(n)`: the rest of a payload may go past it, straight into place.
//!   `skip_payload()`/`reject_payload(error, text)`: it swallows the rest itself. `set_size(size)`.
//! - [`Replier`]: `Copy`, `new(terms)`; `read_head(out, cookie, at, len)` and exactly `len` bytes; or in parts
//!   `data_chunk`, `hole_chunk`, `error_offset`; `done(out, cookie, at, kind)`; `error(out, cookie, at, error, text)`;
//!   `status(out, cookie, at, context, extents, last)`. `out` is anything that is [`Put`].
//! - [`Fatal`]: drop the connection.
//!
//! The client's half is in [`client`].
//!
//! The input of every `next` is a slice that it shortens by what it took. Bytes may come in any pieces: the events are
//! the same, and what is left over of a message is kept inside, never by the caller.
//!
//! # Decisions, where the protocol leaves a choice
//!
//! - A request of no bytes is handed out and succeeds, but a status of none is EINVAL: no extent may be empty.
//! - FLUSH with an offset or a length is a FLUSH. FUA is valid with every command, once advertised.
//! - A refused request is told after its payload is past; a payload up to [`limits::SWALLOW_MAX`] keeps the stream in
//!   step.
//! - A WRITE with an extended header is a WRITE, even without the flag PAYLOAD_LEN that it must have: qemu 10.0 does
//!   not set it.
//! - A command that was not advertised is EINVAL; on a read-only export one that writes is EPERM, advertised or not.
//! - LIST_META_CONTEXT is answered without structured replies too. A query without a colon is `ERR_INVALID`.
//! - STARTTLS without TLS is `ERR_POLICY`.
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
pub use receiver::{Event, Receiver};
pub use replier::{Extent, Put, Replier};
pub use terms::{BlockSizes, Catalog, ContextSet, Export, Fatal, Negotiated, Offer, Refusal, Terms, Tls};
pub use wire::{Cookie, Mode, WireError};

/// The examples of the readme are tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
