//! [`IoQueue`]: an I/O queue pair as a [`Queue`].

use std::{
    os::fd::{AsFd, BorrowedFd},
    sync::{
        Arc,
        atomic::{Ordering, fence},
    },
    time::Duration,
};

use blkdev::{
    Completion, Error, Op, Queue, Request,
    wake::{Wake, now},
};

use crate::{
    limits::{self, Disk},
    owner::Owner,
    pair::{List, Pair, Stage},
    spec::Command,
};

/// Longest wait of a dropped queue for the next completion, …
const DRAIN: Duration = Duration::from_secs(5);
/// … and for all completions, as a multiple of it.
const DRAIN_MAX: u32 = 10;

#[derive(Debug)]
pub(crate) struct IoQueue {
    owner: Arc<Owner>,
    id: u16,
    pair: Pair<Request>,
    wake: Arc<Wake>,
    /// Requests that ended in `push`.
    ended: Vec<Completion>,
    /// Commands resent after a reset wait for the doorbell.
    again: bool,
}

impl IoQueue {
    pub(crate) fn new(owner: &Arc<Owner>, pair: Pair<Request>, wake: Arc<Wake>) -> Self {
        Self { owner: Arc::clone(owner), id: pair.id(), pair, wake, ended: Vec::new(), again: false }
    }

    /// Whether the controller accepts commands: false while it is being reset.
    #[inline]
    fn is_running(&self) -> bool {
        self.pair.flights().stage() == Stage::Running
    }

    /// Handles a reset of the controller. After the reset, the controller no longer accesses the memory of earlier commands,
    /// and has no I/O queues. Commands that were in flight are prepared again, or fail.
    #[cold]
    fn stand_by(&mut self, done: &mut Vec<Completion>) {
        if self.pair.flights().stage() != Stage::Cleared {
            return;
        }
        self.pop(done);
        if self.is_dead() {
            return;
        }
        let core = &*self.owner.core;
        let old = self.pair.flights().old();
        for (request, again) in self.pair.restart(old) {
            if again {
                self.pair.push_again(request, |request, list| describe(&core.disk, core.sgl, &request.op, &list));
            } else {
                done.push(request.refuse(Error::Io));
            }
        }
        self.again = true;
        self.pair.flights().reach(Stage::Ready);
        core.wake_guard();
    }

    /// Pops all completions.
    #[inline]
    fn pop(&mut self, done: &mut Vec<Completion>) {
        loop {
            match self.pair.pop() {
                Ok(Some((Request { tag, op }, completion))) => {
                    let result = limits::settle(&op, completion.status);
                    done.push(Completion { tag, op, result });
                }
                Ok(None) => return,
                Err(nonsense) => return self.owner.core.life.end(&format!("queue {}: {nonsense}", self.id)),
            }
        }
    }

    /// Takes what the device has completed. `false`: it is dead, and its requests in flight are still in the pair.
    #[inline]
    fn collect(&mut self, done: &mut Vec<Completion>) -> bool {
        done.append(&mut self.ended);
        if self.is_dead() {
            return false;
        }
        if !self.is_running() {
            self.stand_by(done);
            return !self.is_dead();
        }
        if self.again {
            self.again = false;
            self.pair.publish();
        }
        self.pop(done);
        if self.is_dead() {
            return false;
        }
        self.pair.acknowledge();
        true
    }

    /// Ends a request without sending it to the device.
    #[cold]
    fn refuse(&mut self, request: Request, error: Error) -> Result<(), Request> {
        self.ended.push(request.refuse(error));
        Ok(())
    }
}

impl Queue for IoQueue {
    #[inline]
    fn push(&mut self, request: Request) -> Result<(), Request> {
        if self.is_dead() {
            return self.refuse(request, Error::Gone);
        }
        if !self.is_running() {
            // The caller retries later: a wake-up follows.
            return Err(request);
        }
        // `Caps` denies the last two, so a caller never pushes them.
        if let Op::Status { .. } | Op::Prefetch { .. } = &request.op {
            return self.refuse(request, Error::NotSupported);
        }
        let core = &*self.owner.core;
        self.pair.push(request, |request, list| describe(&core.disk, core.sgl, &request.op, &list)).map(drop)
    }

    #[inline]
    fn kick(&mut self) {
        // A dead device gets no more commands: their requests end, or have ended, with an error.
        if self.is_running() && !self.is_dead() {
            self.pair.publish();
        }
    }

    #[inline]
    fn reap(&mut self, done: &mut Vec<Completion>) {
        if !self.collect(done) {
            done.extend(self.pair.take_all().map(Request::lose));
        }
    }

    #[inline]
    fn reap_unfinished(&mut self, done: &mut Vec<Completion>, unfinished: &mut Vec<Request>) {
        if !self.collect(done) {
            unfinished.extend(self.pair.take_all());
        }
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.wake.as_fd())
    }

    fn arm(&mut self) -> bool {
        // Interrupts also write to it for completions that were popped already. EAGAIN: there was none.
        self.wake.clear();
        // Only after emptying the eventfd: `Liveness::end` sets its mark first and then writes to the eventfd.
        fence(Ordering::SeqCst);
        if self.is_dead() {
            return self.pair.in_flight() == 0 && self.ended.is_empty();
        }
        match self.pair.flights().stage() {
            Stage::Running if self.again => return false,
            Stage::Running => {}
            Stage::Stopped | Stage::Ready => return self.ended.is_empty(),
            Stage::Cleared => return false,
        }
        // Completions from before the eventfd was emptied raise no further interrupt.
        self.ended.is_empty() && !self.pair.has_completion()
    }

    fn give_up(&mut self) {
        let (count, state) = (self.pair.in_flight(), self.pair.describe());
        self.owner.core.life.end(&format!("queue {}: abandoned with {count} requests in flight ({state})", self.id));
    }

    fn describe(&self) -> String {
        self.pair.describe()
    }

    #[inline]
    fn is_dead(&self) -> bool {
        self.owner.core.life.is_dead()
    }
}

/// The command for a request, with its memory.
#[inline]
fn describe(disk: &Disk, sgl: bool, op: &Op, list: &List<'_>) -> Command {
    let command = disk.command(op);
    match op {
        Op::Read { buf, .. } | Op::Write { buf, .. } => list.payload(command, buf.iova().get(), buf.len(), sgl),
        Op::Discard { at, len } => {
            for (n, range) in disk.ranges(*at, *len).enumerate() {
                list.put(2 * n, range[0]);
                list.put(2 * n + 1, range[1]);
            }
            command.prps(list.address(), 0)
        }
        _ => command,
    }
}
impl Drop for IoQueue {
    fn drop(&mut self) {
        let mut done = Vec::new();
        let core = Arc::clone(&self.owner.core);
        let patience = core.info.timeout.map_or(DRAIN, |timeout| timeout.min(DRAIN));
        let last = now() + DRAIN_MAX * patience;
        let mut deadline = now() + patience;
        self.kick();
        loop {
            self.reap(&mut done);
            if !done.is_empty() {
                // Other queues are in use: a slow controller must not be declared dead because of this one.
                deadline = (now() + patience).min(last);
            }
            done.clear();
            if self.pair.in_flight() == 0 {
                break;
            }
            if self.arm() {
                let left = deadline.saturating_duration_since(now());
                if !self.owner.watch.wait(self.wake.as_fd(), left) && deadline <= now() {
                    self.give_up();
                }
            }
        }
        if core.life.is_dead() {
            // Its memory stays mapped, and the queue stays taken.
            core.life.unwatch(&self.wake);
            return;
        }
        core.close_queue(self.id, self.pair.mapping(), &self.wake);
    }
}
