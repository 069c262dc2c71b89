//! A hostile back end, which attacks its front end through everything they share: memory, eventfds, socket and the channel for
//! back-end requests.

mod common;

use std::{
    io::{ErrorKind, Read, Write},
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixListener,
    },
    sync::{Arc, mpsc},
    thread,
    time::{Duration, Instant},
};

use blkdev::{Arena, Device, Error, Mapping, Op, Queue, Request};
use blkdev_vhost_user::{Options, VhostUser};
use blkdev_virtio::model::{Model, Spec};
use common::{ALL, Answer, BACKEND_REQ, Backend, Dir, MEM_SLOTS, Quirks, REPLY_ACK, attack, collect};
use nix::{
    fcntl::{FallocateFlags, fallocate},
    poll::{PollFd, PollFlags, PollTimeout, poll},
    unistd::{ftruncate, pipe},
};

const MIB: u64 = 1 << 20;
/// Far more time than any test needs, even on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);

/// Message ids.
const SET_MEM_TABLE: u32 = 5;
const SET_VRING_NUM: u32 = 8;
const SET_VRING_ADDR: u32 = 9;
const SET_VRING_BASE: u32 = 10;
const GET_VRING_BASE: u32 = 11;
const SET_VRING_KICK: u32 = 12;
const SET_VRING_CALL: u32 = 13;
const SET_VRING_ENABLE: u32 = 18;
const GET_CONFIG: u32 = 24;
const ADD_MEM_REG: u32 = 37;
const REM_MEM_REG: u32 = 38;

/// The options with a change.
fn with(mut options: Options, change: impl FnOnce(&mut Options)) -> Options {
    change(&mut options);
    options
}

fn backend(quirks: Quirks) -> Backend {
    Backend::new(Model::new(Spec::new(MIB)), quirks)
}

fn short(backend: &Backend) -> Options {
    let connect_timeout = Duration::from_secs(3);
    with(Options::new(&backend.socket), |o| {
        (o.connect_timeout, o.virtio.timeout) = (connect_timeout, Some(Duration::from_secs(2)));
    })
}

/// Runs `act` in its own thread, and panics if it does not return: a blocked thread cannot fail a test.
fn bounded<R: Send + 'static>(what: &str, act: impl FnOnce() -> R + Send + 'static) -> R {
    let (tell, told) = mpsc::channel();
    let thread = thread::spawn(move || {
        let result = act();
        let _ = tell.send(());
        result
    });
    match told.recv_timeout(PATIENCE) {
        Err(mpsc::RecvTimeoutError::Timeout) => panic!("{what} blocks"),
        _ => thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
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

/// Whether a queue detects the dead device without a call of `give_up`.
fn dies(queue: &mut dyn Queue) -> bool {
    let end = Instant::now() + PATIENCE;
    while !queue.is_dead() {
        if Instant::now() >= end {
            return false;
        }
        thread::sleep(Duration::from_millis(5));
    }
    true
}

#[test]
fn memory_cannot_be_taken_away() {
    let backend = backend(Quirks { deaf_from: 1, ..Quirks::default() });
    let device = VhostUser::connect(&short(&backend)).unwrap();
    let mut arena = memory(&device);
    let mut queue = device.open_queue(16).unwrap();
    let loot = backend.loot.lock().unwrap();
    assert_eq!(loot.memory.len(), 2);
    let mut written = arena.alloc(4096).unwrap();
    written.copy_from(0, &[7; 4096]);
    for memory in &loot.memory {
        for len in [0, 4096, 64 * MIB] {
            let e = ftruncate(memory, len as i64).unwrap_err();
            assert_eq!(e, nix::errno::Errno::EPERM, "to {len} bytes");
        }
        // A hole reads as zeroes: it loses the content, and has no other effect.
        let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        fallocate(memory, punch, 0, 2 * MIB as i64).unwrap();
    }
    let mut bytes = [1; 4096];
    written.copy_to(0, &mut bytes);
    assert_eq!(bytes, [0; 4096]);
    // The rings are gone, too.
    for tag in 0..16 {
        queue.push(read(tag, &mut arena)).unwrap();
    }
    queue.kick();
    let mut done = Vec::new();
    queue.reap(&mut done);
    queue.arm();
    queue.give_up();
    queue.reap(&mut done);
    assert_eq!(done.len(), 16);
}

#[test]
fn eventfds_that_block_are_as_good_as_others() {
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    let backend = backend(Quirks::default());
    let device = VhostUser::connect(&short(&backend)).unwrap();
    bounded("a queue", move || {
        let mut arena = memory(&device);
        let mut queue = device.open_queue(16).unwrap();
        {
            let loot = backend.loot.lock().unwrap();
            for fd in loot.kicks.iter().chain(&loot.calls) {
                fcntl(fd, FcntlArg::F_SETFL(OFlag::empty())).unwrap();
            }
        }
        for _ in 0..100 {
            // Sleep both without and with requests in flight.
            assert!(queue.arm());
            for tag in 0..16 {
                queue.push(read(tag, &mut arena)).unwrap();
            }
            queue.kick();
            assert!(collect(&mut *queue, 16, PATIENCE).iter().all(|c| c.result.is_ok()));
        }
    });
}

#[test]
fn a_kick_does_not_block_for_long() {
    for packed in [false, true] {
        let spec = Spec::new(MIB);
        let spec = if packed { spec.packed() } else { spec };
        let backend = Backend::new(Model::new(spec), Quirks { deaf_from: 1, block_from: 1, ..Quirks::default() });
        let device = VhostUser::connect(&short(&backend)).unwrap();
        let mut arena = memory(&device);
        let (mut queue, mut other) = (device.open_queue(16).unwrap(), device.open_queue(16).unwrap());
        bounded("a kick", move || {
            for tag in 0..16 {
                queue.push(read(tag, &mut arena)).unwrap();
            }
            queue.kick();
            assert!(queue.is_dead(), "the device is declared dead before the thread that kicks goes on");
            assert!(collect(&mut *queue, 16, PATIENCE).iter().all(|c| c.result == Err(Error::Gone)));
            assert!(dies(&mut *other));
            drop((queue, other, device, backend));
        });
    }
}

#[test]
fn a_kick_that_blocks_when_the_back_end_goes_is_freed() {
    let backend = backend(Quirks { deaf_from: 1, block_from: 1, ..Quirks::default() });
    let device = VhostUser::connect(&short(&backend)).unwrap();
    let mut arena = memory(&device);
    let mut queue = device.open_queue(16).unwrap();
    queue.push(read(1, &mut arena)).unwrap();
    let kicks = thread::spawn(move || {
        queue.kick();
        queue
    });
    backend.hang_up();
    bounded("a kick", move || {
        let mut queue = kicks.join().unwrap();
        assert_eq!(collect(&mut *queue, 1, PATIENCE)[0].result, Err(Error::Gone));
        drop((queue, device));
    });
}

#[test]
fn a_full_call_that_blocks_does_not_keep_the_end_from_being_noticed() {
    let backend = backend(Quirks { deaf_from: 1, block_from: 1, ..Quirks::default() });
    let device = VhostUser::connect(&short(&backend)).unwrap();
    let mut queues: Vec<_> = (0..4).map(|_| device.open_queue(16).unwrap()).collect();
    bounded("the end", move || {
        backend.hang_up();
        for queue in &mut queues {
            assert!(dies(&mut **queue));
            queue.arm();
        }
        let e = device.register(&Mapping::new(1).unwrap()).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::ConnectionReset);
        drop((queues, device));
    });
}

#[test]
fn giving_up_does_not_block() {
    let backend = backend(Quirks { deaf_from: 1, ..Quirks::default() });
    let device = VhostUser::connect(&short(&backend)).unwrap();
    let (mut queue, mut other) = (device.open_queue(16).unwrap(), device.open_queue(16).unwrap());
    assert!(queue.arm() && other.arm());
    backend.loot.lock().unwrap().calls.iter().for_each(attack);
    bounded("giving up", move || {
        queue.give_up();
        let fd = other.wake_fd().unwrap();
        assert_eq!(poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], PollTimeout::from(20_000_u16)), Ok(1));
        assert!(dies(&mut *other));
        drop((queue, other, device, backend));
    });
}

#[test]
fn connecting_does_not_block() {
    // The eventfds of the probe queue are full and block; then the back end either hangs up or stays silent.
    for hang_up in [true, false] {
        let backend = backend(Quirks { deaf_from: 0, block_from: 0, ..Quirks::default() });
        let options = short(&backend);
        let begin = Instant::now();
        let connecting = thread::spawn(move || VhostUser::connect(&options).map(drop));
        let end = Instant::now() + PATIENCE;
        while hang_up && backend.loot.lock().unwrap().rings == 0 {
            assert!(Instant::now() < end, "the queue starts");
            thread::sleep(Duration::from_millis(1));
        }
        if hang_up {
            backend.hang_up();
        }
        let e = bounded("connecting", move || connecting.join().unwrap()).unwrap_err();
        assert!(begin.elapsed() < Duration::from_secs(15), "{e}");
    }
}

/// Sends back-end requests continuously, until the channel is closed.
fn flood(backend: &Backend) -> thread::JoinHandle<()> {
    let mut requests = backend.requests();
    thread::spawn(move || {
        let messages = [2_u32, 1, 0].map(u32::to_ne_bytes).concat().repeat(1000);
        while requests.write_all(&messages).is_ok() {}
    })
}

#[test]
fn a_flood_of_requests_delays_no_deadline() {
    let backend = backend(Quirks::default());
    let device = VhostUser::connect(&short(&backend)).unwrap();
    let flood = flood(&backend);
    backend.quirks.lock().unwrap().mute = vec![ADD_MEM_REG, GET_CONFIG];
    bounded("adding memory", move || {
        let e = device.register(&Mapping::new(1).unwrap()).unwrap_err();
        assert!([ErrorKind::TimedOut, ErrorKind::ConnectionReset].contains(&e.kind()), "{e}");
        drop(device);
        flood.join().unwrap();
    });
}

#[test]
fn of_a_flood_of_changes_a_few_are_looked_at_and_the_last() {
    let backend = backend(Quirks::default());
    let device = VhostUser::connect(&Options::new(&backend.socket)).unwrap();
    let before = backend.loot.lock().unwrap().configs;
    let mut requests = backend.requests();
    let begin = Instant::now();
    while begin.elapsed() < Duration::from_secs(1) {
        requests.write_all(&[2_u32, 1, 0].map(u32::to_ne_bytes).concat()).unwrap();
    }
    let (looks, seconds) = (backend.loot.lock().unwrap().configs - before, begin.elapsed().as_secs() as usize + 1);
    assert!((1..=20 * seconds).contains(&looks), "{looks} in {seconds} s");
    backend.model.resize(3 * MIB);
    requests.write_all(&[2_u32, 1, 0].map(u32::to_ne_bytes).concat()).unwrap();
    let end = Instant::now() + PATIENCE;
    while device.capacity() != 3 * MIB {
        assert!(Instant::now() < end, "the last change is detected");
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn answers_about_the_configuration_that_are_late_or_nonsense() {
    // The reported length, and whether open must succeed.
    for (config, good) in [
        (Answer::Nonsense(0, u32::MAX, 60), true),
        (Answer::Nonsense(0, 0, 60), false),
        (Answer::Nonsense(0, 60, 4000), true),
        (Answer::Nonsense(0, 60, 5000), false),
        (Answer::Nonsense(8, 60, 60), false),
        (Answer::Nonsense(u32::MAX, u32::MAX, 60), false),
        (Answer::Nonsense(0, 60, 7), false),
        (Answer::Short, false),
    ] {
        let backend = backend(Quirks { config, ..Quirks::default() });
        let result = bounded("connecting", {
            let options = short(&backend);
            move || VhostUser::connect(&options).map(|device| device.capacity())
        });
        assert_eq!(result.as_ref().is_ok_and(|capacity| *capacity == MIB), good, "{result:?}");
        assert_eq!(result.is_ok(), good);
    }
    let backend = backend(Quirks { delay: Duration::from_millis(20), ..Quirks::default() });
    assert_eq!(VhostUser::connect(&Options::new(&backend.socket)).unwrap().capacity(), MIB);
}

#[test]
fn an_answer_that_comes_too_late_is_not_taken_for_another_one() {
    let backend = backend(Quirks::default());
    let device = VhostUser::connect(&short(&backend)).unwrap();
    let mut queue = device.open_queue(1).unwrap();
    backend.quirks.lock().unwrap().delay = Duration::from_secs(6);
    let e = device.register(&Mapping::new(1).unwrap()).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::TimedOut, "{e}");
    assert!(dies(&mut *queue));
    backend.quirks.lock().unwrap().delay = Duration::ZERO;
    assert_eq!(device.register(&Mapping::new(1).unwrap()).unwrap_err().kind(), ErrorKind::TimedOut);
}

#[test]
fn an_answer_that_comes_twice_ends_the_device() {
    for message in [GET_CONFIG, ADD_MEM_REG] {
        let backend = backend(Quirks::default());
        let device = VhostUser::connect(&short(&backend)).unwrap();
        let mut queue = device.open_queue(1).unwrap();
        backend.quirks.lock().unwrap().twice = vec![message];
        if message == GET_CONFIG {
            backend.resize(2 * MIB);
            let end = Instant::now() + PATIENCE;
            while device.capacity() != 2 * MIB {
                assert!(Instant::now() < end);
                thread::sleep(Duration::from_millis(5));
            }
        } else {
            device.register(&Mapping::new(1).unwrap()).unwrap();
        }
        let e = device.register(&Mapping::new(1).unwrap()).unwrap_err();
        assert!(e.to_string().contains("sent an unrequested reply"), "{e}");
        assert!(dies(&mut *queue));
    }
}

/// Descriptors attached to a reply are all closed, however many they are.
#[test]
fn unrequested_descriptors_are_closed() {
    // GET_FEATURES and GET_CONFIG are read by this crate; others by `vhost`.
    for (count, messages) in [
        (1, vec![GET_CONFIG]),
        (253, vec![GET_CONFIG]),
        (2, vec![1]),
        (1, vec![15]),
        (32, vec![36]),
        (33, vec![2]),
        (253, vec![ADD_MEM_REG]),
        (3, vec![GET_VRING_BASE]),
    ] {
        let (reader, writer) = pipe().unwrap();
        let attach = Some((Arc::new(writer), count, messages.clone()));
        let backend = backend(Quirks { attach, ..Quirks::default() });
        let result = bounded("connecting", {
            let options = short(&backend);
            move || VhostUser::connect(&options).map(drop)
        });
        assert_eq!(result.is_ok(), messages == [GET_CONFIG], "{count} with {messages:?}: {result:?}");
        drop(backend);
        hears_the_end(&reader, &format!("{count} with {messages:?}"));
    }
}

#[test]
fn descriptors_on_the_channel_of_requests_are_closed() {
    use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
    use std::{io::IoSlice, os::fd::AsRawFd};
    let (reader, writer) = pipe().unwrap();
    let backend = backend(Quirks::default());
    let device = VhostUser::connect(&short(&backend)).unwrap();
    let mut requests = backend.requests();
    let message = [2_u32, 1 | 8, 0].map(u32::to_ne_bytes).concat();
    for _ in 0..20 {
        let fds = [writer.as_raw_fd(); 100];
        let rights = [ControlMessage::ScmRights(&fds)];
        sendmsg::<()>(requests.as_raw_fd(), &[IoSlice::new(&message)], &rights, MsgFlags::empty(), None).unwrap();
        requests.read_exact(&mut [0; 20]).unwrap();
    }
    drop(writer);
    hears_the_end(&reader, "while the device is open");
    drop(device);
}

/// Checks that the pipe has no writer left.
fn hears_the_end(reader: &OwnedFd, what: &str) {
    let mut fds = [PollFd::new(reader.as_fd(), PollFlags::POLLIN)];
    assert_eq!(poll(&mut fds, PollTimeout::from(20_000_u16)), Ok(1), "{what}: a descriptor was left open");
    assert!(fds[0].revents().is_some_and(|events| events.contains(PollFlags::POLLHUP)), "{what}");
}

#[test]
fn a_back_end_that_hangs_up_at_any_message() {
    let slots = [3, 1, 15, 16, 21, 17, 36, 2, ADD_MEM_REG];
    let table = [SET_MEM_TABLE];
    let rest = [GET_CONFIG, SET_VRING_NUM, SET_VRING_BASE, SET_VRING_ADDR, SET_VRING_CALL, SET_VRING_KICK];
    let rest = rest.into_iter().chain([SET_VRING_ENABLE, GET_VRING_BASE]);
    let table = table.into_iter().chain(rest.clone()).map(|message| (message, ALL & !MEM_SLOTS));
    for (message, protocol) in slots.into_iter().chain(rest).map(|message| (message, ALL)).chain(table) {
        let backend = backend(Quirks { hang_up_at: Some(message), protocol, ..Quirks::default() });
        let options = short(&backend);
        let e = bounded("connecting", move || VhostUser::connect(&options).map(drop)).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::ConnectionReset, "at {message}: {e}");
        let e = e.to_string();
        let first = [1, 3].contains(&message);
        let part = if first { "not a vhost-user back end" } else { "the back end closed the connection" };
        assert!(e.contains(part), "at {message}: {e}");
        // Later, while the device is in use.
        backend.quirks.lock().unwrap().hang_up_at = None;
        let device = VhostUser::connect(&short(&backend)).unwrap();
        let mut queue = device.open_queue(1).unwrap();
        backend.quirks.lock().unwrap().hang_up_at = Some(message);
        bounded("using it", move || {
            if device.register(&Mapping::new(1).unwrap()).is_err() {
                assert!(dies(&mut *queue), "at {message}");
            }
            let _ = device.open_queue(1);
            drop((queue, device));
        });
    }
}

#[test]
fn what_is_no_vhost_user_back_end() {
    let dir = Dir::new();
    let path = dir.join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let nbd: &[u8] = b"NBDMAGICIHAVEOPT\0\x03";
    for (words, part) in [
        (nbd, "an NBD server"),
        (b"", "closed the connection"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "HTTP/1.1 400"),
        (&[1, 0, 0, 0, 5, 0], "in the middle"),
        (&[1, 0, 0, 0, 1, 0, 0, 0, 8, 0, 0, 0], "it sent"),
        (&[1, 0, 0, 0, 5, 0, 0, 0, 255, 255, 255, 255], "it sent"),
        (&[0; 64], "it sent"),
    ] {
        // An NBD server waits for a reply; the others close the connection.
        let stays = words == nbd;
        let listener = listener.try_clone().unwrap();
        let server = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.write_all(words).unwrap();
            if stays {
                let _ = stream.read_to_end(&mut Vec::new());
            }
        });
        let options = with(Options::new(&path), |o| o.connect_timeout = Duration::from_secs(20));
        let begin = Instant::now();
        let e = VhostUser::connect(&options).unwrap_err();
        let is_closed = e.to_string().contains("it closed the connection");
        assert_eq!(e.kind(), if is_closed { ErrorKind::ConnectionReset } else { ErrorKind::InvalidData }, "{e}");
        let e = e.to_string();
        assert!(e.contains("not a vhost-user back end") && e.contains(part), "{e}");
        assert!(begin.elapsed() < Duration::from_secs(15), "the error comes before the time-out");
        server.join().unwrap();
    }
}

/// The new memory table is refused, or not acknowledged, while a queue is stopped for it; or the queue cannot be restarted.
#[test]
fn a_queue_that_stops_for_memory_goes_on_or_the_device_is_dead() {
    for (message, mute) in [
        (SET_MEM_TABLE, false),
        (SET_MEM_TABLE, true),
        (SET_VRING_NUM, false),
        (SET_VRING_ADDR, false),
        (SET_VRING_CALL, false),
        (SET_VRING_ENABLE, false),
        (SET_VRING_ENABLE, true),
        (GET_VRING_BASE, true),
    ] {
        let backend = backend(Quirks { protocol: ALL & !MEM_SLOTS, ..Quirks::default() });
        let device = VhostUser::connect(&short(&backend)).unwrap();
        let mut arena = memory(&device);
        let mut queue = device.open_queue(4).unwrap();
        {
            let mut quirks = backend.quirks.lock().unwrap();
            *(if mute { &mut quirks.mute } else { &mut quirks.refuse }) = vec![message];
        }
        let e = device.register(&Mapping::new(1).unwrap()).unwrap_err();
        assert!(queue.is_dead(), "{message}: {e}");
        queue.push(read(1, &mut arena)).unwrap();
        queue.kick();
        assert_eq!(collect(&mut *queue, 1, PATIENCE)[0].result, Err(Error::Gone), "{message}");
    }
}

#[test]
fn memory_that_is_refused_changes_nothing() {
    let backend = backend(Quirks::default());
    let device = VhostUser::connect(&short(&backend)).unwrap();
    let mut arena = memory(&device);
    let mut queue = device.open_queue(4).unwrap();
    backend.quirks.lock().unwrap().refuse = vec![ADD_MEM_REG, REM_MEM_REG];
    device.register(&Mapping::new(1).unwrap()).unwrap_err();
    queue.push(read(1, &mut arena)).unwrap();
    queue.kick();
    assert_eq!(collect(&mut *queue, 1, PATIENCE)[0].result, Ok(()));
    assert!(!queue.is_dead());
}

#[test]
fn a_queue_that_is_refused_is_stopped_and_the_others_go_on() {
    for message in [SET_VRING_NUM, SET_VRING_ADDR, SET_VRING_CALL, SET_VRING_KICK, SET_VRING_ENABLE] {
        let backend = backend(Quirks::default());
        let device = VhostUser::connect(&short(&backend)).unwrap();
        let mut arena = memory(&device);
        let mut queue = device.open_queue(4).unwrap();
        backend.quirks.lock().unwrap().refuse = vec![message];
        device.open_queue(4).unwrap_err();
        backend.quirks.lock().unwrap().refuse = Vec::new();
        let mut other = device.open_queue(4).unwrap();
        for queue in [&mut queue, &mut other] {
            queue.push(read(1, &mut arena)).unwrap();
            queue.kick();
            assert_eq!(collect(&mut **queue, 1, PATIENCE)[0].result, Ok(()));
        }
    }
}

#[test]
fn memory_comes_and_goes() {
    for protocol in [ALL, ALL & !MEM_SLOTS, ALL & !MEM_SLOTS & !REPLY_ACK] {
        let backend = backend(Quirks { protocol, slots: 3, ..Quirks::default() });
        let device = VhostUser::connect(&Options::new(&backend.socket)).unwrap();
        let mut arena = memory(&device);
        let mut queue = device.open_queue(16).unwrap();
        for _ in 0..20 {
            let mapping = Mapping::new(1).unwrap();
            device.register(&mapping).unwrap();
            device.unregister(&Mapping::new(1).unwrap());
            device.unregister(&mapping);
            device.unregister(&mapping);
            assert_eq!(Arc::strong_count(&mapping), 1, "no reference is left");
            for tag in 0..16 {
                queue.push(read(tag, &mut arena)).unwrap();
            }
            queue.kick();
            assert!(collect(&mut *queue, 16, PATIENCE).iter().all(|c| c.result.is_ok()));
        }
        assert_eq!(backend.model.regions(), 2);
        // Also for a dead device.
        let mapping = Mapping::new(1).unwrap();
        device.register(&mapping).unwrap();
        backend.hang_up();
        assert!(dies(&mut *queue));
        device.unregister(&mapping);
        assert_eq!(Arc::strong_count(&mapping), 1);
    }
}

#[test]
fn a_size_that_is_not_announced_is_seen_when_asked_for() {
    let backend = backend(Quirks { protocol: ALL & !BACKEND_REQ, ..Quirks::default() });
    let device = VhostUser::connect(&Options::new(&backend.socket)).unwrap();
    for capacity in [2 * MIB, MIB / 2, 3 * MIB] {
        backend.model.resize(capacity);
        let end = Instant::now() + PATIENCE;
        while device.capacity() != capacity {
            assert!(Instant::now() < end, "{} is not {capacity}", device.capacity());
            device.refresh();
        }
    }
    backend.quirks.lock().unwrap().mute = vec![GET_CONFIG];
    let begin = Instant::now();
    device.refresh();
    assert!(begin.elapsed() < Duration::from_secs(3), "refresh is bounded whatever the back end does");
}

#[test]
fn a_back_end_that_was_started_again_is_another_one() {
    let first = backend(Quirks::default());
    let device = VhostUser::connect(&Options::new(&first.socket)).unwrap();
    assert!(!device.is_replaced());
    let aside = first.socket.with_extension("aside");
    std::fs::rename(&first.socket, &aside).unwrap();
    assert!(!device.is_replaced(), "no other socket exists");
    let second = UnixListener::bind(&first.socket).unwrap();
    assert!(device.is_replaced());
    drop((device, second));
    std::fs::rename(&aside, &first.socket).unwrap();
}
