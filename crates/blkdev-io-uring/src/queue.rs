//! [`FileQueue`]: requests to a ring, or done on the spot where that is cheaper.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd},
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use blkdev::{Buf, Completion, Error, Extent, ExtentKind, Op, PAGE, Queue, Request};
use blkdev_ring::{Command, Operation, Ring};
use nix::{
    errno::Errno,
    unistd::{Whence, lseek},
};

use crate::{
    device::Shared,
    file::{FILL, PUNCH, ZERO},
    sys,
};

/// The longest transfer that is done on the spot, in bytes. From about here on the copy costs more than the hand-over
/// to a worker thread of the kernel's, which can then do it on another core.
const INLINE_MAX: usize = 64 << 10;

/// A transfer on the spot that took longer than this was made to wait for the disk. A copy takes microseconds, and
/// being preempted some milliseconds.
const SLOW: Duration = Duration::from_millis(10);

/// For how long the kernel's worker threads do the writes after a [`SLOW`] one: doubled when the next one is slow
/// again.
const DETOUR_MIN: Duration = Duration::from_millis(100);
const DETOUR_MAX: Duration = Duration::from_secs(5);

/// How many extents one `Status` is answered with at most: each costs a system call or two, about a microsecond.
const EXTENTS_MAX: usize = 64;

/// How often a request is tried again that the kernel gave back undone.
const TRIES_MAX: u8 = 100;

/// One of the device's queues: a ring.
#[derive(Debug)]
pub(crate) struct FileQueue {
    shared: Arc<Shared>,
    ring: Ring<Flight>,
    /// What has ended without the ring.
    done: Vec<Completion>,
    depth: usize,
    /// Writes are not done on the spot before this.
    detour_until: Option<Instant>,
    /// For how long, should the next one be slow.
    detour: Duration,
    gone: bool,
}

/// A request in the ring.
#[derive(Debug)]
pub(crate) struct Flight {
    request: Request,
    /// Bytes that were transferred already.
    moved: u32,
    tries: u8,
    /// For `Zero` and `Discard`: `fallocate`'s mode, or 0 for the block device's own discard.
    mode: i32,
}

impl Operation for Flight {
    #[inline]
    fn command(&self) -> Command<'_> {
        match &self.request.op {
            Op::Read { at, buf } => Command::Read { at: *at, buf, skip: self.moved },
            Op::Write { at, buf, fua } => Command::Write { at: *at, buf, skip: self.moved, durable: *fua },
            &(Op::Zero { at, len, .. } | Op::Discard { at, len }) => match self.mode {
                0 => Command::Discard { at, len },
                mode => Command::Allocate { mode, at, len },
            },
            Op::Flush => Command::Sync,
            &Op::Prefetch { at, len } => Command::Prefetch { at, len: len.try_into().unwrap_or(u32::MAX) },
            Op::Status { .. } => unreachable!("a status is answered on the spot"),
        }
    }

    fn buf_mut(&mut self) -> Option<&mut Buf> {
        match &mut self.request.op {
            Op::Read { buf, .. } | Op::Write { buf, .. } => Some(buf),
            _ => None,
        }
    }
}

impl Flight {
    fn new(request: Request, mode: i32) -> Self {
        Self { request, moved: 0, tries: 0, mode }
    }

    /// Whether the kernel has discards for the block device `file` that need no worker thread: one of length 0 is
    /// refused for its length, once everything else about it was found good.
    pub(crate) fn probe_discard(file: &std::fs::File) -> io::Result<bool> {
        let mut ring = Ring::new(1, file.as_fd())?;
        let probe = Self::new(Request { tag: 0, op: Op::Discard { at: 0, len: 0 } }, 0);
        assert!(ring.push(probe).is_ok(), "a new ring has room");
        ring.kick();
        let mut known = false;
        // It is refused before anything could wait, so the answer is there; where not, there is fallocate.
        ring.reap(|_, result| {
            known = result == Err(libc::EINVAL);
            None
        });
        Ok(known)
    }

    /// What the kernel's answer means. `Err`: there is more to do, so once more.
    #[inline]
    fn settle(mut self, result: Result<u32, i32>, shared: &Shared) -> Result<Completion, Self> {
        let end = match (&self.request.op, result) {
            (Op::Read { buf, .. } | Op::Write { buf, .. }, Ok(count)) => {
                self.moved += count;
                match buf.len() - self.moved as usize {
                    0 => Ok(()),
                    // The file has shrunk, or the disk is smaller than it said.
                    _ if count == 0 => Err(Error::Io),
                    _ => return Err(self),
                }
            }
            // The rest of a direct transfer that ended amid a block: the file has shrunk.
            (_, Err(libc::EINVAL)) if self.moved > 0 => Err(Error::Io),
            (_, Err(errno)) if is_undone(errno) => {
                if self.tries < TRIES_MAX {
                    self.tries += 1;
                    return Err(self);
                }
                Err(Error::Io)
            }
            // A file system without ZERO_RANGE (tmpfs): a hole, which is then filled where the space must be kept. That
            // it cannot be filled leaves zeroes all the same.
            (Op::Zero { .. }, Err(libc::EOPNOTSUPP)) if self.mode == ZERO && !shared.target.is_disk => {
                shared.zero_range_fails.store(true, Ordering::Relaxed);
                self.mode = PUNCH;
                return Err(self);
            }
            (Op::Zero { unmap: false, .. }, Ok(_)) if self.mode == PUNCH => {
                self.mode = FILL;
                return Err(self);
            }
            (Op::Zero { .. }, Err(libc::EOPNOTSUPP)) if self.mode == FILL => Ok(()),
            (_, Err(errno)) => Err(failure(errno, shared)),
            (_, Ok(_)) => Ok(()),
        };
        Ok(Completion { tag: self.request.tag, op: self.request.op, result: end })
    }
}

impl FileQueue {
    pub(crate) fn open(shared: &Arc<Shared>, depth: u16) -> io::Result<Self> {
        let max = shared.info.queues_max;
        let claim = |open: u16| (open < max).then_some(open + 1);
        if shared.queues.fetch_update(Ordering::Relaxed, Ordering::Relaxed, claim).is_err() {
            let text = format!("{}: all {max} queues are open; close one first", shared.info.target);
            return Err(io::Error::new(io::ErrorKind::QuotaExceeded, text));
        }
        let depth = depth.clamp(1, shared.info.depth_max);
        let ring = Ring::new(depth, shared.file.as_fd()).inspect_err(|_| {
            shared.queues.fetch_sub(1, Ordering::Relaxed);
        })?;
        let depth = usize::from(depth);
        let done = Vec::with_capacity(depth);
        Ok(Self { shared: Arc::clone(shared), ring, done, depth, detour_until: None, detour: DETOUR_MIN, gone: false })
    }

    fn finish(&mut self, request: Request, result: Result<(), Error>) {
        let Request { tag, op } = request;
        self.done.push(Completion { tag, op, result });
    }

    /// Whether a transfer is better done on the spot.
    #[inline]
    fn is_inline(&mut self, op: &Op) -> bool {
        let short = |at: u64, buf: &Buf| {
            buf.len() <= INLINE_MAX && at.is_multiple_of(PAGE as u64) && buf.len().is_multiple_of(PAGE)
        };
        match op {
            Op::Read { at, buf } => self.shared.target.in_memory && short(*at, buf),
            Op::Write { at, buf, fua: false } => {
                self.shared.target.inline_writes
                    && short(*at, buf)
                    && self.detour_until.is_none_or(|until| {
                        let over = Instant::now() >= until;
                        if over {
                            self.detour_until = None;
                        }
                        over
                    })
            }
            _ => false,
        }
    }

    /// Does a transfer on the spot.
    fn transfer(&mut self, mut flight: Flight) -> Completion {
        let file = &self.shared.file;
        let started = Instant::now();
        loop {
            let skip = flight.moved as usize;
            let result = match &mut flight.request.op {
                Op::Read { at, buf } => sys::read(file, *at, buf, skip),
                Op::Write { at, buf, .. } => sys::write(file, *at, buf, skip),
                _ => unreachable!("only transfers are done on the spot"),
            };
            let result = result.map(|n| n as u32).map_err(|e| e.raw_os_error().unwrap_or(libc::EIO));
            match flight.settle(result, &self.shared) {
                Ok(completion) => {
                    let ended = Instant::now();
                    if ended - started > SLOW && !self.shared.target.in_memory {
                        self.detour_until = Some(ended + self.detour);
                        self.detour = (self.detour * 2).min(DETOUR_MAX);
                    } else {
                        self.detour = DETOUR_MIN;
                    }
                    return completion;
                }
                Err(again) => flight = again,
            }
        }
    }
}

impl Queue for FileQueue {
    #[inline]
    fn push(&mut self, mut request: Request) -> Result<(), Request> {
        if self.ring.in_flight() + self.done.len() >= self.depth {
            return Err(request);
        }
        if self.gone {
            self.finish(request, Err(Error::Gone));
            return Ok(());
        }
        let (shared, target) = (&self.shared, &self.shared.target);
        let mode = match &mut request.op {
            Op::Zero { unmap: true, .. } => target.zero_mode,
            Op::Zero { unmap: false, .. } if shared.zero_range_fails.load(Ordering::Relaxed) => PUNCH,
            Op::Zero { unmap: false, .. } => ZERO,
            Op::Discard { .. } if shared.discard_command => 0,
            Op::Discard { .. } => PUNCH,
            Op::Status { at, len, extents } => {
                let result = status(shared, *at, *len, extents);
                self.finish(request, result);
                return Ok(());
            }
            _ => 0,
        };
        let inline = self.is_inline(&request.op);
        let flight = Flight::new(request, mode);
        if inline {
            let completion = self.transfer(flight);
            self.done.push(completion);
            return Ok(());
        }
        self.ring.push(flight).map_err(|flight| flight.request)
    }

    #[inline]
    fn kick(&mut self) {
        self.ring.kick();
    }

    #[inline]
    fn reap(&mut self, done: &mut Vec<Completion>) {
        if self.ring.is_broken() {
            self.give_up();
        }
        done.append(&mut self.done);
        let shared = &*self.shared;
        self.ring.reap(|flight, result| match flight.settle(result, shared) {
            Ok(completion) => {
                done.push(completion);
                None
            }
            Err(flight) => Some(flight),
        });
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.ring.as_fd())
    }

    fn arm(&mut self) -> bool {
        self.done.is_empty() && (self.ring.arm() || self.gone)
    }

    fn give_up(&mut self) {
        self.gone = true;
        let done = &mut self.done;
        self.ring.give_up(|flight| {
            let Request { tag, op } = flight.request;
            done.push(Completion { tag, op, result: Err(Error::Gone) });
        });
    }
}

impl Drop for FileQueue {
    fn drop(&mut self) {
        self.shared.queues.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What an errno means. A disk that was taken away has the size 0, and to a write past the end the kernel says ENOSPC.
#[cold]
fn failure(errno: i32, shared: &Shared) -> Error {
    if errno == libc::ENOSPC && shared.target.is_disk && sys::disk_size(&shared.file).unwrap_or(0) == 0 {
        return Error::Io;
    }
    Error::from_errno(errno)
}

/// Whether the kernel gave a request back before it did anything. The last two are what becomes of requests whose
/// thread has ended: EFAULT of a read that waited for a page (seen with Linux 6.18), ECANCELED of what waited for a
/// worker thread (older ones). A real EFAULT cannot be, since the memory belongs to a mapping of ours.
fn is_undone(errno: i32) -> bool {
    [libc::EINTR, libc::EAGAIN, libc::EFAULT, libc::ECANCELED].contains(&errno)
}

/// Where the range is allocated, for at most [`EXTENTS_MAX`] extents of it.
fn status(shared: &Shared, at: u64, len: u64, extents: &mut Vec<Extent>) -> Result<(), Error> {
    let end = at + len;
    let mut here = at;
    extents.clear();
    while here < end && extents.len() < EXTENTS_MAX {
        let data = seek(shared, here, Whence::SeekData, end)?;
        if data > here {
            extents.push(Extent { at: here, len: data - here, kind: ExtentKind::Hole });
            here = data;
        } else {
            // Never empty, even should the file change in between: what is data once is data enough.
            let hole = seek(shared, here, Whence::SeekHole, end)?.max((here + 1).next_multiple_of(512)).min(end);
            extents.push(Extent { at: here, len: hole - here, kind: ExtentKind::Data });
            here = hole;
        }
    }
    Ok(())
}

/// The next byte from `at` on that is data or hole, at most `end`.
fn seek(shared: &Shared, at: u64, what: Whence, end: u64) -> Result<u64, Error> {
    match lseek(&shared.file, at as i64, what) {
        Ok(found) => Ok((found as u64).clamp(at, end)),
        // No data any more up to the end of the file.
        Err(Errno::ENXIO) => Ok(end),
        Err(errno) => Err(Error::from_errno(errno as i32)),
    }
}

const _: () = assert!(size_of::<Flight>() <= 128);
