//! [`replay`]: a fuzz target without a fuzzer.

use std::{fs, path::Path};

use crate::fault::Rng;

/// Longest input that is mutated, in bytes.
const LONGEST: usize = 4000;

/// Runs `body` with each file of `corpus`, and with `mutations` seeded mutations of them.
///
/// # Panics
/// If the corpus has few files, or `body` panics. Then the input is printed.
pub fn replay(corpus: impl AsRef<Path>, mutations: usize, body: fn(&[u8])) {
    let mut files: Vec<_> = fs::read_dir(&corpus).expect("a corpus").map(|e| e.expect("an entry").path()).collect();
    files.sort();
    assert!(files.len() > 10, "the corpus is there: {files:?}");
    let inputs: Vec<_> = files.iter().map(|file| fs::read(file).expect("a file")).collect();
    for input in &inputs {
        run(input, body);
    }
    let mut rng = Rng::new(1);
    for _ in 0..mutations {
        run(&mutate(&mut rng, &inputs), body);
    }
}

fn run(input: &[u8], body: fn(&[u8])) {
    let _shown = Shown(input);
    body(input);
}

/// Prints the input if it makes the target panic.
struct Shown<'a>(&'a [u8]);

impl Drop for Shown<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let hex: String = self.0.iter().map(|byte| format!("{byte:02x}")).collect();
            eprintln!("the input, as hexadecimal digits: {hex}");
        }
    }
}

/// An input with some changes that keep most of its structure: bits, edges, pieces that are removed, doubled, or from another
/// input.
fn mutate(rng: &mut Rng, inputs: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = rng.pick(inputs).clone();
    bytes.truncate(LONGEST);
    for _ in 0..rng.range(1, 7) {
        if bytes.is_empty() {
            break;
        }
        let at = rng.below(bytes.len() as u64) as usize;
        let len = (rng.range(1, 41) as usize).min(bytes.len() - at);
        match rng.below(6) {
            0 => bytes[at] ^= 1 << rng.below(8),
            1 => bytes[at] = *rng.pick(&[0, 1, 0x7f, 0x80, 0xff]),
            2 => bytes[at..at + len.min(8)].fill(*rng.pick(&[0, 0xff])),
            3 => drop(bytes.drain(at..at + len)),
            4 => {
                let piece = bytes[at..at + len].to_vec();
                bytes.splice(at..at, piece);
            }
            _ => {
                let other = rng.pick(inputs);
                let from = rng.below(other.len() as u64 + 1) as usize;
                let piece = other[from..(from + len).min(other.len())].to_vec();
                bytes.splice(at..at, piece);
            }
        }
    }
    bytes
}
