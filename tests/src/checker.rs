//! A client that knows what its part of the disk must hold.

use crate::image::Rng;
use crate::raw::{Raw, cmd};

/// Length of a block, in bytes.
pub const BLOCK: usize = 4096;

/// NBD_CMD_FLAG_FUA.
const FUA: u16 = 1;

/// How a [`Checker`] makes its writes durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// Never.
    None,
    /// With a flush or FUA, after every few writes.
    Often,
}

/// A client with a part of the disk of its own, of at least 512 blocks, which it writes, and reads to verify what it wrote.
#[derive(Debug)]
pub struct Checker {
    raw: Raw,
    first: u64,
    /// The version of each block; 0: never written.
    versions: Vec<u64>,
    rng: Rng,
    durability: Durability,
    next: u64,
}

impl Checker {
    /// A client for the `count` blocks from `first` on.
    pub fn new(raw: Raw, first: u64, count: usize, durability: Durability) -> Self {
        Self { raw, first, versions: vec![0; count], rng: Rng(first + 1), durability, next: 1 }
    }

    /// Writes some blocks at the same time, then reads some.
    ///
    /// # Panics
    /// If a request fails, or a read returns anything but what was written last.
    pub fn round(&mut self) {
        // All blocks are different: a second write to a block must not be in flight at the same time.
        let depth = 1 + self.rng.below(64);
        let mut cookies = Vec::new();
        let start = self.rng.below(self.versions.len() as u64);
        for n in 0..depth {
            let block = ((start + n * 7) % self.versions.len() as u64) as usize;
            self.versions[block] = self.next;
            let data = self.content(block);
            self.next += 1;
            let fua = self.durability == Durability::Often && self.rng.below(8) == 0;
            let (flags, at) = (if fua { FUA } else { 0 }, self.at(block));
            cookies.push(self.raw.request(flags, cmd::WRITE, at, BLOCK as u32, &data));
        }
        for _ in cookies {
            let answer = self.raw.answer();
            assert_eq!(answer.error, 0, "a WRITE failed: {}", answer.text);
        }
        if self.durability == Durability::Often && self.rng.below(3) == 0 {
            assert_eq!(self.raw.call(0, cmd::FLUSH, 0, 0, b"").error, 0, "a FLUSH failed");
        }
        for _ in 0..8 {
            let block = self.rng.below(self.versions.len() as u64) as usize;
            self.verify(block);
        }
    }

    /// Reads every block.
    ///
    /// # Panics
    /// As [`round`](Self::round).
    pub fn verify_all(&mut self) {
        (0..self.versions.len()).for_each(|block| self.verify(block));
    }

    /// Flushes the disk.
    ///
    /// # Panics
    /// If that fails.
    pub fn flush(&mut self) {
        assert_eq!(self.raw.call(0, cmd::FLUSH, 0, 0, b"").error, 0, "a FLUSH failed");
    }

    /// Continues with another connection.
    #[must_use]
    pub fn on(self, raw: Raw) -> Self {
        Self { raw, ..self }
    }

    fn verify(&mut self, block: usize) {
        let at = self.at(block);
        let data = self.raw.read(at, BLOCK as u32);
        let expected = self.content(block);
        let found = u64::from_le_bytes(data[..8].try_into().expect("eight bytes"));
        let version = self.versions[block];
        assert!(data == expected, "block {block} at {at} holds {found:#x}, but version {version:#x} was written last");
    }

    fn at(&self, block: usize) -> u64 {
        (self.first + block as u64) * BLOCK as u64
    }

    fn content(&self, block: usize) -> Vec<u8> {
        let version = self.versions[block];
        let word = if version == 0 { 0 } else { version << 32 | (self.first + block as u64) };
        word.to_le_bytes().repeat(BLOCK / 8)
    }
}
