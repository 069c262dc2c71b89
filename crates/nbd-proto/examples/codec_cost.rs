//! The hot paths of the codec, in isolation, so that callgrind can count their instructions: `cargo xtask bench --micro`.
//!
//! ```text
//! cargo run --release -p nbd-proto --example codec_cost -- [BATCHES]
//! ```
//!
//! Parses batches of 64 READs and of 64 WRITEs of 4 KiB, and encodes the structured replies. Prints nothing.

use std::hint::black_box;

use nbd_proto::client::Encoder;
use nbd_proto::wire::{CommandKind, TransmissionFlags};
use nbd_proto::{BlockSizes, ContextSet, Cookie, Event, Mode, Receiver, Replier, Terms};

const BATCH: u64 = 64;
const LEN: u32 = 4096;

fn main() {
    let batches: u64 = std::env::args().nth(1).and_then(|word| word.parse().ok()).unwrap_or(1000);
    let terms = Terms {
        mode: Mode::Structured,
        flags: TransmissionFlags::default(),
        size: 1 << 30,
        block: BlockSizes::default(),
        enforce_alignment: false,
        contexts: ContextSet::EMPTY,
    };
    let encoder = Encoder::new(terms.mode);
    let (mut reads, mut writes) = (Vec::new(), Vec::new());
    for n in 0..BATCH {
        encoder.read(&mut reads, Cookie(n), n * u64::from(LEN), LEN);
        encoder.write_head(&mut writes, Cookie(n), n * u64::from(LEN), LEN, false);
        writes.extend_from_slice(&[7; LEN as usize]);
    }
    let (mut receiver, mut out) = (Receiver::new(terms), Vec::with_capacity(1 << 16));
    for _ in 0..batches {
        count_read(&mut receiver, black_box(&reads));
        count_write(&mut receiver, black_box(&writes));
        count_head(Replier::new(terms), &mut out);
        count_done(Replier::new(terms), &mut out);
    }
}

#[inline(never)]
fn count_read(receiver: &mut Receiver, mut input: &[u8]) {
    while let Some(event) = receiver.next(&mut input).expect("requests are good") {
        black_box(event);
    }
}

#[inline(never)]
fn count_write(receiver: &mut Receiver, mut input: &[u8]) {
    while let Some(event) = receiver.next(&mut input).expect("requests are good") {
        assert!(!matches!(black_box(event), Event::Reject(..)), "a write is allowed");
    }
}

#[inline(never)]
fn count_head(replier: Replier, out: &mut Vec<u8>) {
    out.clear();
    for n in 0..BATCH {
        replier.read_head(out, Cookie(n), n * u64::from(LEN), LEN);
    }
    black_box(out);
}

#[inline(never)]
fn count_done(replier: Replier, out: &mut Vec<u8>) {
    out.clear();
    for n in 0..BATCH {
        replier.done(out, Cookie(n), n * u64::from(LEN), CommandKind::WRITE);
    }
    black_box(out);
}
