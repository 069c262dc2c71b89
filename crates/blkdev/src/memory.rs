//! [`Memory`]: a sparse RAM disk, for use as it is, or as any kind of unusual device in a test.

use std::{
    collections::BTreeMap,
    fmt, io,
    ops::Range,
    sync::{
        Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard,
        atomic::{AtomicU64, Ordering},
    },
};

use crate::{
    arena::Buf,
    device::{Caps, Device, Info, Op, Queue},
    error::Error,
    extent,
    extent::{Extent, ExtentKind},
    inline::Inline,
    mem::{Mapping, Pages},
    serve::Serve,
};

/// A RAM disk. Memory is allocated when data is written, and freed in pieces of 64 KiB that are zeroed with `unmap` or discarded.
/// Pieces that were never written are reported as holes.
///
/// There is no volatile cache: a write is as durable as it can be when it completes. Requests are complete when [`Queue::push`]
/// returns, so the queues need no wake-up and have no [`Queue::wake_fd`].
///
/// ```
/// use blkdev::{Device, memory::Memory};
///
/// // A disk of 4096-byte blocks without support for zeroes:
/// let disk = Memory::new(1 << 30).with(|info| {
///     info.block_size = 4096;
///     info.caps.zero = false;
/// });
/// disk.write(0, b"boot sector");
/// assert_eq!(disk.capacity(), 1 << 30);
/// ```
#[derive(Debug)]
pub struct Memory {
    pub(crate) disk: Inline<Disk>,
}

#[derive(Debug)]
pub(crate) struct Disk {
    info: Info,
    capacity: AtomicU64,
    chunks: Chunks,
}

impl Memory {
    /// Returns a disk of `size` bytes, which is one hole.
    pub fn new(size: u64) -> Self {
        let caps = Caps { fua: true, zero: true, discard: true, status: true, prefetch: true, ..Caps::default() };
        let mut info = Info::new("memory", format!("{size} bytes"));
        (info.queues_max, info.depth_max, info.caps) = (256, 1024, caps);
        Self { disk: Inline::new(Disk { info, capacity: size.into(), chunks: Chunks::new() }) }
    }

    /// Changes the device's limits and capabilities: larger blocks, smaller limits, fewer capabilities. Its queues then check
    /// that requests respect them. The size is rounded down to whole blocks.
    ///
    /// # Panics
    /// If a queue is open.
    #[must_use]
    pub fn with(mut self, change: impl FnOnce(&mut Info)) -> Self {
        let disk = self.disk.served_mut().expect("a memory device is changed before its queues are opened");
        change(&mut disk.info);
        let size = disk.capacity.get_mut();
        *size -= *size % u64::from(disk.info.block_size);
        disk.info.target = format!("{size} bytes");
        self
    }

    /// Copies from the disk, without queues and limits. Bytes past its end read as zeroes.
    pub fn read(&self, at: u64, bytes: &mut [u8]) {
        for piece in pieces(at, bytes.len() as u64) {
            let part = &mut bytes[piece.within.clone()];
            match self.disk.served().chunks.shard(piece.chunk).chunk(piece.chunk) {
                Some(chunk) => part.copy_from_slice(&chunk[piece.start..piece.start + part.len()]),
                None => part.fill(0),
            }
        }
    }

    /// Copies to the disk, without queues, limits and write protection: this is how a read-only device gets its content.
    ///
    /// # Panics
    /// If `bytes` do not lie within the disk, or there is no memory for them.
    pub fn write(&self, at: u64, bytes: &[u8]) {
        assert!(self.disk.served().holds(at, bytes.len() as u64), "{} bytes at {at} lie within the disk", bytes.len());
        for piece in pieces(at, bytes.len() as u64) {
            let part = &bytes[piece.within.clone()];
            let mut shard = self.disk.served().chunks.shard_mut(piece.chunk);
            let chunk = shard.chunk_mut(piece.chunk).expect("memory for the data");
            chunk[piece.start..piece.start + part.len()].copy_from_slice(part);
        }
    }

    /// Makes a range read as zeroes and frees its memory, without queues, limits and write protection.
    pub fn clear(&self, at: u64, len: u64) {
        self.disk.served().chunks.clear(at, len, true);
    }

    /// Changes the size of the disk while it is in use. Data past the new end is lost.
    pub fn resize(&self, size: u64) {
        let size = size - size % u64::from(self.disk.served().info.block_size);
        self.disk.served().capacity.store(size, Ordering::Relaxed);
        self.disk.served().chunks.clear(size, u64::MAX - size, true);
    }

    /// Memory in use for data now, in bytes.
    pub fn allocated(&self) -> u64 {
        let chunks =
            |shard: &RwLock<Shard>| read(shard).0.values().map(|region| region.present.count_ones()).sum::<u32>();
        self.disk.served().chunks.shards.iter().map(|shard| u64::from(chunks(shard)) * CHUNK as u64).sum()
    }
}

impl Device for Memory {
    fn info(&self) -> &Info {
        self.disk.info()
    }

    fn capacity(&self) -> u64 {
        self.disk.capacity()
    }

    fn pins_memory(&self) -> bool {
        self.disk.pins_memory()
    }

    fn register(&self, mapping: &Arc<Mapping>) -> io::Result<()> {
        self.disk.register(mapping)
    }

    fn open_queue(&self, depth: u16) -> io::Result<Box<dyn Queue>> {
        self.disk.open_queue(depth)
    }
}

impl Disk {
    fn holds(&self, at: u64, len: u64) -> bool {
        at.checked_add(len).is_some_and(|end| end <= self.capacity.load(Ordering::Relaxed))
    }
}

impl Serve for Disk {
    fn info(&self) -> &Info {
        &self.info
    }

    fn capacity(&self) -> u64 {
        self.capacity.load(Ordering::Relaxed)
    }

    fn serve(&self, op: &mut Op) -> Result<(), Error> {
        if let Some((at, len)) = range(op) {
            self.info.insist(op, at, len);
            // Not a violation: the disk may have shrunk since the request was checked.
            if !self.holds(at, len) {
                return Err(Error::OutOfRange);
            }
        }
        match op {
            Op::Read { at, buf } => self.chunks.read(*at, buf),
            Op::Write { at, buf, .. } => return self.chunks.write(*at, buf),
            Op::Zero { at, len, unmap } => self.chunks.clear(*at, *len, *unmap),
            Op::Discard { at, len } => self.chunks.clear(*at, *len, true),
            Op::Status { at, len, extents } => self.chunks.status(*at, *len, extents),
            Op::Flush | Op::Prefetch { .. } => {}
        }
        Ok(())
    }
}

/// Unit of allocation and of holes, in bytes: as large as most requests at most, and small enough to stay sparse.
const CHUNK: usize = 64 << 10;

/// Address space is taken in pieces of this many chunks: so few that one is found at once. Memory is allocated for the pages that
/// are written.
const REGION: u64 = 32;

/// Most regions for one status: so many with data, or a range of this length, 256 MiB.
const STATUS_REGIONS: usize = 128;

/// Most extents in one answer.
const EXTENTS_MAX: usize = 1024;

/// Number of locks. Neighbouring regions have different locks, so that queues seldom contend.
const SHARDS: u64 = 256;

/// Regions by number.
#[derive(Default)]
struct Shard(BTreeMap<u64, Region>);

/// Chunks that are not present were freed or never written: they are all zeroes.
struct Region {
    pages: Pages,
    /// A bit for each chunk.
    present: u32,
}

/// The content; `None` if nothing was ever written.
struct Chunks {
    shards: Box<[RwLock<Shard>]>,
}

impl fmt::Debug for Chunks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Chunks").finish_non_exhaustive()
    }
}

impl Chunks {
    fn new() -> Self {
        Self { shards: (0..SHARDS).map(|_| RwLock::default()).collect() }
    }

    fn shard(&self, chunk: u64) -> RwLockReadGuard<'_, Shard> {
        read(&self.shards[(chunk / REGION % SHARDS) as usize])
    }

    fn shard_mut(&self, chunk: u64) -> RwLockWriteGuard<'_, Shard> {
        write(&self.shards[(chunk / REGION % SHARDS) as usize])
    }

    fn read(&self, at: u64, buf: &mut Buf) {
        for piece in pieces(at, buf.len() as u64) {
            match self.shard(piece.chunk).chunk(piece.chunk) {
                Some(chunk) => buf.copy_from(piece.within.start, &chunk[piece.start..piece.start + piece.within.len()]),
                None => buf.zero(piece.within.start, piece.within.len()),
            }
        }
    }

    fn write(&self, at: u64, buf: &Buf) -> Result<(), Error> {
        for piece in pieces(at, buf.len() as u64) {
            let mut shard = self.shard_mut(piece.chunk);
            let chunk = shard.chunk_mut(piece.chunk)?;
            buf.copy_to(piece.within.start, &mut chunk[piece.start..piece.start + piece.within.len()]);
        }
        Ok(())
    }

    /// Makes a range read as zeroes. With `unmap`, its whole chunks are freed; without it, allocated chunks stay allocated.
    fn clear(&self, at: u64, len: u64, unmap: bool) {
        let chunks = chunks(at, len);
        let regions = chunks.start / REGION..chunks.end.div_ceil(REGION);
        // A range may have exabytes, but the allocated part never does: iterate over the shorter of the two.
        let few = regions.end - regions.start < SHARDS;
        let shards = if few { regions.clone() } else { 0..SHARDS };
        for shard in shards {
            let shard = &mut write(&self.shards[(shard % SHARDS) as usize]).0;
            let keys: Vec<u64> = shard.range(regions.clone()).map(|(key, _)| *key).collect();
            for key in keys {
                let Some(region) = shard.get_mut(&key) else { continue };
                let mut gone = 0;
                for chunk in region.chunks(key, &chunks) {
                    let start = at.saturating_sub(chunk * CHUNK as u64) as usize;
                    let end = (at + len - chunk * CHUNK as u64).min(CHUNK as u64) as usize;
                    if unmap && end - start == CHUNK {
                        gone |= bit(chunk);
                    } else {
                        region.pages[place(chunk)][start..end].fill(0);
                    }
                }
                region.present &= !gone;
                if region.present == 0 {
                    shard.remove(&key);
                } else {
                    (0..REGION).filter(|&n| gone & bit(n) != 0).for_each(|n| region.pages.give_back(place(n)));
                }
            }
        }
    }

    /// On a disk with much data, the answer covers only the first part of the range: all of it would take milliseconds.
    fn status(&self, at: u64, len: u64, extents: &mut Vec<Extent>) {
        let regions: usize = self.shards.iter().map(|shard| read(shard).0.len()).sum();
        let len = if regions > STATUS_REGIONS { len.min(STATUS_REGIONS as u64 * REGION * CHUNK as u64) } else { len };
        let chunks = chunks(at, len);
        let mut present = Vec::new();
        for shard in &self.shards {
            for (key, region) in read(shard).0.range(chunks.start / REGION..chunks.end.div_ceil(REGION)) {
                present.extend(region.chunks(*key, &chunks));
            }
        }
        present.sort_unstable();
        let mut next = at;
        for chunk in present {
            let data = (chunk * CHUNK as u64).max(at)..((chunk + 1) * CHUNK as u64).min(at + len);
            if next < data.start {
                extent::append(extents, Extent { at: next, len: data.start - next, kind: ExtentKind::Hole });
            }
            let data_len = data.end - data.start;
            extent::append(extents, Extent { at: data.start, len: data_len, kind: ExtentKind::Data });
            next = data.end;
        }
        if next < at + len {
            extent::append(extents, Extent { at: next, len: at + len - next, kind: ExtentKind::Hole });
        }
        // The consumer requests the rest.
        extents.truncate(EXTENTS_MAX);
    }
}

impl Shard {
    fn chunk(&self, chunk: u64) -> Option<&[u8]> {
        let region = self.0.get(&(chunk / REGION)).filter(|region| region.present & bit(chunk) != 0)?;
        Some(&region.pages[place(chunk)])
    }

    /// Returns the chunk; allocates it if necessary.
    fn chunk_mut(&mut self, chunk: u64) -> Result<&mut [u8], Error> {
        use std::collections::btree_map::Entry;
        let region = match self.0.entry(chunk / REGION) {
            Entry::Occupied(held) => held.into_mut(),
            Entry::Vacant(room) => {
                let pages = Pages::new(REGION as usize * CHUNK).map_err(|_| Error::NoSpace)?;
                room.insert(Region { pages, present: 0 })
            }
        };
        region.present |= bit(chunk);
        Ok(&mut region.pages[place(chunk)])
    }
}

impl Region {
    /// The chunks of `chunks` that are present in this region, number `key`.
    fn chunks(&self, key: u64, chunks: &Range<u64>) -> impl Iterator<Item = u64> + use<> {
        let present = self.present;
        let range = chunks.start.max(key * REGION)..chunks.end.min((key + 1) * REGION);
        range.filter(move |&chunk| present & bit(chunk) != 0)
    }
}

/// The chunks that a range touches.
fn chunks(at: u64, len: u64) -> Range<u64> {
    at / CHUNK as u64..(at + len).div_ceil(CHUNK as u64)
}

/// The bit of a chunk in its region's set.
fn bit(chunk: u64) -> u32 {
    1 << (chunk % REGION)
}

/// The range of a chunk in its region.
fn place(chunk: u64) -> Range<usize> {
    let start = (chunk % REGION) as usize * CHUNK;
    start..start + CHUNK
}

/// This code never panics during a change, so the content is consistent even if the lock is poisoned.
fn read<T>(lock: &RwLock<T>) -> RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
}

fn write<T>(lock: &RwLock<T>) -> RwLockWriteGuard<'_, T> {
    lock.write().unwrap_or_else(PoisonError::into_inner)
}

/// The part of a request that lies in one chunk.
struct Piece {
    chunk: u64,
    /// First byte in the chunk.
    start: usize,
    /// The range of bytes of the request.
    within: Range<usize>,
}

fn pieces(at: u64, len: u64) -> impl Iterator<Item = Piece> {
    let mut done = 0;
    std::iter::from_fn(move || {
        let (chunk, start) = ((at + done) / CHUNK as u64, ((at + done) % CHUNK as u64) as usize);
        let here = (CHUNK - start).min((len - done) as usize);
        let within = done as usize..done as usize + here;
        done += here as u64;
        (here > 0).then_some(Piece { chunk, start, within })
    })
}

/// The range of an operation; `None` for a flush.
pub(crate) fn range(op: &Op) -> Option<(u64, u64)> {
    match op {
        Op::Read { at, buf } | Op::Write { at, buf, .. } => Some((*at, buf.len() as u64)),
        Op::Zero { at, len, .. } | Op::Discard { at, len } | Op::Status { at, len, .. } | Op::Prefetch { at, len } => {
            Some((*at, *len))
        }
        Op::Flush => None,
    }
}

impl Info {
    /// Checks the promises of a queue's owner ([`Queue::push`]). Real drivers rely on them; this one checks them.
    pub(crate) fn insist(&self, op: &Op, at: u64, len: u64) {
        let caps = self.caps;
        let (allowed, len_max) = match op {
            Op::Read { .. } => (true, self.transfer_max.into()),
            Op::Write { fua, .. } => (!caps.read_only && (caps.fua || !fua), self.transfer_max.into()),
            Op::Zero { .. } => (!caps.read_only && caps.zero, self.zero_max),
            Op::Discard { .. } => (!caps.read_only && caps.discard, self.discard_max),
            Op::Status { .. } => (caps.status, u64::MAX),
            Op::Prefetch { .. } => (caps.prefetch, u64::MAX),
            Op::Flush => (caps.flush, u64::MAX),
        };
        assert!(allowed, "a queue gets only operations that its device supports: {op:?} with {caps:?}");
        let block = u64::from(self.block_size);
        assert!(
            len > 0 && at.is_multiple_of(block) && len.is_multiple_of(block),
            "a range consists of whole blocks of {block} bytes: {op:?}",
        );
        assert!(len <= len_max, "a request is at most {len_max} bytes long: {op:?}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Request;

    fn extents(disk: &Memory, at: u64, len: u64) -> Vec<(u64, u64, ExtentKind)> {
        let mut found = Vec::new();
        disk.disk.served().chunks.status(at, len, &mut found);
        found.iter().map(|e| (e.at, e.len, e.kind)).collect()
    }

    #[test]
    fn memory_is_allocated_by_the_first_write_and_freed_by_unmap() {
        use ExtentKind::{Data, Hole};
        const C: u64 = CHUNK as u64;
        let disk = Memory::new(1 << 62);
        disk.write(5 * C - 1, &[1, 2]);
        assert_eq!(disk.allocated(), 2 * C);
        assert_eq!(extents(&disk, 7, 8 * C), [(7, 4 * C - 7, Hole), (4 * C, 2 * C, Data), (6 * C, 2 * C + 7, Hole)]);

        disk.disk.served().chunks.clear(4 * C, 2 * C, false);
        assert_eq!(disk.allocated(), 2 * C, "without unmap, zeroes stay allocated");
        disk.disk.served().chunks.clear(4 * C, 2 * C - 1, true);
        assert_eq!(disk.allocated(), C, "with it, whole chunks are freed");
        disk.disk.served().chunks.clear(0, 1 << 62, true);
        assert_eq!(disk.allocated(), 0);
    }

    #[test]
    fn clearing_touches_nothing_outside() {
        let disk = Memory::new(64 << 20);
        let ones = vec![1; 320 * CHUNK];
        for len in [1, 100, CHUNK, CHUNK + 1, 5 * CHUNK, 300 * CHUNK] {
            for at in [0, 1, CHUNK - 1, CHUNK, 7 * CHUNK + 13] {
                disk.write(0, &ones);
                disk.disk.served().chunks.clear(at as u64, len as u64, at % 2 == 0);
                let mut expected = ones.clone();
                expected[at..at + len].fill(0);
                let mut found = vec![9; ones.len()];
                disk.read(0, &mut found);
                assert!(found == expected, "{len} bytes at {at}");
            }
        }
    }

    #[test]
    fn data_past_the_new_end_is_lost() {
        let disk = Memory::new(1 << 20).with(|info| info.block_size = 512);
        disk.write(0, &[1; 1 << 20]);
        disk.resize(1000);
        assert_eq!(disk.capacity(), 512);
        disk.resize(1 << 20);
        let mut bytes = [9; 513];
        disk.read(0, &mut bytes);
        assert_eq!((bytes[511], bytes[512]), (1, 0));
    }

    #[test]
    fn queues_are_counted() {
        let disk = Memory::new(1 << 20).with(|info| info.queues_max = 1);
        let first = disk.open_queue(1).unwrap();
        assert_eq!(disk.open_queue(1).unwrap_err().kind(), io::ErrorKind::ResourceBusy);
        drop(first);
        disk.open_queue(1).unwrap();
    }

    #[test]
    fn a_full_queue_and_a_dead_queue() {
        let mut queue = Memory::new(1 << 20).with(|info| info.caps.flush = true).open_queue(1).unwrap();
        let flush = |tag| Request { tag, op: Op::Flush };
        assert!(queue.arm());
        queue.push(flush(1)).unwrap();
        assert!(!queue.arm());
        assert_eq!(queue.push(flush(2)).unwrap_err().tag, 2);
        let mut done = Vec::new();
        queue.reap(&mut done);
        queue.give_up();
        queue.push(flush(3)).unwrap();
        queue.reap(&mut done);
        let results: Vec<_> = done.iter().map(|c| (c.tag, c.result)).collect();
        assert_eq!(results, [(1, Ok(())), (3, Err(Error::Gone))]);
    }
}
