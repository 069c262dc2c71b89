//! Tests of the driver against a controller in this process that conforms, completes out of order, or is hostile.

use std::{
    os::fd::AsFd,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use blkdev::{Arena, Completion, Device, Error, Io, Mapping, Op, Plan, Queue, Request, conformance, fault::Rng};
use blkdev_nvme::{
    Nvme, Options,
    model::{Fault, Model, SERIAL, Spec},
    spec::Status,
};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

const MIB: u64 = 1 << 20;

/// The options with a change.
fn with(mut options: Options, change: impl FnOnce(&mut Options)) -> Options {
    change(&mut options);
    options
}

fn open(spec: Spec, options: &Options) -> (Arc<Model>, Arc<dyn Device>) {
    let model = Model::new(spec);
    let device = Nvme::open(Arc::clone(&model) as _, options).unwrap();
    (model, Arc::new(device))
}

/// Runs the suite, and checks the controller's state afterwards.
fn conforms(spec: Spec, options: &Options) {
    let (model, device) = open(spec, options);
    conformance::check(&device);
    drop(device);
    assert!(model.was_shut_down() && !model.is_enabled());
}

#[test]
fn conforms_with_page_lists() {
    conforms(Spec::new(32 * MIB), &Options::default());
}

#[test]
fn conforms_with_sgls_and_large_blocks() {
    conforms(Spec { sgl: true, mdts: 0, ..Spec::new(32 * MIB).block_shift(12) }, &Options::default());
}

#[test]
fn conforms_with_long_lists_and_short_ranges() {
    conforms(Spec { mdts: 0, range_max: 100, ..Spec::new(32 * MIB) }, &Options::default());
}

#[test]
fn conforms_with_large_pages_and_one_small_queue() {
    let options = with(Options::default(), |o| o.queue_size = 3);
    conforms(Spec { page_shift: 16, mdts: 1, queues: 1, ..Spec::new(32 * MIB).block_shift(16) }, &options);
}

#[test]
fn conforms_with_no_optional_command_and_no_cache() {
    conforms(Spec { oncs: 0, cache: false, mdts: 1, ..Spec::new(32 * MIB) }, &Options::default());
}

#[test]
fn conforms_with_a_reset_in_between() {
    let (model, device) = open(Spec::new(32 * MIB).fault(Fault::FatalOnce, 300), &Options::default());
    conformance::check(&device);
    assert_eq!(model.resets(), 1);
}

#[test]
fn conforms_read_only() {
    let (_, device) = open(Spec { write_protected: true, ..Spec::new(32 * MIB) }, &Options::default());
    conformance::check_read_only(&device);
    let (_, device) = open(Spec::new(32 * MIB), &with(Options::default(), |o| o.read_only = true));
    conformance::check_read_only(&device);
}

#[test]
fn info_tells_what_the_controller_told() {
    let spec = Spec { nsid: 7, range_max: 1000, ..Spec::new(MIB) };
    let (_, device) = open(spec, &with(Options::default(), |o| o.queue_size = 64));
    let info = device.info();
    assert_eq!((info.serial.as_str(), info.target.as_str()), (SERIAL, "model/7"));
    assert_eq!((info.queues_max, info.depth_max), (4, 63));
    assert_eq!((info.block_size, info.preferred_block_size, info.discard_alignment), (512, 4096, 4096));
    // 2^5 pages of 4096 bytes; 65536 blocks; 16 ranges of 1000 blocks.
    assert_eq!((info.transfer_max, info.zero_max, info.discard_max), (131072, 32 << 20, 16_000 * 512));
    assert!(info.caps.flush && info.caps.fua && info.caps.zero && info.caps.discard && !info.caps.read_only);
    assert_eq!(device.capacity(), MIB);
}

#[test]
fn what_cannot_be_driven_is_refused() {
    let refuse = |spec: Spec, options: Options, part: &str| {
        let model = Model::new(spec);
        let e = Nvme::open(Arc::clone(&model) as _, &options).unwrap_err().to_string();
        assert!(e.contains(part), "{e}");
    };
    let options = Options::default;
    refuse(Spec { metadata: 8, ..Spec::new(MIB) }, options(), "8 bytes of metadata");
    refuse(Spec::new(0), options(), "no namespace 1");
    refuse(Spec::new(MIB), with(options(), |o| o.nsid = Some(2)), "no namespace 2; active are: 1");
    refuse(Spec::new(MIB).block_shift(8), options(), "blocks of 2^8");
    refuse(Spec::new(MIB), with(options(), |o| o.queue_size = 1025), "queue size 1025");
    refuse(Spec::new(MIB), with(options(), |o| o.queues = Some(5)), "the device has 4");
    refuse(Spec::new(MIB), with(options(), |o| o.queues = Some(0)), "0 queues");
    refuse(Spec { queues: 0, ..Spec::new(MIB) }, options(), "1 MSI-X vectors");
}

#[test]
fn registers_that_make_no_sense_are_refused() {
    let refuse = |spec: Spec, part: &str| {
        let model = Model::new(spec);
        let e = Nvme::open(Arc::clone(&model) as _, &Options::default()).unwrap_err().to_string();
        assert!(e.starts_with("nvme model: ") && e.contains(part), "{e}");
    };
    let spec = || Spec::new(MIB);
    let cap = |more: u64| Some(1 << 37 | 2 << 24 | 1 << 16 | more);
    // Doorbells 128 KiB apart.
    refuse(Spec { cap: cap(15 << 32 | 1023), ..spec() }.bar_len(0x4000), "(CAP.DSTRD)");
    refuse(spec().bar_len(0x1008), "(CAP.DSTRD)");
    refuse(spec().bar_len(0x100f), "(CAP.DSTRD)");
    refuse(spec().bar_len(0x1000), "too few");
    refuse(spec().bar_len(0), "too few");
    refuse(Spec { cap: cap(0), ..spec() }, "(CAP.MQES)");
    refuse(Spec { cap: cap(5 << 48 | 1023), ..spec() }, "128 KiB, at most 64 are supported (CAP.MPSMIN)");
    refuse(Spec { cap: cap(15 << 48 | 1023), ..spec() }, "131072 KiB");
    refuse(Spec { cap: Some(0), ..spec() }, "(CAP.CSS)");
    refuse(Spec { cap: Some(u64::MAX), ..spec() }, "all ones");
    refuse(Spec { vectors: Some(0), ..spec() }, "0 MSI-X vectors");
    refuse(
        Spec { mdts: 1, ..spec() }.block_shift(16),
        "blocks of 65536 bytes, but the controller transfers at most 8192",
    );
}

#[test]
fn doorbells_far_apart_are_found() {
    let stride = 128 << 10;
    let spec = Spec { cap: Some(1 << 37 | 2 << 24 | 1 << 16 | 15 << 32 | 1023), ..Spec::new(32 * MIB) };
    conforms(spec.bar_len(0x1000 + 2 * stride * 3), &Options::default());
}

/// Opens a controller with arbitrary values, and works with it. Everything must end in bounded time, without a panic.
fn survives(spec: &Spec, seed: u64) -> bool {
    let started = Instant::now();
    let model = Model::new(Spec { noise: Some(seed), ..spec.clone() });
    let options = with(Options::default(), |o| o.timeout = Some(Duration::from_millis(40)));
    let opened = match Nvme::open(Arc::clone(&model) as _, &options) {
        Ok(device) => {
            let device: Arc<dyn Device> = Arc::new(device);
            let mut plan = Plan::new(MIB as usize);
            plan.depth = 32;
            if let Ok(mut channels) = plan.open(&device, 1) {
                let (mut channel, mut rng, mut done) = (channels.remove(0), Rng::new(seed), Vec::new());
                for tag in 0..24 {
                    let len = 1 + rng.below(256 << 10).min(device.capacity() - 1);
                    let at = rng.below(device.capacity() - len + 1);
                    let io = match rng.below(6) {
                        0 => Io::Zero { at, len, fua: false, unmap: true, fast: true },
                        1 => Io::Discard { at, len, fua: false },
                        2 => Io::Flush,
                        n => match channel.alloc(at, len as usize) {
                            Some(buf) if n == 3 => Io::Write { at, buf, fua: true },
                            Some(buf) => Io::Read { at, buf },
                            None => continue,
                        },
                    };
                    channel.submit(tag, io);
                }
                channel.kick();
                while channel.in_flight() > 0 {
                    channel.tick(Instant::now());
                    channel.reap(&mut done);
                    std::thread::sleep(Duration::from_micros(100));
                    assert!(started.elapsed() < Duration::from_secs(60), "seed {seed}: all requests end");
                }
            }
            true
        }
        Err(e) => {
            assert!(e.to_string().starts_with("nvme model: "), "seed {seed}: {e}");
            false
        }
    };
    assert!(started.elapsed() < Duration::from_secs(60), "seed {seed}: {:?}", started.elapsed());
    opened
}

/// Counts the panics of all threads, the driver's included, except those that another test in this process causes on purpose.
fn without_panics(run: impl FnOnce()) {
    static PANICS: AtomicUsize = AtomicUsize::new(0);
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        if !info.to_string().contains("was to panic") {
            PANICS.fetch_add(1, Ordering::SeqCst);
        }
        before(info);
    }));
    run();
    assert_eq!(PANICS.load(Ordering::SeqCst), 0, "no thread panics");
}

#[test]
fn a_controller_that_says_anything_does_no_harm() {
    without_panics(|| {
        let mut opened = 0;
        for seed in 0..1500 {
            let shift = [9, 12, 16][seed as usize % 3];
            let spec = Spec { sgl: seed % 2 == 0, mdts: (seed % 7) as u8 + 4, ..Spec::new(4 * MIB).block_shift(shift) };
            opened += u32::from(survives(&spec, seed));
        }
        assert!(opened > 100, "{opened} controllers could be opened");
    });
}

#[test]
fn registers_that_say_anything_do_no_harm() {
    without_panics(|| {
        let mut opened = 0;
        for seed in 0..1500 {
            let mut rng = Rng::new(!seed);
            let mut cap = rng.next() & !(0xff << 24);
            if rng.below(4) != 0 {
                // Within the valid range; otherwise nothing else would be tested.
                cap = cap & !(0xf << 48) | 1 << 37 | rng.below(6) << 48;
            }
            let len = [0, 0x14, 0x1000, 0x1008, 0x1010, 0x1018, 0x2000, 0x4000, 0x20_0000, 1 << 40];
            let spec = Spec {
                cap: Some(cap),
                bar_len: Some(len[rng.below(10) as usize]),
                vectors: Some([0, 1, 2, 5, 2048, u16::MAX][rng.below(6) as usize]),
                ..Spec::new(4 * MIB)
            };
            opened += u32::from(survives(&spec, seed));
        }
        assert!(opened > 20, "{opened} controllers could be opened");
    });
}

/// A queue with memory.
struct Rig {
    model: Arc<Model>,
    device: Arc<dyn Device>,
    arena: Arena,
    queue: Box<dyn Queue>,
}

fn rig(spec: Spec, options: &Options) -> Rig {
    let (model, device) = open(spec, options);
    let memory = Mapping::new(MIB as usize).unwrap();
    device.register(&memory).unwrap();
    let arena = memory.arenas(1).remove(0);
    let queue = device.open_queue(64).unwrap();
    Rig { model, device, arena, queue }
}

impl Rig {
    /// Pushes a request, once the controller is not being reset.
    fn push(&mut self, mut request: Request) {
        let end = Instant::now() + Duration::from_secs(5);
        while let Err(back) = self.queue.push(request) {
            assert!(Instant::now() < end, "a queue with few requests is full only briefly");
            self.queue.reap(&mut Vec::new());
            request = back;
        }
    }

    /// Another queue of the device, with its own memory.
    fn beside(&self) -> Self {
        let memory = Mapping::new(MIB as usize).unwrap();
        self.device.register(&memory).unwrap();
        let (model, device) = (Arc::clone(&self.model), Arc::clone(&self.device));
        let queue = device.open_queue(8).unwrap();
        Self { model, device, arena: memory.arenas(1).remove(0), queue }
    }

    /// Pushes 40 writes at once.
    fn writes(&mut self) {
        for tag in 0..40 {
            let mut buf = self.arena.alloc(4096).unwrap();
            buf.copy_from(0, &[tag as u8 + 1; 4096]);
            self.push(Request { tag, op: Op::Write { at: tag * 4096, buf, fua: false } });
        }
        self.queue.kick();
    }

    /// Checks the data written by [`writes`](Self::writes).
    fn is_written(&mut self) {
        for tag in 0..40 {
            let buf = self.arena.alloc(4096).unwrap();
            self.push(Request { tag, op: Op::Read { at: tag * 4096, buf } });
            self.queue.kick();
            let done = self.collect(1).remove(0);
            let Op::Read { buf, .. } = &done.op else { panic!("a read completes as a read") };
            assert_eq!((done.result, buf.to_vec()), (Ok(()), vec![tag as u8 + 1; 4096]));
        }
    }

    /// Pushes 40 reads at once.
    fn reads(&mut self) {
        for tag in 0..40 {
            let buf = self.arena.alloc(4096).unwrap();
            self.push(Request { tag, op: Op::Read { at: tag * 4096, buf } });
        }
        self.queue.kick();
    }

    /// Waits for `count` completions through the wake-up descriptor; panics after ten seconds.
    fn collect(&mut self, count: usize) -> Vec<Completion> {
        let end = Instant::now() + Duration::from_secs(10);
        let mut done = Vec::new();
        loop {
            self.queue.reap(&mut done);
            if done.len() >= count {
                done.sort_by_key(|done| done.tag);
                return done;
            }
            if self.queue.arm() {
                let fd = self.queue.wake_fd().unwrap();
                let woken = poll(&mut [PollFd::new(fd.as_fd(), PollFlags::POLLIN)], PollTimeout::from(10_000u16));
                assert_eq!(woken, Ok(1), "{} of {count} requests completed, but no wake-up came", done.len());
            }
            assert!(Instant::now() < end, "only {} of {count} requests completed in time", done.len());
        }
    }

    /// Checks a dead device: memory is not reused, all requests fail, and the controller is stopped.
    fn is_over(&mut self, done: &[Completion]) {
        let lost = done.iter().filter(|done| done.result == Err(Error::Gone)).count();
        assert!(lost > 0, "something was in flight");
        for done in done {
            let Op::Read { buf, .. } = &done.op else { panic!("a read completes as a read") };
            assert_eq!(
                buf.is_empty(),
                done.result == Err(Error::Gone),
                "the memory of lost requests is abandoned: {done:?}"
            );
        }
        let buf = self.arena.alloc(4096).unwrap();
        self.queue.push(Request { tag: 99, op: Op::Read { at: 0, buf } }).unwrap();
        self.queue.kick();
        let done = self.collect(1);
        assert_eq!((done[0].tag, done[0].result), (99, Err(Error::Gone)));
        assert!(self.device.open_queue(1).is_err());
    }
}

fn quick() -> Options {
    with(Options::default(), |o| o.timeout = Some(Duration::from_millis(800)))
}

#[test]
fn nonsense_ends_the_device() {
    for fault in [Fault::Doubled, Fault::WrongId] {
        let mut rig = rig(Spec::new(MIB).fault(fault, 10), &quick());
        rig.reads();
        let done = rig.collect(40);
        assert_eq!(done.len(), 40, "{fault:?}");
        rig.is_over(&done);
        until(|| !rig.model.is_enabled() && !rig.model.is_bus_master());
    }
}

#[test]
fn a_device_that_is_removed_ends_in_bounded_time() {
    let mut rig = rig(Spec::new(MIB).fault(Fault::Removed, 10), &Options::default());
    let started = Instant::now();
    rig.reads();
    let done = rig.collect(40);
    assert!(started.elapsed() < Duration::from_secs(3), "{:?}", started.elapsed());
    rig.is_over(&done);
}

#[test]
fn a_controller_that_fails_is_reset_and_nothing_is_lost() {
    let mut rig = rig(Spec::new(MIB).fault(Fault::FatalOnce, 10), &Options::default());
    let mut other = rig.beside();
    let mappings = rig.model.mappings();
    rig.writes();
    assert!(rig.collect(40).iter().all(|done| done.result == Ok(())), "requests in flight were sent again");
    other.is_written();
    rig.is_written();
    assert_eq!((rig.model.resets(), rig.model.mappings()), (1, mappings));
    // For a queue that was closed, and one that was opened later.
    drop(other);
    other = rig.beside();
    other.is_written();
}

#[test]
fn a_controller_that_hangs_is_reset_and_works_again() {
    for fault in [Fault::Hung, Fault::Deaf] {
        let mut rig = rig(Spec::new(MIB).fault(fault, 10), &quick());
        let mut other = rig.beside();
        let started = Instant::now();
        rig.writes();
        let done = rig.collect(40);
        assert!(
            started.elapsed() >= Duration::from_millis(500),
            "{fault:?}: not before three quarters of the time-out"
        );
        let failed: Vec<_> = done.iter().filter(|done| done.result.is_err()).collect();
        assert!(failed.len() == 30 && failed.iter().all(|done| done.result == Err(Error::Io)), "{fault:?}: {failed:?}");
        drop(done);
        assert_eq!(rig.arena.free(), rig.arena.capacity(), "{fault:?}: all memory was returned");
        rig.writes();
        assert!(rig.collect(40).iter().all(|done| done.result == Ok(())), "{fault:?}");
        other.is_written();
        assert_eq!(rig.model.resets(), 1, "{fault:?}");
    }
}

#[test]
fn a_queue_is_closed_while_the_controller_is_reset() {
    let mut rig = rig(Spec::new(MIB).fault(Fault::Hung, 0), &quick());
    let before = rig.model.mappings();
    rig.writes();
    until(|| rig.model.resets() > 0);
    drop(rig.queue);
    rig.queue = rig.device.open_queue(64).unwrap();
    assert_eq!(rig.model.mappings(), before);
    rig.writes();
    assert!(rig.collect(40).iter().all(|done| done.result == Ok(())));
}

#[test]
fn a_controller_that_fails_again_and_again_is_given_up() {
    let mut rig = rig(Spec::new(MIB).fault(Fault::Fatal, 10), &Options::default());
    let started = Instant::now();
    while rig.device.open_queue(1).is_ok() {
        rig.reads();
        for done in rig.collect(40) {
            assert!(matches!(done.result, Ok(()) | Err(Error::Io | Error::Gone)), "{done:?}");
        }
        assert!(started.elapsed() < Duration::from_secs(20));
    }
    until(|| !rig.model.is_enabled() && !rig.model.is_bus_master());
    assert_eq!(rig.model.resets(), 4, "the last reset stops the controller");
}

#[test]
fn an_idle_device_that_is_removed_is_noticed() {
    let mut rig = rig(Spec::new(MIB), &Options::default());
    rig.model.remove();
    std::thread::sleep(Duration::from_millis(1500));
    rig.reads();
    let done = rig.collect(40);
    assert!(done.iter().all(|done| done.result == Err(Error::Gone)));
}

#[test]
fn a_device_that_is_asked_back_is_let_go() {
    let mut rig = rig(Spec::new(MIB).fault(Fault::Silent, 10), &Options::default());
    rig.reads();
    rig.model.ask_back();
    let started = Instant::now();
    let done = rig.collect(40);
    assert!(started.elapsed() < Duration::from_secs(2));
    rig.is_over(&done);
    until(|| !rig.model.is_enabled() && !rig.model.is_bus_master());
}

#[test]
fn a_lost_command_is_aborted_and_the_device_lives_on() {
    let mut rig = rig(Spec::new(MIB).fault(Fault::Lost, 10), &quick());
    let started = Instant::now();
    rig.reads();
    let done = rig.collect(40);
    assert!(started.elapsed() >= Duration::from_millis(300), "not before half of the time-out");
    let failed: Vec<_> = done.iter().filter(|done| done.result.is_err()).collect();
    assert_eq!((failed.len(), failed[0].result), (1, Err(Error::Io)));
    drop(done);
    assert_eq!(rig.arena.free(), rig.arena.capacity(), "all memory was returned");
    rig.reads();
    assert!(rig.collect(40).iter().all(|done| done.result == Ok(())));
}

#[test]
fn what_cannot_be_aborted_is_given_up() {
    let mut rig = rig(Spec::new(MIB).fault(Fault::Silent, 10), &quick());
    rig.reads();
    let mut done = rig.collect(10);
    std::thread::sleep(Duration::from_millis(800));
    rig.queue.reap(&mut done);
    assert_eq!(done.len(), 10, "only the queue's owner gives it up");
    rig.queue.give_up();
    done.extend(rig.collect(30));
    rig.is_over(&done);
    until(|| !rig.model.is_enabled() && !rig.model.is_bus_master());
}

#[test]
fn what_cannot_be_reset_is_given_up() {
    let mut rig = rig(Spec::new(MIB).fault(Fault::Silent, 10), &quick());
    rig.reads();
    let done = rig.collect(40);
    rig.is_over(&done);
    until(|| !rig.model.is_enabled() && !rig.model.is_bus_master());
}

#[test]
fn a_queue_of_a_silent_device_is_dropped_in_bounded_time() {
    let mut rig = rig(Spec::new(MIB).fault(Fault::Silent, 10), &quick());
    rig.reads();
    let started = Instant::now();
    drop(rig.queue);
    assert!(started.elapsed() < Duration::from_secs(3));
}

#[test]
fn errors_are_kept_apart() {
    let check = |status: Status, error: Error| {
        let mut rig = rig(Spec::new(MIB).fault(Fault::Status(status), 0), &quick());
        rig.reads();
        assert!(rig.collect(40).iter().all(|done| done.result == Err(error)), "{status}");
    };
    check(Status::new(0, 0x81), Error::NoSpace);
    check(Status::new(0, 0x20), Error::ReadOnly);
    check(Status::new(0, 0x02), Error::Invalid);
    check(Status::new(0, 0x01), Error::NotSupported);
    check(Status::new(2, 0x81), Error::Io);

    // For operations with optional fields, an invalid field means that the controller does not support the operation.
    let mut rig = rig(Spec::new(MIB).fault(Fault::Status(Status::new(0, 2)), 0), &quick());
    rig.queue.push(Request { tag: 1, op: Op::Zero { at: 0, len: 4096, unmap: true } }).unwrap();
    rig.queue.push(Request { tag: 2, op: Op::Discard { at: 0, len: 4096 } }).unwrap();
    rig.queue.kick();
    assert!(rig.collect(2).iter().all(|done| done.result == Err(Error::NotSupported)));
}

#[test]
fn a_change_of_capacity_is_seen() {
    let (model, device) = open(Spec::new(MIB), &Options::default());
    for mib in [2, 1, 3] {
        model.resize((mib * MIB) >> 9);
        until(|| device.capacity() == mib * MIB);
    }
}

#[test]
fn a_namespace_that_goes_ends_the_device() {
    let mut rig = rig(Spec::new(MIB), &Options::default());
    rig.model.resize(0);
    until(|| rig.device.open_queue(1).is_err());
    rig.reads();
    assert!(rig.collect(40).iter().all(|done| done.result == Err(Error::Gone)));
}

#[test]
fn queues_give_their_memory_back() {
    let (model, device) = open(Spec::new(MIB), &Options::default());
    let before = model.mappings();
    for _ in 0..10 {
        let open: Vec<_> = (0..4).map(|_| device.open_queue(8).unwrap()).collect();
        assert_eq!(model.mappings(), before + 4);
        drop(open);
        assert_eq!(model.mappings(), before);
    }
}

#[test]
fn memory_that_comes_and_goes_leaves_no_mapping() {
    let (model, device) = open(Spec::new(MIB), &Options::default());
    let before = model.mappings();
    for _ in 0..100 {
        let memory = Mapping::new(1).unwrap();
        device.register(&memory).unwrap();
        device.register(&memory).unwrap();
        let mut queue = device.open_queue(8).unwrap();
        let buf = memory.arenas(1).remove(0).alloc(4096).unwrap();
        queue.push(Request { tag: 1, op: Op::Read { at: 0, buf } }).unwrap();
        drop(queue);
        device.unregister(&memory);
        device.unregister(&memory);
        assert_eq!(Arc::strong_count(&memory), 1, "the device holds no reference");
    }
    assert_eq!(model.mappings(), before);
}

/// How long the machine kept the test from running: without reaps, a queue makes no progress.
struct Stall {
    last: Instant,
    longest: Duration,
}

impl Stall {
    fn new() -> Self {
        Self { last: Instant::now(), longest: Duration::ZERO }
    }

    fn look(&mut self) {
        let now = Instant::now();
        self.longest = self.longest.max(now - self.last);
        self.last = now;
    }
}

#[test]
fn a_slow_controller_that_completes_something_is_left_alone() {
    let pace = Duration::from_millis(100);
    let options = with(Options::default(), |o| o.timeout = Some(Duration::from_secs(2)));
    let mut rig = rig(Spec::new(MIB).fault(Fault::Slow(pace), 0), &options);
    rig.writes();
    let started = Instant::now();
    let (mut done, mut stall) = (Vec::new(), Stall::new());
    while done.len() < 40 {
        rig.queue.reap(&mut done);
        std::thread::sleep(Duration::from_millis(10));
        stall.look();
        assert!(started.elapsed() < Duration::from_secs(60), "{} of 40 requests have ended", done.len());
    }
    if stall.longest > options.timeout.unwrap() / 8 {
        return;
    }
    assert!(started.elapsed() > 2 * options.timeout.unwrap() - pace, "most requests waited longer than the time-out");
    assert!(done.iter().all(|done| done.result == Ok(())), "{done:?}");
    assert_eq!((rig.model.aborts(), rig.model.resets()), (0, 0));
    assert!(!rig.queue.is_dead());
}

#[test]
fn a_queue_of_a_slow_controller_is_dropped_without_an_end_of_the_device() {
    let options = with(Options::default(), |o| o.timeout = Some(Duration::from_secs(2)));
    let mut rig = rig(Spec::new(MIB).fault(Fault::Slow(Duration::from_millis(100)), 0), &options);
    let before = rig.model.mappings();
    rig.writes();
    drop(rig.queue);
    rig.queue = rig.device.open_queue(64).unwrap();
    assert_eq!((rig.model.mappings(), rig.queue.is_dead()), (before, false));
}

#[test]
fn a_command_that_is_lost_while_others_complete_is_aborted_alone_and_late() {
    let timeout = Duration::from_millis(800);
    let options = with(Options::default(), |o| o.timeout = Some(timeout));
    let mut rig = rig(Spec::new(MIB).fault(Fault::SlowLost(Duration::from_millis(5)), 0), &options);
    let started = Instant::now();
    let (mut failed, mut sent, mut done, mut stall) = (Vec::new(), 0, Vec::new(), Stall::new());
    while failed.is_empty() {
        // Keep some commands in flight all the time.
        while sent < 8 {
            let buf = rig.arena.alloc(4096).unwrap();
            rig.push(Request { tag: 0, op: Op::Read { at: 0, buf } });
            sent += 1;
        }
        rig.queue.kick();
        std::thread::sleep(Duration::from_millis(1));
        rig.queue.reap(&mut done);
        sent -= done.len();
        failed.extend(done.drain(..).filter(|done| done.result.is_err()));
        stall.look();
        assert!(started.elapsed() < Duration::from_secs(60), "a lost command ends");
    }
    assert_eq!((failed.len(), failed[0].result, rig.model.resets()), (1, Err(Error::Io), 0));
    if stall.longest < timeout / 8 {
        assert_eq!(rig.model.aborts(), 1);
        assert!(started.elapsed() > 8 * timeout, "{:?}", started.elapsed());
    }
}

#[test]
fn a_thread_that_panics_ends_the_device() {
    let mut rig = rig(Spec::new(MIB).fault(Fault::Unreadable, 0), &quick());
    rig.reads();
    rig.collect(40);
    until(|| rig.queue.is_dead());
    rig.reads();
    assert!(rig.collect(40).iter().all(|done| done.result == Err(Error::Gone)));
    assert!(rig.device.open_queue(1).is_err());
}

#[test]
fn a_dead_queue_says_so() {
    let mut rig = rig(Spec::new(MIB), &Options::default());
    assert!(!rig.queue.is_dead());
    rig.model.remove();
    until(|| rig.queue.is_dead());
    assert!(rig.device.open_queue(1).is_err());
    rig.reads();
    assert!(rig.collect(40).iter().all(|done| done.result == Err(Error::Gone)));
}

#[test]
fn it_can_be_given_up() {
    let (_, device) = open(Spec::new(32 * MIB), &Options::default());
    conformance::check_give_up(&device);
}

fn until(condition: impl Fn() -> bool) {
    let end = Instant::now() + Duration::from_secs(5);
    while !condition() {
        assert!(Instant::now() < end, "the condition holds within five seconds");
        std::thread::sleep(Duration::from_millis(2));
    }
}
