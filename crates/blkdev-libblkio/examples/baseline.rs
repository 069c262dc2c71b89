//! Measures the crate blkio directly, without this crate: the counterpart of `raw` in blkdev-drivers.
//!
//! ```text
//! cargo run --release -p blkdev-libblkio --example baseline -- DRIVER PATH [read|write] [BLOCK SIZE] [DEPTH] [SECONDS]
//! ```
//!
//! Prints `IOPS MICROSECONDS`; the second number is the CPU time of an I/O. With `write` it overwrites the device.

use std::mem::MaybeUninit;
use std::time::{Duration, Instant};

use blkio::{Blkio, Completion, ReqFlags};
use nix::time::ClockId;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let usage = "usage: baseline DRIVER PATH [read|write] [BLOCK SIZE] [DEPTH] [SECONDS]";
    let (driver, path) = (args.next().ok_or(usage)?, args.next().ok_or(usage)?);
    let write = args.next().is_some_and(|word| word == "write");
    let size: usize = args.next().map_or(Ok(4096), |n| n.parse())?;
    let depth: usize = args.next().map_or(Ok(64), |n| n.parse())?;
    let time = Duration::from_secs(args.next().map_or(Ok(2), |n| n.parse())?);

    let told = |error: blkio::Error| format!("libblkio: {}", error.message());
    let mut blkio = Blkio::new(&driver).map_err(told)?;
    blkio.set_str("path", &path).map_err(told)?;
    blkio.connect().map_err(told)?;
    let mut queue = blkio.start().map_err(told)?.queues.remove(0);
    let blocks = blkio.get_u64("capacity").map_err(told)? / size as u64;
    let region = blkio.alloc_mem_region((depth * size).next_multiple_of(1 << 12)).map_err(told)?;
    blkio.map_mem_region(&region).map_err(told)?;

    let mut seed = 1u64;
    let mut next = || {
        seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (seed >> 33) % blocks * size as u64
    };
    let mut completions: Vec<MaybeUninit<Completion>> = (0..depth).map(|_| MaybeUninit::uninit()).collect();
    let (mut idle, mut count, mut slot) = (depth, 0, 0);
    let (started, processor) = (Instant::now(), processor_time()?);
    let mut now = started;
    while now < started + time || idle < depth {
        for _ in 0..if now < started + time { std::mem::take(&mut idle) } else { 0 } {
            // Completions may be out of order, so two requests may use the same memory at a time. Its content does not matter
            // here.
            slot = (slot + 1) % depth;
            let buf = (region.addr + slot * size) as *mut u8;
            if write {
                queue.write(next(), buf, size, slot, ReqFlags::empty());
            } else {
                queue.read(next(), buf, size, slot, ReqFlags::empty());
            }
        }
        let ended = queue.do_io(&mut completions, 1, None, None).map_err(told)?;
        (idle, count) = (idle + ended, count + ended);
        now = Instant::now();
    }
    let (wall, processor) = (started.elapsed(), processor_time()? - processor);
    println!("{:.0} {:.3}", count as f64 / wall.as_secs_f64(), processor.as_secs_f64() * 1e6 / count as f64);
    Ok(())
}

/// CPU time of all threads of this process, kernel workers included.
fn processor_time() -> nix::Result<Duration> {
    ClockId::CLOCK_PROCESS_CPUTIME_ID.now().map(Duration::from)
}
