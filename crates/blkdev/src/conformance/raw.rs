//! The steps without channels: a queue alone, which gets only operations that its device claims to support.

use std::time::Instant;

use super::{
    Bench,
    rig::{PATIENCE, readable},
    same,
};
use crate::{
    arena::Arena,
    device::{Completion, Device, Op, Queue, Request},
    error::Error,
    extent::{Extent, ExtentKind},
    mem::Mapping,
};

/// Memory for one step.
fn arena(device: &dyn Device) -> Arena {
    let mapping = Mapping::new(8 << 20).expect("8 MiB of memory");
    device.register(&mapping).expect("memory is registered");
    mapping.arenas(1).remove(0)
}

/// Reaps until no request is missing, as a server would: it sleeps if there is a descriptor to wake it.
fn finish(queue: &mut dyn Queue, mut missing: usize) -> Vec<Completion> {
    let (started, mut done) = (Instant::now(), Vec::new());
    while missing > 0 {
        let before = done.len();
        queue.reap(&mut done);
        let ended = done.len() - before;
        assert!(ended <= missing, "each request completes once: {:?}", &done[before..]);
        missing -= ended;
        assert!(started.elapsed() < PATIENCE, "{missing} requests do not complete within {PATIENCE:?}");
        if ended == 0 && missing > 0 && queue.arm() {
            match queue.wake_fd() {
                Some(fd) => assert!(readable(&[fd], PATIENCE), "no wake-up within {PATIENCE:?}, although armed"),
                None => std::thread::yield_now(),
            }
        }
    }
    done
}

/// One request, which must succeed.
fn one(queue: &mut dyn Queue, op: Op) -> Op {
    let asked = format!("{op:?}");
    queue.push(Request { tag: u64::MAX, op }).unwrap_or_else(|_| panic!("an idle queue has room for {asked}"));
    queue.kick();
    let done = finish(queue, 1).remove(0);
    assert_eq!((done.tag, done.result), (u64::MAX, Ok(())), "{asked}");
    done.op
}

/// Every operation of the device, at its shortest and its longest; a full queue; a drop with requests in flight.
pub(super) fn requests(bench: &mut Bench) {
    let device = bench.device.clone();
    let info = bench.info.clone();
    let mut arena = arena(&*device);
    let mut queue = device.open_queue(8).expect("a queue opens");
    let block = bench.block();

    for len in [block, u64::from(info.transfer_max).min(4 << 20) / block * block] {
        transfer(bench, &mut *queue, &mut arena, len);
    }
    if info.caps.flush {
        one(&mut *queue, Op::Flush);
    }
    if info.caps.prefetch {
        one(&mut *queue, Op::Prefetch { at: bench.capacity - block, len: block });
    }
    if info.caps.status {
        status(bench, &mut *queue);
    }
    if info.caps.zero && !info.caps.read_only {
        zeroes(bench, &mut *queue, &mut arena);
    }
    if info.caps.discard && !info.caps.read_only {
        let unit = u64::from(info.discard_alignment);
        for len in [unit, info.discard_max.min(4 << 20) / unit * unit] {
            one(&mut *queue, Op::Discard { at: 0, len });
        }
    }

    full(&mut *queue, &mut arena, block);
    assert_eq!(arena.free(), arena.capacity(), "all memory is back");

    in_flight(&mut *queue, &mut arena, block);
    drop(queue);
    assert_eq!(arena.free(), arena.capacity(), "a queue that is dropped drains");
    drop(device.open_queue(8).expect("and can be opened again"));
}

/// A write of noise at the end of the device, if it can be written, and a read of the same range.
fn transfer(bench: &mut Bench, queue: &mut dyn Queue, arena: &mut Arena, len: u64) {
    let caps = bench.info.caps;
    let at = bench.capacity - len;
    let mut buf = arena.alloc(len as usize).expect("memory");
    if !caps.read_only {
        let bytes = bench.noise(len);
        buf.copy_from(0, &bytes);
        bench.wrote(at, &bytes);
        let Op::Write { buf: back, .. } = one(queue, Op::Write { at, buf, fua: caps.fua }) else {
            panic!("a write completes as a write");
        };
        same(at, &back.to_vec(), &bytes);
        buf = back;
        buf.zero(0, len as usize);
    }
    let place = buf.offset();
    let Op::Read { at: same_at, buf } = one(queue, Op::Read { at, buf }) else {
        panic!("a read completes as a read");
    };
    assert_eq!((same_at, buf.offset(), buf.len() as u64), (at, place, len), "its own buffer comes back");
    if !caps.read_only {
        let mut expected = vec![0; len as usize];
        bench.shadow.read(at, &mut expected);
        same(at, &buf.to_vec(), &expected);
    }
}

/// The status of the last block, which has noise if the device can be written.
fn status(bench: &Bench, queue: &mut dyn Queue) {
    let block = bench.block();
    let at = bench.capacity - block;
    let Op::Status { extents, .. } = one(queue, Op::Status { at, len: block, extents: Vec::new() }) else {
        panic!("a status completes as a status");
    };
    let [Extent { at: from, len, kind }] = extents[..] else { panic!("one block is of one kind: {extents:?}") };
    assert_eq!((from, len), (at, block), "the range that was asked for");
    let has_noise = !bench.info.caps.read_only && bench.keeps_data;
    assert!(!has_noise || kind == ExtentKind::Data, "noise is data, not {kind:?}");
}

/// Zeroes the end of the device, with and without deallocation: the last block then reads as zeroes.
fn zeroes(bench: &Bench, queue: &mut dyn Queue, arena: &mut Arena) {
    let block = bench.block();
    for len in [block, bench.info.zero_max.min(4 << 20) / block * block] {
        for unmap in [false, true] {
            one(queue, Op::Zero { at: bench.capacity - len, len, unmap });
        }
    }
    let at = bench.capacity - block;
    let mut buf = arena.alloc(block as usize).expect("memory");
    buf.copy_from(0, &vec![0xff; block as usize]);
    let Op::Read { buf, .. } = one(queue, Op::Read { at, buf }) else { panic!("a read") };
    same(at, &buf.to_vec(), &vec![0; block as usize]);
}

/// Up to eight reads that are left in flight.
fn in_flight(queue: &mut dyn Queue, arena: &mut Arena, block: u64) {
    for tag in 0..8 {
        let buf = arena.alloc(block as usize).expect("memory");
        if queue.push(Request { tag, op: Op::Read { at: tag * block, buf } }).is_err() {
            break;
        }
        queue.kick();
    }
}

/// A queue takes requests until it is full, returns the next one unchanged, and completes each request once.
fn full(queue: &mut dyn Queue, arena: &mut Arena, block: u64) {
    for _ in 0..10 {
        let (mut taken, mut refused) = (Vec::new(), false);
        while !refused && taken.len() < 64 {
            let tag = taken.len() as u64 * 3 + 7;
            let buf = arena.alloc(block as usize).expect("memory");
            let (at, place) = (tag * block, buf.offset());
            match queue.push(Request { tag, op: Op::Read { at, buf } }) {
                Ok(()) => taken.push((tag, at, place)),
                Err(Request { tag: same_tag, op: Op::Read { at: same_at, buf } }) => {
                    assert_eq!((same_tag, same_at, buf.offset(), buf.len() as u64), (tag, at, place, block), "refused");
                    refused = true;
                }
                Err(request) => panic!("refused as something else: {request:?}"),
            }
        }
        assert!(!taken.is_empty(), "an idle queue takes a request");
        queue.kick();
        let mut done: Vec<_> = finish(queue, taken.len())
            .iter()
            .map(|done| {
                assert_eq!(done.result, Ok(()), "{:?}", done.op);
                let Op::Read { at, buf } = &done.op else { panic!("a read completes as a read") };
                (done.tag, *at, buf.offset())
            })
            .collect();
        done.sort_unstable();
        assert_eq!(done, taken, "each request completes once, with its own buffer");
    }
}

/// As many queues as the device claims can be open at a time, and not one more.
pub(super) fn queues(bench: &mut Bench) {
    let max = usize::from(bench.info.queues_max);
    let mut open: Vec<_> = (0..max.min(8))
        .map(|n| bench.device.open_queue(4).unwrap_or_else(|error| panic!("queue {n} of {max} opens: {error}")))
        .collect();
    if max <= 8 {
        assert!(bench.device.open_queue(4).is_err(), "there is no queue number {max}");
        open.pop();
        bench.device.open_queue(4).expect("one that was dropped can be opened again");
    }
}

pub(super) fn give_up(device: &dyn Device) {
    let info = device.info();
    let block = u64::from(info.block_size);
    let mut arena = arena(device);
    let mut queue = device.open_queue(8).expect("a queue opens");
    let mut taken = 0;
    for tag in 0..8 {
        let buf = arena.alloc(block as usize).expect("memory");
        if queue.push(Request { tag, op: Op::Read { at: tag * block, buf } }).is_err() {
            break;
        }
        taken += 1;
    }
    queue.kick();
    queue.give_up();
    for done in finish(&mut *queue, taken) {
        assert!(matches!(done.result, Ok(()) | Err(Error::Gone)), "{done:?}");
    }
    let buf = arena.alloc(block as usize).expect("memory");
    queue.push(Request { tag: 9, op: Op::Read { at: 0, buf } }).expect("a dead queue takes requests");
    queue.kick();
    let done = finish(&mut *queue, 1).remove(0);
    assert_eq!((done.tag, done.result), (9, Err(Error::Gone)));
    let started = Instant::now();
    drop(queue);
    assert!(started.elapsed() < PATIENCE, "a dead queue is dropped in bounded time");
}
