//! An io_uring that owns its operations, and the memory that they move, until they complete.
//!
//! A [`Ring`] is bound to one file. An operation owns the memory that it moves. It is [pushed](Ring::push) into a slot of the
//! ring and stays there until its completion; then [`Ring::reap`] returns it. So no safe code can free or reuse memory that the
//! kernel still accesses, and users of this crate need no `unsafe`.
//!
//! ```text
//!   push(T) --> slot n, SQE n --kick()--> kernel --CQE n--> reap(): T, result
//! ```
//!
//! [`Operation::command`] describes an operation as plain data.
//!
//! # Kind of ring
//! A ring works from any thread, and from several in turn (the methods take `&mut self`). It uses `COOP_TASKRUN`,
//! `TASKRUN_FLAG` and `SUBMIT_ALL` if the kernel has them (5.19); otherwise 5.6 is enough. `SINGLE_ISSUER` with `DEFER_TASKRUN`
//! would bind a ring to the first thread that submits. For reads from the page cache at depth 64 that gained only 3 % (1258 ns
//! against 1302 ns per read, with noise of 100 ns), so it is not used.
//!
//! If a thread ends, the kernel may return the operations it submitted undone, with `EFAULT` or `ECANCELED`. Submit them again
//! by returning them from the closure of [`Ring::reap`].
//!
//! # Waiting
//! The ring's own descriptor ([`AsFd`](std::os::fd::AsFd)) is readable while completions are pending, level-triggered. It costs
//! nothing for completions that no thread sleeps for, while an eventfd costs a write each, and it never has to be read. A
//! completion may interrupt `epoll_wait` or `poll` with `EINTR`: continue as after a time-out.

mod files;
mod kind;
mod memory;
mod passthrough;
mod ring;

pub use blkdev;
pub use files::{Command, Files};
pub use kind::Kind;
pub use passthrough::{Data, NvmeCommand, PASSTHRU_LEN, Passthrough, passthru};
pub use ring::{Operation, Ring};

/// The examples of the readme are tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
