//! Runs libblkio's drivers through our conformance suite, and compares them with our drivers, request by request.

mod backend;
mod hardware;
mod script;

use std::{
    fs,
    sync::Arc,
    time::{Duration, Instant},
};

use backend::{Export, Scratch};
use blkdev::{
    Device, Error, Io, Mapping, Op, Plan, Request,
    conformance::{Suite, check, check_read_only},
};
use blkdev_io_uring::IoUring;
use blkdev_libblkio::Libblkio;
use blkdev_vhost_user::VhostUser;
use script::{Side, same_all_the_way};

const SIZE: u64 = 40 << 20;

fn open(driver: &str, properties: &[(&str, &str)]) -> Libblkio {
    let properties: Vec<_> = properties.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect();
    Libblkio::open(driver, &properties).unwrap()
}

fn shared(device: Libblkio) -> Arc<dyn Device> {
    Arc::new(device)
}

#[test]
fn io_uring_conforms() {
    let scratch = Scratch::new();
    let file = scratch.file("disk", SIZE);
    check(&shared(open("io_uring", &[("path", &file)])));
    check(&shared(open("io_uring", &[("path", &file), ("num-queues", "1"), ("num-entries", "4")])));
    check_read_only(&shared(open("io_uring", &[("path", &file), ("read-only", "true")])));
}

#[test]
fn virtio_conforms() {
    let scratch = Scratch::new();
    let export = Export::start(&scratch, &scratch.file("disk", SIZE), 2, true);
    check(&shared(open("virtio-blk-vhost-user", &[("path", export.socket())])));
}

#[test]
fn memory_can_come_and_go() {
    let scratch = Scratch::new();
    let file = scratch.file("disk", SIZE);
    let export = Export::start(&scratch, &file, 1, true);
    let virtio = open("virtio-blk-vhost-user", &[("path", export.socket())]);
    // A back end supports only a few regions at a time.
    for (device, pins) in [(virtio, true), (open("io_uring", &[("path", &file)]), false)] {
        assert_eq!(device.pins_memory(), pins);
        for _ in 0..100 {
            let memory = Mapping::new(1).unwrap();
            device.register(&memory).unwrap();
            let mut queue = device.open_queue(1).unwrap();
            let buf = memory.arenas(1).remove(0).alloc(4096).unwrap();
            queue.push(Request { tag: 1, op: Op::Read { at: 0, buf } }).unwrap();
            assert!(!queue.is_dead());
            drop(queue);
            device.unregister(&memory);
            device.unregister(&memory);
            assert_eq!(Arc::strong_count(&memory), 1, "the device holds no reference");
        }
    }
}

#[test]
fn a_small_ring_is_never_overfilled() {
    let scratch = Scratch::new();
    let export = Export::start(&scratch, &scratch.file("disk", SIZE), 1, true);
    let device = open("virtio-blk-vhost-user", &[("path", export.socket()), ("queue-size", "16")]);
    assert_eq!((device.info().depth_max, device.info().queues_max), (5, 1));
    Suite { seed: 5, ..Suite::default() }.run(&shared(device));
}

#[test]
fn a_read_only_export_is_opened_read_only() {
    let scratch = Scratch::new();
    let export = Export::start(&scratch, &scratch.file("disk", SIZE), 1, false);
    check_read_only(&shared(open("virtio-blk-vhost-user", &[("path", export.socket())])));
}

/// A file for our driver and one for libblkio's; `direct` bypasses the page cache.
fn io_uring_sides(scratch: &Scratch, direct: bool) -> [(String, Side); 2] {
    let (ours, theirs) = (scratch.file("ours", SIZE), scratch.file("theirs", SIZE));
    let mut options = blkdev_io_uring::Options::path(&ours);
    options.direct = direct;
    let own = Side::open(&(Arc::new(IoUring::open(options).unwrap()) as Arc<dyn Device>));
    let text = direct.to_string();
    let other = Side::open(&shared(open("io_uring", &[("path", &theirs), ("direct", &text)])));
    [(ours, own), (theirs, other)]
}

#[test]
fn io_uring_is_the_same() {
    for direct in [false, true] {
        let scratch = Scratch::new();
        let [(ours, mut own), (theirs, mut other)] = io_uring_sides(&scratch, direct);
        // Without discards: every kernel refuses those of libblkio.
        same_all_the_way(&mut own, &mut other, 500, false);
        assert!(fs::read(ours).unwrap() == fs::read(theirs).unwrap(), "the files are equal, direct={direct}");
    }
}

#[test]
fn io_uring_discards_with_ours_only() {
    let scratch = Scratch::new();
    let [(_, mut own), (_, mut other)] = io_uring_sides(&scratch, false);
    let results = [&mut own, &mut other].map(|side| side.one(|_| Io::Discard { at: 0, len: 1 << 20, fua: true }).0);
    assert_eq!(results, [Ok(()), Err(Error::NotSupported)]);
}

#[test]
fn virtio_is_the_same() {
    let scratch = Scratch::new();
    let (ours, theirs) = (scratch.file("ours", SIZE), scratch.file("theirs", SIZE));
    let exports = [&ours, &theirs].map(|file| Export::start(&scratch, file, 1, true));
    let options = blkdev_vhost_user::Options::new(exports[0].socket());
    let mut own = Side::open(&(Arc::new(VhostUser::connect(&options).unwrap()) as Arc<dyn Device>));
    let mut other = Side::open(&shared(open("virtio-blk-vhost-user", &[("path", exports[1].socket())])));
    same_all_the_way(&mut own, &mut other, 500, true);
    drop((own, other, exports));
    assert!(fs::read(ours).unwrap() == fs::read(theirs).unwrap(), "the files are equal");
}

/// libblkio itself would wait forever.
#[test]
fn requests_to_a_dead_back_end_end() {
    let scratch = Scratch::new();
    let export = Export::start(&scratch, &scratch.file("disk", SIZE), 1, true);
    let device = open("virtio-blk-vhost-user", &[("path", export.socket())]).timeout(Some(Duration::from_millis(800)));
    let mut plan = Plan::new(1 << 20);
    plan.depth = 16;
    let mut channel = plan.open(&shared(device), 1).unwrap().remove(0);
    drop(export);
    let before = channel.memory_free();
    for tag in 0..4 {
        let buf = channel.alloc(0, 4096).unwrap();
        let io = if tag % 2 == 0 { Io::Read { at: 0, buf } } else { Io::Write { at: 8192, buf, fua: true } };
        channel.submit(tag, io);
    }
    let (started, mut done) = (Instant::now(), Vec::new());
    while done.len() < 4 {
        channel.tick(Instant::now());
        channel.kick();
        channel.reap(&mut done);
        assert!(started.elapsed() < Duration::from_secs(10), "{} of 4 requests have ended", done.len());
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(done.iter().all(|done| done.result == Err(Error::Gone)), "{done:?}");
    drop(done);
    assert_eq!(before - channel.memory_free(), 4 * 4096, "memory that a device may still use is not reused");
    let started = Instant::now();
    drop(channel);
    assert!(started.elapsed() < Duration::from_secs(1), "abandoned requests are not waited for");
}
