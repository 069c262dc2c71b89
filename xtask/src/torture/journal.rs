//! [`Journal`]: which versions each block of a region may have. It is a file, so it outlives the client that writes it: an
//! intent comes before the request, an acknowledgement after the reply.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::clock::Millis;
use super::pattern::{Kind, Permitted};

/// Time after the end of a connection in which its last requests may still reach the device. It is much longer than the longest
/// fault of a device.
const STRAY: Millis = 30_000;

/// Bytes of a record in the file.
const RECORD: usize = 32;

/// The versions of a block. Versions of a region only grow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Record {
    /// The newest version that was acknowledged: older ones must not come back.
    low: u32,
    /// The newest version that was sent.
    high: u32,
    /// The newest version that was flushed.
    durable: u32,
    /// Until then, versions from this one on may still come: a client sent them and vanished.
    stray: u32,
    until: Millis,
    /// One of the versions that the block may have has zeroes.
    zeroes: bool,
    /// One of them is a TRIM, after which a block may have any content.
    anything: bool,
}

impl Record {
    fn bytes(self) -> [u8; RECORD] {
        let mut bytes = [0; RECORD];
        let words = [self.low, self.high, self.durable, self.stray];
        words.iter().enumerate().for_each(|(n, word)| bytes[n * 4..][..4].copy_from_slice(&word.to_le_bytes()));
        bytes[16..24].copy_from_slice(&self.until.to_le_bytes());
        bytes[24..26].copy_from_slice(&[self.zeroes.into(), self.anything.into()]);
        bytes
    }

    fn parse(bytes: &[u8]) -> Self {
        let word = |n: usize| u32::from_le_bytes(bytes[n * 4..][..4].try_into().expect("a word has four bytes"));
        let until = u64::from_le_bytes(bytes[16..24].try_into().expect("the time has eight bytes"));
        let (zeroes, anything) = (bytes[24] != 0, bytes[25] != 0);
        Self { low: word(0), high: word(1), durable: word(2), stray: word(3), until, zeroes, anything }
    }

    fn has_strays(&self, now: Millis) -> bool {
        now < self.until
    }

    fn oldest(&self, now: Millis) -> u32 {
        if self.has_strays(now) { self.low.min(self.stray) } else { self.low }
    }

    /// A version of this kind is sent.
    fn add(&mut self, kind: Kind) {
        self.zeroes |= kind != Kind::Data;
        self.anything |= kind == Kind::Trim;
    }
}

/// The versions of all blocks of a region.
#[derive(Debug)]
pub(crate) struct Journal {
    file: File,
    records: Vec<Record>,
}

impl Journal {
    /// Opens the journal of a region, or creates that of a new one.
    pub(crate) fn open(path: &Path, blocks: usize, now: Millis) -> io::Result<Self> {
        let file = File::options().read(true).write(true).create(true).truncate(false).open(path)?;
        let mut bytes = vec![0; blocks * RECORD];
        if file.metadata()?.len() == 0 {
            file.write_all_at(&bytes, 0)?;
        }
        file.read_exact_at(&mut bytes, 0)?;
        let mut journal = Self { file, records: bytes.chunks_exact(RECORD).map(Record::parse).collect() };
        journal.connection_ended(0..blocks as u32, now)?;
        Ok(journal)
    }

    /// The newest version of all blocks.
    pub(crate) fn newest(&self) -> u32 {
        self.records.iter().map(|record| record.high).max().unwrap_or_default()
    }

    /// What a block may have in a read that is sent now.
    pub(crate) fn permitted(&self, block: u32, now: Millis) -> Permitted {
        let record = &self.records[block as usize];
        let oldest = record.oldest(now);
        // Version 0 is the new image.
        let zeroes = record.zeroes || oldest == 0;
        Permitted { versions: oldest..=record.high, zeroes, anything: record.anything }
    }

    /// Before a change is sent.
    pub(crate) fn intend(&mut self, blocks: Range<u32>, version: u32, kind: Kind) -> io::Result<()> {
        self.update(blocks, |record| {
            record.high = version;
            record.add(kind);
        })
    }

    /// After its reply.
    pub(crate) fn acknowledge(
        &mut self,
        blocks: Range<u32>,
        (version, kind): (u32, Kind),
        is_durable: bool,
        now: Millis,
    ) -> io::Result<()> {
        self.update(blocks, |record| {
            record.low = version;
            if is_durable {
                record.durable = version;
            }
            if !record.has_strays(now) {
                (record.zeroes, record.anything) = (false, false);
                record.add(kind);
            }
        })
    }

    /// What a FLUSH that is sent now makes durable.
    pub(crate) fn acknowledged(&self) -> Vec<u32> {
        self.records.iter().map(|record| record.low).collect()
    }

    /// A FLUSH has succeeded that was sent when these versions were acknowledged.
    pub(crate) fn flushed(&mut self, acknowledged: &[u32]) -> io::Result<()> {
        let mut versions = acknowledged.iter();
        self.update(0..self.blocks(), |record| {
            record.durable = record.durable.max(*versions.next().expect("each block has one"));
        })
    }

    /// The connection has ended: changes of these blocks without a reply may happen, and may happen late.
    pub(crate) fn connection_ended(&mut self, blocks: Range<u32>, now: Millis) -> io::Result<()> {
        self.update(blocks, |record| {
            if record.low < record.high {
                record.stray = record.oldest(now);
                record.until = now + STRAY;
            }
        })
    }

    /// The back end may have crashed, and has a cache of its own: only what was flushed must still be there.
    pub(crate) fn cache_lost(&mut self) -> io::Result<()> {
        self.update(0..self.blocks(), |record| {
            // A version in between may have had zeroes.
            record.zeroes |= record.durable < record.low;
            record.low = record.low.min(record.durable);
        })
    }

    fn blocks(&self) -> u32 {
        self.records.len() as u32
    }

    fn update(&mut self, blocks: Range<u32>, mut change: impl FnMut(&mut Record)) -> io::Result<()> {
        let (start, end) = (blocks.start as usize, blocks.end as usize);
        self.records[start..end].iter_mut().for_each(&mut change);
        let bytes: Vec<u8> = self.records[start..end].iter().flat_map(|record| record.bytes()).collect();
        self.file.write_all_at(&bytes, (start * RECORD) as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(name: &str) -> std::path::PathBuf {
        let path = std::env::temp_dir().join(format!("nbdblk-journal-{name}-{}", std::process::id()));
        let _ = std::fs::remove_file(&path);
        path
    }

    const DATA: Kind = Kind::Data;

    #[test]
    fn what_was_acknowledged_outlives_the_client() {
        let path = file("outlives");
        let mut journal = Journal::open(&path, 4, 0).unwrap();
        let versions = |journal: &Journal, block, now| journal.permitted(block, now).versions;
        assert_eq!(versions(&journal, 0, 0), 0..=0);
        journal.intend(0..2, 1, DATA).unwrap();
        assert_eq!(versions(&journal, 1, 0), 0..=1);
        journal.acknowledge(0..2, (1, DATA), false, 0).unwrap();
        assert_eq!(versions(&journal, 1, 0), 1..=1);
        journal.intend(1..3, 2, DATA).unwrap();
        drop(journal);
        // Version 2 may be there or not, and may come late.
        let mut journal = Journal::open(&path, 4, 1_000).unwrap();
        assert_eq!([0, 1, 2, 3].map(|block| versions(&journal, block, 1_000)), [1..=1, 1..=2, 0..=2, 0..=0]);
        assert_eq!(journal.newest(), 2);
        journal.intend(1..2, 3, DATA).unwrap();
        journal.acknowledge(1..2, (3, DATA), false, 1_000).unwrap();
        drop(journal);
        let journal = Journal::open(&path, 4, 2_000).unwrap();
        assert_eq!(versions(&journal, 1, 2_000), 1..=3);
        assert_eq!(versions(&journal, 1, 1_000 + STRAY), 3..=3);
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn zeroes_are_permitted_until_data_is_acknowledged() {
        let path = file("zeroes");
        let mut journal = Journal::open(&path, 1, 0).unwrap();
        assert!(journal.permitted(0, 0).zeroes && !journal.permitted(0, 0).anything);
        for (version, kind, zeroes, anything) in [(1, DATA, false, false), (2, Kind::Trim, true, true)] {
            journal.intend(0..1, version, kind).unwrap();
            journal.acknowledge(0..1, (version, kind), false, 0).unwrap();
            let permitted = journal.permitted(0, 0);
            assert_eq!((permitted.zeroes, permitted.anything), (zeroes, anything), "{version}");
        }
        journal.intend(0..1, 3, DATA).unwrap();
        assert!(journal.permitted(0, 0).anything);
        journal.acknowledge(0..1, (3, DATA), false, 0).unwrap();
        assert_eq!(journal.permitted(0, 0), Permitted { versions: 3..=3, zeroes: false, anything: false });
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn a_crash_takes_only_what_was_not_flushed() {
        let path = file("crash");
        let mut journal = Journal::open(&path, 3, 0).unwrap();
        for (block, version, fua) in [(0, 1, false), (1, 2, false), (2, 3, true)] {
            journal.intend(block..block + 1, version, DATA).unwrap();
            journal.acknowledge(block..block + 1, (version, DATA), fua, 0).unwrap();
        }
        let acknowledged = journal.acknowledged();
        journal.intend(0..1, 4, DATA).unwrap();
        journal.acknowledge(0..1, (4, DATA), false, 0).unwrap();
        journal.flushed(&acknowledged).unwrap();
        journal.cache_lost().unwrap();
        assert_eq!([0, 1, 2].map(|block| journal.permitted(block, 0).versions), [1..=4, 2..=2, 3..=3]);
        assert_eq!([0, 1, 2].map(|block| journal.permitted(block, 0).zeroes), [true, false, false]);
        std::fs::remove_file(&path).unwrap();
    }
}
