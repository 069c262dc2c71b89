//! An io_uring that owns its operations: the one place where requests are handed to the kernel.
//!
//! A [`Ring`] is bound to one file. An operation, with the memory it moves, is [pushed](Ring::push) into a slot of the
//! ring and stays there until its completion was seen; then [`Ring::reap`] gives it back. What goes in comes out. So
//! nobody can free or reuse memory that the kernel still works on, and users of this crate need no `unsafe`.
//!
//! ```text
//!   push(T) --> slot n, SQE n --kick()--> kernel --CQE n--> reap(): T, result
//! ```
//!
//! What an operation is to do, its [`Operation::command`] says as plain data.
//!
//! # The kind of ring
//! A ring works from any thread, also from several in turn (one at a time: the methods take `&mut self`). It asks for
//! `COOP_TASKRUN`, `TASKRUN_FLAG` and `SUBMIT_ALL` where the kernel has them (5.19), and does without where not (5.6).
//! `SINGLE_ISSUER` with `DEFER_TASKRUN` would tie it to the first thread that submits; for reads from the page cache at
//! depth 64 that gained 3 % (1258 ns each against 1302 ns, in noise of 100 ns), so the tie is not worth it.
//!
//! What a thread has submitted and not seen completed when it ends, the kernel may hand back undone, with `EFAULT` or
//! `ECANCELED`: give it back to the ring from [`Ring::reap`]'s closure.
//!
//! # Waiting
//! The ring's own descriptor ([`AsFd`](std::os::fd::AsFd)) is readable while completions wait, level-triggered. That
//! costs nothing for completions that nobody sleeps for, where an eventfd costs a write each, and there is nothing to
//! read. A thread that sleeps in `epoll_wait` or `poll` may be woken with `EINTR` by a completion: go on as after a
//! time-out.

mod files;
mod kind;
mod memory;
mod passthrough;
mod ring;

pub use files::{Command, Files};
pub use kind::Kind;
pub use passthrough::{Data, NvmeCommand, PASSTHRU_LEN, Passthrough, passthru};
pub use ring::{Operation, Ring};

/// The examples of the readme are tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
