//! [`Files`]: operations on files and block devices.

use std::{
    os::fd::{AsRawFd, BorrowedFd},
    time::Duration,
};

use blkdev::Buf;
use io_uring::{cqueue, opcode, squeue, types};

use crate::{
    kind::{Kind, Sealed},
    memory::Memory,
};

/// A ring for a file or block device: each operation's [`Command`] is plain data.
#[derive(Clone, Copy, Debug)]
pub struct Files;

/// A command on the ring's file. Offsets and lengths are bytes.
#[derive(Clone, Copy, Debug)]
pub enum Command<'a> {
    /// Reads the file from offset `at + skip` on, into `buf` from byte `skip` on.
    Read {
        /// File offset of the buffer's first byte.
        at: u64,
        /// The whole buffer.
        buf: &'a Buf,
        /// Number of bytes already transferred.
        skip: u32,
    },
    /// Writes `buf` from byte `skip` on, to the file from offset `at + skip` on.
    Write {
        /// File offset of the buffer's first byte.
        at: u64,
        /// The whole buffer.
        buf: &'a Buf,
        /// Number of bytes already transferred.
        skip: u32,
        /// Durable before it completes (`RWF_DSYNC`).
        durable: bool,
    },
    /// Makes completed writes durable, with the metadata needed to read them back (`fdatasync`).
    Sync,
    /// Calls `fallocate`. Needs Linux 5.6.
    Allocate {
        /// `FALLOC_FL_*`.
        mode: i32,
        /// First byte.
        at: u64,
        /// Length in bytes.
        len: u64,
    },
    /// Reads ahead into the page cache (`POSIX_FADV_WILLNEED`). Needs Linux 5.6.
    Prefetch {
        /// First byte.
        at: u64,
        /// Length in bytes; the kernel interface has 32 bits for it.
        len: u32,
    },
    /// Discards a range of a block device (`BLOCK_URING_CMD_DISCARD`). Needs Linux 6.12; older kernels return `EOPNOTSUPP`.
    Discard {
        /// First byte.
        at: u64,
        /// Length in bytes.
        len: u64,
    },
    /// Waits until another descriptor is readable, and transfers nothing. So other threads can wake the ring's owner.
    Poll(BorrowedFd<'a>),
}

/// The file's index in the ring's table of registered files.
const FILE: types::Fixed = types::Fixed(0);

/// `_IO(0x12, 0)` of linux/blkdev.h.
const BLOCK_URING_CMD_DISCARD: u32 = 0x1200;

impl Sealed for Files {}

impl Kind for Files {
    type Command<'a> = Command<'a>;
    type Sqe = squeue::Entry;
    type Cqe = cqueue::Entry;

    const NEEDED: &'static [u8] = &[
        opcode::Read::CODE,
        opcode::Write::CODE,
        opcode::Fsync::CODE,
        opcode::Fallocate::CODE,
        opcode::Fadvise::CODE,
        opcode::PollAdd::CODE,
    ];
    const OPTIONAL: &'static [u8] = &[opcode::UringCmd16::CODE];
    const TOO_OLD: &'static str = "the kernel's io_uring is too old, or there is none: Linux 5.6 or later is needed";
    const DRAIN_MAX: Duration = Duration::from_secs(10);

    #[inline]
    fn entry(command: Command<'_>, memory: &mut Memory, user_data: u64) -> squeue::Entry {
        entry(command, memory).user_data(user_data)
    }
}

#[inline]
fn entry(command: Command<'_>, memory: &mut Memory) -> squeue::Entry {
    let mut window = |buf: &Buf, skip: u32| {
        let len = (buf.len() as u32).checked_sub(skip).expect("skip lies within the buffer");
        memory.keep(buf);
        (buf.as_ptr().wrapping_add(skip as usize), len)
    };
    match command {
        Command::Read { at, buf, skip } => {
            let (ptr, len) = window(buf, skip);
            opcode::Read::new(FILE, ptr, len).offset(at + u64::from(skip)).build()
        }
        Command::Write { at, buf, skip, durable } => {
            let (ptr, len) = window(buf, skip);
            let flags = if durable { libc::RWF_DSYNC } else { 0 };
            opcode::Write::new(FILE, ptr, len).offset(at + u64::from(skip)).rw_flags(flags).build()
        }
        Command::Poll(fd) => opcode::PollAdd::new(types::Fd(fd.as_raw_fd()), libc::POLLIN as u32).build(),
        Command::Sync => opcode::Fsync::new(FILE).flags(types::FsyncFlags::DATASYNC).build(),
        Command::Allocate { mode, at, len } => opcode::Fallocate::new(FILE, len).offset(at).mode(mode).build(),
        Command::Prefetch { at, len } => {
            opcode::Fadvise::new(FILE, len.into(), libc::POSIX_FADV_WILLNEED).offset(at).build()
        }
        Command::Discard { at, len } => {
            let mut cmd = [0; 16];
            cmd[..8].copy_from_slice(&len.to_ne_bytes());
            opcode::UringCmd16::new(FILE, BLOCK_URING_CMD_DISCARD).addr(Some(at)).cmd(cmd).build()
        }
    }
}
