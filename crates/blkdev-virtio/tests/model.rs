//! Tests of the driver against a device in this process that conforms, completes out of order, or is hostile.

use std::{
    os::fd::AsFd,
    sync::Arc,
    time::{Duration, Instant},
};

use blkdev::{Completion, Device, Error, Mapping, Op, Queue, Request, conformance};
use blkdev_virtio::{
    Format, Options, VirtioBlk, WriteCache,
    model::{Fault, Local, Model, SERIAL, Spec},
};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

const MIB: u64 = 1 << 20;

// This test does not depend on virtio_bindings.
const INDIRECT: u32 = 28;
const EVENT_IDX: u32 = 29;
const VERSION_1: u32 = 32;
const MULTIQUEUE: u32 = 12;
const CONFIG_WCE: u32 = 11;

/// The options with a change.
fn with(mut options: Options, change: impl FnOnce(&mut Options)) -> Options {
    change(&mut options);
    options
}

fn open(spec: Spec, options: &Options) -> (Arc<Model>, Arc<dyn Device>) {
    let model = Model::new(spec);
    let device = VirtioBlk::open(Local::new(&model), options).unwrap();
    (model, Arc::new(device))
}

/// Waits for `count` completions through the wake-up descriptor; panics after ten seconds.
fn collect(queue: &mut dyn Queue, count: usize) -> Vec<Completion> {
    let end = Instant::now() + Duration::from_secs(10);
    let mut done = Vec::new();
    loop {
        queue.reap(&mut done);
        if done.len() >= count {
            return done;
        }
        if queue.arm() {
            let fd = queue.wake_fd().unwrap();
            let woken = poll(&mut [PollFd::new(fd.as_fd(), PollFlags::POLLIN)], PollTimeout::from(10_000u16));
            assert_eq!(woken, Ok(1), "{} of {count} requests completed, but no wake-up came", done.len());
        }
        assert!(Instant::now() < end, "only {} of {count} requests completed in time", done.len());
    }
}

/// As [`open`], with queues that are started once.
fn open_for_good(spec: Spec, options: &Options) -> (Arc<Model>, Arc<dyn Device>) {
    let model = Model::new(spec);
    let device = VirtioBlk::open(Local::for_good(&model), options).unwrap();
    (model, Arc::new(device))
}

/// Runs the conformance suite with both ring formats.
fn conforms(spec: Spec, options: &Options) {
    let (_, device) = open(spec.clone(), options);
    conformance::check(&device);
    let (_, device) = open(spec.packed(), options);
    conformance::check(&device);
}

#[test]
fn conforms_with_everything() {
    conforms(Spec::new(32 * MIB), &Options::default());
}

#[test]
fn conforms_without_indirect_descriptors() {
    conforms(Spec::new(32 * MIB).without(INDIRECT), &Options::default());
}

#[test]
fn conforms_without_event_index() {
    conforms(Spec::new(32 * MIB).without(EVENT_IDX), &Options::default());
}

#[test]
fn conforms_with_a_plain_ring_of_eight() {
    let options = with(Options::default(), |o| o.queue_size = 8);
    conforms(Spec::new(32 * MIB).without(INDIRECT).without(EVENT_IDX), &options);
}

#[test]
fn conforms_with_queues_that_run_for_good() {
    for spec in [Spec::new(32 * MIB), Spec::new(32 * MIB).without(INDIRECT).without(EVENT_IDX)] {
        for spec in [spec.clone().packed(), spec] {
            let (_, device) = open_for_good(spec, &Options::default());
            conformance::check(&device);
        }
    }
}

#[test]
fn a_format_can_be_chosen() {
    let (_, device) = open(Spec::new(32 * MIB).packed(), &with(Options::default(), |o| o.ring = Some(Format::Split)));
    conformance::check(&device);
    let options = with(Options::default(), |o| o.ring = Some(Format::Packed));
    open(Spec::new(MIB).packed(), &options);
    let e = VirtioBlk::open(Local::new(&Model::new(Spec::new(MIB))), &options).unwrap_err().to_string();
    assert!(e.contains("VIRTIO_F_RING_PACKED"), "{e}");
}

#[test]
fn a_device_that_changes_its_size_is_believed() {
    let (model, device) = open(Spec::new(MIB), &Options::default());
    for capacity in [2 * MIB, 512 * 1024, 3 * MIB] {
        model.resize(capacity);
        let end = Instant::now() + Duration::from_secs(10);
        while device.capacity() != capacity {
            assert!(Instant::now() < end, "the capacity is {}, not {capacity}", device.capacity());
            std::thread::yield_now();
        }
    }
    let memory = Mapping::new(MIB as usize).unwrap();
    device.register(&memory).unwrap();
    let buf = memory.arenas(1).remove(0).alloc(4096).unwrap();
    let mut queue = device.open_queue(1).unwrap();
    queue.push(Request { tag: 1, op: Op::Write { at: 3 * MIB - 4096, buf, fua: false } }).unwrap();
    queue.kick();
    assert_eq!(collect(&mut *queue, 1)[0].result, Ok(()));
}

/// Callers rely on the block size. It stays, and so does the capacity, in whole blocks of it.
#[test]
fn a_device_that_changes_its_block_size_goes_on() {
    let (model, device) = open(Spec::new(MIB).field(20, 4096), &Options::default());
    for (block, sectors) in [(512, 8 * 100 + 3), (65536, 8 * 90 + 1), (0, 8 * 80), (u32::MAX, 8 * 70)] {
        model.reconfigure(20, block);
        model.reconfigure(0, sectors);
        let end = Instant::now() + Duration::from_secs(10);
        while device.capacity() != u64::from(sectors / 8 * 4096) {
            assert!(Instant::now() < end, "the capacity is {}, not {sectors} sectors", device.capacity());
            std::thread::yield_now();
        }
        assert_eq!(device.info().block_size, 4096);
    }
    // An invalid size is ignored: the last valid one stays.
    model.reconfigure(4, u32::MAX);
    let mut queue = device.open_queue(1).unwrap();
    queue.push(Request { tag: 1, op: Op::Flush }).unwrap();
    queue.kick();
    assert_eq!(collect(&mut *queue, 1)[0].result, Ok(()));
    assert_eq!(device.capacity(), 70 * 4096);
}

#[test]
fn memory_is_forgotten_when_it_is_unregistered() {
    let (model, device) = open(Spec::new(MIB), &Options::default());
    let before = model.regions();
    for _ in 0..3 {
        let memory = Mapping::new(1).unwrap();
        device.unregister(&memory);
        device.register(&memory).unwrap();
        assert_eq!(model.regions(), before + 1);
        device.unregister(&memory);
        assert_eq!((model.regions(), Arc::strong_count(&memory)), (before, 1));
    }
    assert!(device.pins_memory() && !device.is_replaced());
    device.refresh();
    let mut queue = device.open_queue(1).unwrap();
    assert!(!queue.is_dead());
    queue.give_up();
    assert!(queue.is_dead());
    device.refresh();
}

#[test]
fn the_write_cache_can_be_switched() {
    let mode = |model: &Model| model.config()[32];
    let with = |write_cache| with(Options::default(), |o| o.write_cache = write_cache);
    let (model, _) = open(Spec::new(MIB), &with(None));
    assert_eq!(mode(&model), 1, "left alone");
    for (cache, byte) in [(WriteCache::Writethrough, 0), (WriteCache::Writeback, 1)] {
        let (model, _) = open(Spec::new(MIB), &with(Some(cache)));
        assert_eq!(mode(&model), byte);
    }
    let spec = Spec::new(MIB).without(CONFIG_WCE);
    let e = VirtioBlk::open(Local::new(&Model::new(spec)), &with(Some(WriteCache::Writeback))).unwrap_err();
    assert!(e.to_string().contains("VIRTIO_BLK_F_CONFIG_WCE"), "{e}");
}

/// Whatever the device writes into ring and slots: every request completes once, at the latest in `give_up`.
#[test]
fn chaos_in_the_ring_does_no_harm() {
    for seed in 1..=40 {
        let spec = Spec { seed, ..Spec::new(MIB).fault(Fault::Chaos, 2) };
        for spec in
            [spec.clone(), spec.clone().without(INDIRECT), spec.clone().packed(), spec.packed().without(INDIRECT)]
        {
            let (_, device) = open(spec, &Options::default());
            let memory = Mapping::new(2 * MIB as usize).unwrap();
            device.register(&memory).unwrap();
            let mut arena = memory.arenas(1).remove(0);
            let mut queue = device.open_queue(32).unwrap();
            let (mut pushed, mut done) = (0, Vec::new());
            let end = Instant::now() + Duration::from_millis(30);
            while Instant::now() < end {
                if let Some(buf) = arena.alloc(4096) {
                    let request = Request { tag: pushed, op: Op::Read { at: 0, buf } };
                    pushed += u64::from(queue.push(request).is_ok());
                }
                queue.kick();
                queue.reap(&mut done);
                queue.arm();
            }
            queue.give_up();
            queue.reap(&mut done);
            let mut tags: Vec<u64> = done.iter().map(|c| c.tag).collect();
            tags.sort_unstable();
            assert_eq!(tags, (0..pushed).collect::<Vec<_>>(), "seed {seed}");
        }
    }
}

#[test]
fn conforms_with_small_segments() {
    conforms(Spec::new(32 * MIB).segments(4096, 126), &Options::default());
    conforms(Spec::new(32 * MIB).segments(1536, 16).without(INDIRECT), &Options::default());
}

#[test]
fn conforms_with_large_blocks_on_one_queue() {
    conforms(Spec::new(32 * MIB).field(20, 4096).without(MULTIQUEUE), &Options::default());
}

#[test]
fn conforms_without_used_lengths() {
    conforms(Spec::new(32 * MIB).fault(Fault::NoLengths, 0), &Options::default());
}

#[test]
fn conforms_read_only() {
    let (_, device) = open(Spec::new(32 * MIB).read_only(), &Options::default());
    conformance::check_read_only(&device);
    let (_, device) = open(Spec::new(32 * MIB), &with(Options::default(), |o| o.read_only = true));
    conformance::check_read_only(&device);
}

#[test]
fn info_tells_the_limits() {
    let (_, device) = open(Spec::new(MIB).segments(4096, 100), &with(Options::default(), |o| o.queue_size = 64));
    let info = device.info();
    assert_eq!((info.serial.as_str(), info.queues_max, info.depth_max), (SERIAL, 4, 64));
    assert_eq!((info.transfer_max, info.zero_max, info.discard_max), (62 * 4096, 4096 * 512, 8192 * 512));
    assert!(info.caps.flush && info.caps.zero && info.caps.discard && !info.caps.read_only);
    assert_eq!(device.capacity(), MIB);
}

#[test]
fn what_cannot_be_driven_is_refused() {
    let refuse = |spec: Spec, options: Options, part: &str| {
        let e = VirtioBlk::open(Local::new(&Model::new(spec)), &options).unwrap_err().to_string();
        assert!(e.contains(part), "{e}");
    };
    let options = Options::default;
    refuse(Spec::new(MIB).without(VERSION_1), options(), "older than virtio 1.0");
    refuse(Spec::new(MIB).field(20, 100), options(), "block size 100");
    refuse(Spec::new(MIB).segments(1, 1), options(), "too little");
    refuse(Spec::new(MIB), with(options(), |o| o.queue_size = 100), "queue size 100");
    refuse(Spec::new(MIB), with(options(), |o| o.queues = Some(5)), "the device has 4");
    refuse(Spec::new(MIB), with(options(), |o| o.queues = Some(0)), "0 queues");
    let timeout = Some(Duration::from_millis(200));
    refuse(Spec::new(MIB).fault(Fault::Silent, 0), with(options(), |o| o.timeout = timeout), "does not answer");
    for fault in [Fault::WrongId, Fault::SameIdTwice, Fault::IndexJump, Fault::LengthTooLong] {
        refuse(Spec::new(MIB).fault(fault, 0), with(options(), |o| o.timeout = timeout), "used");
    }
    for fault in [Fault::WrongId, Fault::LengthTooLong] {
        refuse(Spec::new(MIB).packed().fault(fault, 0), with(options(), |o| o.timeout = timeout), "used");
    }
}

/// Pushes 40 reads to a device that fails from the 30th on, and returns their completions.
fn reads(spec: Spec) -> (Vec<Completion>, Arc<dyn Device>, Box<dyn Queue>) {
    // Two requests were sent during open.
    let spec = Spec { after: 32, ..spec };
    let (_, device) = open(spec, &Options::default());
    let memory = Mapping::new(MIB as usize).unwrap();
    device.register(&memory).unwrap();
    let mut arena = memory.arenas(1).remove(0);
    let mut queue = device.open_queue(64).unwrap();
    for tag in 0..40 {
        let mut buf = arena.alloc(4096).unwrap();
        buf.zero(0, 4096);
        queue.push(Request { tag, op: Op::Read { at: tag * 4096, buf } }).unwrap();
    }
    queue.kick();
    let done = collect(&mut *queue, 40);
    assert_eq!(done.len(), 40);
    (done, device, queue)
}

#[test]
fn nonsense_in_the_ring_ends_the_device() {
    let faults = [Fault::WrongId, Fault::SameIdTwice, Fault::IndexJump, Fault::LengthTooLong];
    let split = faults.map(|fault| (Spec::new(MIB), fault));
    let packed =
        [Fault::WrongId, Fault::SameIdTwice, Fault::LengthTooLong].map(|fault| (Spec::new(MIB).packed(), fault));
    for (spec, fault) in split.into_iter().chain(packed) {
        let (done, device, mut queue) = reads(spec.fault(fault, 0));
        let gone = done.iter().filter(|c| c.result == Err(Error::Gone)).count();
        assert!((1..=40).contains(&gone), "{fault:?}: {gone} gone");
        for Completion { op, result, .. } in &done {
            let Op::Read { buf, .. } = op else { panic!("a read completes as a read") };
            match result {
                Ok(()) => assert_eq!(buf.len(), 4096, "{fault:?}"),
                Err(e) => assert_eq!((*e, buf.is_empty()), (Error::Gone, true), "{fault:?}: memory is abandoned"),
            }
        }
        // The device stays dead, for this queue and for all others.
        queue.push(Request { tag: 99, op: Op::Flush }).unwrap();
        assert!(!queue.arm());
        assert_eq!(collect(&mut *queue, 1)[0].result, Err(Error::Gone));
        assert!(device.open_queue(1).is_err());
    }
}

#[test]
fn nonsense_in_a_request_fails_the_request() {
    let faults = [Fault::LengthTooShort, Fault::NoLengths, Fault::Status(3), Fault::Status(0xff), Fault::NoStatus];
    for (spec, fault) in faults.into_iter().flat_map(|f| [(Spec::new(MIB), f), (Spec::new(MIB).packed(), f)]) {
        let (done, _device, mut queue) = reads(spec.fault(fault, 0));
        let failed = done.iter().filter(|c| c.result == Err(Error::Io)).count();
        let good = done.iter().filter(|c| c.result.is_ok()).count();
        assert!(failed >= 1 && failed + good == 40, "{fault:?}: {failed} failed, {good} good");
        queue.push(Request { tag: 99, op: Op::Flush }).unwrap();
        queue.kick();
        assert_eq!(collect(&mut *queue, 1).len(), 1, "{fault:?}: the queue lives");
    }
}

#[test]
fn a_silent_device_can_be_given_up() {
    let spec = |fault| Spec::new(MIB).fault(fault, 2);
    for spec in [Fault::Silent, Fault::Scribble].into_iter().flat_map(|f| [spec(f), spec(f).packed()]) {
        let (_, device) = open(spec, &Options::default());
        let memory = Mapping::new(MIB as usize).unwrap();
        device.register(&memory).unwrap();
        let mut arena = memory.arenas(1).remove(0);
        let (mut queue, mut other) = (device.open_queue(64).unwrap(), device.open_queue(64).unwrap());
        for tag in 0..20 {
            let (at, buf) = (tag * 4096, arena.alloc(4096).unwrap());
            let op = if tag % 2 == 0 { Op::Read { at, buf } } else { Op::Write { at, buf, fua: false } };
            queue.push(Request { tag, op }).unwrap();
        }
        queue.kick();
        assert!(other.arm());
        queue.give_up();
        let done = collect(&mut *queue, 20);
        assert!(done.iter().all(|c| c.result == Err(Error::Gone)));
        let fd = other.wake_fd().unwrap();
        assert_eq!(
            poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], PollTimeout::from(5000u16)),
            Ok(1),
            "a waiting queue wakes"
        );
        drop(done);
        assert_eq!(arena.free(), arena.capacity() - 20 * 4096, "memory that the device may still access is not reused");
    }
}

#[test]
fn give_up_conforms() {
    for spec in [Spec::new(32 * MIB), Spec::new(32 * MIB).packed()] {
        let (_, device) = open(spec.clone(), &Options::default());
        conformance::check_give_up(&device);
        let (_, device) = open_for_good(spec, &Options::default());
        conformance::check_give_up(&device);
    }
}

#[test]
fn a_queue_that_nobody_waits_for_is_not_notified() {
    let plain = Spec::new(MIB).without(EVENT_IDX);
    for spec in [Spec::new(MIB), plain.clone(), Spec::new(MIB).packed(), plain.packed()] {
        let (model, device) = open(spec, &Options::default());
        let opening = model.notifications();
        let mut queue = device.open_queue(64).unwrap();
        let mut done = Vec::new();
        // More than 2^16 requests, so that all indices wrap.
        for round in 0..3000 {
            for tag in 0..32 {
                queue.push(Request { tag, op: Op::Flush }).unwrap();
            }
            queue.kick();
            while done.len() < 32 {
                queue.reap(&mut done);
                std::thread::yield_now();
            }
            assert!(done.drain(..).all(|c| c.result.is_ok()), "round {round}");
        }
        assert_eq!(model.taken(), 2 + 3000 * 32);
        assert_eq!(model.notifications(), opening);
        queue.push(Request { tag: 1, op: Op::Flush }).unwrap();
        assert!(queue.arm());
        queue.kick();
        let fd = queue.wake_fd().unwrap();
        assert_eq!(poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], PollTimeout::from(5000u16)), Ok(1));
        assert_eq!(model.notifications(), opening + 1);
    }
}

#[test]
fn a_full_queue_gives_the_request_back() {
    let (_, device) = open(Spec::new(MIB).fault(Fault::Silent, 2), &Options::default());
    let mut queue = device.open_queue(3).unwrap();
    for tag in 0..3 {
        queue.push(Request { tag, op: Op::Flush }).unwrap();
    }
    assert_eq!(queue.push(Request { tag: 3, op: Op::Flush }).unwrap_err().tag, 3);
    queue.give_up();
}

#[test]
fn queues_are_counted_and_reused() {
    let options = with(Options::default(), |o| o.queues = Some(2));
    let (split, packed) = (Spec::new(MIB), Spec::new(MIB).packed());
    for device in [
        open(split.clone(), &options).1,
        open(packed.clone(), &options).1,
        open_for_good(split, &options).1,
        open_for_good(packed, &options).1,
    ] {
        reuse(&device);
    }
}

fn reuse(device: &Arc<dyn Device>) {
    for _ in 0..20 {
        let (mut a, b) = (device.open_queue(8).unwrap(), device.open_queue(200).unwrap());
        let e = device.open_queue(8).unwrap_err().to_string();
        assert!(e.contains("all 2 queues"), "{e}");
        drop(b);
        a.push(Request { tag: 1, op: Op::Flush }).unwrap();
        // Dropped with a request in flight: the queue drains first.
    }
}
