//! A channel with helpers for tests: tags, waiting, and a clear message if something does not end.

use std::{
    os::fd::BorrowedFd,
    time::{Duration, Instant},
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::{
    arena::Buf,
    channel::Channel,
    io::{Done, Io},
};

/// Time after which the suite considers a request lost.
pub(super) const PATIENCE: Duration = Duration::from_secs(30);

/// A channel, and its requests.
pub(super) struct Rig {
    pub(super) channel: Channel,
    pub(super) done: Vec<Done>,
    /// Requests that were submitted, and are not in `done` yet.
    pub(super) missing: usize,
    tag: u64,
    free: usize,
}

impl Rig {
    pub(super) fn new(channel: Channel) -> Self {
        Self { free: channel.memory_free(), channel, done: Vec::new(), missing: 0, tag: 0 }
    }

    /// Submits a request, and returns its tag.
    pub(super) fn submit(&mut self, io: Io) -> u64 {
        self.tag += 1;
        self.missing += 1;
        self.channel.submit(self.tag, io);
        self.tag
    }

    /// Waits until all submitted requests have ended.
    pub(super) fn finish(&mut self) -> Vec<Done> {
        while self.missing > 0 {
            wait(std::slice::from_mut(self));
        }
        std::mem::take(&mut self.done)
    }

    /// Submits a request and waits for its end. No other request is in flight.
    pub(super) fn one(&mut self, io: Io) -> Done {
        let tag = self.submit(io);
        let mut done = self.finish();
        assert!(done.len() == 1 && done[0].tag == tag, "request {tag} ends once, and nothing else: {done:?}");
        done.remove(0)
    }

    /// As [`one`](Self::one), which must succeed.
    pub(super) fn ok(&mut self, io: Io) -> Io {
        let asked = format!("{io:?}");
        let done = self.one(io);
        assert_eq!(done.result, Ok(()), "{asked}");
        done.io
    }

    /// Returns a buffer, as soon as there is room for it. Buffers in `done` take room too.
    pub(super) fn buf(&mut self, at: u64, len: u64) -> Buf {
        loop {
            if let Some(buf) = self.channel.alloc(at, len as usize) {
                return buf;
            }
            assert!(self.missing > 0, "{len} bytes can be had while nothing is in flight");
            wait(std::slice::from_mut(self));
        }
    }

    pub(super) fn write_of(&mut self, at: u64, bytes: &[u8], fua: bool) -> Io {
        let mut buf = self.buf(at, bytes.len() as u64);
        buf.copy_from(0, bytes);
        Io::Write { at, buf, fua }
    }

    pub(super) fn read_of(&mut self, at: u64, len: u64) -> Io {
        Io::Read { at, buf: self.buf(at, len) }
    }

    /// Writes, in one request if it is not too long for the channel's memory.
    pub(super) fn write(&mut self, mut at: u64, bytes: &[u8]) {
        for part in bytes.chunks(self.longest()) {
            let io = self.write_of(at, part, false);
            self.ok(io);
            at += part.len() as u64;
        }
    }

    /// Reads, in one request if it is not too long for the channel's memory.
    pub(super) fn read(&mut self, at: u64, len: u64) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(len as usize);
        while bytes.len() < len as usize {
            let at = at + bytes.len() as u64;
            let step = (len - bytes.len() as u64).min(self.longest() as u64);
            let io = self.read_of(at, step);
            let Io::Read { buf, .. } = self.ok(io) else { panic!("a read ends as a read") };
            assert_eq!(buf.len() as u64, step, "a read ends with its own buffer");
            bytes.extend(buf.to_vec());
        }
        bytes
    }

    /// The longest request that always gets memory when the channel is idle.
    pub(super) fn longest(&self) -> usize {
        self.channel.memory() - 2 * self.channel.info().block_size as usize
    }

    /// Checks that after a step nothing is in flight and all memory is free.
    pub(super) fn settled(&self) {
        assert_eq!((self.missing, self.done.len(), self.channel.in_flight()), (0, 0, 0), "nothing is left over");
        assert_eq!(self.channel.memory_free(), self.free, "all memory is back");
    }
}

/// Waits until another request of any rig has ended. Sleeps as a server does, so that a missing wake-up is found.
pub(super) fn wait(rigs: &mut [Rig]) {
    let started = Instant::now();
    let done_by = |rigs: &[Rig]| rigs.iter().map(|rig| rig.done.len()).sum::<usize>();
    let before = done_by(rigs);
    loop {
        for rig in &mut *rigs {
            turn(rig);
        }
        if done_by(rigs) > before {
            return;
        }
        let missing: usize = rigs.iter().map(|rig| rig.missing).sum();
        assert!(missing > 0, "there is something to wait for");
        assert!(started.elapsed() < PATIENCE, "{missing} requests do not end within {PATIENCE:?}");
        if !rigs.iter_mut().all(|rig| rig.missing == 0 || rig.channel.arm()) {
            std::thread::yield_now();
            continue;
        }
        let waiting = || rigs.iter().filter(|rig| rig.missing > 0);
        if waiting().any(|rig| rig.channel.wake_fd().is_none()) {
            std::thread::yield_now();
            continue;
        }
        let due = waiting().filter_map(|rig| rig.channel.due()).min();
        let fds: Vec<_> = waiting().filter_map(|rig| rig.channel.wake_fd()).collect();
        if !readable(&fds, due.unwrap_or(PATIENCE)) && due.is_none() {
            rigs.iter_mut().for_each(turn);
            let done = done_by(rigs) - before;
            panic!("no wake-up within {PATIENCE:?}, although armed, for {missing} requests, {done} of them done");
        }
    }
}

fn turn(rig: &mut Rig) {
    rig.channel.tick(Instant::now());
    rig.channel.kick();
    let before = rig.done.len();
    rig.channel.reap(&mut rig.done);
    let ended = rig.done.len() - before;
    assert!(ended <= rig.missing, "each request ends once: {:?}", &rig.done[before..]);
    rig.missing -= ended;
}

/// Whether one of them becomes readable in time.
pub(super) fn readable(fds: &[BorrowedFd<'_>], time: Duration) -> bool {
    let mut fds: Vec<_> = fds.iter().map(|fd| PollFd::new(*fd, PollFlags::POLLIN)).collect();
    // Rounded up, so that a wait of less than a millisecond is not a busy loop.
    let time = PollTimeout::try_from(time + Duration::from_micros(999)).unwrap_or(PollTimeout::MAX);
    poll(&mut fds, time).expect("poll") > 0
}
