//! Tests particular to files and block devices: space, holes, sizes, modes, and errors of `open`.

mod common;

use std::{
    fs::{self, File, OpenOptions},
    os::{
        fd::OwnedFd,
        unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt},
    },
    path::Path,
    process::Command,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use blkdev::{Arena, Completion, Device, Error, Extent, ExtentKind, Mapping, Op, Queue, Request};
use blkdev_io_uring::{IoUring, Options};
use common::{Loop, Scratch, Tmpfs};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

const MIB: u64 = 1 << 20;

/// The options with a change.
fn with(mut options: Options, change: impl FnOnce(&mut Options)) -> Options {
    change(&mut options);
    options
}

/// A device with a queue and memory, for one request at a time.
struct Rig {
    device: IoUring,
    queue: Box<dyn Queue>,
    arena: Arena,
}

impl Rig {
    fn new(options: Options) -> Self {
        let device = IoUring::open(options).unwrap();
        let mapping = Mapping::new(8 << 20).unwrap();
        device.register(&mapping).unwrap();
        let queue = device.open_queue(64).unwrap();
        Self { device, queue, arena: mapping.arenas(1).remove(0) }
    }

    fn path(path: &Path) -> Self {
        Self::new(Options::path(path))
    }

    fn run(&mut self, op: Op) -> Completion {
        self.queue.push(Request { tag: 7, op }).unwrap();
        self.queue.kick();
        let done = wait(&mut *self.queue, 1).remove(0);
        assert_eq!(done.tag, 7);
        done
    }

    fn write(&mut self, at: u64, byte: u8, len: usize) -> Result<(), Error> {
        let mut buf = self.arena.alloc(len).unwrap();
        buf.copy_from(0, &vec![byte; len]);
        self.run(Op::Write { at, buf, fua: false }).result
    }

    fn read(&mut self, at: u64, len: usize) -> Result<Vec<u8>, Error> {
        let buf = self.arena.alloc(len).unwrap();
        let done = self.run(Op::Read { at, buf });
        let Op::Read { buf, .. } = done.op else { panic!("a read came back as {:?}", done.op) };
        done.result.map(|()| buf.to_vec())
    }

    fn status(&mut self, at: u64, len: u64) -> Vec<Extent> {
        let done = self.run(Op::Status { at, len, extents: Vec::new() });
        assert_eq!(done.result, Ok(()));
        let Op::Status { extents, .. } = done.op else { panic!("a status came back as {:?}", done.op) };
        extents
    }
}

/// Sleeps and reaps until `count` requests have ended.
fn wait(queue: &mut dyn Queue, count: usize) -> Vec<Completion> {
    let (mut done, deadline) = (Vec::new(), Instant::now() + Duration::from_secs(60));
    loop {
        queue.reap(&mut done);
        if done.len() >= count {
            return done;
        }
        assert!(Instant::now() < deadline, "{} of {count} requests ended within a minute", done.len());
        if queue.arm() {
            let mut fds = [PollFd::new(queue.wake_fd().unwrap(), PollFlags::POLLIN)];
            let _ = poll(&mut fds, PollTimeout::from(1000u16));
        }
    }
}

/// Bytes allocated to the file on its file system.
fn space(path: &Path) -> u64 {
    File::open(path).unwrap().sync_all().unwrap();
    fs::metadata(path).unwrap().blocks() * 512
}

fn fill(path: &Path, at: u64, len: u64) {
    let file = OpenOptions::new().write(true).open(path).unwrap();
    file.write_all_at(&vec![0xa5; len as usize], at).unwrap();
    file.sync_all().unwrap();
}

#[track_caller]
fn refused(options: Options, words: &[&str]) {
    let error = IoUring::open(options).expect_err("must not open").to_string();
    for word in words {
        assert!(error.contains(word), "{error:?} contains {word:?}");
    }
}

#[test]
fn discard_and_unmapping_zeroes_give_space_back() {
    for file in [Scratch::on_disk(16 * MIB), Scratch::in_memory(16 * MIB)] {
        fill(file.path(), 0, 16 * MIB);
        let full = space(file.path());
        let mut rig = Rig::path(file.path());
        assert_eq!(rig.run(Op::Discard { at: 0, len: 4 * MIB }).result, Ok(()));
        assert!(space(file.path()) <= full - 4 * MIB);
        assert_eq!(rig.run(Op::Zero { at: 4 * MIB, len: 4 * MIB, unmap: true }).result, Ok(()));
        assert!(space(file.path()) <= full - 8 * MIB);
        assert_eq!(rig.read(4 * MIB, 4096).unwrap(), [0; 4096]);
        assert_eq!(rig.read(8 * MIB, 4096).unwrap(), [0xa5; 4096]);
        assert_eq!(fs::metadata(file.path()).unwrap().len(), 16 * MIB);
    }
}

#[test]
fn zeroes_that_do_not_unmap_keep_and_take_space() {
    // tmpfs has no ZERO_RANGE: its second round takes another code path than the first.
    for file in [Scratch::on_disk(16 * MIB), Scratch::in_memory(16 * MIB)] {
        fill(file.path(), 0, 8 * MIB);
        let mut rig = Rig::path(file.path());
        for at in [4 * MIB, 8 * MIB] {
            assert_eq!(rig.run(Op::Zero { at, len: 4 * MIB, unmap: false }).result, Ok(()));
            assert_eq!(rig.read(at, 4 * MIB as usize).unwrap(), vec![0; 4 * MIB as usize]);
        }
        assert!(space(file.path()) >= 12 * MIB);
        assert_eq!(rig.read(0, 4096).unwrap(), [0xa5; 4096]);
    }
}

#[test]
fn status_tells_holes_from_data() {
    for file in [Scratch::on_disk(16 * MIB), Scratch::in_memory(16 * MIB)] {
        fill(file.path(), 4 * MIB, MIB);
        let mut rig = Rig::path(file.path());
        let (hole, data) = (ExtentKind::Hole, ExtentKind::Data);
        let extent = |at, end, kind| Extent { at, len: end - at, kind };
        assert_eq!(
            rig.status(0, 16 * MIB),
            [extent(0, 4 * MIB, hole), extent(4 * MIB, 5 * MIB, data), extent(5 * MIB, 16 * MIB, hole)]
        );
        assert_eq!(
            rig.status(4 * MIB + 512, MIB),
            [extent(4 * MIB + 512, 5 * MIB, data), extent(5 * MIB, 5 * MIB + 512, hole)]
        );
    }
}

#[test]
fn status_of_many_extents_is_answered_in_parts() {
    let file = Scratch::on_disk(16 * MIB);
    for n in 0..100 {
        fill(file.path(), n * 128 * 1024, 4096);
    }
    let mut rig = Rig::path(file.path());
    let (mut at, mut holes) = (0, 0);
    while at < 16 * MIB {
        let extents = rig.status(at, 16 * MIB - at);
        assert!((1..=64).contains(&extents.len()));
        for extent in extents {
            assert_eq!(extent.at, at);
            at += extent.len;
            holes += u32::from(extent.kind == ExtentKind::Hole);
        }
    }
    assert_eq!((at, holes), (16 * MIB, 100));
}

#[test]
fn a_file_that_grew_is_seen_when_asked() {
    let file = Scratch::on_disk(MIB);
    let mut rig = Rig::path(file.path());
    file.open().set_len(2 * MIB).unwrap();
    assert_eq!(rig.device.capacity(), MIB);
    rig.device.refresh();
    assert_eq!(rig.device.capacity(), 2 * MIB);
    rig.write(2 * MIB - 4096, 3, 4096).unwrap();
    assert_eq!(rig.read(2 * MIB - 4096, 4096).unwrap(), [3; 4096]);
}

#[test]
fn a_file_that_shrank_fails_reads_and_goes_on() {
    for direct in [false, true] {
        let file = Scratch::on_disk(MIB);
        fill(file.path(), 0, MIB);
        let mut rig = Rig::new(with(Options::path(file.path()), |o| o.direct = direct));
        file.open().set_len(MIB / 2 + 100).unwrap();
        assert_eq!(rig.read(0, MIB as usize), Err(Error::Io));
        assert_eq!(rig.read(MIB - 4096, 4096), Err(Error::Io));
        assert_eq!(rig.read(0, MIB as usize / 2).unwrap(), vec![0xa5; MIB as usize / 2]);
    }
}

#[test]
fn a_smaller_size_is_seen_when_asked() {
    let file = Scratch::on_disk(2 * MIB);
    let rig = Rig::path(file.path());
    file.open().set_len(MIB + 7).unwrap();
    rig.device.refresh();
    assert_eq!(rig.device.capacity(), MIB + 7);
    // With block sizes above 1, only whole blocks count.
    let file = Scratch::on_disk(2 * MIB);
    let rig = Rig::new(with(Options::path(file.path()), |o| o.direct = true));
    file.open().set_len(MIB + 7).unwrap();
    rig.device.refresh();
    assert_eq!(rig.device.capacity(), MIB);
}

#[test]
fn a_disk_that_grew_is_seen_when_asked() {
    let Some(disk) = Loop::new(MIB, 512) else { return };
    let mut rig = Rig::path(disk.path());
    disk.file.open().set_len(2 * MIB).unwrap();
    assert!(Command::new("losetup").arg("--set-capacity").arg(disk.path()).status().unwrap().success());
    rig.device.refresh();
    assert_eq!(rig.device.capacity(), 2 * MIB);
    rig.write(2 * MIB - 4096, 3, 4096).unwrap();
}

#[test]
fn another_file_of_the_same_name_is_noticed() {
    let (file, other) = (Scratch::on_disk(MIB), Scratch::on_disk(MIB));
    let (by_path, by_fd) = (IoUring::open(Options::path(file.path())), IoUring::open(Options::fd(file.open().into())));
    let (by_path, by_fd) = (by_path.unwrap(), by_fd.unwrap());
    assert!(!by_path.is_replaced());
    file.open().set_len(2 * MIB).unwrap();
    assert!(!by_path.is_replaced(), "the same file has grown");
    fs::rename(other.path(), file.path()).unwrap();
    assert!(by_path.is_replaced() && !by_fd.is_replaced());
    fs::remove_file(file.path()).unwrap();
    assert!(!by_path.is_replaced(), "no other file exists to open instead");
}

#[test]
fn direct_access_refuses_an_end_that_it_cannot_reach() {
    let file = Scratch::on_disk(MIB + 100);
    let direct = || with(Options::path(file.path()), |o| o.direct = true);
    refused(
        direct(),
        &[&file.path().display().to_string(), "1048676 bytes", "leave out direct=true", "truncate --size=%"],
    );
    let device = IoUring::open(Options::path(file.path())).unwrap();
    assert_eq!((device.info().block_size, device.capacity()), (1, MIB + 100));
    drop(device);
    file.open().set_len(MIB).unwrap();
    let device = IoUring::open(direct()).unwrap();
    let info = device.info();
    assert!(info.block_size >= 512 && info.preferred_block_size >= 4096 && !info.caps.prefetch);
    assert_eq!(device.capacity(), MIB);
}

#[test]
fn memory_is_forgotten_when_asked() {
    let file = Scratch::on_disk(MIB);
    let device = IoUring::open(Options::path(file.path())).unwrap();
    assert!(!device.pins_memory());
    let (one, two) = (Mapping::new(4096).unwrap(), Mapping::new(4096).unwrap());
    device.register(&one).unwrap();
    device.register(&two).unwrap();
    assert_eq!((Arc::strong_count(&one), Arc::strong_count(&two)), (2, 2));
    device.unregister(&one);
    device.unregister(&one);
    assert_eq!((Arc::strong_count(&one), Arc::strong_count(&two)), (1, 2));
}

#[test]
fn status_requests_take_places_in_the_queue_and_come_back() {
    let file = Scratch::in_memory(16 * MIB);
    fill(file.path(), 0, 8 * MIB);
    let device = IoUring::open(Options::path(file.path())).unwrap();
    for depth in [1, 3] {
        let mut queue = device.open_queue(depth).unwrap();
        for round in 0..50 {
            for tag in 0..depth.into() {
                // Requests to the helper, and requests through the ring.
                let op = match (tag + round) % 3 {
                    0 => Op::Flush,
                    _ => Op::Status { at: 4 * MIB, len: 8 * MIB, extents: Vec::new() },
                };
                queue.push(Request { tag, op }).unwrap();
            }
            assert_eq!(queue.push(Request { tag: 99, op: Op::Flush }).unwrap_err().tag, 99);
            queue.kick();
            let mut done = wait(&mut *queue, depth.into());
            done.sort_by_key(|done| done.tag);
            for (tag, done) in done.into_iter().enumerate() {
                assert_eq!((done.tag, done.result), (tag as u64, Ok(())));
                if let Op::Status { extents, .. } = done.op {
                    let (data, hole) = (ExtentKind::Data, ExtentKind::Hole);
                    let expected =
                        [(4 * MIB, data), (8 * MIB, hole)].map(|(at, kind)| Extent { at, len: 4 * MIB, kind });
                    assert_eq!(extents, expected);
                }
            }
        }
    }
}

#[test]
fn status_requests_have_a_thread_that_ends_with_the_device() {
    let threads = || {
        let names = fs::read_dir("/proc/self/task").unwrap().flatten().map(|task| task.path().join("comm"));
        names.filter(|comm| fs::read_to_string(comm).is_ok_and(|name| name.trim() == "block status")).count()
    };
    // Tests that run at the same time may have such threads too, but in the end all have ended.
    let file = Scratch::in_memory(MIB);
    let mut rig = Rig::path(file.path());
    rig.status(0, MIB);
    assert!(threads() > 0);
    drop(rig);
    let started = Instant::now();
    while threads() > 0 {
        assert!(started.elapsed() < Duration::from_secs(60), "the thread has ended");
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn status_requests_do_not_hold_up_the_end() {
    // Large enough that a query is in progress when the queue ends.
    let file = Scratch::in_memory(256 * MIB);
    fill(file.path(), 0, 256 * MIB);
    for give_up in [false, true] {
        let device = IoUring::open(Options::path(file.path())).unwrap();
        let mut queue = device.open_queue(16).unwrap();
        for tag in 0..16 {
            queue.push(Request { tag, op: Op::Status { at: 0, len: 256 * MIB, extents: Vec::new() } }).unwrap();
        }
        queue.kick();
        if give_up {
            queue.give_up();
            assert!(queue.is_dead());
            let done = wait(&mut *queue, 16);
            assert!(done.iter().all(|done| matches!(done.result, Ok(()) | Err(Error::Gone))), "{done:?}");
            // Late replies belong to no request.
            thread::sleep(Duration::from_millis(300));
            let mut more = Vec::new();
            queue.reap(&mut more);
            assert!(more.is_empty() && queue.arm(), "{more:?}");
        }
        let started = Instant::now();
        drop((queue, device));
        assert!(started.elapsed() < Duration::from_secs(8), "the ring waited for the poll");
    }
}

#[test]
fn reads_and_writes_of_every_way_agree() {
    // Inline and through the ring: short and long, on whole pages and not.
    for file in [Scratch::on_disk(16 * MIB), Scratch::in_memory(16 * MIB)] {
        let mut rig = Rig::path(file.path());
        for (n, (at, len)) in [(0, 4096), (4096, 65536), (MIB, MIB as usize), (3 * MIB + 1, 511), (4 * MIB - 7, 70000)]
            .into_iter()
            .enumerate()
        {
            let byte = n as u8 + 1;
            rig.write(at, byte, len).unwrap();
            assert!(rig.read(at, len).unwrap().iter().all(|&b| b == byte), "{len} bytes at {at}");
            let mut seen = vec![0; len];
            file.open().read_exact_at(&mut seen, at).unwrap();
            assert!(seen.iter().all(|&b| b == byte), "{len} bytes at {at}, from outside");
        }
    }
}

#[test]
fn a_queue_changes_threads_and_outlives_them() {
    // When a thread ends, the kernel's workers for its requests end, too.
    let file = Scratch::on_disk(64 * MIB);
    let Rig { device, mut queue, mut arena } = Rig::path(file.path());
    for round in 0..20u64 {
        queue = thread::scope(|scope| {
            let arena = &mut arena;
            let submit = move || {
                for n in 0..32 {
                    let op = match n % 4 {
                        0 => Op::Write { at: n * MIB, buf: arena.alloc(128 << 10).unwrap(), fua: true },
                        1 => Op::Zero { at: n * MIB, len: MIB, unmap: round.is_multiple_of(2) },
                        2 => Op::Prefetch { at: n * MIB, len: MIB },
                        _ => Op::Flush,
                    };
                    queue.push(Request { tag: n, op }).unwrap();
                }
                queue.kick();
                queue
            };
            scope.spawn(submit).join().unwrap()
        });
        let done = wait(&mut *queue, 32);
        for completion in &done {
            assert_eq!(completion.result, Ok(()), "round {round}: {completion:?}");
        }
    }
    drop((queue, device));
}

#[test]
fn reads_outlive_the_thread_that_submitted_them() {
    // Requests that wait for the disk when their thread ends are returned undone by the kernel.
    let file = Scratch::on_disk(32 * MIB);
    fill(file.path(), 0, 32 * MIB);
    for direct in [false, true] {
        let Rig { mut queue, mut arena, .. } = Rig::new(with(Options::path(file.path()), |o| o.direct = direct));
        for _ in 0..10 {
            posix_fadvise(file.open(), 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).unwrap();
            queue = thread::scope(|scope| {
                let arena = &mut arena;
                let submit = move || {
                    for tag in 0..32 {
                        let op = Op::Read { at: tag * MIB, buf: arena.alloc(64 << 10).unwrap() };
                        queue.push(Request { tag, op }).unwrap();
                    }
                    queue.kick();
                    queue
                };
                scope.spawn(submit).join().unwrap()
            });
            for completion in wait(&mut *queue, 32) {
                assert_eq!(completion.result, Ok(()), "{completion:?}");
                let Op::Read { buf, .. } = completion.op else { panic!("a read came back as {:?}", completion.op) };
                assert!(buf.to_vec().iter().all(|&byte| byte == 0xa5));
            }
        }
    }
}

#[test]
fn a_full_queue_gives_the_request_back() {
    let file = Scratch::in_memory(MIB);
    let Rig { device, queue, mut arena } = Rig::new(with(Options::path(file.path()), |o| o.entries = 3));
    assert_eq!(device.info().depth_max, 3);
    drop(queue);
    let mut queue = device.open_queue(1000).unwrap();
    let mut read = |tag| Request { tag, op: Op::Read { at: 0, buf: arena.alloc(4096).unwrap() } };
    for tag in 0..3 {
        queue.push(Request { tag, op: Op::Flush }).unwrap();
    }
    // Inline requests also take a slot, until they are reaped.
    assert_eq!(queue.push(read(3)).unwrap_err().tag, 3);
    queue.kick();
    wait(&mut *queue, 3);
    for tag in 0..3 {
        queue.push(read(tag)).unwrap();
    }
    assert_eq!(queue.push(Request { tag: 3, op: Op::Flush }).unwrap_err().tag, 3);
    assert!(!queue.arm());
    assert_eq!(wait(&mut *queue, 3).len(), 3);
}

#[test]
fn queues_are_counted() {
    let file = Scratch::on_disk(MIB);
    let device = IoUring::open(Options::path(file.path())).unwrap();
    let mut queues: Vec<_> = (0..device.info().queues_max).map(|_| device.open_queue(1).unwrap()).collect();
    assert!(device.open_queue(1).unwrap_err().to_string().contains("256 queues"));
    queues.pop();
    device.open_queue(1).unwrap();
}

#[test]
fn a_loop_device_discards_into_its_file() {
    let Some(disk) = Loop::new(16 * MIB, 512) else { return };
    for direct in [false, true] {
        fill(disk.path(), 0, 16 * MIB);
        let mut rig = Rig::new(with(Options::path(disk.path()), |o| o.direct = direct));
        let info = rig.device.info();
        assert!(info.caps.discard && info.caps.zero && !info.caps.status, "{:?}", info.caps);
        assert_eq!((info.block_size, rig.device.capacity()), (512, 16 * MIB));
        let full = space(disk.file.path());
        assert_eq!(rig.run(Op::Discard { at: 0, len: 4 * MIB }).result, Ok(()));
        assert_eq!(rig.run(Op::Zero { at: 4 * MIB, len: 4 * MIB, unmap: true }).result, Ok(()));
        assert_eq!(rig.run(Op::Flush).result, Ok(()));
        assert!(space(disk.file.path()) <= full - 8 * MIB);
        assert_eq!(rig.read(4 * MIB, 4096).unwrap(), [0; 4096]);
        assert_eq!(rig.run(Op::Zero { at: 8 * MIB, len: MIB, unmap: false }).result, Ok(()));
        assert_eq!(rig.read(8 * MIB, MIB as usize).unwrap(), vec![0; MIB as usize]);
        assert_eq!(rig.read(9 * MIB, 512).unwrap(), [0xa5; 512]);
    }
}

#[test]
fn read_only_takes_no_more_than_read_permission() {
    let file = Scratch::on_disk(MIB);
    fs::set_permissions(file.path(), fs::Permissions::from_mode(0o400)).unwrap();
    let mut rig = Rig::new(with(Options::path(file.path()), |o| o.read_only = true));
    let caps = rig.device.info().caps;
    assert!(caps.read_only && caps.status && !caps.zero && !caps.discard);
    assert_eq!(rig.read(0, 512).unwrap(), [0; 512]);
    // The channel refuses writes; if one got through, the kernel would refuse it.
    assert_eq!(rig.write(0, 1, 4096), Err(Error::ReadOnly));
}

#[test]
fn what_cannot_be_opened_says_what_to_do() {
    let file = Scratch::on_disk(MIB);
    let path = file.path().display().to_string();
    refused(Options::path("/nonexistent/disk.img"), &["/nonexistent/disk.img", "No such file"]);
    refused(Options::path("/"), &["/ is a directory", "regular file or a block device"]);
    refused(Options::path("/dev/null"), &["/dev/null is a character device"]);
    refused(Options::fd(File::open(file.path()).unwrap().into()), &[&path, "reading only", "read-only=true"]);
    let open = |options: &mut OpenOptions| -> OwnedFd { options.open(file.path()).unwrap().into() };
    refused(Options::fd(open(OpenOptions::new().write(true))), &[&path, "writing only"]);
    refused(Options::fd(open(OpenOptions::new().read(true).append(true))), &[&path, "O_APPEND"]);
    refused(
        with(Options::fd(open(OpenOptions::new().read(true).write(true))), |o| o.direct = true),
        &[&path, "O_DIRECT", "direct=true"],
    );
    let direct = open(OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT));
    assert!(IoUring::open(Options::fd(direct)).unwrap().info().block_size >= 512);
}

#[test]
fn a_read_only_loop_device_names_the_remedy() {
    let Some(disk) = Loop::with(MIB, &["--read-only"]) else { return };
    refused(Options::path(disk.path()), &["read-only=true"]);
    let device = IoUring::open(with(Options::path(disk.path()), |o| o.read_only = true)).unwrap();
    assert_eq!(device.capacity(), MIB);
}

#[test]
fn a_durable_write_is_one_request() {
    for direct in [false, true] {
        let file = Scratch::on_disk(MIB);
        let mut rig = Rig::new(with(Options::path(file.path()), |o| o.direct = direct));
        assert!(rig.device.info().caps.fua && rig.device.info().caps.flush);
        let mut buf = rig.arena.alloc(4096).unwrap();
        buf.copy_from(0, &[9; 4096]);
        assert_eq!(rig.run(Op::Write { at: 4096, buf, fua: true }).result, Ok(()));
        assert_eq!(rig.read(4096, 4096).unwrap(), [9; 4096]);
        assert_eq!(rig.run(Op::Flush).result, Ok(()));
    }
}

#[test]
fn no_space_is_told_apart() {
    let Some(small) = Tmpfs::new(MIB) else { return };
    let path = small.path().join("disk.img");
    File::create(&path).and_then(|file| file.set_len(4 * MIB)).unwrap();
    let mut rig = Rig::path(&path);
    // Inline, and through the ring.
    assert_eq!(rig.write(0, 1, 64 << 10), Ok(()));
    assert_eq!((0..32).find_map(|n| rig.write(n * 65536, 1, 64 << 10).err()), Some(Error::NoSpace));
    assert_eq!(rig.write(2 * MIB, 1, 128 << 10), Err(Error::NoSpace));
    assert_eq!(rig.run(Op::Zero { at: 2 * MIB, len: 2 * MIB, unmap: false }).result, Err(Error::NoSpace));
    assert_eq!(rig.run(Op::Discard { at: 0, len: 4 * MIB }).result, Ok(()));
    assert_eq!(rig.write(2 * MIB, 1, 64 << 10), Ok(()));
}
