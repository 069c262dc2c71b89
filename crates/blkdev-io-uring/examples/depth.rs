//! Reads a whole file with 32 requests in flight, and prints the sum of its bytes and the rate:
//!
//! ```text
//! $ cargo run --release -p blkdev-io-uring --example depth -- disk.img
//! 1073741824 bytes, sum 136899980427, 1893 MiB/s
//! ```

use std::{env, io, path::PathBuf, process::ExitCode, sync::Arc, time::Instant};

use blkdev::{Device, Io, Plan};
use blkdev_io_uring::{IoUring, Options};

const DEPTH: u16 = 32;
const CHUNK: usize = 128 << 10;

fn main() -> ExitCode {
    let Some(path) = env::args_os().nth(1) else {
        eprintln!("usage: depth PATH");
        return ExitCode::from(2);
    };
    match sum(path.into()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("{e}");
            ExitCode::FAILURE
        }
    }
}

fn sum(path: PathBuf) -> io::Result<()> {
    let mut options = Options::path(path);
    options.read_only = true;
    let device: Arc<dyn Device> = Arc::new(IoUring::open(options)?);
    let mut plan = Plan::new(usize::from(DEPTH) * CHUNK);
    plan.depth = DEPTH;
    let mut channel = plan.open(&device, 1)?.remove(0);

    let (started, size) = (Instant::now(), device.capacity());
    let (mut at, mut sum, mut done, mut bytes) = (0, 0, Vec::new(), vec![0; CHUNK]);
    loop {
        // The channel has memory for 32 requests. With so many in flight, it has no buffer for another one.
        while let len = (size - at).min(CHUNK as u64)
            && len > 0
            && let Some(buf) = channel.alloc(at, len as usize)
        {
            channel.submit(0, Io::Read { at, buf });
            at += len;
        }
        // Notifies the device and sleeps until at least one request has ended.
        channel.wait(&mut done);
        if done.is_empty() {
            break;
        }
        for ended in done.drain(..) {
            ended.result?;
            // The buffer comes back with the request. Dropping it frees its memory for the next one.
            if let Io::Read { buf, .. } = ended.io {
                let bytes = &mut bytes[..buf.len()];
                buf.copy_to(0, bytes);
                sum += bytes.iter().map(|&byte| u64::from(byte)).sum::<u64>();
            }
        }
    }
    let rate = size as f64 / f64::from(1 << 20) / started.elapsed().as_secs_f64();
    println!("{size} bytes, sum {sum}, {rate:.0} MiB/s");
    Ok(())
}
