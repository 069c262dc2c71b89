//! [`Ledger`]: what the client asked for, what the device did, and so which results are right.

use std::{
    collections::BTreeMap,
    ops::Range,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use super::dma::Dma;
use crate::{
    device::{Completion, Op},
    error::Error,
};

/// The unit of the disk's content, in bytes.
const SECTOR: usize = 512;

/// What a request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Fills memory from the disk.
    Read,
    /// Writes memory to the disk.
    Write,
    /// Makes a range read as zeroes.
    Zero,
    /// Hints that a range is not needed.
    Discard,
    /// Makes writes durable.
    Flush,
}

/// Both sides' view of the requests in flight, and the content of the disk. Client and device share it.
#[derive(Debug, Default)]
pub struct Ledger(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    flights: Vec<Flight>,
    /// Sectors that were written.
    disk: BTreeMap<u64, Sector>,
    /// The content of the last write, as the device read it.
    found: Vec<u8>,
    /// Memory that a dead device may still access.
    doomed: Vec<Range<u64>>,
    lies: bool,
    cut_off: bool,
    /// The device was reset, or has aborted a request: the driver may send requests again, or fail them, in its own time.
    was_reset: bool,
    /// Block size that the driver relies on, as a power of two.
    block_shift: Option<u32>,
}

/// The content of a sector.
#[derive(Debug)]
enum Sector {
    Zero,
    /// Sector `at` of a write with this content.
    Written {
        bytes: Arc<[u8]>,
        at: usize,
    },
}

impl Sector {
    fn content(&self) -> &[u8] {
        match self {
            Self::Zero => &[0; SECTOR],
            Self::Written { bytes, at } => &bytes[at * SECTOR..][..SECTOR],
        }
    }
}

#[derive(Debug)]
pub(super) struct Flight {
    pub(super) queue: u32,
    pub(super) tag: u64,
    pub(super) kind: Kind,
    pub(super) at: u64,
    pub(super) len: u64,
    pub(super) memory: Range<u64>,
    /// The content of a write.
    pub(super) bytes: Arc<[u8]>,
    /// The device was dead, so the driver may return the memory at once.
    pub(super) too_late: bool,
    /// The device has received it.
    pub(super) taken: bool,
    pub(super) answer: Option<Answer>,
}

/// A device's answer to a request.
#[derive(Debug)]
pub(super) enum Answer {
    /// Success, with this content of a read.
    Right(Vec<u8>),
    /// An answer that may end in success or in an error.
    Any,
}

impl Ledger {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The device from now on violates its protocol such that no result can be predicted: the driver may take any request as
    /// answered, and may read any garbage as a request.
    pub fn lie(&self) {
        self.state().lies = true;
    }

    /// Whether [`lie`](Self::lie) was called.
    pub fn lies(&self) -> bool {
        self.state().lies
    }

    /// The driver has declared the device dead. The device may still find requests that the client has back.
    pub fn cut_off(&self) {
        self.state().cut_off = true;
    }

    /// Whether the driver has declared the device dead.
    pub fn is_cut_off(&self) -> bool {
        self.state().cut_off
    }

    /// The device has received a request with these pieces of memory. Returns the tag of the client's request; `None`: there is
    /// none, after a [`lie`](Self::lie) or a [`cut_off`](Self::cut_off).
    ///
    /// # Panics
    /// If the client did not make this request, or the device has received it already.
    pub fn take(&self, kind: Kind, at: u64, len: u64, pieces: &[(u64, u64)]) -> Option<u64> {
        let mut state = self.state();
        let start = pieces.first().map_or(0, |piece| piece.0);
        let has_memory = matches!(kind, Kind::Read | Kind::Write);
        let is_it = |flight: &&mut Flight| {
            (flight.kind, flight.at, flight.len, flight.taken) == (kind, at, len, false)
                && (!has_memory || flight.memory.start == start)
        };
        let lies = state.lies;
        let Some(flight) = state.flights.iter_mut().find(is_it) else {
            assert!(
                lies || state.cut_off,
                "the driver sent a request that its client did not make: {kind:?} of {len} bytes at {at}"
            );
            return None;
        };
        if has_memory && !lies {
            let end = pieces.iter().fold(start, |end, (at, len)| {
                assert_eq!(*at, end, "the pieces of a request are those of its memory: {pieces:?}");
                end + len
            });
            assert_eq!(end, flight.memory.end, "a request has all of its memory: {pieces:?}");
        }
        flight.taken = true;
        Some(flight.tag)
    }

    /// The device forgets the requests that it has received and not answered: a reset. The driver may send them again, or fail
    /// them.
    pub fn reset(&self) {
        let mut state = self.state();
        state.was_reset = true;
        for flight in &mut state.flights {
            flight.taken &= flight.answer.is_some();
        }
    }

    /// The block size that the driver relies on, as a power of two, once it is open.
    pub fn block_shift(&self) -> Option<u32> {
        self.state().block_shift
    }

    pub(super) fn open(&self, block_size: u32) {
        self.state().block_shift = Some(block_size.trailing_zeros());
    }

    /// Whether a request that the device has answered need not complete at the next look.
    pub(super) fn may_wait(&self) -> bool {
        let state = self.state();
        state.lies || state.was_reset
    }

    /// Executes a request correctly: moves its data and records its result.
    ///
    /// # Panics
    /// If the memory of the request is not registered, or the content of a write is wrong.
    pub fn execute(&self, tag: u64, dma: &Dma) {
        let mut state = self.state();
        let State { flights, disk, found, lies, .. } = &mut *state;
        // Of a queue that was closed, the device is late.
        let Some(flight) = flights.iter_mut().find(|flight| flight.tag == tag) else { return };
        let sectors = flight.at / SECTOR as u64..(flight.at + flight.len) / SECTOR as u64;
        let mut data = Vec::new();
        match flight.kind {
            Kind::Read => {
                data.reserve(flight.len as usize);
                for n in sectors {
                    match disk.get(&n) {
                        Some(sector) => data.extend_from_slice(sector.content()),
                        None => data.extend_from_slice(&unwritten(n)),
                    }
                }
                assert!(dma.write(flight.memory.start, &data) || *lies, "the memory of a read is registered");
            }
            Kind::Write => {
                found.resize(flight.len as usize, 0);
                assert!(dma.read(flight.memory.start, found) || *lies, "the memory of a write is registered");
                let is_same = found[..] == flight.bytes[..];
                assert!(is_same || *lies, "the memory of a write keeps its content");
                let bytes = if is_same { Arc::clone(&flight.bytes) } else { found[..].into() };
                disk.extend(sectors.zip(0..).map(|(n, at)| (n, Sector::Written { bytes: Arc::clone(&bytes), at })));
            }
            // A model need not remember more than a client reads.
            Kind::Zero => disk.extend(sectors.take(64).map(|n| (n, Sector::Zero))),
            Kind::Discard | Kind::Flush => {}
        }
        let is_short = flight.kind == Kind::Zero && flight.len > 64 * SECTOR as u64;
        flight.answer = Some(if is_short { Answer::Any } else { Answer::Right(data) });
    }

    /// The device has answered a request in a way that may end in success or in an error.
    pub fn answer(&self, tag: u64) {
        if let Some(flight) = self.state().flights.iter_mut().find(|flight| flight.tag == tag) {
            flight.answer = Some(Answer::Any);
        }
    }

    /// The driver made the device abort a request, on a thread of its own. So the client may look just before that.
    pub fn abort(&self, tag: u64) {
        self.state().was_reset = true;
        self.answer(tag);
    }

    /// The device has not answered a request after all.
    pub fn unanswer(&self, tag: Option<u64>) {
        if let Some(flight) = self.state().flights.iter_mut().find(|flight| Some(flight.tag) == tag) {
            flight.answer = None;
        }
    }

    /// Whether the client has no request in flight. So a request that the device receives is one of the driver's own.
    pub fn is_idle(&self) -> bool {
        self.state().flights.is_empty()
    }

    /// Whether another queue has a request in flight that looks the same to the device.
    pub(super) fn has_twin(&self, new: &Flight) -> bool {
        let looks = |flight: &Flight| (flight.kind, flight.at, flight.len, flight.memory.start);
        self.state().flights.iter().any(|flight| flight.queue != new.queue && looks(flight) == looks(new))
    }

    pub(super) fn push(&self, flight: Flight) {
        self.state().flights.push(flight);
    }

    /// The queue was full.
    pub(super) fn unpush(&self) {
        self.state().flights.pop();
    }

    /// The device died during the last push.
    pub(super) fn push_was_too_late(&self, tag: u64) {
        if let Some(flight) = self.state().flights.iter_mut().find(|flight| flight.tag == tag) {
            flight.too_late = true;
        }
    }

    /// Number of requests of a queue that are in flight, and of those that the device has answered.
    pub(super) fn in_flight(&self, queue: u32) -> (usize, usize) {
        let state = self.state();
        let mine = || state.flights.iter().filter(|flight| flight.queue == queue);
        (mine().count(), mine().filter(|flight| flight.answer.is_some()).count())
    }

    /// Checks a completion of a queue.
    pub(super) fn complete(&self, queue: u32, completion: &Completion) {
        let mut state = self.state();
        let found = state.flights.iter().position(|f| f.tag == completion.tag && f.queue == queue);
        let flight = state.flights.remove(found.expect("a request completes once, on its queue"));
        let (kind, at, memory) = match &completion.op {
            Op::Read { at, buf } => (Kind::Read, *at, Some(buf)),
            Op::Write { at, buf, .. } => (Kind::Write, *at, Some(buf)),
            Op::Zero { at, .. } => (Kind::Zero, *at, None),
            Op::Discard { at, .. } => (Kind::Discard, *at, None),
            Op::Flush => (Kind::Flush, 0, None),
            op => panic!("no client asked for {op:?}"),
        };
        assert_eq!((kind, at), (flight.kind, flight.at), "a request ends as it began");
        let is_abandoned = memory.is_some_and(|buf| buf.is_empty());
        if let Some(buf) = memory.filter(|_| !is_abandoned) {
            assert_eq!((buf.iova().get(), buf.len() as u64), (flight.memory.start, flight.len), "it has its memory");
        }
        if completion.result == Err(Error::Gone) {
            // A device that has answered the request no longer uses its memory, whatever the answer is.
            let must_abandon = memory.is_some() && !flight.too_late && flight.answer.is_none();
            assert!(is_abandoned || !must_abandon, "memory of a dead device is returned for reuse: {flight:?}");
            state.doomed.extend(Some(flight.memory).filter(|_| is_abandoned));
            return;
        }
        assert!(!is_abandoned, "memory is abandoned although the device is alive: {:?}", completion.result);
        match (&flight.answer, completion.result) {
            _ if state.lies => {}
            (None, Err(_)) if state.was_reset => {}
            (None, result) => panic!("{result:?}, but the device has not answered: {flight:?}"),
            (Some(Answer::Any), _) => {}
            (Some(Answer::Right(_)), Err(e)) => panic!("{e:?}, but the device reported success: {flight:?}"),
            (Some(Answer::Right(data)), Ok(())) => {
                let is_same = kind != Kind::Read || memory.is_none_or(|buf| buf.to_vec() == *data);
                assert!(is_same, "a read returns the wrong data: {flight:?}");
            }
        }
    }

    /// The queue was closed: its requests have ended. The device may still access the memory of those that it has not answered.
    pub(super) fn close(&self, queue: u32) {
        let mut state = self.state();
        let State { flights, doomed, lies, was_reset, .. } = &mut *state;
        let closed = flights.extract_if(.., |flight| flight.queue == queue);
        let lost = closed.filter(|flight| flight.answer.is_none() && !flight.too_late && !*lies && !*was_reset);
        doomed.extend(lost.map(|flight| flight.memory));
    }

    /// Checks that memory which the driver has returned is not used by a dead device or by another request.
    pub(super) fn check_free(&self, memory: &Range<u64>) {
        let state = self.state();
        let is_apart = |used: &Range<u64>| used.end <= memory.start || memory.end <= used.start;
        assert!(state.doomed.iter().all(is_apart), "memory of a dead device is used again");
        assert!(state.flights.iter().all(|flight| is_apart(&flight.memory)), "memory in flight is used again");
    }
}

/// The content of a sector that was never written: not zeroes, so that a buffer without the data of a read is noticed.
fn unwritten(sector: u64) -> [u8; SECTOR] {
    let word = (sector ^ 0x5a5a).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes();
    let mut bytes = [0; SECTOR];
    bytes.as_chunks_mut().0.fill(word);
    bytes
}
