//! The steps that go through channels.

use std::{
    sync::{
        Barrier,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use super::{
    Bench,
    model::{Model, covered, noise, old_or_zero},
    rig::{PATIENCE, Rig, readable, wait},
    same,
};
use crate::{arena::PAGE, error::Error, extent::Extent, fault::Rng, io::Io};

/// Random bytes everywhere, so that lost, moved or missing data is noticed.
pub(super) fn fill(bench: &mut Bench) {
    for range in [0..super::AREA, bench.tail()] {
        bench.write(range.start, range.end - range.start);
        bench.verify(range);
    }
}

/// Lengths around every limit, at both ends of the device. The surroundings must not change.
pub(super) fn edges(bench: &mut Bench) {
    let (block, transfer) = (bench.block(), u64::from(bench.info.transfer_max));
    let page = PAGE as u64;
    let mut lens = vec![1, 2, 511, 512, 513, page - 1, page, page + 1, 3 * page + 7, 64 << 10];
    lens.extend([block - 1, block, block + 1, 2 * block + 1, 5 * block - 1]);
    lens.extend([transfer - block, transfer - 1, transfer, transfer + 1, transfer + block, 3 * transfer + block + 1]);
    lens.sort_unstable();
    lens.dedup();
    lens.retain(|len| *len > 0 && *len <= 16 << 20);
    for len in lens {
        for at in [0, 1, block - 1, block, 3 * block + 5] {
            bench.write(at, len);
            bench.verify_around(at, len);
            if len > 1 << 20 {
                break;
            }
        }
        if len <= 512 << 10 {
            for from_end in [len, len + 1, len + block, len + 2 * block - 1] {
                bench.write(bench.capacity - from_end, len);
                bench.verify_around(bench.capacity - from_end, len);
            }
        }
    }
}

/// Zeroes of every length, aligned or not, with and without holes; the whole device too, and 17 MiB, which is more than many
/// devices take at a time.
pub(super) fn zero(bench: &mut Bench) {
    zero_one(bench, 3 << 20, 17 << 20, true, false);
    zero_one(bench, (2 << 20) + 1, 17 << 20, false, false);
    bench.write(2 << 20, 18 << 20);
    let (block, max) = (bench.block(), bench.info.zero_max);
    let mut lens = vec![1, 100, 512, PAGE as u64, (64 << 10) + 1, 300 << 10];
    lens.extend([block - 1, block, block + 1, 2 * block, 4 * block - 1]);
    lens.extend([max.saturating_sub(block), max, max.saturating_add(block), max.saturating_mul(3)]);
    lens.sort_unstable();
    lens.dedup();
    lens.retain(|len| *len > 0 && *len <= 8 << 20);
    for len in lens {
        for (n, at) in [0, 1, block, 5 * block - 1, bench.capacity - len].into_iter().enumerate() {
            for (unmap, fast) in [(true, false), (false, n % 2 == 0), (true, true)] {
                bench.write(at, len);
                zero_one(bench, at, len, unmap, fast);
            }
        }
    }
    // Unless this would fill a large device.
    if bench.capacity <= 64 << 20 || (bench.info.caps.zero && bench.capacity <= 1 << 40) {
        zero_one(bench, 0, bench.capacity, true, false);
        fill(bench);
    }
}

fn zero_one(bench: &mut Bench, at: u64, len: u64, unmap: bool, fast: bool) {
    let io = Io::Zero { at, len, fua: unmap, unmap, fast };
    let asked = format!("{io:?}");
    match bench.rig().one(io).result {
        Ok(()) => bench.shadow.clear(at, len),
        // Then nothing has changed.
        Err(Error::NotSupported) if fast => {}
        Err(error) => panic!("{asked}: {error}"),
    }
    if len < super::AREA {
        bench.verify_around(at, len);
    } else {
        bench.verify(0..super::AREA);
        bench.verify(bench.tail());
    }
}

/// A discard leaves the old content or zeroes, and does not change anything else.
pub(super) fn discard(bench: &mut Bench) {
    if !bench.info.caps.discard {
        let result = bench.rig().one(Io::Discard { at: 0, len: 4096, fua: false }).result;
        assert_eq!(result, Err(Error::NotSupported));
        return bench.verify(0..65536);
    }
    let (block, unit, max) = (bench.block(), u64::from(bench.info.discard_alignment), bench.info.discard_max);
    let mut lens = vec![1, block, block + 1, unit, 2 * unit, 2 * unit + 1, 3 * unit - 1, 1 << 20, 17 << 20];
    lens.extend([max.saturating_sub(unit), max, max.saturating_add(unit)]);
    lens.sort_unstable();
    lens.dedup();
    lens.retain(|len| *len > 0 && *len <= 17 << 20);
    for len in lens {
        for at in [0, 1, unit, 3 * unit + block] {
            discard_one(bench, at, len, at == 0);
            if len > 1 << 20 {
                break;
            }
        }
        discard_one(bench, bench.capacity - len.min(1 << 20), len.min(1 << 20), false);
    }
    let len = bench.capacity;
    bench.rig().ok(Io::Discard { at: 0, len, fua: true });
    for range in [0..super::AREA, bench.tail()] {
        learn(bench, range.start, range.end - range.start);
    }
    fill(bench);
}

fn discard_one(bench: &mut Bench, at: u64, len: u64, fua: bool) {
    bench.write(at, len.min(1 << 20));
    bench.rig().ok(Io::Discard { at, len, fua });
    learn(bench, at, len);
    bench.verify_around(at, len);
}

/// Reads the range of a discard, and takes the result as the expected content.
fn learn(bench: &mut Bench, at: u64, len: u64) {
    let found = bench.rig().read(at, len);
    let mut before = vec![0; len as usize];
    bench.shadow.read(at, &mut before);
    old_or_zero(at, &found, &before);
    bench.wrote(at, &found);
}

/// Flush and FUA work on every device. (Only a power failure shows whether the data is durable.)
pub(super) fn durability(bench: &mut Bench) {
    let block = bench.block();
    bench.rig().ok(Io::Flush);
    for (at, len) in [(0, block), (1, 3), (block - 1, 2 * block + 1), (64 << 10, 256 << 10)] {
        let bytes = bench.noise(len);
        let io = bench.rig().write_of(at, &bytes, true);
        bench.rig().ok(io);
        bench.wrote(at, &bytes);
        bench.verify_around(at, len);
    }
    for _ in 0..3 {
        bench.rig().submit(Io::Flush);
    }
    assert!(bench.rig().finish().iter().all(|done| done.result == Ok(())));
}

/// The answers cover a range without gaps, and report no data as a hole or as zeroes.
pub(super) fn status(bench: &mut Bench) {
    if !bench.info.caps.read_only {
        bench.rig().ok(Io::Zero { at: 1 << 20, len: 1 << 20, fua: false, unmap: true, fast: false });
        bench.shadow.clear(1 << 20, 1 << 20);
        bench.rig().ok(Io::Zero { at: 4 << 20, len: 1 << 20, fua: false, unmap: false, fast: false });
        bench.shadow.clear(4 << 20, 1 << 20);
        bench.write((1 << 20) + 70_000, 1);
        bench.rig().ok(Io::Flush);
    }
    let (area, capacity) = (super::AREA, bench.capacity);
    let tail = bench.tail();
    for (at, end) in
        [(0, area), (1, 4097), (70_000, 70_001), (3, area - 1), (tail.start, capacity), (capacity - 1, capacity)]
    {
        let mut next = at;
        while next < end {
            let extents = ask(bench, next, end - next);
            covered(next, end - next, &extents, &bench.shadow);
            next = extents.last().map_or(end, |last| last.at + last.len);
        }
    }
    // For the whole device, the answer must only be well-formed.
    let extents = ask(bench, 0, capacity);
    assert!(extents.first().is_some_and(|first| first.at == 0), "{extents:?}");
}

fn ask(bench: &mut Bench, at: u64, len: u64) -> Vec<Extent> {
    let Io::Status { extents, .. } = bench.rig().ok(Io::Status { at, len, extents: Vec::new() }) else {
        panic!("a status ends as a status");
    };
    extents
}

/// Requests past the end of the device fail, whatever the operation, and the buffer comes back.
pub(super) fn out_of_range(bench: &mut Bench) {
    let capacity = bench.capacity;
    let caps = bench.info.caps;
    for (at, len) in [(capacity, 1), (capacity - 1, 2), (capacity - 4096, 8192), (u64::MAX, 1), (u64::MAX - 4095, 4096)]
    {
        let rig = bench.rig();
        let mut ios = vec![rig.read_of(at, len), Io::Status { at, len, extents: Vec::new() }, Io::Prefetch { at, len }];
        if !caps.read_only {
            ios.push(rig.write_of(at, &vec![0x5a; len as usize], false));
            ios.push(Io::Zero { at, len, fua: false, unmap: false, fast: false });
            ios.push(Io::Discard { at, len, fua: false });
        }
        for io in ios {
            let asked = format!("{io:?}");
            let done = bench.rig().one(io);
            assert_eq!(done.result, Err(Error::OutOfRange), "{asked}");
            if let Io::Read { buf, .. } | Io::Write { buf, .. } = done.io {
                assert_eq!(buf.len() as u64, len, "the buffer comes back: {asked}");
            }
        }
    }
    if !caps.read_only {
        bench.verify(bench.tail());
    }
}

/// Requests of no bytes succeed, up to the end of the device.
pub(super) fn no_length(bench: &mut Bench) {
    let caps = bench.info.caps;
    for at in [0, 1, bench.capacity] {
        let rig = bench.rig();
        let read = rig.read_of(at, 0);
        rig.ok(read);
        rig.ok(Io::Status { at, len: 0, extents: Vec::new() });
        if !caps.read_only {
            let write = rig.write_of(at, &[], true);
            rig.ok(write);
            rig.ok(Io::Zero { at, len: 0, fua: true, unmap: true, fast: false });
        }
        if !caps.read_only && caps.discard {
            rig.ok(Io::Discard { at, len: 0, fua: true });
        }
    }
}

/// Many more requests than a queue takes, submitted before the first reap.
pub(super) fn many_at_once(bench: &mut Bench) {
    let (block, count) = (bench.block().max(512), 20 * u64::from(super::DEPTH));
    let read_only = bench.info.caps.read_only;
    if !read_only {
        for n in 0..count {
            let bytes = bench.noise(block);
            let io = bench.rig().write_of(n * block, &bytes, n % 16 == 0);
            bench.rig().submit(io);
            bench.wrote(n * block, &bytes);
            if (n + 1) * block >= 16 << 20 {
                break;
            }
        }
        assert!(bench.rig().finish().iter().all(|done| done.result == Ok(())));
    }
    for n in 0..count {
        let at = n * 37 % count * block;
        if at + block <= 16 << 20 {
            let Some(buf) = bench.rig().channel.alloc(at, block as usize) else { break };
            bench.rig().submit(Io::Read { at, buf });
        }
    }
    for done in bench.rig().finish() {
        assert_eq!(done.result, Ok(()), "{:?}", done.io);
        let Io::Read { at, buf } = done.io else { panic!("a read ends as a read") };
        if !read_only {
            let mut expected = vec![0; buf.len()];
            bench.shadow.read(at, &mut expected);
            same(at, &buf.to_vec(), &expected);
        }
    }
}

/// When all memory is in use, there is none until a buffer comes back; then there is.
pub(super) fn back_pressure(bench: &mut Bench) {
    let len = 1 << 20;
    for n in 0..64 {
        let bytes = bench.noise(len);
        let at = n % 16 * len;
        let rig = bench.rig();
        while rig.channel.alloc(at, len as usize).is_none() {
            wait(std::slice::from_mut(rig));
            rig.done.clear();
        }
        if n % 16 == 0 {
            // Two writes to one place have no order while both are in flight.
            rig.finish();
        }
        let io = rig.write_of(at, &bytes, false);
        rig.submit(io);
        bench.wrote(at, &bytes);
    }
    bench.rig().finish();
    bench.verify(0..16 << 20);
}

/// A cancelled request ends once, as completed or as cancelled. If cancelled, it was executed completely or not at all.
pub(super) fn cancel(bench: &mut Bench) {
    let read_only = bench.info.caps.read_only;
    let len = bench.block().max(512);
    for round in 0..20 {
        let bytes = bench.noise(len);
        let rig = bench.rig();
        let mut tags = Vec::new();
        for n in 0..3 * u64::from(super::DEPTH) {
            let Some(mut buf) = rig.channel.alloc(n * len, len as usize) else { break };
            buf.copy_from(0, &bytes);
            let at = n * len;
            tags.push(rig.submit(if read_only { Io::Read { at, buf } } else { Io::Write { at, buf, fua: false } }));
        }
        if round % 2 == 0 {
            rig.channel.kick();
        }
        let last = *tags.last().expect("there is memory for one");
        rig.channel.cancel(|tag| tag % 3 == 0 || tag == last);
        let done = rig.finish();
        let mut ended: Vec<_> = done.iter().map(|done| done.tag).collect();
        ended.sort_unstable();
        assert_eq!(ended, tags, "each request ends once");
        for done in done {
            match (done.result, done.io) {
                (Ok(()), Io::Write { at, .. }) => bench.wrote(at, &bytes),
                (Ok(()), _) => {}
                (Err(Error::Cancelled), _) => {
                    assert!(done.tag % 3 == 0 || done.tag == last, "{} was not cancelled", done.tag);
                }
                (Err(error), io) => panic!("{io:?}: {error}"),
            }
        }
        if !read_only {
            bench.verify(0..4 * u64::from(super::DEPTH) * len);
        }
    }
}

/// Every completion after an `arm` makes the descriptor readable. An idle channel lets its owner sleep.
pub(super) fn wake(bench: &mut Bench) {
    let block = bench.block().max(512);
    for rig in &mut bench.rigs {
        for round in 0..300u64 {
            // One at a time, then bursts.
            for n in 0..if round < 200 { 1 } else { 1 + round % 24 } {
                let io = rig.read_of((round * 24 + n) * block % super::AREA, block);
                rig.submit(io);
            }
            match round % 3 {
                // Arm before any completion, or after all of them.
                0 => rig.channel.kick(),
                1 => {
                    rig.channel.kick();
                    std::thread::sleep(Duration::from_micros(200));
                }
                _ => {}
            }
            while rig.missing > 0 {
                // Panics if a wake-up is lost.
                wait(std::slice::from_mut(rig));
                if round % 5 == 0 {
                    rig.channel.arm();
                }
            }
            assert!(rig.done.drain(..).all(|done| done.result == Ok(())));
        }
        idle(rig);
    }
}

/// With nothing in flight, an armed channel is quiet after a few turns at most.
fn idle(rig: &mut Rig) {
    let started = Instant::now();
    let mut quiet = 0;
    while quiet < 3 {
        assert!(started.elapsed() < PATIENCE, "an idle channel keeps waking its owner");
        rig.channel.reap(&mut rig.done);
        let armed = rig.channel.arm();
        let woken = rig.channel.wake_fd().is_some_and(|fd| readable(&[fd], Duration::from_millis(1)));
        quiet = if armed && !woken { quiet + 1 } else { 0 };
    }
}

/// Random requests on all channels, from one thread.
pub(super) fn model(bench: &mut Bench) {
    let rng = Rng::new(bench.rng.next());
    let (keeps_data, shadow) = (bench.keeps_data, &bench.shadow);
    Model { range: 0..8 << 20, shadow, keeps_data, rng }.run(&mut bench.rigs, 600);
    let rng = Rng::new(bench.rng.next());
    let tail = bench.capacity - (1 << 20) + 1..bench.capacity;
    Model { range: tail, shadow, keeps_data, rng }.run(&mut bench.rigs, 200);
    bench.verify(0..8 << 20);
    bench.verify(bench.tail());
}

/// One thread for each channel, with random requests in its own part of the device, exact to the byte.
pub(super) fn threads(bench: &mut Bench) {
    // Neighbours share a block, if blocks are longer than a byte.
    let (share, mut start) = ((4 << 20) + 1, 12345);
    let (keeps_data, shadow, rng) = (bench.keeps_data, &bench.shadow, &mut bench.rng);
    let models: Vec<_> = bench
        .rigs
        .iter_mut()
        .map(|rig| {
            let range = start..start + share;
            start += share;
            (rig, Model { range, shadow, keeps_data, rng: Rng::new(rng.next()) })
        })
        .collect();
    std::thread::scope(|scope| {
        for (rig, model) in models {
            scope.spawn(move || model.run(std::slice::from_mut(rig), 300));
        }
    });
    bench.verify(0..start + (1 << 20));
}

/// Threads write neighbouring bytes of the same blocks. None may undo the writes of another.
pub(super) fn neighbours(bench: &mut Bench) {
    let block = bench.block().max(512);
    let (keeps_data, shadow, rng) = (bench.keeps_data, &bench.shadow, &mut bench.rng);
    // Every few bytes belong to another thread; over three blocks.
    let (piece, pieces) = (block / 8 - 1, 24);
    let count = bench.rigs.len() as u64;
    let barrier = Barrier::new(bench.rigs.len());
    let barrier = &barrier;
    std::thread::scope(|scope| {
        for (rig, own) in bench.rigs.iter_mut().zip(0u64..) {
            let mut rng = Rng::new(rng.next());
            scope.spawn(move || {
                barrier.wait();
                for round in 0..200 {
                    let n = rng.below(pieces / count) * count + own;
                    let at = n * piece;
                    let mut bytes = vec![0; piece as usize];
                    if rng.chance(0.2) {
                        rig.ok(Io::Zero { at, len: piece, fua: false, unmap: true, fast: false });
                    } else {
                        rng.fill(&mut bytes);
                        rig.write(at, &bytes);
                    }
                    if keeps_data {
                        shadow.write(at, &bytes);
                        let found = rig.read(at, piece);
                        assert!(
                            found == bytes,
                            "round {round}: what was written to {piece} bytes at {at} is there still"
                        );
                    }
                }
            });
        }
    });
    bench.verify(0..pieces * piece + block);
}

/// Writes of whole blocks, and of a few bytes in the same blocks at the same time. Outside these bytes, every block has the
/// content of the last write of the whole block.
pub(super) fn whole_and_part(bench: &mut Bench) {
    const BLOCKS: u64 = 8;
    let block = bench.block().max(512);
    let (from, to) = (3, 10);
    let check = |n: u64, found: &[u8], whole: &[u8]| {
        same(n * block, &found[..from], &whole[..from]);
        same(n * block + to as u64, &found[to..], &whole[to..]);
    };
    let keeps_data = bench.keeps_data;
    let expected = move |whole: Vec<u8>| if keeps_data { whole } else { vec![0; whole.len()] };

    // On one channel, both in flight, in either order.
    for round in 0..40 {
        let wholes: Vec<_> = (0..BLOCKS).map(|_| bench.noise(block)).collect();
        let rig = bench.rig();
        for (n, whole) in (0u64..).zip(&wholes) {
            let mut ios =
                [rig.write_of(n * block, whole, false), rig.write_of(n * block + from as u64, &[0x11; 7], false)];
            if (n + round) % 2 == 0 {
                ios.reverse();
            }
            for io in ios {
                rig.submit(io);
            }
        }
        assert!(rig.finish().iter().all(|done| done.result == Ok(())));
        for (n, whole) in (0u64..).zip(wholes) {
            let found = rig.read(n * block, block);
            check(n, &found, &expected(whole));
        }
    }

    // One channel writes whole blocks, the others write parts.
    let seed = bench.rng.next();
    let done = AtomicBool::new(false);
    let (first, others) = bench.rigs.split_first_mut().expect("there is a channel");
    std::thread::scope(|scope| {
        for (rig, seed) in others.iter_mut().zip(seed..) {
            let (mut rng, done) = (Rng::new(seed), &done);
            scope.spawn(move || {
                while !done.load(Ordering::Relaxed) {
                    rig.write(rng.below(2) * block + from as u64, &[0x22; 7]);
                }
            });
        }
        // Also if a check fails, so that the other threads end.
        let _end = OnDrop(|| done.store(true, Ordering::Relaxed));
        let mut rng = Rng::new(seed);
        for _ in 0..300 {
            let (n, whole) = (rng.below(2), noise(&mut rng, block));
            first.write(n * block, &whole);
            let found = first.read(n * block, block);
            check(n, &found, &expected(whole));
        }
    });
    bench.write(0, BLOCKS * block);
}

struct OnDrop<F: Fn()>(F);

impl<F: Fn()> Drop for OnDrop<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}

/// Channels can be dropped with requests in flight, and opened again. Their writes were executed or not.
pub(super) fn drop_in_flight(bench: &mut Bench) {
    let (len, read_only) = (bench.block().max(4096), bench.info.caps.read_only);
    for _ in 0..2 {
        let bytes = bench.noise(len);
        for rig in &mut bench.rigs {
            for n in 0..64 {
                let mut buf = rig.buf(n * len, len);
                buf.copy_from(0, &bytes);
                let at = n * len;
                rig.submit(if read_only || n % 2 == 0 {
                    Io::Read { at, buf }
                } else {
                    Io::Write { at, buf, fua: false }
                });
                if !read_only && n % 16 == 0 {
                    rig.submit(Io::Flush);
                }
            }
            rig.channel.kick();
        }
        bench.rigs.clear();
        bench.open();
        if read_only {
            continue;
        }
        for n in 0..64 {
            let found = bench.rig().read(n * len, len);
            let mut before = vec![0; len as usize];
            bench.shadow.read(n * len, &mut before);
            assert!(found == before || (n % 2 == 1 && found == bytes), "block {n} is as before, or as written");
            bench.wrote(n * len, &found);
        }
    }
}

/// Nothing can be changed; everything can be read.
pub(super) fn read_only(bench: &mut Bench) {
    // The present content of the device must not change.
    for range in [0..super::AREA, bench.tail()] {
        let bytes = bench.rig().read(range.start, range.end - range.start);
        bench.wrote(range.start, &bytes);
    }
    let block = bench.block();
    for (at, len) in [(0, 1), (0, block), (1, 2 * block), (bench.capacity - 1, 1)] {
        let rig = bench.rig();
        let ios = [
            rig.write_of(at, &vec![0xa5; len as usize], false),
            Io::Zero { at, len, fua: false, unmap: true, fast: false },
            Io::Discard { at, len, fua: false },
        ];
        for io in ios {
            let asked = format!("{io:?}");
            assert_eq!(bench.rig().one(io).result, Err(Error::ReadOnly), "{asked}");
        }
    }
    bench.rig().ok(Io::Flush);
    for at in [0, 1, block, 12345, bench.capacity - (256 << 10)] {
        for len in [1, 512, block, 2 * block + 1, 128 << 10] {
            bench.verify(at..at + len);
        }
    }
}
