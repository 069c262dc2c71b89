//! Exports are added, changed and removed while their own clients and clients of others are busy.

use std::{
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use blkdev::{
    Device,
    fault::{Fault, Faults},
    memory::Memory,
};
use nbd_proto::{Cookie, WireError};
use nbd_server_core::{Export, Removal, Status};

use crate::{Client, PATIENCE, Running};

const LEN: u32 = 64 << 10;

#[test]
fn adding_and_removing_an_export_does_not_affect_others() {
    let server = Running::start(vec![("stays", disk(0))], |limits| limits.workers = 2);
    let (over, answers) = (AtomicBool::new(false), AtomicU64::new(0));
    thread::scope(|scope| {
        for n in 0..3 {
            let mut client = server.client("stays");
            let (over, answers) = (&over, &answers);
            scope.spawn(move || {
                let at = u64::from(n * LEN);
                for round in 0.. {
                    let data = vec![round as u8; LEN as usize];
                    client.write(at, &data).expect("written");
                    assert!(client.read(at, LEN).expect("read") == data);
                    answers.fetch_add(2, Ordering::Relaxed);
                    if over.load(Ordering::Relaxed) {
                        return;
                    }
                }
            });
        }
        for round in 1..=30 {
            let removal = [Removal::Hide, Removal::Soft, Removal::Hard][round % 3];
            let disk = disk(round as u8);
            let watched = Arc::downgrade(&disk);
            server.server.add(export("comes", disk)).unwrap();
            let mut client = server.client("comes");
            assert_eq!(client.read(0, 1), Ok(vec![round as u8]));
            server.server.remove("comes", removal).unwrap();
            assert!(server.try_client("comes").is_none());
            drop(client);
            await_closed(&watched);
            let before = answers.load(Ordering::Relaxed);
            eventually(|| answers.load(Ordering::Relaxed) > before + 6);
        }
        over.store(true, Ordering::Relaxed);
    });
    eventually(|| server.server.exports() == [status("stays", 0, None)]);
}

#[test]
fn clients_of_a_hidden_export_stay_until_they_leave() {
    let disk = disk(7);
    let watched = Arc::downgrade(&disk);
    let server = Running::start(vec![("stays", self::disk(0)), ("x", disk)], |limits| limits.workers = 2);
    let mut clients: Vec<Client> = (0..4).map(|_| server.client("x")).collect();
    server.server.remove("x", Removal::Hide).unwrap();
    eventually(|| server.server.exports() == [status("stays", 0, None), status("x", 4, Some(Removal::Hide))]);
    while let Some(mut client) = clients.pop() {
        assert!(server.try_client("x").is_none());
        assert_eq!(client.read(5, 1), Ok(vec![7]));
        client.write(1000, b"hidden").unwrap();
        assert_eq!(client.read(1000, 6), Ok(b"hidden".to_vec()));
        assert!(watched.upgrade().is_some());
    }
    await_closed(&watched);
    assert_eq!(server.server.exports(), [status("stays", 0, None)]);
}

#[test]
fn clients_of_a_softly_removed_export_get_eshutdown() {
    let disk = disk(7);
    let watched = Arc::downgrade(&disk);
    let server = Running::start(vec![("x", disk)], |limits| limits.farewell = Duration::from_secs(2));
    let (mut polite, mut rude, mut late) = (server.client("x"), server.client("x"), server.client("x"));
    assert_eq!(polite.read(0, 1), Ok(vec![7]));
    // A write that has begun is completed.
    late.encoder.write_head(&mut late.out, Cookie(1), 0, 4, false);
    late.out.extend_from_slice(b"la");
    late.send();
    thread::sleep(Duration::from_millis(100));
    let start = Instant::now();
    server.server.remove("x", Removal::Soft).unwrap();
    eventually(|| polite.read(0, 1) == Err(WireError::Shutdown));
    late.out.extend_from_slice(b"te");
    late.send();
    assert_eq!(late.reply(1), Ok(Vec::new()));
    // The payload of a refused write is discarded; a write of no bytes is refused as well.
    assert_eq!(polite.write(0, &vec![9; 3 << 20]), Err(WireError::Shutdown));
    assert_eq!(polite.write(0, b""), Err(WireError::Shutdown));
    polite.encoder.flush(&mut polite.out, Cookie(5));
    polite.send();
    assert_eq!(polite.reply(5), Err(WireError::Shutdown));
    polite.encoder.disconnect(&mut polite.out, Cookie(0));
    polite.send();
    assert!(polite.next_reply().is_none());
    assert_eq!(rude.read(0, 4), Err(WireError::Shutdown));
    assert!(rude.next_reply().is_none(), "a client that does not leave is disconnected");
    assert!(start.elapsed() >= Duration::from_secs(2), "but not before the grace period is over");
    await_closed(&watched);
    assert_eq!(server.server.exports(), []);
}

#[test]
fn clients_of_a_hard_removed_export_are_disconnected_under_load() {
    for removal in [Removal::Hard, Removal::Soft] {
        let disk = disk(1);
        let watched = Arc::downgrade(&disk);
        let server = Running::start(vec![("x", disk)], |limits| (limits.workers, limits.memory) = (2, 1 << 20));
        let served = AtomicU64::new(0);
        thread::scope(|scope| {
            for n in 0..6 {
                let mut client = server.client("x");
                let served = &served;
                scope.spawn(move || {
                    // More than the memory, so that some wait for others.
                    let len = if n % 2 == 0 { LEN } else { 700 << 10 };
                    for cookie in 0.. {
                        client.encoder.read(&mut client.out, Cookie(cookie), 0, len);
                        if client.try_send().is_err() {
                            return;
                        }
                        if cookie < 8 {
                            continue;
                        }
                        match client.next_reply() {
                            Some((_, Ok(data))) => assert!(data == vec![1; len as usize]),
                            Some((_, Err(error))) => {
                                assert_eq!((error, removal), (WireError::Shutdown, Removal::Soft));
                                return;
                            }
                            None => return assert_eq!(removal, Removal::Hard),
                        }
                        served.fetch_add(1, Ordering::Relaxed);
                    }
                });
            }
            eventually(|| served.load(Ordering::Relaxed) > 100);
            server.server.remove("x", removal).unwrap();
        });
        await_closed(&watched);
    }
}

#[test]
fn a_silent_device_is_abandoned_in_bounded_time() {
    let device = Arc::new(Fault::new(Memory::new(1 << 20), Faults { lost: 1.0, ..Faults::new(3) }));
    let watched: Weak<dyn Device> = Arc::<Fault<Memory>>::downgrade(&device);
    let server = Running::start(vec![("stays", disk(0)), ("x", Arc::<Fault<Memory>>::clone(&device))], |_| {});
    let mut client = server.client("x");
    client.encoder.read(&mut client.out, Cookie(0), 0, 512);
    client.send();
    eventually(|| device.requests() > 0);
    drop(device);
    server.server.remove("x", Removal::Hard).unwrap();
    assert!(client.next_reply().is_none());
    await_closed(&watched);
    assert_eq!(server.client("stays").read(0, 1), Ok(vec![0]));
}

#[test]
fn a_stronger_removal_replaces_a_weaker_one() {
    let server = Running::start(vec![("x", disk(1))], |_| {});
    let mut first = server.client("x");
    assert_eq!(first.read(0, 1), Ok(vec![1]));
    server.server.remove("x", Removal::Hide).unwrap();
    server.server.add(export("x", disk(2))).unwrap();
    let mut second = server.client("x");
    assert_eq!((first.read(0, 1), second.read(0, 1)), (Ok(vec![1]), Ok(vec![2])));
    server.server.remove("x", Removal::Hard).unwrap();
    assert!(first.next_reply().is_none() && second.next_reply().is_none());
    eventually(|| server.server.exports().is_empty());
    let error = server.server.remove("x", Removal::Hard).unwrap_err();
    assert_eq!((error.kind(), error.to_string().as_str()), (std::io::ErrorKind::NotFound, "no export is named \"x\""));
}

#[test]
fn a_name_changes_its_device_in_one_step() {
    let server = Running::start(vec![("x", sized_disk(0))], |limits| limits.workers = 2);
    let mut first = server.client("x");
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    // The export always exists, and its device and size always match.
                    let mut client = server.client("x");
                    let size = client.size;
                    assert_eq!(client.read(size - 1, 1), Ok(vec![((size >> 20) - 1) as u8]));
                }
            });
        }
        for n in 1..60 {
            // The removed device is only hidden: clients that have got as far as GO are served.
            server.server.replace(vec![export("x", sized_disk(n))], None, |_| Removal::Hide).unwrap();
            thread::sleep(Duration::from_millis(5));
        }
        over.store(true, Ordering::Relaxed);
    });
    assert_eq!(first.read(0, 1), Ok(vec![0]), "an early client keeps its device");
    eventually(|| server.server.exports() == [status("x", 0, None), status("x", 1, Some(Removal::Hide))]);
}

#[test]
fn changed_properties_do_not_affect_clients() {
    let disk = disk(1);
    let server = Running::start(vec![("x", Arc::clone(&disk))], |_| {});
    let mut client = server.client("x");
    let mut changed = export("x", disk);
    (changed.description, changed.read_only) = ("other words".into(), true);
    server.server.replace(vec![export("default", self::disk(2)), changed], None, |_| Removal::Hard).unwrap();
    client.write(0, b"still").unwrap();
    assert_eq!(server.client("x").write(0, b"x"), Err(WireError::Perm));
    assert_eq!(server.client("").read(0, 1), Ok(vec![2]), "the first is the default one");
}

#[test]
fn a_change_that_fails_changes_nothing() {
    let single: Arc<dyn Device> = Arc::new(Memory::new(1 << 20).with(|info| info.queues_max = 1));
    let server = Running::start(vec![("x", disk(1)), ("single", Arc::clone(&single))], |_| {});
    let mut client = server.client("x");
    let fails = |list: Vec<Export>, words: &str| {
        let error = server.server.replace(list, None, |_| Removal::Hard).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    };
    fails(vec![export("new", disk(2)), export("new", disk(3))], "two exports are named \"new\"");
    fails(vec![export(&"long".repeat(2000), disk(2))], "4096");
    // The second one cannot be opened, so the first is not added either.
    fails(vec![export("new", disk(2)), export("again", single)], "queue");
    let error = server.server.add(export("x", disk(2))).unwrap_err().to_string();
    assert!(error.contains("two exports are named \"x\""), "{error}");
    assert!(server.try_client("new").is_none());
    assert_eq!(client.read(0, 1), Ok(vec![1]));
    assert_eq!(server.server.exports(), [status("x", 1, None), status("single", 0, None)]);
}

#[test]
fn a_handshake_uses_the_exports_at_its_end() {
    let server = Running::start(vec![("x", disk(1))], |_| {});
    let (early, other) = (server.connect(), server.connect());
    server.server.remove("x", Removal::Hide).unwrap();
    assert!(Client::try_enter(early, "x").is_none() && server.try_client("").is_none());
    server.server.add(export("y", disk(2))).unwrap();
    assert_eq!(Client::try_enter(other, "").unwrap().read(0, 1), Ok(vec![2]));
}

/// A disk of 4 MiB filled with this byte, with one queue for each worker.
fn disk(byte: u8) -> Arc<dyn Device> {
    let disk = Memory::new(4 << 20);
    disk.write(0, &vec![byte; 4 << 20]);
    Arc::new(disk)
}

/// A disk of `n + 1` MiB, with `n` in its last byte.
fn sized_disk(n: u8) -> Arc<dyn Device> {
    let size = (u64::from(n) + 1) << 20;
    let disk = Memory::new(size);
    disk.write(size - 1, &[n]);
    Arc::new(disk)
}

fn export(name: &str, device: Arc<dyn Device>) -> Export {
    crate::export(name, device, &[])
}

fn status(name: &str, clients: usize, removal: Option<Removal>) -> Status {
    Status { name: name.into(), clients, removal }
}

fn await_closed(device: &Weak<dyn Device>) {
    eventually(|| device.strong_count() == 0);
}

#[track_caller]
pub(crate) fn eventually(mut test: impl FnMut() -> bool) {
    let start = Instant::now();
    while !test() {
        assert!(start.elapsed() < PATIENCE, "the condition is never met");
        thread::sleep(Duration::from_millis(1));
    }
}

impl Client {
    pub(super) fn read(&mut self, at: u64, len: u32) -> Result<Vec<u8>, WireError> {
        self.encoder.read(&mut self.out, Cookie(77), at, len);
        self.send();
        self.reply(77)
    }

    pub(super) fn write(&mut self, at: u64, data: &[u8]) -> Result<(), WireError> {
        self.encoder.write_head(&mut self.out, Cookie(78), at, data.len() as u32, false);
        self.out.extend_from_slice(data);
        self.send();
        self.reply(78).map(drop)
    }
}
