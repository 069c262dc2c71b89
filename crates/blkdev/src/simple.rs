//! A [`Channel`] for simple programs: calls that wait until they are done. Everything else about a channel stays as it is, so
//! they can be mixed with requests in flight.

use std::{io, thread, time::Instant};

use crate::{
    arena::Buf,
    channel::Channel,
    error::Error,
    io::{Done, Io},
    wake::wait,
};

/// The tag of requests of this file. Others may use it too, but then must not mix these calls with requests in flight.
const MINE: u64 = u64::MAX;

/// Bytes of one READ or WRITE, at most.
const PIECE: usize = 1 << 20;

impl Channel {
    /// Waits until at least one request has ended, and appends all that have. Returns at once if none is in flight and none has
    /// ended.
    pub fn wait(&mut self, done: &mut Vec<Done>) {
        let before = done.len();
        loop {
            self.tick(Instant::now());
            self.kick();
            self.reap(done);
            if done.len() > before || self.in_flight() == 0 {
                return;
            }
            if !self.arm() {
                continue;
            }
            let due = self.due();
            let Some(fd) = self.wake_fd() else {
                thread::yield_now();
                continue;
            };
            wait([fd], due);
        }
    }

    /// Reads `bytes` from the device's byte `at` on, and waits until that is done.
    ///
    /// # Errors
    /// [`Error::OutOfRange`], or what the device reports. Then the content of `bytes` is undefined.
    pub fn read_at(&mut self, at: u64, bytes: &mut [u8]) -> io::Result<()> {
        let piece = PIECE.min(self.memory()).max(1);
        for (n, part) in bytes.chunks_mut(piece).enumerate() {
            let at = at.checked_add((n * piece) as u64).ok_or(Error::OutOfRange)?;
            let buf = self.alloc_now(at, part.len())?;
            if let Io::Read { buf, .. } = self.call(Io::Read { at, buf })? {
                buf.copy_to(0, part);
            }
        }
        Ok(())
    }

    /// Writes `bytes` to the device from its byte `at` on, and waits until that is done. They are durable after a
    /// [`flush`](Self::flush).
    ///
    /// # Errors
    /// [`Error::OutOfRange`], [`Error::ReadOnly`], or what the device reports. Then a part of it may have been written.
    pub fn write_at(&mut self, at: u64, bytes: &[u8]) -> io::Result<()> {
        let piece = PIECE.min(self.memory()).max(1);
        for (n, part) in bytes.chunks(piece).enumerate() {
            let at = at.checked_add((n * piece) as u64).ok_or(Error::OutOfRange)?;
            let mut buf = self.alloc_now(at, part.len())?;
            buf.copy_from(0, part);
            self.call(Io::Write { at, buf, fua: false })?;
        }
        Ok(())
    }

    /// Waits until all completed writes are durable.
    ///
    /// # Errors
    /// What the device reports.
    pub fn flush(&mut self) -> io::Result<()> {
        self.call(Io::Flush)?;
        Ok(())
    }

    /// Submits a request, and waits until it is done.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn call(&mut self, io: Io) -> Result<Io, Error> {
        self.submit(MINE, io);
        let mut done = Vec::new();
        loop {
            self.wait(&mut done);
            if let Some(mine) = done.iter().position(|done| done.tag == MINE) {
                let Done { io, result, .. } = done.swap_remove(mine);
                self.put_back(done);
                return result.map(|()| io);
            }
        }
    }

    /// Memory. That of other requests is their owner's to free, so waiting for it here would be waiting forever.
    fn alloc_now(&mut self, at: u64, len: usize) -> io::Result<Buf> {
        let text = "requests in flight hold all payload memory; use a larger Plan::memory";
        self.alloc(at, len).ok_or_else(|| io::Error::new(io::ErrorKind::OutOfMemory, text))
    }
}
