//! Disk images with known content, and their comparison.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

/// Pseudo-random numbers from a seed (splitmix64): the same content in every run.
#[derive(Debug)]
pub struct Rng(pub u64);

impl Rng {
    /// Returns the next number.
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Returns a number below `end`.
    pub fn below(&mut self, end: u64) -> u64 {
        self.number() % end
    }

    /// Returns `len` bytes.
    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(len + 8);
        while bytes.len() < len {
            bytes.extend_from_slice(&self.number().to_le_bytes());
        }
        bytes.truncate(len);
        bytes
    }
}

/// Creates a file of `size` bytes, which is a hole except for the runs `(at, len)` of random bytes.
pub fn write_runs(path: &Path, size: u64, runs: impl IntoIterator<Item = (u64, u64)>) {
    let file = File::create(path).unwrap_or_else(|error| panic!("creating {}: {error}", path.display()));
    file.set_len(size).expect("a file of the test can grow");
    let mut rng = Rng(size);
    for (at, len) in runs {
        let end = at + len;
        for at in (at..end).step_by(1 << 20) {
            let bytes = rng.bytes((end - at).min(1 << 20) as usize);
            file.write_all_at(&bytes, at).expect("there is room for the image of the test");
        }
    }
}

/// Disk space that a file occupies, in bytes.
pub fn allocated(path: &Path) -> u64 {
    std::fs::metadata(path).expect("the image is there").blocks() * 512
}

/// Panics with the first differing offset if two files differ.
pub fn assert_equal(a: &Path, b: &Path) {
    let open = |path: &Path| File::open(path).unwrap_or_else(|error| panic!("opening {}: {error}", path.display()));
    let (mut a, mut b) = (open(a), open(b));
    let size = |file: &File| file.metadata().expect("an open file has metadata").len();
    assert_eq!(size(&a), size(&b), "the sizes differ");
    let (mut x, mut y) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    for at in (0..size(&a)).step_by(1 << 20) {
        let len = (size(&a) - at).min(1 << 20) as usize;
        a.read_exact(&mut x[..len]).expect("the first file can be read");
        b.read_exact(&mut y[..len]).expect("the second file can be read");
        if x[..len] != y[..len] {
            let first = x.iter().zip(&y).position(|(x, y)| x != y).unwrap_or(0);
            panic!("the files differ at byte {}", at + first as u64);
        }
    }
}
