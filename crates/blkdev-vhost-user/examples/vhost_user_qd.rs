//! Measures random 4 KiB reads at one queue depth:
//!
//! ```text
//! cargo run --release -p blkdev-vhost-user --example vhost_user_qd -- SOCKET [DEPTH [poll|wake [SECONDS]]]
//! ```
//!
//! Prints the time of a request and its CPU cost in this process. With polling: the median of the turns that found a completion
//! (a turn without one is waiting). With wake-ups: the CPU time of the thread, system calls included. On a busy machine, give
//! each side its own core and `chrt -f 1`.

use std::{
    env, io,
    sync::Arc,
    time::{Duration, Instant},
};

use blkdev::{Completion, Device, Mapping, Op, Queue, Registration, Request};
use blkdev_vhost_user::{Options, VhostUser};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    time::{ClockId, clock_gettime},
};

fn main() -> io::Result<()> {
    let mut args = env::args().skip(1);
    let path =
        args.next().ok_or_else(|| io::Error::other("usage: vhost_user_qd SOCKET [DEPTH [poll|wake [SECONDS]]]"))?;
    let depth: u16 = args.next().map_or(Ok(64), |a| a.parse()).map_err(io::Error::other)?;
    let sleep = args.next().is_some_and(|a| a == "wake");
    let seconds: f64 = args.next().map_or(Ok(2.0), |a| a.parse()).map_err(io::Error::other)?;

    let device: Arc<dyn Device> = Arc::new(VhostUser::connect(&Options::new(path))?);
    let memory = Registration::new(&device, &Mapping::new(usize::from(depth) * 4096)?)?;
    let mut arena = memory.mapping().arenas(1).remove(0);
    let mut queue = device.open_queue(depth)?;
    let mut load = Load { random: 1, blocks: device.capacity() / 4096 };
    for tag in 0..u64::from(depth) {
        let buf = arena.alloc(4096).ok_or(io::ErrorKind::OutOfMemory)?;
        let request = Request { tag, op: Op::Read { at: load.place(), buf } };
        queue.push(request).map_err(|_| io::ErrorKind::ResourceBusy)?;
    }
    queue.kick();

    let mut done = Vec::with_capacity(usize::from(depth));
    let (mut requests, mut turns) = (0u64, Vec::with_capacity(1 << 22));
    let processor = cpu_time()?;
    let begin = Instant::now();
    while begin.elapsed().as_secs_f64() < seconds {
        let turn = Instant::now();
        let count = load.turn(&mut *queue, &mut done)?;
        if let Some(each) = (turn.elapsed().as_nanos() as u64).checked_div(count) {
            turns.push(each);
            requests += count;
        } else if !sleep {
            std::hint::spin_loop();
        } else if queue.arm()
            && let Some(fd) = queue.wake_fd()
        {
            let _ = poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], PollTimeout::from(1000u16));
        }
    }
    let (wall, processor) = (begin.elapsed(), cpu_time()? - processor);
    let each = |time: Duration| time.as_nanos() as f64 / requests as f64;
    turns.sort_unstable();
    let ours = if sleep { each(processor) } else { turns.get(turns.len() / 2).map_or(0.0, |ns| *ns as f64) };
    println!(
        "depth {depth}: {:.0} ns a request, {ours:.0} ns of it in this process; {:.1} requests a turn",
        each(wall),
        requests as f64 / turns.len() as f64,
    );
    Ok(())
}

/// The pattern of offsets of the next reads.
struct Load {
    random: u64,
    blocks: u64,
}

impl Load {
    fn place(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random % self.blocks * 4096
    }

    /// Reaps completions and submits as many new reads. Returns their number.
    fn turn(&mut self, queue: &mut dyn Queue, done: &mut Vec<Completion>) -> io::Result<u64> {
        queue.reap(done);
        let count = done.len() as u64;
        for Completion { tag, mut op, result } in done.drain(..) {
            result?;
            if let Op::Read { at, .. } = &mut op {
                *at = self.place();
            }
            queue.push(Request { tag, op }).map_err(|_| io::ErrorKind::ResourceBusy)?;
        }
        if count > 0 {
            queue.kick();
        }
        Ok(count)
    }
}

fn cpu_time() -> io::Result<Duration> {
    Ok(clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)?.into())
}
