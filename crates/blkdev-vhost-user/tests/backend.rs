//! Back ends that are missing, slow, dying or faulty.

mod common;

use std::{
    fs,
    io::ErrorKind,
    os::{fd::AsFd, unix::net::UnixListener},
    sync::{Arc, Barrier},
    thread,
    time::{Duration, Instant},
};

use blkdev::{Arena, Device, Error, Mapping, Op, Request};
use blkdev_vhost_user::{Format, Options, VhostUser, WriteCache};
use blkdev_virtio::model::{Fault, Model, SERIAL, Spec};
use common::{ALL, Answer, Backend, CONFIG, Dir, MEM_SLOTS, MQ, Qemu, Quirks, REPLY_ACK, collect, idle_client};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

const MIB: u64 = 1 << 20;
/// Far more time than any test needs, even on a busy machine.
const PATIENCE: Duration = Duration::from_secs(20);

/// The options with a change.
fn with(mut options: Options, change: impl FnOnce(&mut Options)) -> Options {
    change(&mut options);
    options
}

fn short(path: impl Into<std::path::PathBuf>) -> Options {
    with(Options::new(path), |o| o.connect_timeout = Duration::from_millis(300))
}

/// Checks that connecting fails in time, with all of `parts` in the error.
fn refuse(options: &Options, parts: &[&str]) {
    let begin = Instant::now();
    let text = VhostUser::connect(options).unwrap_err().to_string();
    assert!(begin.elapsed() < options.connect_timeout + Duration::from_secs(5), "{:?}", begin.elapsed());
    for part in [&["vhost-user", &*options.path.to_string_lossy()], parts].concat() {
        assert!(text.contains(part), "{part:?} in {text:?}");
    }
}

fn memory(device: &dyn Device) -> Arena {
    let mapping = Mapping::new(MIB as usize).unwrap();
    device.register(&mapping).unwrap();
    mapping.arenas(1).remove(0)
}

fn read(tag: u64, arena: &mut Arena) -> Request {
    Request { tag, op: Op::Read { at: tag % 128 * 4096, buf: arena.alloc(4096).unwrap() } }
}

#[test]
fn a_path_without_a_back_end() {
    let dir = Dir::new();
    refuse(&short(dir.join("nothing")), &["no such socket"]);
    fs::write(dir.join("file"), "").unwrap();
    refuse(&short(dir.join("file")), &["not a socket"]);
    drop(UnixListener::bind(dir.join("left")).unwrap());
    refuse(&short(dir.join("left")), &["no process listens"]);
    refuse(&short(dir.join(&"x".repeat(108))), &["at most 107 bytes"]);
}

#[test]
fn a_back_end_that_never_answers() {
    let dir = Dir::new();
    let _listener = UnixListener::bind(dir.join("socket")).unwrap();
    refuse(&short(dir.join("socket")), &["no reply within", "busy with another front end?"]);
}

#[test]
fn a_back_end_that_is_busy() {
    let qemu = Qemu::null(MIB, "writable=on");
    let first = VhostUser::connect(&Options::new(&qemu.socket)).unwrap();
    refuse(&short(&qemu.socket), &["busy with another front end?"]);
    drop(first);
    VhostUser::connect(&Options::new(&qemu.socket)).unwrap();
}

#[test]
fn a_backlog_that_is_full() {
    let dir = Dir::new();
    let listener = UnixListener::bind(dir.join("socket")).unwrap();
    nix::sys::socket::listen(&listener, nix::sys::socket::Backlog::new(0).unwrap()).unwrap();
    let _waiting = idle_client(&dir.join("socket"));
    refuse(&short(dir.join("socket")), &["not accepted within", "busy with another front end?"]);
}

#[test]
fn a_back_end_that_falls_silent_while_connecting() {
    // GET_FEATURES, SET_FEATURES, ADD_MEM_REG, GET_CONFIG, SET_VRING_ENABLE, GET_VRING_BASE.
    for message in [1, 2, 37, 24, 18, 11] {
        let backend = Backend::new(Model::new(Spec::new(MIB)), Quirks { mute: vec![message], ..Quirks::default() });
        refuse(&short(&backend.socket), &["no reply within"]);
        assert!(backend.seen.lock().unwrap().contains(&message));
    }
    let backend = Backend::new(Model::new(Spec::new(MIB).fault(Fault::Silent, 0)), Quirks::default());
    let request_timeout = Duration::from_millis(300);
    refuse(&with(short(&backend.socket), |o| o.virtio.timeout = Some(request_timeout)), &["does not answer"]);
}

#[test]
fn a_back_end_without_a_configuration() {
    let quirks = Quirks { protocol: ALL & !CONFIG, ..Quirks::default() };
    let backend = Backend::new(Model::new(Spec::new(MIB)), quirks);
    refuse(&short(&backend.socket), &["CONFIG", "capacity is unknown"]);
    let quirks = Quirks { config: Answer::AtMost(0), ..Quirks::default() };
    let backend = Backend::new(Model::new(Spec::new(MIB)), quirks);
    refuse(&short(&backend.socket), &["refuses to return its configuration"]);
}

#[test]
fn configurations_of_all_lengths() {
    for (config, zero) in [
        (Answer::Asked, true),
        (Answer::Always(60), true),
        (Answer::Always(256), true),
        (Answer::AtMost(57), true),
        (Answer::Always(36), false),
        (Answer::AtMost(24), false),
    ] {
        let backend = Backend::new(Model::new(Spec::new(MIB)), Quirks { config, ..Quirks::default() });
        let device = VhostUser::connect(&Options::new(&backend.socket)).unwrap();
        assert_eq!((device.capacity(), device.info().caps.zero), (MIB, zero));
        assert_eq!(device.info().serial, SERIAL);
    }
}

#[test]
fn the_number_of_queues() {
    let queues = |protocol, num_queues| {
        let backend = Backend::new(Model::new(Spec::new(MIB)), Quirks { protocol, ..Quirks::default() });
        let device = VhostUser::connect(&with(Options::new(&backend.socket), |o| o.virtio.queues = num_queues));
        device.map(|d| d.info().queues_max)
    };
    assert_eq!(queues(ALL, None).unwrap(), 4);
    assert_eq!(queues(ALL, Some(2)).unwrap(), 2);
    assert_eq!(queues(ALL & !MQ, None).unwrap(), 1);
    let e = queues(ALL, Some(5)).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::InvalidInput);
    assert!(e.to_string().contains("5 queues requested, but the device has 4"), "{e}");
}

#[test]
fn too_many_memory_regions() {
    let protocol = ALL & !MEM_SLOTS;
    let backend = Backend::new(Model::new(Spec::new(MIB)), Quirks { protocol, ..Quirks::default() });
    let device = VhostUser::connect(&Options::new(&backend.socket)).unwrap();
    // One region holds the rings.
    let mappings: Vec<_> = (0..8).map(|_| Mapping::new(1).unwrap()).collect();
    for mapping in &mappings[..7] {
        device.register(mapping).unwrap();
    }
    device.register(&mappings[0]).unwrap();
    let e = device.register(&mappings[7]).unwrap_err().to_string();
    assert!(e.contains("at most 8 memory regions"), "{e}");
}

/// Memory is registered while requests are in flight, on back ends that must replace the whole memory table.
#[test]
fn memory_that_comes_late() {
    for protocol in [ALL, ALL & !MEM_SLOTS, ALL & !MEM_SLOTS & !REPLY_ACK] {
        let backend = Backend::new(Model::new(Spec::new(MIB)), Quirks { protocol, ..Quirks::default() });
        let device = Arc::new(VhostUser::connect(&Options::new(&backend.socket)).unwrap());
        let mut arena = memory(&*device);
        let mut queue = device.open_queue(16).unwrap();
        let later = Arc::clone(&device);
        let register = thread::spawn(move || {
            for _ in 0..5 {
                later.register(&Mapping::new(1).unwrap()).unwrap();
            }
        });
        let mut rounds = 0;
        while rounds < 200 || !register.is_finished() {
            for tag in 0..16 {
                queue.push(read(tag, &mut arena)).unwrap();
            }
            queue.kick();
            let done = collect(&mut *queue, 16, PATIENCE);
            assert!(done.iter().all(|c| c.result.is_ok()));
            rounds += 1;
        }
        register.join().unwrap();
    }
}

#[test]
fn what_is_written_is_in_the_file() {
    let qemu = Qemu::file(MIB, "writable=on");
    let device = VhostUser::connect(&Options::new(&qemu.socket)).unwrap();
    let mut arena = memory(&device);
    let mut queue = device.open_queue(8).unwrap();
    let mut expected = vec![0; MIB as usize];
    for tag in 0..8 {
        let mut buf = arena.alloc(8192).unwrap();
        let bytes: Vec<u8> = (0..8192u64).map(|n| (n * 7 + tag * 31) as u8).collect();
        buf.copy_from(0, &bytes);
        let at = tag * 65536 + 512;
        expected[at as usize..][..8192].copy_from_slice(&bytes);
        queue.push(Request { tag, op: Op::Write { at, buf, fua: false } }).unwrap();
    }
    queue.kick();
    assert!(collect(&mut *queue, 8, PATIENCE).iter().all(|c| c.result.is_ok()));
    queue.push(Request { tag: 0, op: Op::Zero { at: 1024, len: 2048, unmap: true } }).unwrap();
    expected[1024..3072].fill(0);
    queue.kick();
    assert_eq!(collect(&mut *queue, 1, PATIENCE)[0].result, Ok(()));
    queue.push(Request { tag: 0, op: Op::Flush }).unwrap();
    queue.kick();
    assert_eq!(collect(&mut *queue, 1, PATIENCE)[0].result, Ok(()));
    assert!(fs::read(qemu.disk()).unwrap() == expected);
}

#[test]
fn a_write_to_a_read_only_export_fails() {
    let qemu = Qemu::file(MIB, "writable=off");
    let device = VhostUser::connect(&Options::new(&qemu.socket)).unwrap();
    let caps = device.info().caps;
    assert!(caps.read_only && !caps.zero && !caps.discard);
    let mut arena = memory(&device);
    let mut queue = device.open_queue(8).unwrap();
    let buf = arena.alloc(512).unwrap();
    queue.push(Request { tag: 0, op: Op::Write { at: 0, buf, fua: false } }).unwrap();
    queue.kick();
    assert_eq!(collect(&mut *queue, 1, PATIENCE)[0].result, Err(Error::Io));
}

/// Checks that every request ends, from some point on with [`Error::Gone`], and that an idle, armed queue wakes up.
fn dies_under_load(device: &dyn Device, kill: impl FnOnce() + Send) {
    let mut idle = device.open_queue(4).unwrap();
    assert!(idle.arm());
    let loaded = Barrier::new(2);
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut arena = memory(device);
            let mut queue = device.open_queue(32).unwrap();
            let mut round = 0;
            let done = loop {
                for tag in 0..32 {
                    queue.push(read(tag, &mut arena)).unwrap();
                }
                queue.kick();
                let done = collect(&mut *queue, 32, PATIENCE);
                assert_eq!(done.len(), 32);
                if done.iter().any(|c| c.result.is_err()) {
                    break done;
                }
                if round == 100 {
                    loaded.wait();
                }
                round += 1;
            };
            assert!(done.iter().all(|c| matches!(c.result, Ok(()) | Err(Error::Gone))));
            queue.push(Request { tag: 7, op: Op::Flush }).unwrap();
            queue.kick();
            assert_eq!(collect(&mut *queue, 1, PATIENCE)[0].result, Err(Error::Gone));
        });
        loaded.wait();
        let begin = Instant::now();
        kill();
        let fd = idle.wake_fd().unwrap();
        assert_eq!(poll(&mut [PollFd::new(fd.as_fd(), PollFlags::POLLIN)], PollTimeout::from(20000u16)), Ok(1));
        assert!(begin.elapsed() < Duration::from_secs(10));
    });
    let e = device.register(&Mapping::new(1).unwrap()).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::ConnectionReset);
    assert!(device.open_queue(1).is_err());
    let begin = Instant::now();
    drop(idle);
    assert!(begin.elapsed() < Duration::from_secs(2));
}

#[test]
fn qemu_killed_under_load() {
    let mut qemu = Qemu::file(MIB, "writable=on,num-queues=2,iothread=io0");
    let device = VhostUser::connect(&Options::new(&qemu.socket)).unwrap();
    dies_under_load(&device, || qemu.kill());
}

#[test]
fn a_back_end_that_hangs_up_under_load() {
    let backend = Backend::new(Model::new(Spec::new(MIB)), Quirks::default());
    let device = VhostUser::connect(&Options::new(&backend.socket)).unwrap();
    dies_under_load(&device, || backend.hang_up());
}

#[test]
fn hostile_back_ends() {
    let all = [
        Fault::WrongId,
        Fault::SameIdTwice,
        Fault::IndexJump,
        Fault::LengthTooLong,
        Fault::LengthTooShort,
        Fault::NoLengths,
        Fault::Status(77),
        Fault::NoStatus,
        Fault::Silent,
        Fault::Scribble,
    ];
    for fault in all {
        let backend = Backend::new(Model::new(Spec::new(MIB).fault(fault, 50)), Quirks::default());
        let device = VhostUser::connect(&Options::new(&backend.socket)).unwrap();
        let mut arena = memory(&device);
        let mut queue = device.open_queue(32).unwrap();
        let mut failed = 0;
        for _ in 0..4 {
            for tag in 0..32 {
                queue.push(read(tag, &mut arena)).unwrap();
            }
            queue.kick();
            if matches!(fault, Fault::Silent | Fault::Scribble) && backend.model.taken() > 30 {
                // As a Channel's request time-out would do.
                thread::sleep(Duration::from_millis(50));
                queue.give_up();
            }
            let done = collect(&mut *queue, 32, PATIENCE);
            assert_eq!(done.len(), 32, "{fault:?}");
            for c in &done {
                assert!(c.result.is_ok() || c.result.unwrap_err().errno() == libc::EIO, "{fault:?}: {:?}", c.result);
            }
            failed += done.iter().filter(|c| c.result.is_err()).count();
        }
        assert!(failed > 0, "{fault:?}");
        let begin = Instant::now();
        drop((queue, device));
        assert!(begin.elapsed() < Duration::from_secs(5), "{fault:?}");
    }
}

#[test]
fn a_queue_that_cannot_be_drained_is_dropped_in_bounded_time() {
    let backend = Backend::new(Model::new(Spec::new(MIB).fault(Fault::Silent, 2)), Quirks::default());
    let request_timeout = Duration::from_millis(300);
    let device =
        VhostUser::connect(&with(Options::new(&backend.socket), |o| o.virtio.timeout = Some(request_timeout))).unwrap();
    let mut arena = memory(&device);
    let mut queue = device.open_queue(4).unwrap();
    queue.push(read(1, &mut arena)).unwrap();
    queue.kick();
    let begin = Instant::now();
    drop((queue, device));
    assert!(begin.elapsed() < Duration::from_secs(5));
    assert_eq!(arena.free(), arena.capacity() - 4096, "memory that the back end may still write to is not reused");
}

#[test]
fn queues_at_the_same_time() {
    let qemu = Qemu::file(8 * MIB, "writable=on,num-queues=4");
    let device = VhostUser::connect(&Options::new(&qemu.socket)).unwrap();
    thread::scope(|scope| {
        for n in 0..4u64 {
            let device = &device;
            scope.spawn(move || {
                let mut arena = memory(device);
                let mut queue = device.open_queue(16).unwrap();
                for round in 0..50 {
                    for tag in 0..16 {
                        let mut buf = arena.alloc(4096).unwrap();
                        buf.copy_from(0, &[(n * 16 + tag + round) as u8; 4096]);
                        let at = (n * 16 + tag) * 4096;
                        queue.push(Request { tag, op: Op::Write { at, buf, fua: false } }).unwrap();
                    }
                    queue.kick();
                    assert!(collect(&mut *queue, 16, PATIENCE).iter().all(|c| c.result.is_ok()));
                }
            });
        }
    });
    let disk = fs::read(qemu.disk()).unwrap();
    for n in 0..64 {
        assert!(disk[n * 4096..][..4096].iter().all(|b| *b == (n + 49) as u8));
    }
}

fn wait_for_capacity(device: &VhostUser, capacity: u64) {
    let end = Instant::now() + Duration::from_secs(10);
    while device.capacity() != capacity {
        assert!(Instant::now() < end, "the capacity is {}, not {capacity}", device.capacity());
        thread::yield_now();
    }
}

#[test]
fn a_back_end_that_changes_its_size_is_heard() {
    let backend = Backend::new(Model::new(Spec::new(MIB)), Quirks::default());
    let device = VhostUser::connect(&Options::new(&backend.socket)).unwrap();
    for capacity in [4 * MIB, MIB, 2 * MIB] {
        backend.resize(capacity);
        wait_for_capacity(&device, capacity);
    }
}

#[test]
fn qemu_switches_its_write_cache() {
    let qemu = Qemu::file(MIB, "writable=on");
    for write_cache in [Some(WriteCache::Writethrough), Some(WriteCache::Writeback), None] {
        VhostUser::connect(&with(Options::new(&qemu.socket), |o| o.virtio.write_cache = write_cache)).unwrap();
    }
    // This back end has no packed rings.
    let packed = with(Options::new(&qemu.socket), |o| o.virtio.ring = Some(Format::Packed));
    let e = VhostUser::connect(&packed).unwrap_err().to_string();
    assert!(e.contains("VIRTIO_F_RING_PACKED"), "{e}");
}
