//! [`FileQueue`]: requests to a ring, or done on the spot where that is cheaper.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd},
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use blkdev::{Buf, Completion, Error, Extent, Op, PAGE, Queue, Request};
use blkdev_ring::Ring;

use crate::{
    file::{FILL, PUNCH, ZERO},
    flight::{Flight, Moving},
    shared::Shared,
    status::{Answer, Mailbox, all_data, extents},
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

/// How often a request is tried again that the kernel gave back undone.
const TRIES_MAX: u8 = 100;

/// One of the device's queues: a ring.
#[derive(Debug)]
pub(crate) struct FileQueue {
    /// Dropped before the device: once the device's descriptor is closed, the file is closed.
    ring: Ring<Flight>,
    /// What has ended without the ring.
    done: Vec<Completion>,
    depth: usize,
    /// The file, where transfers can be done on the spot.
    spot: Option<Arc<File>>,
    shared: Arc<Shared>,
    /// Writes are not done on the spot before this.
    detour_until: Option<Instant>,
    /// For how long, should the next one be slow.
    detour: Duration,
    /// Where the answers about `asked` come to, once there was a `Status`.
    mailbox: Option<Arc<Mailbox>>,
    /// Every `Status` that is not answered yet. While there is one, the ring polls the mailbox.
    asked: Vec<Asked>,
    /// How many there were.
    questions: u64,
    gone: bool,
}

/// A `Status` at the device's helper.
#[derive(Debug)]
struct Asked {
    number: u64,
    tag: u64,
    at: u64,
    len: u64,
    extents: Vec<Extent>,
}

impl Asked {
    fn end(mut self, result: Result<Vec<Extent>, Error>) -> Completion {
        let result = result.map(|found| self.extents = found);
        let Self { tag, at, len, extents, .. } = self;
        Completion { tag, op: Op::Status { at, len, extents }, result }
    }
}

impl Moving {
    /// What the kernel's answer means. `Err`: there is more to do, so once more.
    #[inline]
    fn settle(mut self, result: Result<u32, i32>, shared: &Shared) -> Result<Completion, Self> {
        let end = match (&self.request.op, result) {
            (Op::Read { buf, .. } | Op::Write { buf, .. }, Ok(count)) => {
                self.moved = self.moved.saturating_add(count).min(buf.len() as u32);
                match buf.len() - self.moved as usize {
                    0 => Ok(()),
                    // The file has shrunk, or the disk is smaller than it said.
                    _ if count == 0 => Err(self.failed(0, shared)),
                    _ => return Err(self),
                }
            }
            // The rest of a direct transfer that ended amid a block: the file has shrunk.
            (_, Err(libc::EINVAL)) if self.moved > 0 => Err(self.failed(0, shared)),
            (_, Err(errno)) if is_undone(errno) => {
                if self.tries < TRIES_MAX {
                    self.tries += 1;
                    return Err(self);
                }
                self.failed(errno, shared);
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
            (_, Err(errno)) => Err(self.failed(errno, shared)),
            (_, Ok(_)) => Ok(()),
        };
        Ok(Completion { tag: self.request.tag, op: self.request.op, result: end })
    }

    /// Logs an errno and returns its meaning. 0: the file has ended.
    #[cold]
    fn failed(&self, errno: i32, shared: &Shared) -> Error {
        let (operation, at, len) = match &self.request.op {
            Op::Read { at, buf } => ("read", *at, buf.len() as u64),
            Op::Write { at, buf, .. } => ("write", *at, buf.len() as u64),
            Op::Zero { at, len, .. } => ("write zeroes", *at, *len),
            Op::Discard { at, len } => ("discard", *at, *len),
            Op::Prefetch { at, len } => ("prefetch", *at, *len),
            Op::Flush | Op::Status { .. } => ("flush", 0, shared.capacity()),
        };
        // A disk that was taken away has the size 0, and to a write past the end the kernel says ENOSPC.
        let errno = if errno == libc::ENOSPC && shared.has_vanished() { libc::EIO } else { errno };
        let error = if errno == 0 { Error::Io } else { Error::from_errno(errno) };
        if error != Error::NotSupported {
            shared.failures.report(&shared.info.target, operation, at, len, errno);
        }
        error
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
        let ring = shared.handle.open().and_then(|file| Ring::new(depth, file.as_fd())).inspect_err(|_| {
            shared.queues.fetch_sub(1, Ordering::Relaxed);
        })?;
        let depth = usize::from(depth);
        let has_spot = (shared.target.in_memory || shared.target.inline_writes) && !shared.handle.is_far();
        let spot = if has_spot { shared.handle.open().ok() } else { None };
        Ok(Self {
            shared: Arc::clone(shared),
            ring,
            done: Vec::with_capacity(depth),
            depth,
            spot,
            detour_until: None,
            detour: DETOUR_MIN,
            mailbox: None,
            asked: Vec::new(),
            questions: 0,
            gone: false,
        })
    }

    /// Requests that are pushed and not reaped. The poll, which is in the ring while anything is asked, is none.
    #[inline]
    fn pushed(&self) -> usize {
        self.ring.in_flight() - usize::from(!self.asked.is_empty()) + self.asked.len() + self.done.len()
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
                    && !self.shared.helper.is_busy()
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

    /// Does a transfer on the spot. `Err`: part of it is left to do.
    fn transfer(&mut self, file: &File, mut flight: Moving) -> Result<Completion, Moving> {
        let started = Instant::now();
        let result = match &mut flight.request.op {
            Op::Read { at, buf } => sys::read(file, *at, buf),
            Op::Write { at, buf, .. } => sys::write(file, *at, buf),
            _ => unreachable!("only transfers are done on the spot"),
        };
        let ended = Instant::now();
        if ended - started > SLOW && !self.shared.target.in_memory {
            self.detour_until = Some(ended + self.detour);
            self.detour = (self.detour * 2).min(DETOUR_MAX);
        } else {
            self.detour = DETOUR_MIN;
        }
        let result = result.map(|n| n as u32).map_err(|e| e.raw_os_error().unwrap_or(libc::EIO));
        flight.settle(result, &self.shared)
    }

    /// Has the helper answer a `Status`; where there is none, everything is data.
    fn ask(&mut self, tag: u64, at: u64, len: u64, extents: Vec<Extent>) {
        let asked = Asked { number: self.questions, tag, at, len, extents };
        self.questions += 1;
        let mailbox = match &self.mailbox {
            Some(mailbox) => Ok(Arc::clone(mailbox)),
            None => Mailbox::new(),
        };
        let sent = mailbox.and_then(|mailbox| {
            self.shared.helper.ask(question(&self.shared, &mailbox, asked.number, at, len))?;
            Ok(mailbox)
        });
        match sent {
            Ok(mailbox) => {
                if self.asked.is_empty() {
                    let poll = self.ring.push(Flight::Poll(Arc::clone(&mailbox)));
                    assert!(poll.is_ok(), "the question that nobody asks the ring has left it a slot");
                }
                self.mailbox = Some(mailbox);
                self.asked.push(asked);
            }
            Err(e) => {
                log::debug!("{}: no thread for block status, so all is data: {e}", self.shared.info.target);
                self.done.push(asked.end(Ok(vec![all_data(at, len)])));
            }
        }
    }
}

/// What the helper does for a `Status`: it looks at the range, and puts the answer into `mailbox`.
fn question(
    shared: &Arc<Shared>,
    mailbox: &Arc<Mailbox>,
    number: u64,
    at: u64,
    len: u64,
) -> impl FnOnce() + Send + 'static {
    let (shared, receiver) = (Arc::clone(shared), Arc::downgrade(mailbox));
    move || {
        // Otherwise the queue is gone.
        let result = (receiver.strong_count() > 0).then(|| {
            let file = shared.handle.open_to_ask().map_err(|e| e.raw_os_error().unwrap_or(libc::EIO));
            file.and_then(|file| extents(&file, at, len))
        });
        shared.helper.is_done();
        // Before the answer: the receiver may close the device and expect the file to be closed.
        drop(shared);
        if let Some((result, mailbox)) = result.zip(receiver.upgrade()) {
            mailbox.put(Answer { number, result });
        }
    }
}

/// Hands out the answers in `mailbox`. Answers to abandoned requests are dropped.
#[cold]
fn collect(mailbox: &Mailbox, asked: &mut Vec<Asked>, done: &mut Vec<Completion>, shared: &Shared) {
    for Answer { number, result } in mailbox.take() {
        let Some(place) = asked.iter().position(|asked| asked.number == number) else { continue };
        let asked = asked.swap_remove(place);
        let result = result.map_err(|errno| {
            shared.failures.report(&shared.info.target, "block status", asked.at, asked.len, errno);
            Error::from_errno(errno)
        });
        done.push(asked.end(result));
    }
}

impl Queue for FileQueue {
    #[inline]
    fn push(&mut self, mut request: Request) -> Result<(), Request> {
        if self.pushed() >= self.depth {
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
                let (at, len, extents) = (*at, *len, std::mem::take(extents));
                self.ask(request.tag, at, len, extents);
                return Ok(());
            }
            _ => 0,
        };
        let inline = self.is_inline(&request.op);
        let mut flight = Moving::new(request, mode);
        if inline && let Some(file) = self.spot.take() {
            let result = self.transfer(&file, flight);
            self.spot = Some(file);
            match result {
                Ok(completion) => {
                    self.done.push(completion);
                    return Ok(());
                }
                // The rest may have to wait, so it is for the kernel's threads.
                Err(rest) => flight = rest,
            }
        }
        match self.ring.push(Flight::Request(flight)) {
            Ok(()) => Ok(()),
            Err(Flight::Request(flight)) => Err(flight.request),
            Err(Flight::Poll(_)) => unreachable!("what comes back is what was pushed"),
        }
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
        let Self { shared, ring, asked, .. } = self;
        ring.reap(|flight, result| match flight {
            Flight::Request(flight) => match flight.settle(result, shared) {
                Ok(completion) => {
                    done.push(completion);
                    None
                }
                Err(flight) => Some(Flight::Request(flight)),
            },
            Flight::Poll(mailbox) => {
                collect(&mailbox, asked, done, shared);
                (!asked.is_empty()).then_some(Flight::Poll(mailbox))
            }
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
            if let Flight::Request(Moving { request: Request { tag, op }, .. }) = flight {
                done.push(Completion { tag, op, result: Err(Error::Gone) });
            }
        });
        // Late answers belong to no request.
        done.extend(self.asked.drain(..).map(|asked| asked.end(Err(Error::Gone))));
    }

    fn is_dead(&self) -> bool {
        self.gone || self.ring.is_broken()
    }
}

impl Drop for FileQueue {
    fn drop(&mut self) {
        // The ring waits for the poll too.
        if let Some(mailbox) = &self.mailbox {
            self.asked.clear();
            mailbox.ring();
        }
        self.shared.queues.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Whether the kernel gave a request back before it did anything. The last two are what becomes of requests whose
/// thread has ended: EFAULT of a read that waited for a page (seen with Linux 6.18), ECANCELED of what waited for a
/// worker thread (older ones). A real EFAULT cannot be, since the memory belongs to a mapping of ours.
fn is_undone(errno: i32) -> bool {
    [libc::EINTR, libc::EAGAIN, libc::EFAULT, libc::ECANCELED].contains(&errno)
}
