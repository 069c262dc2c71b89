//! Measures the driver's CPU cost of a request, without system calls and waiting:
//!
//! ```text
//! cargo run --release -p blkdev-virtio --example cost -- [BATCH] [split|packed] [BATCHES]
//! ```
//!
//! Drives the model device, which runs in its own thread, with batches of 4 KiB reads, and times only the driver's calls.
//! `cargo xtask bench --micro` counts their instructions.

use std::{env, io, sync::Arc, thread, time::Instant};

use blkdev::{Completion, Device, Mapping, Op, Queue, Registration, Request};
use blkdev_virtio::{
    Options, VirtioBlk,
    model::{Local, Model, Spec},
};

fn main() -> io::Result<()> {
    let batch: u64 = env::args().nth(1).map_or(Ok(64), |a| a.parse()).map_err(io::Error::other)?;
    let packed = env::args().nth(2).is_some_and(|a| a == "packed");
    let batches: u64 = env::args().nth(3).map_or(Ok(20_000), |a| a.parse()).map_err(io::Error::other)?;
    let spec = Spec::new(32 << 20);
    let model = Model::new(if packed { spec.packed() } else { spec });
    let device: Arc<dyn Device> = Arc::new(VirtioBlk::open(Local::new(&model), &Options::default())?);
    let memory = Registration::new(&device, &Mapping::new(batch as usize * 4096)?)?;
    let mut arena = memory.mapping().arenas(1).remove(0);
    let mut queue = device.open_queue(batch as u16)?;
    let mut ready: Vec<_> = (0..batch)
        .map(|tag| Request {
            tag,
            op: Op::Read { at: tag * 4096, buf: arena.alloc(4096).expect("the arena is large enough") },
        })
        .collect();
    let mut done = Vec::with_capacity(batch as usize);
    let (mut pushes, mut reaps) = (Vec::new(), Vec::new());
    for _ in 0..batches {
        let begin = Instant::now();
        count_push(&mut *queue, &mut ready)?;
        pushes.push(begin.elapsed());
        queue.kick();
        // Wait until the model has completed the whole batch, so that one reap takes all of it.
        while model.completed() < 2 + pushes.len() as u64 * batch {
            thread::yield_now();
        }
        let begin = Instant::now();
        count_reap(&mut *queue, &mut done);
        reaps.push(begin.elapsed());
        ready.extend(done.drain(..).map(|c| Request { tag: c.tag, op: c.op }));
        assert_eq!(ready.len() as u64, batch);
    }
    for (name, mut times) in [("push", pushes), ("reap", reaps)] {
        times.sort_unstable();
        let each = |part: usize| times[times.len() * part / 100].as_nanos() as f64 / batch as f64;
        println!("{name}: {:.1} ns a request (median; 10th percentile: {:.1})", each(50), each(10));
    }
    Ok(())
}

#[inline(never)]
fn count_push(queue: &mut dyn Queue, ready: &mut Vec<Request>) -> io::Result<()> {
    for request in ready.drain(..) {
        queue.push(request).map_err(|_| io::ErrorKind::ResourceBusy)?;
    }
    Ok(())
}

#[inline(never)]
fn count_reap(queue: &mut dyn Queue, done: &mut Vec<Completion>) {
    queue.reap(done);
}
