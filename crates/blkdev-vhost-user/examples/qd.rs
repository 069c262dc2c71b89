//! Random 4 KiB reads at one queue depth, by polling: `cargo run --release --example qd -- SOCKET [DEPTH [SECONDS]]`
//!
//! Prints the time for each request, and how much of it this process' own thread spent outside of waiting.
use std::{
    env, io,
    time::{Duration, Instant},
};

use blkdev::{Device, Mapping, Op, Request};
use blkdev_vhost_user::{Options, VhostUser};

fn main() -> io::Result<()> {
    let mut args = env::args().skip(1);
    let path = args.next().ok_or_else(|| io::Error::other("usage: qd SOCKET [DEPTH [SECONDS]]"))?;
    let depth: u16 = args.next().map_or(Ok(64), |a| a.parse()).map_err(io::Error::other)?;
    let seconds: f64 = args.next().map_or(Ok(2.0), |a| a.parse()).map_err(io::Error::other)?;

    let device = VhostUser::connect(&Options::new(path))?;
    let memory = Mapping::new(usize::from(depth) * 4096)?;
    device.register(&memory)?;
    let mut arena = memory.arenas(1).remove(0);
    let mut queue = device.open_queue(depth)?;
    let blocks = device.capacity() / 4096;

    let mut random = 1u64;
    let mut place = || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random % blocks * 4096
    };
    for tag in 0..u64::from(depth) {
        let buf = arena.alloc(4096).ok_or(io::ErrorKind::OutOfMemory)?;
        queue.push(Request { tag, op: Op::Read { at: place(), buf } }).map_err(|_| io::ErrorKind::ResourceBusy)?;
    }
    queue.kick();

    let mut done = Vec::with_capacity(usize::from(depth));
    let (mut requests, mut batches, mut empty) = (0u64, 0u64, 0u64);
    // Time in calls that did something; a reap that finds nothing is waiting.
    let mut own = Duration::ZERO;
    let begin = Instant::now();
    while begin.elapsed().as_secs_f64() < seconds {
        let turn = Instant::now();
        queue.reap(&mut done);
        if done.is_empty() {
            empty += 1;
            std::hint::spin_loop();
            continue;
        }
        requests += done.len() as u64;
        batches += 1;
        for mut completion in done.drain(..) {
            completion.result?;
            if let Op::Read { at, .. } = &mut completion.op {
                *at = place();
            }
            let request = Request { tag: completion.tag, op: completion.op };
            queue.push(request).map_err(|_| io::ErrorKind::ResourceBusy)?;
        }
        queue.kick();
        own += turn.elapsed();
    }
    let wall = begin.elapsed().as_nanos() as f64 / requests as f64;
    println!(
        "depth {depth}: {wall:.0} ns a request, {:.0} of them ours; {:.1} requests a batch; {empty} empty looks",
        own.as_nanos() as f64 / requests as f64,
        requests as f64 / batches as f64,
    );
    Ok(())
}
