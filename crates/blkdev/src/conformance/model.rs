//! Random requests, many in flight, checked against the expected content of the device.

use std::{collections::HashMap, ops::Range, sync::LazyLock};

use super::{
    rig::{Rig, wait},
    same,
};
use crate::{
    device::Info,
    extent::{Extent, ExtentKind},
    fault::Rng,
    io::{Done, Io},
    memory::Memory,
};

/// Requests in flight at a time. More than the depth of a queue.
const IN_FLIGHT: usize = 48;

/// One run. It touches only bytes of `range`; `shadow` has their content, before and after.
pub(super) struct Model<'a> {
    pub(super) range: Range<u64>,
    pub(super) shadow: &'a Memory,
    pub(super) keeps_data: bool,
    pub(super) rng: Rng,
}

/// A request in flight. Its range overlaps no other one, unless both only read.
struct Flight {
    at: u64,
    len: u64,
    task: Task,
}

enum Task {
    Read,
    /// Reads the range of a discard: the old content, or zeroes.
    Learn,
    Write(Vec<u8>),
    Zero,
    Discard,
    Status,
    Other,
}

impl Task {
    fn changes(&self) -> bool {
        matches!(self, Self::Learn | Self::Write(_) | Self::Zero | Self::Discard)
    }
}

impl Model<'_> {
    /// Makes `count` requests on random channels, and checks each when it ends.
    pub(super) fn run(mut self, rigs: &mut [Rig], count: usize) {
        let info = rigs[0].channel.info().clone();
        let mut flights: HashMap<(usize, u64), Flight> = HashMap::new();
        // Ranges of discards that were not read yet.
        let mut unlearned: Vec<(usize, Flight)> = Vec::new();
        let mut started = 0;
        while started < count || !flights.is_empty() || !unlearned.is_empty() {
            if let Some((n, flight)) = unlearned.pop() {
                if let Some(buf) = rigs[n].channel.alloc(flight.at, flight.len as usize) {
                    flights.insert((n, rigs[n].submit(Io::Read { at: flight.at, buf })), flight);
                    continue;
                }
                unlearned.push((n, flight));
            }
            let busy = flights.len() + unlearned.len();
            if started < count && busy < IN_FLIGHT && (flights.is_empty() || self.rng.chance(0.9)) {
                let n = self.rng.below(rigs.len() as u64) as usize;
                let others = flights.values().chain(unlearned.iter().map(|(_, flight)| flight));
                if let Some((io, flight)) = self.draw(&mut rigs[n], &info, others) {
                    flights.insert((n, rigs[n].submit(io)), flight);
                    started += 1;
                    continue;
                }
            }
            if flights.is_empty() {
                continue;
            }
            wait(rigs);
            for (n, rig) in rigs.iter_mut().enumerate() {
                for done in rig.done.drain(..) {
                    let flight = flights.remove(&(n, done.tag)).expect("each submitted request ends once");
                    unlearned.extend(self.end(flight, done).map(|flight| (n, flight)));
                }
            }
        }
    }

    /// A random request that does not conflict with those in flight.
    fn draw<'f>(
        &mut self,
        rig: &mut Rig,
        info: &Info,
        mut others: impl Iterator<Item = &'f Flight>,
    ) -> Option<(Io, Flight)> {
        let (at, len) = self.draw_range(info);
        let (unmap, fua, fast) = (self.rng.chance(0.5), self.rng.chance(0.2), false);
        let mut task = match self.rng.below(100) {
            0..35 => Task::Read,
            35..75 => Task::Write(Vec::new()),
            75..87 => Task::Zero,
            87..92 if info.caps.discard => Task::Discard,
            92..95 => Task::Status,
            _ => Task::Other,
        };
        let conflict = |other: &Flight| {
            at < other.at + other.len && other.at < at + len && (other.task.changes() || task.changes())
        };
        if others.any(conflict) {
            return None;
        }
        let io = match &mut task {
            Task::Read | Task::Learn => Io::Read { at, buf: rig.channel.alloc(at, len as usize)? },
            Task::Write(bytes) => {
                let mut buf = rig.channel.alloc(at, len as usize)?;
                *bytes = noise(&mut self.rng, len);
                buf.copy_from(0, bytes);
                Io::Write { at, buf, fua }
            }
            Task::Zero => Io::Zero { at, len, fua, unmap, fast },
            Task::Discard => Io::Discard { at, len, fua },
            Task::Status => Io::Status { at, len, extents: Vec::new() },
            Task::Other if info.caps.prefetch && unmap => Io::Prefetch { at, len },
            Task::Other => Io::Flush,
        };
        Some((io, Flight { at, len, task }))
    }

    fn draw_range(&mut self, info: &Info) -> (u64, u64) {
        let block = u64::from(info.block_size);
        let size = self.range.end - self.range.start;
        let unit = block.max(512);
        let mut len = match self.rng.below(10) {
            0..3 => self.rng.range(1, 3 * unit),
            3..7 => self.rng.range(1, 17) * unit,
            7 => self.rng.range(1, 128 << 10),
            8 => u64::from(info.transfer_max).min(256 << 10) + self.rng.below(2 * unit),
            _ => self.rng.range(1, 65) * unit,
        };
        len = len.min(size);
        let mut at = self.range.start + self.rng.below(size - len + 1);
        if self.rng.chance(0.6) {
            // Whole blocks, if there is room for one.
            at = at / block * block;
            len = (len / block * block).max(block);
            at = at.clamp(self.range.start, self.range.end.saturating_sub(len).max(self.range.start));
        }
        (at, len.min(self.range.end - at))
    }

    /// Checks the result of a request. Returns a read that must follow, if any.
    fn end(&mut self, flight: Flight, done: Done) -> Option<Flight> {
        let Flight { at, len, task } = flight;
        assert_eq!(done.result, Ok(()), "{:?}", done.io);
        match (task, done.io) {
            (Task::Read, Io::Read { at: same_at, buf }) => {
                assert_eq!((same_at, buf.len() as u64), (at, len), "a read ends as it began");
                same(at, &buf.to_vec(), &self.expected(at, len));
            }
            (Task::Learn, Io::Read { buf, .. }) => {
                let found = buf.to_vec();
                old_or_zero(at, &found, &self.expected(at, len));
                self.shadow.write(at, &found);
            }
            (Task::Write(bytes), Io::Write { at: same_at, buf, .. }) => {
                assert_eq!((same_at, buf.len() as u64), (at, len), "a write ends as it began");
                same(at, &buf.to_vec(), &bytes);
                if self.keeps_data {
                    self.shadow.write(at, &bytes);
                }
            }
            (Task::Zero, Io::Zero { .. }) => self.shadow.clear(at, len),
            (Task::Discard, Io::Discard { .. }) => return Some(Flight { at, len, task: Task::Learn }),
            (Task::Status, Io::Status { extents, .. }) => covered(at, len, &extents, self.shadow),
            (Task::Other, _) => {}
            (_, io) => panic!("a request ends as what it began as, not as {io:?}"),
        }
        None
    }

    fn expected(&self, at: u64, len: u64) -> Vec<u8> {
        let mut bytes = vec![0; len as usize];
        self.shadow.read(at, &mut bytes);
        bytes
    }
}

/// Random bytes, quickly: a part of a longer buffer that is filled once, from a random byte on.
pub(super) fn noise(rng: &mut Rng, len: u64) -> Vec<u8> {
    static STRETCH: LazyLock<Vec<u8>> = LazyLock::new(|| {
        let mut bytes = vec![0; (1 << 20) + 7];
        Rng::new(0).fill(&mut bytes);
        bytes
    });
    let mut bytes = Vec::with_capacity(len as usize);
    while bytes.len() < len as usize {
        let start = rng.below(STRETCH.len() as u64) as usize;
        let end = STRETCH.len().min(start + len as usize - bytes.len());
        bytes.extend_from_slice(&STRETCH[start..end]);
    }
    bytes
}

/// After a discard, every byte is as before, or zero.
pub(super) fn old_or_zero(at: u64, found: &[u8], before: &[u8]) {
    const PART: usize = 4096;
    const ZEROES: [u8; PART] = [0; PART];
    for (n, (found, before)) in found.chunks(PART).zip(before.chunks(PART)).enumerate() {
        if found == before || found == &ZEROES[..found.len()] {
            continue;
        }
        let wrong = found.iter().zip(before).position(|(found, before)| *found != 0 && found != before);
        assert_eq!(wrong.map(|k| at + (n * PART + k) as u64), None, "after a discard a byte is as before, or 0");
    }
}

/// Checks an answer to a status: it starts at `at`, has no gaps, ends within the range, and reports no data as a hole or as
/// zeroes.
pub(super) fn covered(at: u64, len: u64, extents: &[Extent], shadow: &Memory) {
    let mut next = at;
    for extent in extents {
        assert!(extent.at == next && extent.len > 0, "extents follow each other, {extent:?} starts at {next}");
        next += extent.len;
        if extent.kind != ExtentKind::Data {
            let mut at = extent.at;
            while at < extent.at + extent.len {
                let mut bytes = vec![0; (extent.at + extent.len - at).min(1 << 20) as usize];
                shadow.read(at, &mut bytes);
                let zeroes = vec![0; bytes.len()];
                assert!(bytes == zeroes, "there is data in {extent:?}, in the {} bytes at {at}", bytes.len());
                at += bytes.len() as u64;
            }
        }
    }
    assert!(next > at && next <= at + len, "an answer about {len} bytes at {at} ends at {next}");
}
