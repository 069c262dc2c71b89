//! [`Job`]: a request that the device cannot take unchanged. It goes through stages. Each stage sends pieces to the queue, a few
//! at a time, until its range is done.

use crate::{
    ages::NEVER,
    arena::Buf,
    counters::Operation,
    device::{Info, Op},
    error::Error,
    extent::{self, Extent, ExtentKind},
    io::{Done, Io},
    stamp::Stamp,
};

/// A request that takes more than one step.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) tag: u64,
    /// During the job, a buffer in it is widened to whole blocks.
    io: Io,
    /// The requested range.
    pub(crate) at: u64,
    pub(crate) len: u64,
    pub(crate) way: Way,
    /// It is counted in the gate.
    pub(crate) inside: bool,
    stage: Stage,
    /// The part that the stage has still to send, from here …
    cursor: u64,
    /// … to here: bytes on the device, or numbers of edges.
    end: u64,
    /// Pieces in flight.
    pub(crate) out: u32,
    /// The first error; nothing more is sent after it.
    pub(crate) error: Option<Error>,
    /// A piece came back without its memory, which the device may still access.
    pub(crate) lost: bool,
    /// The device has refused to make zeroes.
    refused: bool,
    pub(crate) born: u32,
    pub(crate) since: Stamp,
    pub(crate) marks: Marks,
}

/// The extra work that a job has caused so far, for the counters.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Marks {
    pub(crate) split: bool,
    pub(crate) flushed: bool,
    pub(crate) zeroed: bool,
}

/// How a job passes the gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// It changes nothing.
    Free,
    /// It changes whole blocks only.
    Shared,
    /// It merges into blocks, and needs exclusive use of the device.
    Alone,
}

/// A stage of a job. Each job goes through some of them, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Reading the blocks that a write covers in part.
    Merge,
    /// The request itself, on whole blocks.
    Main,
    /// Writing zeroes, because the device cannot make them.
    Zeroes,
    /// Reading the blocks that a zero request covers in part.
    EdgesIn,
    /// Writing them back.
    EdgesOut,
    /// Making the changes durable.
    Flush,
}

impl Job {
    /// `Err`: the request has ended already. (Boxed, because that is rare.)
    pub(crate) fn new(tag: u64, since: Stamp, mut io: Io, info: &Info) -> Result<Self, Box<Done>> {
        let (at, len) = match &mut io {
            Io::Read { at, buf } | Io::Write { at, buf, .. } => {
                let len = buf.len() as u64;
                let (before, after) = margins(*at, len, info.block_size);
                if !buf.widen(before, after) {
                    return Err(Box::new(Done { tag, io, result: Err(Error::Invalid) }));
                }
                (*at, len)
            }
            Io::Status { at, len, extents } => {
                if !info.caps.status {
                    extents.push(Extent { at: *at, len: *len, kind: ExtentKind::Data });
                    return Err(Box::new(Done { tag, io, result: Ok(()) }));
                }
                (*at, *len)
            }
            Io::Zero { at, len, .. } | Io::Discard { at, len, .. } | Io::Prefetch { at, len } => (*at, *len),
            Io::Flush => (0, 1),
        };
        let partial = edges(at, len, info.block_size).count > 0;
        let (way, stage) = match &io {
            Io::Read { .. } | Io::Status { .. } | Io::Prefetch { .. } | Io::Flush => (Way::Free, Stage::Main),
            Io::Discard { .. } => (Way::Shared, Stage::Main),
            Io::Write { .. } if partial => (Way::Alone, Stage::Merge),
            Io::Write { .. } => (Way::Shared, Stage::Main),
            Io::Zero { .. } => {
                let way = if partial { Way::Alone } else { Way::Shared };
                (way, if info.caps.zero { Stage::Main } else { Stage::Zeroes })
            }
        };
        let (cursor, end, out, error, inside, refused, born) = (0, 0, 0, None, false, false, NEVER);
        let (lost, marks) = (false, Marks::default());
        let mut job =
            Self { tag, io, at, len, way, inside, stage, cursor, end, out, error, lost, refused, born, since, marks };
        job.enter(stage, info);
        Ok(job)
    }

    /// Enters a stage, at its start.
    fn enter(&mut self, stage: Stage, info: &Info) {
        self.stage = stage;
        self.marks.zeroed |= stage == Stage::Zeroes;
        self.marks.flushed |= stage == Stage::Flush;
        (self.cursor, self.end) = match stage {
            Stage::Main | Stage::Zeroes => self.blocks(info),
            Stage::Merge | Stage::EdgesIn | Stage::EdgesOut => (0, edges(self.at, self.len, info.block_size).count),
            Stage::Flush => (0, 1),
        };
    }

    /// The whole blocks that the request uses: around its range if it reads or merges, inside its range if it must not touch
    /// more.
    fn blocks(&self, info: &Info) -> (u64, u64) {
        let (at, end) = (self.at, self.at + self.len);
        let block = match &self.io {
            Io::Discard { .. } => u64::from(info.discard_alignment.max(info.block_size)),
            _ => u64::from(info.block_size),
        };
        match &self.io {
            Io::Zero { .. } | Io::Discard { .. } => {
                let end = end / block * block;
                (at.next_multiple_of(block).min(end), end)
            }
            _ => (at / block * block, end.next_multiple_of(block)),
        }
    }

    /// Returns the next request to the queue, if the stage has one.
    pub(crate) fn piece(&mut self, info: &Info, zeroes: &Buf, scratch: &Buf) -> Option<Op> {
        if self.cursor >= self.end {
            return None;
        }
        let (at, left) = (self.cursor, self.end - self.cursor);
        let block = u64::from(info.block_size);
        let (op, step) = match (self.stage, &mut self.io) {
            (Stage::Merge | Stage::EdgesIn | Stage::EdgesOut | Stage::Zeroes, _)
                if scratch.is_empty() || zeroes.is_empty() =>
            {
                // Lost at a device that was declared dead.
                self.error = Some(Error::Gone);
                return None;
            }
            (Stage::Merge | Stage::EdgesIn | Stage::EdgesOut, _) => {
                let buf = scratch.lend((at * block) as usize, block as usize);
                let at = edges(self.at, self.len, info.block_size).starts[at as usize];
                let out = self.stage == Stage::EdgesOut;
                (if out { Op::Write { at, buf, fua: false } } else { Op::Read { at, buf } }, 1)
            }
            (Stage::Zeroes, _) => {
                let len = left.min(zeroes.len() as u64);
                (Op::Write { at, buf: zeroes.lend(0, len as usize), fua: false }, len)
            }
            (Stage::Flush, _) | (_, Io::Flush) => (Op::Flush, 1),
            (Stage::Main, Io::Read { buf, .. }) => {
                let (from, len) = (at - self.at / block * block, left.min(info.transfer_max.into()));
                (Op::Read { at, buf: buf.lend(from as usize, len as usize) }, len)
            }
            (Stage::Main, Io::Write { buf, fua, .. }) => {
                let (from, len) = (at - self.at / block * block, left.min(info.transfer_max.into()));
                let fua = *fua && info.caps.fua;
                (Op::Write { at, buf: buf.lend(from as usize, len as usize), fua }, len)
            }
            (Stage::Main, Io::Zero { unmap, .. }) => {
                let len = left.min(info.zero_max);
                (Op::Zero { at, len, unmap: *unmap }, len)
            }
            (Stage::Main, Io::Discard { .. }) => {
                let len = left.min(info.discard_max);
                (Op::Discard { at, len }, len)
            }
            (Stage::Main, Io::Status { extents, .. }) => {
                (Op::Status { at, len: left, extents: std::mem::take(extents) }, left)
            }
            (Stage::Main, Io::Prefetch { .. }) => (Op::Prefetch { at, len: left }, left),
        };
        self.marks.split |= step < left && matches!(self.stage, Stage::Main | Stage::Zeroes);
        self.cursor += step;
        Some(op)
    }

    /// Whether a piece of the present stage can be such an operation.
    pub(crate) fn awaits(&self, op: &Op) -> bool {
        match (self.stage, &self.io) {
            (Stage::Merge | Stage::EdgesIn, _) | (Stage::Main, Io::Read { .. }) => matches!(op, Op::Read { .. }),
            (Stage::EdgesOut | Stage::Zeroes, _) | (Stage::Main, Io::Write { .. }) => matches!(op, Op::Write { .. }),
            (Stage::Flush, _) | (_, Io::Flush) => matches!(op, Op::Flush),
            (Stage::Main, Io::Zero { .. }) => matches!(op, Op::Zero { .. }),
            (Stage::Main, Io::Discard { .. }) => matches!(op, Op::Discard { .. }),
            (Stage::Main, Io::Status { .. }) => matches!(op, Op::Status { .. }),
            (Stage::Main, Io::Prefetch { .. }) => matches!(op, Op::Prefetch { .. }),
        }
    }

    /// Takes back a piece. `true`: it came back without its memory, which the device may still access.
    pub(crate) fn take_back(&mut self, op: Op, result: Result<(), Error>) -> bool {
        let lost = op.has_lost_memory();
        self.lost |= lost;
        match op {
            Op::Read { .. } | Op::Write { .. } if lost => self.error = self.error.or(Some(Error::Gone)),
            Op::Status { extents: found, .. } => {
                if let Io::Status { extents, .. } = &mut self.io {
                    *extents = clip(&found, self.at, self.at + self.len);
                    if extents.is_empty() {
                        // The device returned nothing about the range; data is always a safe answer.
                        extents.push(Extent { at: self.at, len: self.len, kind: ExtentKind::Data });
                    }
                }
            }
            _ => {}
        }
        match (result, &self.io, self.stage) {
            (Ok(()), ..) => {}
            (Err(Error::NotSupported), Io::Zero { .. }, Stage::Main) => {
                self.refused = true;
                self.cursor = self.end;
            }
            // A device may refuse a hint: this is not an error.
            (Err(Error::NotSupported), Io::Discard { .. }, Stage::Main) => self.cursor = self.end,
            (Err(error), ..) => self.error = self.error.or(Some(error)),
        }
        lost
    }

    pub(crate) fn operation(&self) -> Operation {
        Operation::of(&self.io)
    }

    /// Whether its pieces use the channel's buffer for edges.
    pub(crate) fn uses_edges(&self) -> bool {
        matches!(self.stage, Stage::Merge | Stage::EdgesIn | Stage::EdgesOut)
    }

    /// Takes the memory out of a job that has [lost](Self::lost) some, when no piece is out any more.
    pub(crate) fn take_lost(&mut self) -> Option<Buf> {
        match &mut self.io {
            Io::Read { buf, .. } | Io::Write { buf, .. } if self.lost => Some(buf.take()),
            _ => None,
        }
    }

    /// Whether its present stage only reads.
    pub(crate) fn reads(&self) -> bool {
        matches!(self.stage, Stage::Merge | Stage::EdgesIn) || matches!(self.io, Io::Read { .. })
    }

    /// Starts its present stage again, which [only reads](Self::reads). Its data goes to `fresh`; what it has
    /// [lost](Self::lost) is abandoned.
    pub(crate) fn restart(&mut self, mut fresh: Buf, info: &Info) {
        if let Io::Read { at, buf } = &mut self.io {
            let (before, after) = margins(*at, self.len, info.block_size);
            // It was allocated for that.
            fresh.widen(before, after);
            std::mem::replace(buf, fresh).abandon();
        }
        (self.lost, self.error) = (false, None);
        self.enter(self.stage, info);
    }

    /// Enters the next stage; all pieces of the present one have succeeded. `false`: the job is over.
    pub(crate) fn next_stage(&mut self, info: &Info, scratch: &mut Buf) -> bool {
        let zero = matches!(self.io, Io::Zero { .. });
        let next = match self.stage {
            Stage::Merge => {
                self.merge(info, scratch);
                Some(Stage::Main)
            }
            Stage::Main if std::mem::take(&mut self.refused) => {
                if matches!(self.io, Io::Zero { fast: true, .. }) {
                    self.error = Some(Error::NotSupported);
                    return false;
                }
                Some(Stage::Zeroes)
            }
            Stage::Main | Stage::Zeroes if zero && self.way == Way::Alone => Some(Stage::EdgesIn),
            Stage::EdgesIn => {
                self.zero_edges(info, scratch);
                Some(Stage::EdgesOut)
            }
            Stage::Main | Stage::Zeroes | Stage::EdgesOut => self.needs_flush(info).then_some(Stage::Flush),
            Stage::Flush => None,
        };
        if let Some(stage) = next {
            self.enter(stage, info);
        }
        next.is_some()
    }

    /// Copies the data around a write into its margins, so that whole blocks can be written.
    fn merge(&mut self, info: &Info, scratch: &Buf) {
        let Io::Write { buf, .. } = &mut self.io else { unreachable!("only writes are merged") };
        let (before, after) = margins(self.at, self.len, info.block_size);
        buf.copy_buf(0, scratch, 0, before);
        // The last edge. For a write within one block, it is also the first.
        let end = (edges(self.at, self.len, info.block_size).count * u64::from(info.block_size)) as usize;
        buf.copy_buf(buf.len() - after, scratch, end - after, after);
    }

    /// Clears the requested part of each edge.
    fn zero_edges(&self, info: &Info, scratch: &mut Buf) {
        let block = u64::from(info.block_size);
        let edges = edges(self.at, self.len, info.block_size);
        for n in 0..edges.count {
            let start = edges.starts[n as usize];
            let (from, to) = (self.at.max(start), (self.at + self.len).min(start + block));
            scratch.zero((n * block + from - start) as usize, (to - from) as usize);
        }
    }

    /// Whether the changes need a flush to be durable.
    fn needs_flush(&self, info: &Info) -> bool {
        let fua = match self.io {
            Io::Write { fua, .. } => fua && !info.caps.fua,
            Io::Zero { fua, .. } | Io::Discard { fua, .. } => fua,
            _ => false,
        };
        fua && info.caps.flush
    }

    /// Returns the result for its owner if the device does not answer in time. The memory stays with the job.
    pub(crate) fn overdue(&mut self, empty: Buf) -> Done {
        let io = match &mut self.io {
            Io::Read { at, .. } => Io::Read { at: *at, buf: empty },
            Io::Write { at, fua, .. } => Io::Write { at: *at, buf: empty, fua: *fua },
            io => std::mem::replace(io, Io::Flush),
        };
        Done { tag: self.tag, io, result: Err(Error::Gone) }
    }

    /// Payload memory in use, in bytes.
    pub(crate) fn held(&self) -> u64 {
        match &self.io {
            Io::Read { buf, .. } | Io::Write { buf, .. } => buf.len() as u64,
            _ => 0,
        }
    }

    /// The whole blocks that it may still change: first byte and length.
    pub(crate) fn changes(&self, block_size: u32) -> Option<(u64, u64)> {
        if matches!(self.io, Io::Read { .. } | Io::Status { .. } | Io::Prefetch { .. } | Io::Flush) {
            return None;
        }
        let (before, after) = margins(self.at, self.len, block_size);
        Some((self.at - before as u64, self.len + before as u64 + after as u64))
    }

    pub(crate) fn done(mut self, block_size: u32) -> Done {
        if let Io::Read { buf, .. } | Io::Write { buf, .. } = &mut self.io
            && !buf.is_empty()
        {
            let (before, after) = margins(self.at, self.len, block_size);
            buf.narrow(before, after);
        }
        Done { tag: self.tag, io: self.io, result: self.error.map_or(Ok(()), Err) }
    }
}

/// Bytes from the start of the first block to `at`, and from the end of the range to the end of its last block.
#[inline]
pub(crate) fn margins(at: u64, len: u64, block_size: u32) -> (usize, usize) {
    let mask = u64::from(block_size) - 1;
    ((at & mask) as usize, (at.wrapping_add(len).wrapping_neg() & mask) as usize)
}

/// The blocks that a range covers only in part: at most its first and its last.
struct Edges {
    starts: [u64; 2],
    count: u64,
}

fn edges(at: u64, len: u64, block_size: u32) -> Edges {
    let block = u64::from(block_size);
    let (head, tail) = (at / block * block, (at + len) / block * block);
    match (head != at, tail != at + len) {
        (true, true) if head != tail => Edges { starts: [head, tail], count: 2 },
        (true, _) => Edges { starts: [head, 0], count: 1 },
        (false, true) => Edges { starts: [tail, 0], count: 1 },
        (false, false) => Edges { starts: [0, 0], count: 0 },
    }
}

/// Returns the part of an answer that lies within the range.
fn clip(found: &[Extent], at: u64, end: u64) -> Vec<Extent> {
    let mut extents = Vec::with_capacity(found.len());
    for e in found {
        let (from, to) = (e.at.max(at), e.at.saturating_add(e.len).min(end));
        if from < to {
            extent::append(&mut extents, Extent { at: from, len: to - from, kind: e.kind });
        }
    }
    extents
}
