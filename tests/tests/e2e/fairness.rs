//! A slow or greedy client does not delay other clients, and a slow device is not declared dead.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nbdblk_tests::raw::{Mode, Raw, cmd};
use nbdblk_tests::{Address, Dir, Export, Nbdblk, Qsd, eventually, write_runs};

use crate::{Behind, KIB, MIB};

const SIZE: u64 = 64 * MIB;
const LONGEST: u32 = 32 << 20;

/// Threads that run until they are told to stop, or their connection ends.
struct Crowd {
    stop: Arc<AtomicBool>,
    threads: Vec<std::thread::JoinHandle<()>>,
}

impl Crowd {
    fn new() -> Self {
        Self { stop: Arc::default(), threads: Vec::new() }
    }

    /// Runs `step` repeatedly until it returns `false`.
    fn add(&mut self, mut step: impl FnMut() -> bool + Send + 'static) {
        let stop = Arc::clone(&self.stop);
        self.threads.push(std::thread::spawn(move || while !stop.load(Ordering::Relaxed) && step() {}));
    }
}

impl Drop for Crowd {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.threads.drain(..).for_each(|thread| thread.join().expect("a member of the crowd does not panic"));
    }
}

/// Requests a long READ, and takes the reply at 100 kB/s.
fn slow_reader(crowd: &mut Crowd, address: &Address) {
    let mut raw = Raw::enter(address, Mode::Simple, "");
    raw.request_reads(&[(0, LONGEST)]);
    crowd.add(move || {
        std::thread::sleep(Duration::from_millis(100));
        raw.try_receive(10_000).is_ok()
    });
}

/// One worker, and so one memory for all clients.
fn stand(behind: Behind) -> (Dir, Option<Qsd>, Nbdblk) {
    let dir = Dir::new();
    let image = dir.at("disk.raw");
    write_runs(&image, SIZE, [(0, SIZE)]);
    let (qsd, spec) = behind.device(&dir, &image);
    let server = Nbdblk::unix(&dir, &["--threads=1", &spec]);
    (dir, qsd, server)
}

#[test]
fn slow_readers_of_long_replies_do_not_delay_others() {
    for behind in Behind::BOTH {
        let (_dir, _qsd, server) = stand(behind);
        let mut crowd = Crowd::new();
        (0..3).for_each(|_| slow_reader(&mut crowd, server.address()));
        // By then all common memory is in use. Requests that need none, or little, are not affected.
        let mut raw = Raw::enter(server.address(), Mode::Structured, "");
        for n in 0..200 {
            assert_eq!(raw.call(0, cmd::FLUSH, 0, 0, b"").error, 0);
            raw.write(n * 4096, &[n as u8; 4096]);
            assert_eq!(raw.read(n * 4096, 4096), [n as u8; 4096]);
        }
        // A long request also gets its memory, which the slow clients do not use yet.
        let mut long = Raw::enter(server.address(), Mode::Structured, "");
        let cookie = long.request(0, cmd::READ, 0, LONGEST, b"");
        // On the same connection, a request without memory overtakes it.
        let flush = long.request(0, cmd::FLUSH, 0, 0, b"");
        let mut answers = [long.answer(), long.answer()];
        answers.sort_by_key(|answer| answer.cookie);
        assert_eq!(answers.each_ref().map(|answer| (answer.cookie, answer.error)), [(cookie, 0), (flush, 0)]);
        assert!(!server.log().contains("disconnected"), "{behind:?}: {}", server.log());
    }
}

/// If many clients request long replies and do not take them, another client is still served. They get their whole replies when
/// they take them.
#[test]
fn unread_replies_hold_no_memory_that_others_wait_for() {
    for behind in Behind::BOTH {
        let (_dir, _qsd, server) = stand(behind);
        let data = |at: u64, len: u64| -> Vec<u8> { (at..at + len).map(|n| (n / KIB) as u8).collect() };
        let mut writer = Raw::enter(server.address(), Mode::Simple, "");
        (0..SIZE / MIB).for_each(|n| writer.write(n * MIB, &data(n * MIB, MIB)));
        let mut sleepers: Vec<(u64, Raw)> = (0..32)
            .map(|n| {
                let at = n * 511 * KIB + n;
                let mode = if n % 2 == 0 { Mode::Simple } else { Mode::Structured };
                let mut raw = Raw::enter(server.address(), mode, "");
                raw.request(0, cmd::READ, at, 8 << 20, b"");
                (at, raw)
            })
            .collect();
        for _ in 0..3 {
            let mut long = Raw::enter(server.address(), Mode::Structured, "");
            assert!(long.read(0, LONGEST) == data(0, LONGEST.into()), "{behind:?}");
        }
        for (at, raw) in &mut sleepers {
            let answer = raw.answer();
            assert_eq!(answer.error, 0, "{behind:?}");
            assert!(answer.data == data(*at, 8 * MIB), "{behind:?}: the reply at {at} is wrong");
        }
        assert!(!server.log().contains("disconnected"), "{behind:?}: {}", server.log());
    }
}

#[test]
fn writers_never_pass_a_reader_that_waits_for_memory() {
    for behind in Behind::BOTH {
        let (_dir, _qsd, server) = stand(behind);
        let mut crowd = Crowd::new();
        for n in 0..40 {
            let mut raw = Raw::enter(server.address(), Mode::Simple, "");
            crowd.add(move || {
                let mut request = Mode::Simple.header(0, cmd::WRITE, 1, n * MIB, MIB);
                request.resize(request.len() + MIB as usize, n as u8);
                // In two parts, so that some payload is always half received.
                let (first, second) = request.split_at(request.len() / 2);
                raw.try_send(first).is_ok()
                    && {
                        std::thread::sleep(Duration::from_millis(50));
                        raw.try_send(second).is_ok()
                    }
                    && raw.try_receive(16).is_ok()
            });
        }
        let mut raw = Raw::enter(server.address(), Mode::Structured, "");
        for _ in 0..3 {
            assert_eq!(raw.read(0, LONGEST).len(), LONGEST as usize, "{behind:?}");
        }
    }
}

#[test]
fn slow_writers_are_disconnected_when_others_wait() {
    let (_dir, _qsd, server) = stand(Behind::IoUring);
    let mut crowd = Crowd::new();
    for n in 0..42_u64 {
        let len = if n < 2 { 32 * MIB } else { 64 * KIB };
        let mut raw = Raw::enter(server.address(), Mode::Simple, "");
        raw.send(&Mode::Simple.header(0, cmd::WRITE, 1, 0, len));
        crowd.add(move || {
            std::thread::sleep(Duration::from_millis(500));
            raw.try_send(&[1]).is_ok()
        });
    }
    let mut raw = Raw::enter(server.address(), Mode::Structured, "");
    assert_eq!(raw.read(0, 64 << 10).len(), 64 << 10);
    assert_eq!(raw.read(0, LONGEST).len(), LONGEST as usize);
}

#[test]
fn replies_to_refused_requests_are_bounded() {
    let (_dir, _qsd, server) = stand(Behind::IoUring);
    let settle = || Raw::enter(server.address(), Mode::Structured, "").read(0, 1);
    settle();
    let before = server.resident_private();
    let mut crowd: Vec<Raw> = (0..50).map(|_| Raw::enter(server.address(), Mode::Structured, "")).collect();
    // Unknown commands, whose error replies are not read, until the server stops reading.
    for raw in &mut crowd {
        let flood: Vec<u8> = (0..20_000).flat_map(|n| Mode::Structured.header(0, 77, n, 0, 0)).collect();
        raw.flood(&flood);
    }
    settle();
    let grown = server.resident_private().saturating_sub(before);
    assert!(grown < 32 * MIB, "{grown} bytes of unread replies");
    drop(crowd);
    eventually("what was grown is given back", || server.resident_private() < before + 8 * MIB);
}

#[test]
fn block_status_replies_that_are_not_read_are_bounded() {
    let dir = Dir::new();
    let server = Nbdblk::unix(&dir, &["--threads=1", "memory=1G"]);
    let mut raw = Raw::enter(server.address(), Mode::Extended, "");
    for n in 0..4000 {
        raw.write(n * 128 * KIB, &[1; 512]);
    }
    let before = server.resident_private();
    let mut crowd: Vec<Raw> = (0..20).map(|_| Raw::enter(server.address(), Mode::Extended, "")).collect();
    for client in &mut crowd {
        let header = |n| Mode::Extended.header(0, cmd::BLOCK_STATUS, n, 0, 1 << 30);
        client.flood(&(0..1000).flat_map(header).collect::<Vec<u8>>());
    }
    // When a later client has had several turns, all of them have had one.
    for _ in 0..1000 {
        assert_eq!(raw.read(0, 512), [1; 512]);
    }
    let grown = server.resident_private().saturating_sub(before);
    assert!(grown < 16 * MIB, "{grown} bytes of replies that are not read");
    drop(crowd);
    assert!(server.terminate().success());
}

#[test]
fn idle_payload_memory_is_returned_to_the_system() {
    for spec in ["io_uring=disk.raw", "memory=64M"] {
        let dir = Dir::new();
        write_runs(&dir.at("disk.raw"), SIZE, [(0, SIZE)]);
        let server = Nbdblk::unix(&dir, &[spec]);
        let mut raw = Raw::enter(server.address(), Mode::Structured, "");
        raw.read(0, 4096);
        let before = server.resident();
        for _ in 0..2 {
            raw.request_reads(&(0..32).map(|n| (n % 8 * 8 * MIB, 8 << 20)).collect::<Vec<_>>());
            (0..32).for_each(|_| assert_eq!(raw.answer().error, 0));
        }
        eventually("idle memory is given back", || server.resident() < before + 8 * MIB);
        assert_eq!(raw.read(0, 8 << 20).len(), 8 << 20, "and there is memory again");
    }
}

/// A disk with a throughput of `rate` bytes per second.
fn throttled(dir: &Dir, rate: u64) -> Qsd {
    write_runs(&dir.at("disk.raw"), SIZE, [(0, SIZE)]);
    let image = dir.at("disk.raw");
    let node = format!(
        "driver=throttle,throttle-group=slow,node-name=disk,file.driver=file,file.locking=off,file.filename={}",
        image.display()
    );
    let group = format!("throttle-group,id=slow,x-bps-total={rate}");
    Qsd::start_behind(dir, &["--object", &group], &node, Export::default())
}

#[test]
fn a_slow_device_is_not_a_dead_one() {
    let dir = Dir::new();
    let qsd = throttled(&dir, MIB);
    // One request completes each second; the last one waits for much longer than the time-out.
    let spec = format!("{},request-timeout=3s", qsd.spec());
    let server = Nbdblk::unix(&dir, &["--threads=1", &spec]);
    let mut raw = Raw::enter(server.address(), Mode::Structured, "");
    raw.request_reads(&(0..16).map(|n| (n * MIB, MIB as u32)).collect::<Vec<_>>());
    for _ in 0..16 {
        assert_eq!(raw.answer().error, 0, "{}", server.log());
    }
}

#[test]
fn a_stopped_device_returns_eio_at_once_and_is_used_again_when_it_continues() {
    let dir = Dir::new();
    write_runs(&dir.at("disk.raw"), SIZE, [(0, SIZE)]);
    let qsd = Qsd::start(&dir, &dir.at("disk.raw"), Export::default());
    let spec = format!("{},request-timeout=1s,reconnect=0", qsd.spec());
    let server = Nbdblk::unix(&dir, &["--threads=1", &spec]);
    let mut raw = Raw::enter(server.address(), Mode::Structured, "");
    let first = raw.read(0, 4096);
    qsd.freeze();
    // They hold all the memory, which the device may write to at any time from now on.
    raw.request_reads(&[(0, LONGEST), (0, LONGEST)]);
    (0..2).for_each(|_| assert_eq!(raw.answer().error, 5));
    let mut other = Raw::enter(server.address(), Mode::Extended, "");
    for len in [4096, MIB as u32, LONGEST] {
        assert_eq!(other.call(0, cmd::READ, 0, len, b"").error, 5);
        assert_eq!(other.call(0, cmd::WRITE, 0, len, &vec![1; len as usize]).error, 5);
        assert_eq!(other.call(0, cmd::FLUSH, 0, 0, b"").error, 5);
    }
    qsd.thaw();
    let mut answer = 5;
    eventually("the device is used again", || {
        answer = other.call(0, cmd::READ, 0, 4096, b"").error;
        answer == 0
    });
    assert_eq!(other.read(0, 4096), first, "what failed was not written");
    assert_eq!(raw.read(0, LONGEST).len(), LONGEST as usize, "and its memory is back");
    assert!(server.terminate().success());
}
