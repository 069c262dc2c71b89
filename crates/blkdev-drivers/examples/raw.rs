//! Measures a driver with nothing above it but its channel: random reads or writes at a fixed depth.
//!
//! ```text
//! cargo run --release -p blkdev-drivers --example raw -- DRIVER=VALUE[,PROPERTY=VALUE]... [read|write] [BLOCK SIZE] [DEPTH] [SECONDS]
//! ```
//!
//! Prints `IOPS MICROSECONDS`; the second number is the CPU time of an I/O. With `write` it overwrites the device.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use blkdev::{Device, Io, Plan};
use blkdev_drivers::Spec;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::time::ClockId;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let spec: Spec =
        args.next().ok_or("usage: raw DRIVER=VALUE [read|write] [BLOCK SIZE] [DEPTH] [SECONDS]")?.parse()?;
    let write = args.next().is_some_and(|word| word == "write");
    let size: usize = args.next().map_or(Ok(4096), |n| n.parse())?;
    let depth: u16 = args.next().map_or(Ok(64), |n| n.parse())?;
    let time = Duration::from_secs(args.next().map_or(Ok(2), |n| n.parse())?);

    let device: Arc<dyn Device> = spec.settings.open()?;
    let blocks = device.capacity() / size as u64;
    let mut plan = Plan::default();
    plan.depth = depth;
    let mut channel = plan.open(&device, 1)?.remove(0);
    let mut seed = 1u64;
    let mut next = || {
        seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (seed >> 33) % blocks * size as u64
    };
    let (mut done, mut idle, mut count) = (Vec::new(), depth, 0u64);
    let (started, processor) = (Instant::now(), processor_time()?);
    let mut now = started;
    while now < started + time || channel.in_flight() > 0 {
        channel.tick(now);
        for _ in 0..if now < started + time { std::mem::take(&mut idle) } else { 0 } {
            let at = next();
            let buf = channel.alloc(at, size).ok_or("too little memory for this depth")?;
            channel.submit(0, if write { Io::Write { at, buf, fua: false } } else { Io::Read { at, buf } });
        }
        channel.kick();
        channel.reap(&mut done);
        if done.is_empty() && channel.arm() {
            let mut fds = [PollFd::new(channel.wake_fd().ok_or("a device to wait for")?, PollFlags::POLLIN)];
            poll(&mut fds, PollTimeout::NONE)?;
        }
        for ended in done.drain(..) {
            ended.result.map_err(io::Error::from)?;
            (idle, count) = (idle + 1, count + 1);
        }
        now = Instant::now();
    }
    let (wall, processor) = (started.elapsed(), processor_time()? - processor);
    println!("{:.0} {:.3}", count as f64 / wall.as_secs_f64(), processor.as_secs_f64() * 1e6 / count as f64);
    Ok(())
}

/// Of all threads of this process, the kernel's workers for it included.
fn processor_time() -> nix::Result<Duration> {
    ClockId::CLOCK_PROCESS_CPUTIME_ID.now().map(Duration::from)
}
