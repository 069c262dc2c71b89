//! The suite finds each kind of broken promise: a check that never fails is none.

use std::{
    io,
    os::fd::BorrowedFd,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};

use blkdev::{
    Completion, Device, Extent, ExtentKind, Info, Mapping, Op, Queue, Request,
    conformance::{check, check_read_only},
    fault::{Fault, Faults},
    memory::Memory,
};

const SIZE: u64 = 32 << 20;

/// What a device does wrong to a request, before or after the disk has done it.
#[derive(Clone, Copy)]
struct Lie {
    before: fn(&mut Op),
    after: fn(&mut Op),
    /// What it does to all that is reaped at a time.
    reaped: fn(&mut [Completion]),
    /// Every so many requests.
    every: u64,
}

const HONEST: Lie = Lie { before: |_| {}, after: |_| {}, reaped: |_| {}, every: 1 };

struct Liar(Memory, Lie);

struct LiarQueue(Box<dyn Queue>, Lie, u64);

impl Device for Liar {
    fn info(&self) -> &Info {
        self.0.info()
    }

    fn capacity(&self) -> u64 {
        self.0.capacity()
    }

    fn register(&self, mapping: &Arc<Mapping>) -> io::Result<()> {
        self.0.register(mapping)
    }

    fn open_queue(&self, depth: u16) -> io::Result<Box<dyn Queue>> {
        Ok(Box::new(LiarQueue(self.0.open_queue(depth)?, self.1, 0)))
    }
}

impl Queue for LiarQueue {
    fn push(&mut self, mut request: Request) -> Result<(), Request> {
        self.2 += 1;
        if self.2.is_multiple_of(self.1.every) {
            (self.1.before)(&mut request.op);
        }
        self.0.push(request)
    }

    fn kick(&mut self) {
        self.0.kick();
    }

    fn reap(&mut self, done: &mut Vec<Completion>) {
        let before = done.len();
        self.0.reap(done);
        (self.1.reaped)(&mut done[before..]);
        done[before..].iter_mut().for_each(|done| (self.1.after)(&mut done.op));
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        self.0.wake_fd()
    }

    fn arm(&mut self) -> bool {
        self.0.arm()
    }

    fn give_up(&mut self) {
        self.0.give_up();
    }
}

/// Runs the suite over a device that must not pass, and answers what it was told.
fn verdict(suite: fn(&Arc<dyn Device>), device: impl Device + 'static) -> String {
    let device: Arc<dyn Device> = Arc::new(device);
    let panic = catch_unwind(AssertUnwindSafe(|| suite(&device))).expect_err("the suite finds the lie");
    panic.downcast::<String>().map_or_else(|panic| panic.downcast::<&str>().unwrap().to_string(), |text| *text)
}

fn found(text: &str, lie: Lie) {
    let disk = Memory::new(SIZE).with(|info| (info.block_size, info.discard_alignment) = (512, 512));
    let verdict = verdict(check, Liar(disk, lie));
    assert!(verdict.contains(text), "{verdict}");
}

#[test]
fn a_write_to_another_place() {
    let before = |op: &mut Op| {
        if let Op::Write { at, .. } = op {
            *at = 4096;
        }
    };
    found("wrong data", Lie { before, every: 40, ..HONEST });
}

#[test]
fn a_read_that_leaves_its_last_byte() {
    let after = |op: &mut Op| {
        if let Op::Read { buf, .. } = op {
            buf.copy_from(buf.len() - 1, &[0x77]);
        }
    };
    found("wrong data", Lie { after, ..HONEST });
}

#[test]
fn a_zero_that_clears_too_much() {
    let before = |op: &mut Op| {
        if let Op::Zero { at, len, .. } = op
            && *at + *len < SIZE
        {
            *len += 512;
        }
    };
    found("wrong data", Lie { before, ..HONEST });
}

#[test]
fn a_zero_that_clears_too_little() {
    let before = |op: &mut Op| {
        if let Op::Zero { len, .. } = op
            && *len > 512
        {
            *len -= 512;
        }
    };
    found("wrong data", Lie { before, ..HONEST });
}

#[test]
fn a_discard_next_to_where_it_should_be() {
    let before = |op: &mut Op| {
        if let Op::Discard { at, len } = op {
            *at = (*at + 512).min(SIZE - *len);
        }
    };
    found("wrong data", Lie { before, ..HONEST });
}

#[test]
fn data_in_a_hole() {
    let after = |op: &mut Op| {
        if let Op::Status { extents, .. } = op {
            extents.iter_mut().for_each(|extent| extent.kind = ExtentKind::Zero);
        }
    };
    found("data", Lie { after, ..HONEST });
}

#[test]
fn an_answer_with_a_gap() {
    let after = |op: &mut Op| {
        if let Op::Status { at, len, extents } = op {
            let half = *len / 1024 * 512;
            if half > 0 {
                *extents = vec![Extent { at: *at + half, len: *len - half, kind: ExtentKind::Data }];
            }
        }
    };
    found("extents follow each other", Lie { after, ..HONEST });
}

#[test]
fn another_requests_buffer() {
    let reaped = |done: &mut [Completion]| {
        if let [first, .., last] = done {
            std::mem::swap(&mut first.tag, &mut last.tag);
        }
    };
    found("each request completes once, with its own buffer", Lie { reaped, ..HONEST });
}

#[test]
fn limits_that_make_no_sense() {
    let disk = Memory::new(SIZE).with(|info| (info.block_size, info.transfer_max) = (512, 5000));
    let verdict = verdict(check, disk);
    assert!(verdict.contains("longest transfer 5000"), "{verdict}");
}

#[test]
fn a_request_that_is_never_done() {
    let verdict = verdict(check, Fault::new(Memory::new(SIZE), Faults { lost: 0.01, ..Faults::new(1) }));
    assert!(verdict.contains("no wake-up within"), "{verdict}");
}

#[test]
fn a_device_that_can_be_written_is_not_read_only() {
    let verdict = verdict(check_read_only, Memory::new(SIZE));
    assert!(verdict.contains("Info reports that the device is read-only"), "{verdict}");
}
