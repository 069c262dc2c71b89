//! [`Counters`] of a channel, written by its owner and read by any thread; and [`Counts`], a copy of them.

use std::{fmt, ops::AddAssign, time::Duration};

use crate::{
    error::Error,
    gauge::Gauge,
    histogram::{Histogram, Latency},
    io::Io,
};

/// The operation of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Operation {
    /// [`Io::Read`]
    Read,
    /// [`Io::Write`]
    Write,
    /// [`Io::Flush`]
    Flush,
    /// [`Io::Zero`]
    Zero,
    /// [`Io::Discard`]
    Discard,
    /// [`Io::Status`]
    Status,
    /// [`Io::Prefetch`]
    Prefetch,
}

impl Operation {
    /// All of them, in the order of [`Counts::operations`].
    pub const ALL: [Self; 7] =
        [Self::Read, Self::Write, Self::Flush, Self::Zero, Self::Discard, Self::Status, Self::Prefetch];

    /// The operation of a request.
    #[inline]
    pub fn of(io: &Io) -> Self {
        match io {
            Io::Read { .. } => Self::Read,
            Io::Write { .. } => Self::Write,
            Io::Flush => Self::Flush,
            Io::Zero { .. } => Self::Zero,
            Io::Discard { .. } => Self::Discard,
            Io::Status { .. } => Self::Status,
            Io::Prefetch { .. } => Self::Prefetch,
        }
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Flush => "flush",
            Self::Zero => "zero",
            Self::Discard => "discard",
            Self::Status => "status",
            Self::Prefetch => "prefetch",
        })
    }
}

/// The counters of a channel.
#[derive(Debug, Default)]
pub struct Counters {
    operations: [Row; Operation::ALL.len()],
    /// See [`Counts`].
    pub(crate) split: Gauge,
    pub(crate) merged: Gauge,
    pub(crate) flushed: Gauge,
    pub(crate) zeroed: Gauge,
    pub(crate) stalls: Gauge,
}

/// One operation.
#[derive(Debug, Default)]
struct Row {
    begun: Gauge,
    bytes: Gauge,
    latency: Histogram,
    errors: [Gauge; Error::ALL.len()],
}

impl Counters {
    #[inline]
    pub(crate) fn begin(&self, operation: Operation) {
        self.operations[operation as usize].begun.add(1);
    }

    /// A request of `len` bytes has ended after `ticks`.
    #[inline]
    pub(crate) fn end(&self, operation: Operation, ticks: u64, len: u64, result: Result<(), Error>) {
        let row = &self.operations[operation as usize];
        row.latency.add(ticks);
        match result {
            Ok(()) => row.bytes.add(len),
            Err(error) => row.errors[error as usize].add(1),
        }
    }

    /// A copy. Requests that begin or end during the call may be counted in part.
    pub fn copy(&self) -> Counts {
        let row = |row: &Row| {
            // In this order, so that no more requests have ended than have begun.
            let latency = row.latency.copy();
            let (begun, bytes) = (row.begun.get().max(latency.count()), row.bytes.get());
            OperationCounts { begun, bytes, errors: row.errors.each_ref().map(Gauge::get), latency }
        };
        Counts {
            operations: self.operations.each_ref().map(row),
            split: self.split.get(),
            merged: self.merged.get(),
            flushed: self.flushed.get(),
            zeroed: self.zeroed.get(),
            stalls: self.stalls.get(),
        }
    }
}

/// The counters of one or several channels. There may be more fields later.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Counts {
    /// Indexed by [`Operation`].
    pub operations: [OperationCounts; Operation::ALL.len()],
    /// Requests that were split because of the limits of the device.
    pub split: u64,
    /// Unaligned requests, for which blocks were read, changed and written back (read-modify-write).
    pub merged: u64,
    /// FUA requests that were completed by a flush, because the device has no FUA.
    pub flushed: u64,
    /// Zero requests that became writes of zeroes, because the device cannot make zeroes.
    pub zeroed: u64,
    /// How often a queue has stalled: it completed nothing within the time-out, and all its requests failed.
    pub stalls: u64,
}

/// One operation of [`Counts`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct OperationCounts {
    /// Requests that have begun.
    pub begun: u64,
    /// Bytes of the requests that have succeeded: read, written, made zero, discarded, asked about or prefetched.
    pub bytes: u64,
    /// Requests that have failed, in the order of [`Error::ALL`].
    pub errors: [u64; Error::ALL.len()],
    /// Time from the turn in which a request was submitted to the turn in which it ended. Includes failed requests.
    pub latency: Latency,
}

impl OperationCounts {
    /// Requests that have ended, with success or not.
    pub fn ended(&self) -> u64 {
        self.latency.count()
    }

    /// Requests that have begun and not ended.
    pub fn in_flight(&self) -> u64 {
        self.begun.saturating_sub(self.ended())
    }

    /// Requests that have failed.
    pub fn failed(&self) -> u64 {
        self.errors.iter().sum()
    }
}

impl Counts {
    /// One operation.
    pub fn of(&self, operation: Operation) -> &OperationCounts {
        &self.operations[operation as usize]
    }
}

impl AddAssign<&Self> for Counts {
    fn add_assign(&mut self, other: &Self) {
        for (sum, more) in self.operations.iter_mut().zip(&other.operations) {
            sum.begun += more.begun;
            sum.bytes += more.bytes;
            sum.latency += &more.latency;
            sum.errors.iter_mut().zip(&more.errors).for_each(|(sum, more)| *sum += more);
        }
        self.split += other.split;
        self.merged += other.merged;
        self.flushed += other.flushed;
        self.zeroed += other.zeroed;
        self.stalls += other.stalls;
    }
}

/// A request that has not ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Pending {
    /// The tag from [`Channel::submit`](crate::Channel::submit).
    pub tag: u64,
    /// The operation.
    pub operation: Operation,
    /// First byte on the device.
    pub at: u64,
    /// Length in bytes.
    pub len: u64,
    /// Time since it was submitted.
    pub age: Duration,
}

#[cfg(test)]
mod tests {
    use std::{sync::Arc, time::Instant};

    use super::*;
    use crate::{
        channel::{Channel, Plan},
        device::Device,
        memory::Memory,
    };

    /// A device of 4 KiB blocks for which a channel must emulate FUA and zeroes.
    fn channel() -> Channel {
        let device: Arc<dyn Device> = Arc::new(Memory::new(1 << 20).with(|info| {
            (info.block_size, info.transfer_max) = (4096, 16384);
            (info.caps.zero, info.caps.fua, info.caps.flush) = (false, false, true);
        }));
        Plan::new(1 << 20).open(&device, 1).unwrap().remove(0)
    }

    fn settle(channel: &mut Channel) {
        while channel.in_flight() > 0 {
            channel.reap(&mut Vec::new());
        }
        channel.reap(&mut Vec::new());
    }

    fn write(channel: &mut Channel, at: u64, len: usize, fua: bool) {
        let buf = channel.alloc(at, len).unwrap();
        channel.submit(1, Io::Write { at, buf, fua });
        settle(channel);
    }

    #[test]
    fn what_a_channel_adds_is_counted() {
        let mut channel = channel();
        write(&mut channel, 0, 4096, false);
        write(&mut channel, 0, 65536, false);
        write(&mut channel, 7, 9, false);
        write(&mut channel, 4096, 4096, true);
        channel.submit(1, Io::Zero { at: 0, len: 8192, fua: false, unmap: false, fast: false });
        settle(&mut channel);
        let counts = channel.counters().copy();
        assert_eq!((counts.split, counts.merged, counts.flushed, counts.zeroed), (1, 1, 1, 1));
        let write = counts.of(Operation::Write);
        assert_eq!((write.begun, write.ended(), write.bytes), (4, 4, 4096 + 65536 + 9 + 4096));
        assert_eq!(counts.of(Operation::Zero).bytes, 8192);
    }

    #[test]
    fn errors_are_counted_by_kind() {
        let mut channel = channel();
        channel.submit(1, Io::Discard { at: 1 << 20, len: 4096, fua: false });
        channel.submit(2, Io::Zero { at: 0, len: 4096, fua: false, unmap: false, fast: true });
        settle(&mut channel);
        let counts = channel.counters().copy();
        let kinds = |operation| {
            let errors = counts.of(operation).errors.iter().zip(Error::ALL).filter(|(count, _)| **count > 0);
            errors.map(|(count, error)| (error, *count)).collect::<Vec<_>>()
        };
        assert_eq!(kinds(Operation::Discard), [(Error::OutOfRange, 1)]);
        assert_eq!(kinds(Operation::Zero), [(Error::NotSupported, 1)]);
        assert_eq!((counts.of(Operation::Zero).ended(), counts.of(Operation::Zero).bytes), (1, 0));
    }

    #[test]
    fn a_latency_runs_from_turn_to_turn() {
        let (mut channel, begin) = (channel(), Instant::now());
        channel.tick(begin);
        let buf = channel.alloc(0, 4096).unwrap();
        channel.submit(5, Io::Read { at: 0, buf });
        let buf = channel.alloc(0, 4096).unwrap();
        // A part of the same request.
        channel.submit_again(6, Io::Read { at: 0, buf });
        channel.tick(begin + Duration::from_millis(3));
        let pending: Vec<Pending> = channel.pending().collect();
        let expected = Pending { tag: 5, operation: Operation::Read, at: 0, len: 4096, age: Duration::from_millis(3) };
        assert_eq!(pending, [expected]);
        assert_eq!(channel.counters().copy().of(Operation::Read).in_flight(), 1);
        settle(&mut channel);
        let counts = channel.counters().copy();
        let read = counts.of(Operation::Read);
        assert_eq!((read.ended(), read.in_flight(), read.latency.sum()), (1, 0, Duration::from_millis(3)));
        let mut twice = counts.clone();
        twice += &counts;
        assert_eq!((twice.of(Operation::Read).bytes, twice.of(Operation::Read).ended()), (8192, 2));
    }
}
