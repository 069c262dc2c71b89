//! The way of a request through a channel, for callgrind to count instructions in: `cargo xtask bench --micro`.
//!
//! ```text
//! cargo run --release -p blkdev --example channel_cost -- [BATCHES]
//! ```
//!
//! Sends batches of 64 writes of 4 KiB through a channel on a device that does nothing with them. Prints nothing.

use std::hint::black_box;
use std::{io, sync::Arc};

use blkdev::{Channel, Device, Done, Io, Plan, null::Null};

const BATCH: u64 = 64;
const LEN: u64 = 4096;

fn main() -> io::Result<()> {
    let batches: u64 = std::env::args().nth(1).and_then(|word| word.parse().ok()).unwrap_or(1000);
    let device: Arc<dyn Device> = Arc::new(Null::new(1 << 30));
    let mut plan = Plan::new(1 << 20);
    plan.depth = 64;
    let mut channel = plan.open(&device, 1)?.remove(0);
    let mut done = Vec::with_capacity(64);
    for _ in 0..batches {
        count_submit(&mut channel);
        count_reap(&mut channel, &mut done);
        count_drop(&mut done);
    }
    Ok(())
}

#[inline(never)]
fn count_submit(channel: &mut Channel) {
    for n in 0..BATCH {
        let at = n * LEN;
        let buf = channel.alloc(at, LEN as usize).expect("there is enough");
        channel.submit(n, Io::Write { at, buf, fua: false });
    }
    channel.kick();
}

#[inline(never)]
fn count_reap(channel: &mut Channel, done: &mut Vec<Done>) {
    channel.reap(done);
    assert_eq!(done.len() as u64, BATCH);
}

/// Gives the memory back.
#[inline(never)]
fn count_drop(done: &mut Vec<Done>) {
    black_box(done).clear();
}
