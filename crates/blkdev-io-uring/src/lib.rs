//! Files and kernel block devices through io_uring, as a [`blkdev::Device`].
//!
//! [`IoUring::open`] takes a regular file or a block device. Each queue is an io_uring of its own
//! ([`blkdev_ring::Ring`]), so queues share nothing but the file.
//!
//! ```no_run
//! use std::sync::Arc;
//! use blkdev::{Device, Plan};
//! use blkdev_io_uring::{IoUring, Options};
//!
//! let disk = IoUring::open(Options { direct: true, ..Options::path("/var/lib/images/disk.img") })?;
//! let disk: Arc<dyn Device> = Arc::new(disk);
//! let channels = Plan::default().open(&disk, 2)?; // one for each thread that works with it
//! # std::io::Result::Ok(())
//! ```
//!
//! # Through the page cache, or not
//! By default transfers go through the page cache. With [`Options::direct`] they go past it (`O_DIRECT`), and the
//! device's block size becomes what the file system or the disk demands.
//!
//! # What does not go through the ring
//! Where the kernel cannot do an operation without sleeping it hands it to a worker thread, which costs more than the
//! operation itself. So these are done on the spot, by a plain system call in `push`, when they are short (at most 64
//! KiB) and lie on whole pages:
//! - writes through the page cache to ext4, f2fs, tmpfs and block devices;
//! - reads from tmpfs.
//!
//! For 4096 bytes at depth 64 that takes about half the time, for 1 MiB no less. They are copies to memory, unless the
//! kernel makes writers wait because too much is dirty: a write that took longer than 10 ms sends the queue's writes of
//! the next 100 ms (when that happens again and again, of up to 5 s) to the kernel's worker threads, so that whoever
//! drives the queue is not held up. What is left of a transfer after one call goes to the kernel's worker threads too.
//!
//! Where a range is allocated (`Status`) is asked on a thread of the device's, which starts with the first question. A full
//! image on tmpfs takes `lseek` hundreds of milliseconds. While it is at work writes go to the kernel's worker threads,
//! since both need the file's lock.
//!
//! # Sharing
//! Images are locked as QEMU's file driver locks them, and a block device is claimed (`O_EXCL`) unless it is only read.
//! Openings by one process share a file; others exclude each other if one of them writes. [`Options::force_share`] does
//! without locks. Where the file system has no locks, nothing is locked.
//!
//! # File systems that hang
//! FUSE and NFS have a server behind them, which may stop. Nothing here waits for it on the thread that drives a queue, and
//! the process holds no descriptor of such a file, since closing one waits for the server and cannot be interrupted. Files
//! of FUSE have no block status for that reason. [`Source::Fd`] cannot avoid that: the sender holds the descriptor too.
//!
//! # Sizes
//! The size of a file is asked for when it is opened, when a queue is, and on
//! [`Device::refresh`](blkdev::Device::refresh). A read past the end of a file that has shrunk since fails with
//! [`Io`](blkdev::Error::Io). With [`Options::direct`] a size that is no multiple of the block size is refused.

mod device;
mod failures;
mod file;
mod flight;
mod handle;
mod lock;
mod queue;
mod shared;
mod status;
mod sys;

pub use blkdev::Source;
pub use device::{IoUring, Options};

/// The examples of the readme are tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
