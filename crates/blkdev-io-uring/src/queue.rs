//! [`FileQueue`]: sends requests through a ring, or does them inline if that is cheaper.

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

/// The longest inline transfer, in bytes. Above it, the copy costs more than the hand-over to a kernel worker thread, which can
/// run on another core.
const INLINE_MAX: usize = 64 << 10;

/// An inline transfer that took longer than this had to wait for the disk. A copy takes microseconds, a preemption some
/// milliseconds.
const SLOW: Duration = Duration::from_millis(10);

/// After a [`SLOW`] write, kernel worker threads do all writes for this time; doubled if the next inline write is slow, too.
const DETOUR_MIN: Duration = Duration::from_millis(100);
const DETOUR_MAX: Duration = Duration::from_secs(5);

/// Most retries of a request that the kernel returned undone.
const TRIES_MAX: u8 = 100;

/// One queue of the device: a ring.
#[derive(Debug)]
pub(crate) struct FileQueue {
    /// Dropped before the device: when the device closes its descriptor, the file is really closed.
    ring: Ring<Flight>,
    /// Requests that ended without the ring.
    done: Vec<Completion>,
    depth: usize,
    /// The file, if transfers can be done inline.
    spot: Option<Arc<File>>,
    shared: Arc<Shared>,
    /// No inline writes before this time.
    detour_until: Option<Instant>,
    /// Duration of the next detour, if the next inline write is slow.
    detour: Duration,
    /// Receives the replies for `queries`, once there was a `Status`.
    mailbox: Option<Arc<Mailbox>>,
    /// All `Status` requests without a reply. While there is one, the ring polls the mailbox.
    queries: Vec<Query>,
    /// Number of `Status` requests so far.
    questions: u64,
    gone: bool,
}

/// A `Status` request at the device's helper thread.
#[derive(Debug)]
struct Query {
    number: u64,
    tag: u64,
    at: u64,
    len: u64,
    extents: Vec<Extent>,
}

impl Query {
    fn end(mut self, result: Result<Vec<Extent>, Error>) -> Completion {
        let result = result.map(|found| self.extents = found);
        let Self { tag, at, len, extents, .. } = self;
        Completion { tag, op: Op::Status { at, len, extents }, result }
    }
}

impl Moving {
    /// Translates the kernel's result. `Err`: the rest of the request must be submitted again.
    #[inline]
    fn settle(mut self, result: Result<u32, i32>, shared: &Shared) -> Result<Completion, Self> {
        let end = match (&self.request.op, result) {
            (Op::Read { buf, .. } | Op::Write { buf, .. }, Ok(count)) => {
                self.moved = self.moved.saturating_add(count).min(buf.len() as u32);
                match buf.len() - self.moved as usize {
                    0 => Ok(()),
                    // The file has shrunk, or the disk is smaller than reported.
                    _ if count == 0 => Err(self.failed(0, shared)),
                    _ => return Err(self),
                }
            }
            // The rest of a direct transfer that ended inside a block: the file has shrunk.
            (_, Err(libc::EINVAL)) if self.moved > 0 => Err(self.failed(0, shared)),
            (_, Err(errno)) if is_undone(errno) => {
                if self.tries < TRIES_MAX {
                    self.tries += 1;
                    return Err(self);
                }
                self.failed(errno, shared);
                Err(Error::Io)
            }
            // A file system without ZERO_RANGE (tmpfs): punch a hole, and fill it if the space must stay allocated. If the fill
            // fails, the range still reads as zeroes.
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

    /// Logs an errno and returns the matching error. 0: end of file.
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
        // A removed disk has size 0, and the kernel returns ENOSPC for a write past the end.
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
            return Err(io::Error::new(io::ErrorKind::ResourceBusy, text));
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
            queries: Vec::new(),
            questions: 0,
            gone: false,
        })
    }

    /// Number of requests pushed and not reaped. The poll, which is in the ring while a `Status` is pending, does not count.
    #[inline]
    fn pushed(&self) -> usize {
        self.ring.in_flight() - usize::from(!self.queries.is_empty()) + self.queries.len() + self.done.len()
    }

    fn finish(&mut self, request: Request, result: Result<(), Error>) {
        let Request { tag, op } = request;
        self.done.push(Completion { tag, op, result });
    }

    /// Whether a transfer is cheaper inline.
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

    /// Does a transfer inline. `Err`: a part of it is left.
    fn transfer(&mut self, file: &File, mut flight: Moving) -> Result<Completion, Moving> {
        let started = Instant::now();
        let result = match &mut flight.request.op {
            Op::Read { at, buf } => sys::read(file, *at, buf),
            Op::Write { at, buf, .. } => sys::write(file, *at, buf),
            _ => unreachable!("only transfers are done inline"),
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

    /// Sends a `Status` to the helper thread. If there is none, the whole range counts as data.
    fn ask(&mut self, tag: u64, at: u64, len: u64, extents: Vec<Extent>) {
        let query = Query { number: self.questions, tag, at, len, extents };
        self.questions += 1;
        let mailbox = match &self.mailbox {
            Some(mailbox) => Ok(Arc::clone(mailbox)),
            None => Mailbox::new(),
        };
        let sent = mailbox.and_then(|mailbox| {
            self.shared.helper.ask(question(&self.shared, &mailbox, query.number, at, len))?;
            Ok(mailbox)
        });
        match sent {
            Ok(mailbox) => {
                if self.queries.is_empty() {
                    let poll = self.ring.push(Flight::Poll(Arc::clone(&mailbox)));
                    assert!(poll.is_ok(), "a Status takes no slot of the ring, so there is one for the poll");
                }
                self.mailbox = Some(mailbox);
                self.queries.push(query);
            }
            Err(e) => {
                log::debug!(
                    "{}: cannot start a thread for block status, so all is reported as data: {e}",
                    self.shared.info.target
                );
                self.done.push(query.end(Ok(vec![all_data(at, len)])));
            }
        }
    }
}

/// The helper's work for a `Status`: it queries the range, and puts the reply into `mailbox`.
fn question(
    shared: &Arc<Shared>,
    mailbox: &Arc<Mailbox>,
    number: u64,
    at: u64,
    len: u64,
) -> impl FnOnce() + Send + 'static {
    let (shared, receiver) = (Arc::clone(shared), Arc::downgrade(mailbox));
    move || {
        // Otherwise the queue is closed.
        let result = (receiver.strong_count() > 0).then(|| {
            let file = shared.handle.open_to_ask().map_err(|e| e.raw_os_error().unwrap_or(libc::EIO));
            file.and_then(|file| extents(&file, at, len))
        });
        shared.helper.is_done();
        // Before the reply: the receiver may close the device and expect the file to be closed.
        drop(shared);
        if let Some((result, mailbox)) = result.zip(receiver.upgrade()) {
            mailbox.put(Answer { number, result });
        }
    }
}

/// Completes requests with the replies in `mailbox`. Replies to abandoned requests are dropped.
#[cold]
fn collect(mailbox: &Mailbox, queries: &mut Vec<Query>, done: &mut Vec<Completion>, shared: &Shared) {
    for Answer { number, result } in mailbox.take() {
        let Some(place) = queries.iter().position(|query| query.number == number) else { continue };
        let query = queries.swap_remove(place);
        let result = result.map_err(|errno| {
            shared.failures.report(&shared.info.target, "block status", query.at, query.len, errno);
            Error::from_errno(errno)
        });
        done.push(query.end(result));
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
                // The rest may have to wait, so kernel worker threads do it.
                Err(rest) => flight = rest,
            }
        }
        match self.ring.push(Flight::Request(flight)) {
            Ok(()) => Ok(()),
            Err(Flight::Request(flight)) => Err(flight.request),
            Err(Flight::Poll(_)) => unreachable!("a pushed request comes back"),
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
        let Self { shared, ring, queries, .. } = self;
        ring.reap(|flight, result| match flight {
            Flight::Request(flight) => match flight.settle(result, shared) {
                Ok(completion) => {
                    done.push(completion);
                    None
                }
                Err(flight) => Some(Flight::Request(flight)),
            },
            Flight::Poll(mailbox) => {
                collect(&mailbox, queries, done, shared);
                (!queries.is_empty()).then_some(Flight::Poll(mailbox))
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
            if let Flight::Request(moving) = flight {
                done.push(moving.request.refuse(Error::Gone));
            }
        });
        // Late replies belong to no request.
        done.extend(self.queries.drain(..).map(|query| query.end(Err(Error::Gone))));
    }

    fn describe(&self) -> String {
        format!("ring: {} requests at the kernel, {} block status queries", self.ring.in_flight(), self.queries.len())
    }

    fn is_dead(&self) -> bool {
        self.gone || self.ring.is_broken()
    }
}

impl Drop for FileQueue {
    fn drop(&mut self) {
        // The ring's drop also waits for the poll.
        if let Some(mailbox) = &self.mailbox {
            self.queries.clear();
            mailbox.ring();
        }
        self.shared.queues.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Whether the kernel returned a request before it did anything. The last two errors occur for requests whose thread has ended:
/// EFAULT for a read that waited for a page (seen with Linux 6.18), ECANCELED for requests that waited for a worker thread
/// (older kernels). A real EFAULT is impossible, because the memory belongs to one of our mappings.
fn is_undone(errno: i32) -> bool {
    [libc::EINTR, libc::EAGAIN, libc::EFAULT, libc::ECANCELED].contains(&errno)
}
