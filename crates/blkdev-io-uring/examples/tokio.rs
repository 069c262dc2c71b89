//! Reads files concurrently on one thread under tokio, which waits for `Channel::wake_fd`, and prints the sums of their bytes:
//!
//! ```text
//! $ cargo run --release -p blkdev-io-uring --example tokio -- one.img two.img
//! one.img: 1073741824 bytes, sum 136899980427
//! two.img: 1048576 bytes, sum 0
//! ```

use std::{env, io, os::fd::OwnedFd, process::ExitCode, sync::Arc, time::Duration, time::Instant};

use blkdev::{Channel, Device, Done, Io, Plan};
use blkdev_io_uring::{IoUring, Options};
use tokio::{
    io::{Interest, unix::AsyncFd},
    runtime, task, time,
};

const DEPTH: u16 = 32;
const CHUNK: usize = 128 << 10;

fn main() -> ExitCode {
    let paths: Vec<String> = env::args().skip(1).collect();
    if paths.is_empty() {
        eprintln!("usage: tokio PATH...");
        return ExitCode::from(2);
    }
    let runtime = runtime::Builder::new_current_thread().enable_all().build();
    match runtime.and_then(|runtime| runtime.block_on(sums(&paths))) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("{e}");
            ExitCode::FAILURE
        }
    }
}

async fn sums(paths: &[String]) -> io::Result<()> {
    // A channel is `Send`, so a task can own it, on a runtime with several threads too.
    let tasks: Vec<_> = paths.iter().map(|path| task::spawn(sum(path.clone()))).collect();
    for (path, task) in paths.iter().zip(tasks) {
        let (size, sum) = task.await??;
        println!("{path}: {size} bytes, sum {sum}");
    }
    Ok(())
}

async fn sum(path: String) -> io::Result<(u64, u64)> {
    let mut options = Options::path(path);
    options.read_only = true;
    let device: Arc<dyn Device> = Arc::new(IoUring::open(options)?);
    let mut plan = Plan::new(usize::from(DEPTH) * CHUNK);
    plan.depth = DEPTH;
    let mut channel = plan.open(&device, 1)?.remove(0);
    // Registered once: the descriptor stays the same. tokio gets a duplicate, because the channel is used meanwhile.
    let wake = channel.wake_fd().ok_or(io::ErrorKind::Unsupported)?.try_clone_to_owned()?;
    #[expect(deprecated, reason = "the successor in tokio 1.54 is unsafe, for types that may lose their descriptor")]
    let wake = AsyncFd::with_interest(wake, Interest::READABLE)?;

    let size = device.capacity();
    let (mut at, mut sum, mut done) = (0, 0, Vec::new());
    loop {
        while let len = (size - at).min(CHUNK as u64)
            && len > 0
            && let Some(buf) = channel.alloc(at, len as usize)
        {
            channel.submit(0, Io::Read { at, buf });
            at += len;
        }
        wait(&mut channel, &wake, &mut done).await?;
        if done.is_empty() {
            return Ok((size, sum));
        }
        for ended in done.drain(..) {
            ended.result?;
            if let Io::Read { buf, .. } = ended.io {
                sum += buf.to_vec().into_iter().map(u64::from).sum::<u64>();
            }
        }
    }
}

/// `Channel::wait` for tasks: waits until at least one request has ended, or none is in flight.
async fn wait(channel: &mut Channel, wake: &AsyncFd<OwnedFd>, done: &mut Vec<Done>) -> io::Result<()> {
    loop {
        channel.tick(Instant::now());
        channel.kick();
        channel.reap(done);
        if !done.is_empty() || channel.in_flight() == 0 {
            // Lets other tasks run, even if this one never has to wait.
            task::yield_now().await;
            return Ok(());
        }
        if channel.arm() {
            // tokio's epoll is edge-triggered. Clear the readiness before `reap`: a later completion sets it again.
            let time = channel.due().unwrap_or(Duration::MAX);
            if let Ok(ready) = time::timeout(time, wake.readable()).await {
                ready?.clear_ready();
            }
        }
    }
}
