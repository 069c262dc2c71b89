//! The fuzz targets without a fuzzer: the golden conversations and the corpus, every truncation of them, and seeded mutations.

mod common;

use std::path::Path;

use common::{Seed, bodies, golden};

/// The golden inputs, and the inputs that fuzzing found.
fn inputs(target: &str, golden: Vec<(String, Vec<u8>)>) -> Vec<Vec<u8>> {
    let mut all: Vec<Vec<u8>> = golden.into_iter().map(|(_, bytes)| bytes).collect();
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
    let mut files: Vec<_> = std::fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    assert!(files.len() > 10, "the corpus is there");
    all.extend(files.iter().map(|file| std::fs::read(file).unwrap()));
    all
}

fn replay(inputs: &[Vec<u8>], body: fn(&[u8])) {
    for input in inputs {
        body(input);
        // Of a long input, only the first and the last truncations.
        for len in (0..input.len()).filter(|len| *len < 300 || input.len() - len < 20) {
            body(&input[..len]);
        }
    }
}

/// Mutations that keep most of the structure: flipped bits, interesting numbers, pieces that are duplicated, dropped, or taken
/// from another input.
fn mutate(seed: &mut Seed, inputs: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = seed.pick(inputs).clone();
    bytes.truncate(4000);
    for _ in 0..=seed.below(6) {
        if bytes.is_empty() {
            break;
        }
        let at = seed.below(bytes.len() as u64) as usize;
        let len = (1 + seed.below(40) as usize).min(bytes.len() - at);
        match seed.below(6) {
            0 => bytes[at] ^= 1 << seed.below(8),
            1 => bytes[at] = *seed.pick(&[0, 1, 0x7f, 0x80, 0xff]),
            2 => bytes[at..at + len.min(8)].fill(*seed.pick(&[0, 0xff])),
            3 => drop(bytes.drain(at..at + len)),
            4 => {
                let piece = bytes[at..at + len].to_vec();
                bytes.splice(at..at, piece);
            }
            _ => {
                let other = seed.pick(inputs);
                let from = seed.below(other.len() as u64 + 1) as usize;
                let piece = other[from..(from + len).min(other.len())].to_vec();
                bytes.splice(at..at, piece);
            }
        }
    }
    bytes
}

fn check(inputs: &[Vec<u8>], body: fn(&[u8])) {
    replay(inputs, body);
    let mut seed = Seed(0x6e62_6470);
    for _ in 0..4000 {
        body(&mutate(&mut seed, inputs));
    }
}

#[test]
fn handshake() {
    check(&inputs("handshake", golden::handshakes()), bodies::handshake);
}

#[test]
fn receiver() {
    check(&inputs("receiver", golden::requests()), bodies::receiver);
}

#[test]
fn decoder() {
    check(&inputs("decoder", golden::replies()), bodies::decoder);
}
