//! Tests of a ring and the operations that it owns.

use std::{
    fs::File,
    io::{self, Read, Write},
    os::fd::AsFd,
    path::{Path, PathBuf},
    process, thread,
    time::{Duration, Instant},
};

use blkdev::{Arena, Buf, Mapping, PAGE};
use blkdev_ring::{Command, Operation, Ring};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// A transfer that records its progress.
#[derive(Debug)]
struct Transfer {
    at: u64,
    buf: Buf,
    moved: u32,
    write: bool,
}

impl Operation for Transfer {
    fn command(&self) -> Command<'_> {
        let &Self { at, ref buf, moved: skip, write } = self;
        if write { Command::Write { at, buf, skip, durable: true } } else { Command::Read { at, buf, skip } }
    }

    fn buf_mut(&mut self) -> Option<&mut Buf> {
        Some(&mut self.buf)
    }
}

fn arena() -> Arena {
    Mapping::new(1).unwrap().arenas(1).remove(0)
}

fn read(arena: &mut Arena, at: u64, len: usize) -> Transfer {
    Transfer { at, buf: arena.alloc(len).unwrap(), moved: 0, write: false }
}

fn write(arena: &mut Arena, at: u64, byte: u8) -> Transfer {
    let mut buf = arena.alloc(PAGE).unwrap();
    buf.copy_from(0, &[byte; PAGE]);
    Transfer { at, buf, moved: 0, write: true }
}

/// Sleeps and reaps until one operation has completed.
fn wait(ring: &mut Ring<Transfer>) -> (Transfer, Result<u32, i32>) {
    let (mut ended, deadline) = (None, Instant::now() + Duration::from_secs(60));
    while ended.is_none() {
        assert!(Instant::now() < deadline, "an operation ends within a minute");
        if ring.arm() {
            let mut fds = [PollFd::new(ring.as_fd(), PollFlags::POLLIN)];
            let _ = poll(&mut fds, PollTimeout::from(1000u16));
        }
        ring.reap(|mut op, result| {
            assert!(ended.is_none(), "one operation is in flight");
            if let Ok(count @ 1..) = result {
                op.moved += count;
                if (op.moved as usize) < op.buf.len() {
                    return Some(op);
                }
            }
            ended = Some((op, result));
            None
        });
    }
    ended.unwrap()
}

struct Scratch(PathBuf, File);

impl Scratch {
    fn new(name: &str) -> Self {
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("blkdev-ring-{name}-{}", process::id()));
        let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        Self(path, file)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

#[test]
fn full_or_given_up_the_operation_comes_back() {
    let (pipe, _end) = io::pipe().unwrap();
    let (mut ring, mut arena) = (Ring::new(2, pipe.as_fd()).unwrap(), arena());
    assert_eq!(ring.depth(), 2);
    ring.push(read(&mut arena, 0, 8)).unwrap();
    ring.push(read(&mut arena, 1, 8)).unwrap();
    let back = ring.push(read(&mut arena, 2, 8)).unwrap_err();
    assert_eq!((back.at, back.buf.len(), ring.in_flight()), (2, 8, 2));
    ring.give_up(drop);
    assert_eq!(ring.push(back).unwrap_err().at, 2);
}

#[test]
fn what_is_given_up_is_never_reused() {
    let (pipe, mut end) = io::pipe().unwrap();
    let (mut ring, mut arena) = (Ring::new(4, pipe.as_fd()).unwrap(), arena());
    let all = arena.free();
    ring.push(read(&mut arena, 0, 8)).unwrap();
    ring.kick();
    assert!(ring.arm());
    let mut given = Vec::new();
    ring.give_up(|op| given.push(op));
    assert!(given.len() == 1 && given[0].buf.is_empty());
    drop(given);
    assert_eq!((ring.in_flight(), arena.free()), (0, all - PAGE));
    // The drop does not wait for it, and the kernel may still write.
    let started = Instant::now();
    drop((ring, arena));
    assert!(started.elapsed() < Duration::from_secs(10));
    let _ = end.write_all(b"too late");
}

#[test]
fn what_is_given_back_goes_on_where_it_was() {
    let (pipe, mut end) = io::pipe().unwrap();
    let (mut ring, mut arena) = (Ring::new(1, pipe.as_fd()).unwrap(), arena());
    ring.push(read(&mut arena, 0, 8)).unwrap();
    let writer = thread::spawn(move || {
        for part in ["one", "tw", "thr"] {
            thread::yield_now();
            end.write_all(part.as_bytes()).unwrap();
        }
        end
    });
    let (op, result) = wait(&mut ring);
    assert!(result.is_ok());
    assert_eq!(op.buf.to_vec(), b"onetwthr");
    drop(writer.join().unwrap());
    // End of file, and an errno.
    ring.push(read(&mut arena, 0, 8)).unwrap();
    assert_eq!(wait(&mut ring).1, Ok(0));
    ring.push(write(&mut arena, 0, 1)).unwrap();
    assert_eq!(wait(&mut ring).1, Err(libc::EBADF));
}

#[test]
fn dropped_it_waits_for_what_is_in_flight() {
    let Scratch(_, file) = &Scratch::new("drop");
    let mut arena = arena();
    let all = arena.free();
    for kicked in [true, false] {
        let mut ring = Ring::new(64, file.as_fd()).unwrap();
        for n in 0..64 {
            ring.push(write(&mut arena, n * PAGE as u64, n as u8 + u8::from(kicked))).unwrap();
        }
        assert_eq!(arena.free(), all - 64 * PAGE);
        if kicked {
            ring.kick();
        }
        drop(ring);
        assert_eq!(arena.free(), all);
        let mut page = [0; PAGE];
        use std::os::unix::fs::FileExt;
        for n in 0..64 {
            file.read_exact_at(&mut page, n * PAGE as u64).unwrap();
            assert_eq!(page, [n as u8 + u8::from(kicked); PAGE]);
        }
    }
}

#[test]
fn dropped_it_has_closed_its_file() {
    let mut arena = arena();
    for round in 0..50 {
        let (mut end, pipe) = io::pipe().unwrap();
        fcntl(&end, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
        let mut ring = Ring::new(8, pipe.as_fd()).unwrap();
        drop(pipe);
        for _ in 0..round % 8 {
            ring.push(write(&mut arena, 0, 1)).unwrap();
        }
        drop(ring);
        // End of file, not WouldBlock, which it would be with the other end still open.
        let mut bytes = Vec::new();
        end.read_to_end(&mut bytes).unwrap_or_else(|e| panic!("round {round}: {e}"));
    }
}

#[test]
fn a_poll_ends_when_the_other_descriptor_is_readable() {
    struct Wait(io::PipeReader);
    impl Operation for Wait {
        fn command(&self) -> Command<'_> {
            Command::Poll(self.0.as_fd())
        }
        fn buf_mut(&mut self) -> Option<&mut Buf> {
            None
        }
    }
    let Scratch(_, file) = &Scratch::new("poll");
    let (reader, mut writer) = io::pipe().unwrap();
    let mut ring = Ring::new(1, file.as_fd()).unwrap();
    assert!(ring.push(Wait(reader)).is_ok());
    ring.kick();
    ring.reap(|_, result| panic!("nothing was written, but the poll ended with {result:?}"));
    writer.write_all(b"x").unwrap();
    let (mut ended, deadline) = (None, Instant::now() + Duration::from_secs(60));
    while ended.is_none() {
        assert!(Instant::now() < deadline, "a poll ends within a minute");
        if ring.arm() {
            let _ = poll(&mut [PollFd::new(ring.as_fd(), PollFlags::POLLIN)], PollTimeout::from(1000u16));
        }
        ring.reap(|_, result| {
            ended = Some(result);
            None
        });
    }
    assert!(matches!(ended, Some(Ok(events)) if events & 1 != 0), "{ended:?}");
}

#[test]
fn any_thread_may_submit_and_any_may_reap() {
    let Scratch(_, file) = &Scratch::new("threads");
    file.set_len(1 << 20).unwrap();
    let (mut ring, mut arena) = (Ring::new(8, file.as_fd()).unwrap(), arena());
    for round in 0..50 {
        let op = write(&mut arena, round * PAGE as u64, round as u8);
        // The thread has ended, or nearly, when its operation completes.
        ring = thread::spawn(move || {
            ring.push(op).unwrap();
            ring.kick();
            ring
        })
        .join()
        .unwrap();
        let (_, result) = wait(&mut ring);
        assert!(matches!(result, Ok(4096) | Err(libc::ECANCELED)), "{result:?}");
    }
}

#[test]
fn other_commands_reach_the_file() {
    struct Plain(Command<'static>);
    impl Operation for Plain {
        fn command(&self) -> Command<'_> {
            self.0
        }
        fn buf_mut(&mut self) -> Option<&mut Buf> {
            None
        }
    }
    let Scratch(_, file) = &Scratch::new("commands");
    (&*file).write_all(&[1; 8192]).unwrap();
    let mut ring = Ring::new(8, file.as_fd()).unwrap();
    let punch = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    for (command, expected) in [
        (Command::Sync, Ok(0)),
        (Command::Allocate { mode: punch, at: 0, len: 4096 }, Ok(0)),
        (Command::Prefetch { at: 0, len: 8192 }, Ok(0)),
        (Command::Allocate { mode: -1, at: 0, len: 4096 }, Err(libc::EOPNOTSUPP)),
        // Regular files do not support this command.
        (Command::Discard { at: 0, len: 4096 }, Err(libc::EOPNOTSUPP)),
    ] {
        assert!(ring.push(Plain(command)).is_ok());
        let mut ended = None;
        while ended.is_none() {
            ring.kick();
            ring.reap(|_, result| {
                ended = Some(result);
                None
            });
        }
        assert_eq!(ended, Some(expected), "{command:?}");
    }
    let mut bytes = Vec::new();
    File::open(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(file)))
        .unwrap()
        .read_to_end(&mut bytes)
        .unwrap();
    assert!(bytes == [[0; 4096], [1; 4096]].concat());
}
