//! Files and kernel block devices through io_uring, as a [`blkdev::Device`].
//!
//! [`IoUring::open`] opens a regular file or a block device. Each queue has its own io_uring ([`blkdev_ring::Ring`]), so queues
//! share only the file.
//!
//! ```no_run
//! use std::sync::Arc;
//! use blkdev::{Device, Plan};
//! use blkdev_io_uring::{IoUring, Options};
//!
//! let mut options = Options::path("/var/lib/images/disk.img");
//! options.direct = true;
//! let disk = IoUring::open(options)?;
//! let disk: Arc<dyn Device> = Arc::new(disk);
//! let channels = Plan::default().open(&disk, 2)?; // one for each thread that works with it
//! # std::io::Result::Ok(())
//! ```
//!
//! # Page cache
//! By default, transfers go through the page cache. [`Options::direct`] bypasses it (`O_DIRECT`); the device's block size is
//! then the one that the file system or the disk requires.
//!
//! # Inline operations
//! If the kernel cannot do an operation without sleeping, it passes it to a worker thread, which costs more than a short
//! operation itself. So the driver does some operations inline, by a plain system call in `push`, if they are short (at most 64
//! KiB) and cover whole pages:
//! - writes through the page cache to ext4, f2fs, tmpfs and block devices;
//! - reads from tmpfs.
//!
//! At depth 64 this takes about half the time for 4096 bytes, and gains nothing for 1 MiB. Inline operations only copy memory,
//! unless the kernel throttles writers because too much is dirty. If a write took longer than 10 ms, the queue's writes of the
//! next 100 ms (up to 5 s if it happens repeatedly) go to the kernel's worker threads, so that the thread that drives the queue
//! does not block. The rest of a partial transfer also goes to the worker threads.
//!
//! A thread of the device queries the allocation of ranges (`Status`), because `lseek` on a full image on tmpfs takes hundreds
//! of milliseconds. The first query starts the thread. During a query writes go to the kernel's worker threads, because both
//! need the file's lock.
//!
//! # Sharing
//! Images are locked as by QEMU's file driver. A block device is claimed (`O_EXCL`) unless it is opened read-only. Openings by
//! one process share a file; openings by different processes exclude each other if one of them writes. [`Options::force_share`]
//! disables the locks. If the file system does not support locks, there are none.
//!
//! # File systems that hang
//! FUSE and NFS depend on a server, which may stop. The thread that drives a queue never waits for it. The process holds no
//! descriptor of such a file, because closing one waits for the server and cannot be interrupted; for the same reason files on
//! FUSE have no block status. With [`Source::Fd`] this is not possible: the sender holds the descriptor too.
//!
//! # Sizes
//! The size of a file is read when the file is opened, when a queue is opened, and at
//! [`Device::refresh`](blkdev::Device::refresh). If a file has shrunk since, a read past its end fails with
//! [`Io`](blkdev::Error::Io). With [`Options::direct`] the size must be a multiple of the block size.

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

pub use blkdev;
pub use blkdev::Source;
pub use device::{IoUring, Options};

/// The examples of the readme are tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
