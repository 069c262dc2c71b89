//! The client's half: questions and requests out, answers and replies in. It is the other side of the server's tests,
//! and what a load generator or a prober is made of; sans-IO in the same manner.
//!
//! - [`Handshake`]: question by question. [`Handshake::ask`] puts an option out, [`Handshake::next`] takes its
//!   answers in.
//! - [`Negotiation`]: the usual course of questions from a greeting to the transmission phase, by a [`Wish`].
//!   What comes after STARTTLS is only in its [`Upgrade`], so it cannot be sent in plain text.
//! - [`Encoder`]: requests. [`Decoder`]: replies.

mod decoder;
pub(crate) mod encoder;
mod handshake;
mod negotiation;

pub use decoder::{Chunk, Decoder, Event};
pub use encoder::Encoder;
pub use handshake::{Answer, Ask, Handshake, Info};
pub use negotiation::{Agreement, Failure, Negotiation, Step, Upgrade, Wish};
