//! Measures a queue: random reads or writes at a fixed depth, for two seconds.
//!
//! ```text
//! cargo run --release -p blkdev-io-uring --example io_uring_qd -- PATH [read|write] [BLOCK SIZE] [DEPTH] [direct]
//! ```
//!
//! Prints the time and the CPU time of an operation. With `write` it overwrites the file.

use std::{
    env, io,
    sync::Arc,
    time::{Duration, Instant},
};

use blkdev::{Device, Mapping, Op, Registration, Request};
use blkdev_io_uring::{IoUring, Options};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        resource::{UsageWho, getrusage},
        time::TimeValLike,
    },
};

fn main() -> io::Result<()> {
    let mut args = env::args().skip(1);
    let path = args
        .next()
        .ok_or_else(|| io::Error::other("usage: io_uring_qd PATH [read|write] [BLOCK SIZE] [DEPTH] [direct]"))?;
    let write = args.next().as_deref() == Some("write");
    let size: usize = args.next().map_or(4096, |n| n.parse().expect("a block size"));
    let depth: u16 = args.next().map_or(64, |n| n.parse().expect("a depth"));
    let direct = args.next().as_deref() == Some("direct");

    let mut options = Options::path(path);
    (options.direct, options.read_only) = (direct, !write);
    let device: Arc<dyn Device> = Arc::new(IoUring::open(options)?);
    let blocks = device.capacity() / size as u64;
    let mapping = Mapping::new(usize::from(depth) * size.next_multiple_of(4096))?;
    let memory = Registration::new(&device, &mapping)?;
    let mut arena = memory.mapping().arenas(1).remove(0);
    let mut queue = device.open_queue(depth)?;

    let mut seed = 1u64;
    let mut at = || {
        seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (seed >> 33) % blocks * size as u64
    };
    let mut idle = Vec::new();
    idle.extend((0..depth).map_while(|_| arena.alloc(size)));
    let (mut done, mut ended, mut slept) = (Vec::new(), 0u64, 0u64);
    let (started, processor) = (Instant::now(), processor_time()?);
    while started.elapsed() < Duration::from_secs(2) || idle.len() < depth.into() {
        if started.elapsed() < Duration::from_secs(2) {
            for buf in idle.drain(..) {
                let at = at();
                let op = if write { Op::Write { at, buf, fua: false } } else { Op::Read { at, buf } };
                queue.push(Request { tag: 0, op }).expect("room for each buffer");
            }
            queue.kick();
        }
        queue.reap(&mut done);
        if done.is_empty() && queue.arm() {
            let mut fds = [PollFd::new(queue.wake_fd().expect("a wake-up descriptor"), PollFlags::POLLIN)];
            // An interrupted sleep is harmless.
            let _ = poll(&mut fds, PollTimeout::NONE);
            slept += 1;
        }
        for completion in done.drain(..) {
            completion.result.map_err(io::Error::from)?;
            ended += 1;
            if let Op::Read { buf, .. } | Op::Write { buf, .. } = completion.op {
                idle.push(buf);
            }
        }
    }
    let each = |time: Duration| time.as_nanos() as f64 / ended as f64;
    let (wall, processor) = (started.elapsed(), processor_time()? - processor);
    println!("{:.0} ns/op, {:.0} ns/op of CPU time, {ended} operations, {slept} sleeps", each(wall), each(processor));
    Ok(())
}

/// CPU time of all threads of this process, kernel workers included.
fn processor_time() -> io::Result<Duration> {
    let usage = getrusage(UsageWho::RUSAGE_SELF)?;
    let micros = usage.user_time().num_microseconds() + usage.system_time().num_microseconds();
    Ok(Duration::from_micros(micros as u64))
}
