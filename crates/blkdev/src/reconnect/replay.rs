//! Makes changes again on a device that was opened again.

use std::{
    io,
    sync::Arc,
    time::{Duration, Instant},
};

use crate::{
    arena::{Arena, PAGE},
    device::{Device, Op, Queue, Request},
    error::Error,
    registration::Registration,
    wake,
};

use super::log::{Change, Kept};

/// Changes sent at a time.
const BATCH: usize = 32;

/// Longest wait for the device if it has no time-out of its own.
const PATIENCE: Duration = Duration::from_secs(30);

/// Interval of looks at a queue without a descriptor, or whose wake-up was swallowed.
const GLANCE: Duration = Duration::from_millis(50);

/// Makes all changes again, in order, and flushes the device.
///
/// # Errors
/// The device failed one of them, or does not answer.
pub(super) fn replay(device: &Arc<dyn Device>, kept: &[Kept]) -> io::Result<()> {
    if kept.is_empty() {
        return Ok(());
    }
    let transfer = device.info().transfer_max as usize;
    let longest = kept.iter().map(|kept| kept.change.range()).map(|(_, len)| len.min(transfer as u64) as usize);
    let len = (longest.max().unwrap_or(0).next_multiple_of(PAGE)).max(1 << 20);
    let memory = device.new_memory(len)?;
    let registration = Registration::new(device, &memory)?;
    let arena = memory.arenas(1).remove(0);
    let timeout = device.info().timeout.unwrap_or(PATIENCE);
    let mut replay = Replay { queue: device.open_queue(BATCH as u16)?, arena, timeout };
    let mut rest = kept;
    while !rest.is_empty() {
        let sent = replay.send(rest)?;
        rest = &rest[sent..];
    }
    replay.run(vec![Op::Flush])?;
    drop(replay);
    drop(registration);
    Ok(())
}

struct Replay {
    // Dropped before the memory that it uses.
    queue: Box<dyn Queue>,
    arena: Arena,
    timeout: Duration,
}

impl Replay {
    /// Makes the first changes that do not overlap, and for which there is memory. Returns how many.
    fn send(&mut self, kept: &[Kept]) -> io::Result<usize> {
        let mut ops = Vec::new();
        let mut ranges: Vec<(u64, u64)> = Vec::new();
        for Kept { change, .. } in kept.iter().take(BATCH) {
            let (at, len) = change.range();
            if ranges.iter().any(|(other, length)| at < other + length && *other < at + len) {
                break;
            }
            let op = match change {
                Change::Write { at, data } => {
                    let Some(mut buf) = self.arena.alloc(data.len()) else { break };
                    data.copy_to(&mut buf);
                    Op::Write { at: *at, buf, fua: false }
                }
                Change::Zero { at, len, unmap } => Op::Zero { at: *at, len: *len, unmap: *unmap },
                Change::Discard { at, len } => Op::Discard { at: *at, len: *len },
            };
            ranges.push((at, len));
            ops.push(op);
        }
        let count = ops.len();
        self.run(ops)?;
        Ok(count)
    }

    /// Carries out operations, and waits for them.
    fn run(&mut self, ops: Vec<Op>) -> io::Result<()> {
        let deadline = Instant::now() + self.timeout;
        let (mut left, mut done) = (ops.len(), Vec::new());
        let mut waiting: Vec<Request> = ops.into_iter().map(|op| Request { tag: 0, op }).rev().collect();
        while left > 0 {
            while let Some(request) = waiting.pop() {
                if let Err(request) = self.queue.push(request) {
                    waiting.push(request);
                    break;
                }
            }
            self.queue.kick();
            self.queue.reap(&mut done);
            for completion in done.drain(..) {
                left -= 1;
                // A device may refuse a hint.
                let is_hint = matches!(completion.op, Op::Discard { .. });
                match completion.result {
                    Err(error) if !is_hint => return Err(failed(&completion.op, error)),
                    _ => {}
                }
            }
            if left > 0 && self.queue.arm() {
                if Instant::now() > deadline {
                    self.queue.give_up();
                    let why = "it does not answer while unflushed changes are made again";
                    return Err(io::Error::new(io::ErrorKind::TimedOut, why));
                }
                match self.queue.wake_fd() {
                    Some(fd) => drop(wake::wait([fd], Some(GLANCE))),
                    None => std::thread::sleep(Duration::from_millis(1)),
                }
            }
        }
        Ok(())
    }
}

fn failed(op: &Op, error: Error) -> io::Error {
    let what = match op {
        Op::Write { at, buf, .. } => format!("a write of {} bytes at {at}", buf.len()),
        Op::Zero { at, len, .. } => format!("a write of {len} zeroes at {at}"),
        _ => "a flush".into(),
    };
    io::Error::other(format!("it failed {what} that must be made again: {error}"))
}
