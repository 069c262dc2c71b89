//! [`Watch`]: the thread that watches a controller: events, overdue commands, failure and removal.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use blkdev::wake::{Stop, Wake, Watcher, now, wait};

use crate::{
    admin::Failure,
    core::{Core, Place, lock},
    limits::check,
    pair::{Pace, Stage},
    registers::TAKEN_AWAY,
    spec::{Command, Namespace, cns},
};

/// The running thread. The owner must [stop](Self::stop) it.
#[derive(Debug)]
pub(crate) struct Watch {
    /// Woken when the device dies, too.
    watcher: Watcher,
}

impl Watch {
    pub(crate) fn start(core: &Arc<Core>) -> io::Result<Self> {
        let removal = Wake::new()?;
        core.pci.watch_removal(removal.as_fd())?;
        let mut guard = Guard {
            core: Arc::clone(core),
            wake: Arc::clone(&lock(&core.admin).wake),
            removal,
            paces: Vec::new(),
            aborted: Vec::new(),
            resets: 0,
            last_reset: None,
            next: now(),
            is_over: false,
        };
        let seen = Arc::clone(core);
        let turn = move |stop: &Stop| {
            catch_unwind(AssertUnwindSafe(|| guard.turn(stop))).unwrap_or_else(|_| {
                // Without this thread, requests that the controller does not complete would never end.
                seen.life.end("the watching thread panicked");
                seen.cut_off();
                false
            })
        };
        let watcher = Watcher::with_turns("nvme-watch", turn)?;
        core.life.watch(watcher.wake());
        Ok(Self { watcher })
    }

    pub(crate) fn stop(&mut self) {
        self.watcher.stop();
    }

    /// Waits until `fd` is readable, for `time` at most. Returns whether it is.
    pub(crate) fn wait(&self, fd: BorrowedFd<'_>, time: Duration) -> bool {
        self.watcher.wait([fd], time) == [true]
    }
}

struct Guard {
    core: Arc<Core>,
    /// Eventfd of the admin queue's vector.
    wake: Arc<Wake>,
    removal: Wake,
    /// Progress of each I/O queue.
    paces: Vec<Pace>,
    /// Commands being aborted: queue and identifier.
    aborted: Vec<(u16, u16)>,
    /// Number of resets in short succession.
    resets: u32,
    last_reset: Option<Instant>,
    /// Time of the next tick.
    next: Instant,
    /// The device is dead and cut off: nothing is left to watch.
    is_over: bool,
}

/// Longest interval between reads of the status register: the only sign of a removed device.
const LOOK: Duration = Duration::from_secs(1);

/// After this many ticks without a completion in a queue, commands of that age are aborted.
const OLD: u16 = 4;

/// After this many ticks the controller is reset. The queue's owner declares the device dead shortly after 8 ticks.
const TOO_OLD: u16 = 6;

/// While other commands of its queue complete, a command only waits for its turn. After this many ticks, 10 times the time-out,
/// it counts as lost, and is aborted alone.
const LOST: u16 = 80;

/// Most resets within a time-out before the device is declared dead.
const RESETS_MAX: u32 = 3;

/// That time-out, if requests have none.
const AGAIN: Duration = Duration::from_secs(30);

impl Guard {
    /// Looks after everything once, then sleeps. Returns whether there is more to do.
    fn turn(&mut self, stop: &Stop) -> bool {
        if stop.is_requested() {
            return false;
        }
        if self.is_over {
            self.sleep(stop, None);
            return true;
        }
        match self.core.registers.trouble() {
            Some(TAKEN_AWAY) => self.core.life.end(TAKEN_AWAY),
            Some(why) => self.reset(why),
            None if self.core.registers.has_stopped() => self.reset("it stopped on its own (CSTS.RDY)"),
            None => {}
        }
        if self.core.life.is_dead() {
            self.core.cut_off();
            self.is_over = true;
            return true;
        }
        self.collect();
        let tick = self.core.info.timeout.map(|timeout| (timeout / 8).max(Duration::from_millis(1)));
        let now = now();
        if let Some(tick) = tick
            && now >= self.next
        {
            // One tick at a time, however late: a process that was stopped must first handle its completions.
            self.next = now + tick;
            let clock = &self.core.clock;
            let time = clock.load(Ordering::Relaxed) as u16;
            clock.store(u32::from(time.checked_add(1).unwrap_or(1)), Ordering::Relaxed);
            self.abort_old(tick);
        }
        self.resume();
        self.sleep(stop, Some(tick.map_or(LOOK, |tick| self.next.saturating_duration_since(now).min(LOOK).min(tick))));
        true
    }

    fn sleep(&self, stop: &Stop, time: Option<Duration>) {
        let bell = stop.wake();
        if time.is_none() {
            // A dead device's events and removal are ignored.
            wait([bell.as_fd()], stop.patience(None));
        } else {
            let [.., removal] = wait([bell.as_fd(), self.wake.as_fd(), self.removal.as_fd()], stop.patience(time));
            if removal && self.removal.clear() {
                self.core.life.end("it is being removed, or its link has failed");
            }
        }
        bell.clear();
    }

    /// Handles events.
    fn collect(&mut self) {
        let mut admin = lock(&self.core.admin);
        admin.wake.clear();
        admin.collect();
        for event in std::mem::take(&mut admin.events) {
            let (kind, about, page) = (event & 7, event >> 8 & 0xff, event >> 16 & 0xff);
            log::debug!("nvme {}: event {kind}/{about:02x}, log page {page:#x}", self.core.info.target);
            match kind {
                0 => log::warn!("nvme {}: the controller reports error {about:#x}", self.core.info.target),
                1 => log::warn!("nvme {}: the controller reports a health warning ({about:#x})", self.core.info.target),
                _ => {}
            }
            // Reading the log page re-enables the event.
            let len = if page == 4 { 4096 } else { 512 };
            let read = admin.ask_bytes::<4096>(Command::log_page(page as u8, len));
            if let Err(Failure::Dead | Failure::Late) = read {
                return;
            }
            if (kind, about) == (2, 0) {
                let namespace = admin.identify(cns::NAMESPACE, self.core.disk.nsid);
                if let Ok(bytes) = namespace {
                    self.changed(&Namespace::parse(&bytes));
                }
            }
            if self.core.life.is_dead() {
                return;
            }
            admin.expect_event();
        }
    }

    /// Handles a possible change of the namespace.
    fn changed(&self, namespace: &Namespace) {
        let core = &self.core;
        if let Err(why) = check(namespace, core.disk.nsid) {
            return core.life.end(&why.to_string());
        }
        if namespace.block_shift != core.disk.block_shift {
            return core.life.end("the namespace was formatted with another block size");
        }
        let now = namespace.blocks << namespace.block_shift;
        let before = core.capacity.swap(now, Ordering::Relaxed);
        if now != before {
            log::info!("nvme {}: capacity changed from {before} to {now} bytes", core.info.target);
        }
        if namespace.write_protected && !core.info.caps.read_only {
            log::warn!("nvme {}: the namespace is now write protected", core.info.target);
        }
    }

    /// Resets a controller that has failed or does not respond.
    fn reset(&mut self, why: &str) {
        let core = &self.core;
        let again = |at: Instant| now().saturating_duration_since(at) < core.info.timeout.unwrap_or(AGAIN);
        self.resets = if self.last_reset.is_some_and(again) { self.resets + 1 } else { 1 };
        self.last_reset = Some(now());
        if self.resets > RESETS_MAX {
            return core.life.end(&format!("{why}, after {RESETS_MAX} resets"));
        }
        core.resets.fetch_add(1, Ordering::Relaxed);
        log::warn!("nvme {}: {why}: resetting the controller", core.info.target);
        for (n, place) in lock(&core.queues).iter().enumerate() {
            if let Place::Open(open) = place {
                // A command of a silent queue may be what hangs the controller. In other queues it only waited for its turn.
                let is_silent = self.paces.get(n).is_some_and(|pace| pace.silent() >= OLD);
                open.flights.retire(if is_silent { OLD } else { LOST });
            }
        }
        let mut admin = lock(&core.admin);
        if let Err(e) = core.reset(&mut admin) {
            return core.life.end(&format!("{why}, and the reset failed: {e}"));
        }
        self.aborted.clear();
        // The controller may run another firmware now.
        match admin.identify(cns::NAMESPACE, core.disk.nsid) {
            Ok(bytes) => self.changed(&Namespace::parse(&bytes)),
            Err(e) => core.life.end(&e.explain("cannot identify the namespace after a reset").to_string()),
        }
    }

    /// Resumes queues that are ready after a reset. Resets a controller whose admin queue is stuck.
    fn resume(&mut self) {
        let mut admin = lock(&self.core.admin);
        let resumed = self.core.resume(&mut admin);
        if admin.is_late {
            drop(admin);
            return self.reset("an admin command was not completed in time");
        }
        if let Err(e) = resumed {
            self.core.life.end(&format!("cannot resume after a reset: {e}"));
        }
    }

    /// Aborts overdue commands, each once, and resets the controller if that does not help a silent queue.
    fn abort_old(&mut self, tick: Duration) {
        let (mut old, mut too_old) = (Vec::new(), None);
        let queues = lock(&self.core.queues).clone();
        self.paces.resize_with(queues.len(), Pace::default);
        for ((place, pace), id) in queues.iter().zip(&mut self.paces).zip(1..) {
            match place {
                Place::Open(open) if open.flights.stage() == Stage::Running => {
                    let silent = pace.look(&open.flights);
                    let age = if silent < OLD { LOST } else { OLD };
                    old.extend(open.flights.older(age).map(|command| (id, command)));
                    if silent >= TOO_OLD {
                        too_old = too_old.or(open.flights.older(TOO_OLD).next().map(|command| (id, command)));
                    }
                }
                _ => *pace = Pace::default(),
            }
        }
        if let Some((queue, id)) = too_old {
            return self.reset(&format!("queue {queue}: command {id:#06x} is not completed"));
        }
        self.aborted.retain(|known| old.contains(known));
        for (queue, id) in old {
            if self.aborted.contains(&(queue, id)) {
                continue;
            }
            self.aborted.push((queue, id));
            // If the command has ended meanwhile, or its owner has not reaped it, the controller does not find it, and nothing
            // happens.
            match lock(&self.core.admin).ask_within(tick * u32::from(TOO_OLD - OLD), Command::abort(queue, id)) {
                Ok(answer) if answer.result & 1 == 0 => {
                    log::warn!(
                        "nvme {}: queue {queue}: command {id:#06x} took too long: aborted",
                        self.core.info.target
                    );
                }
                Ok(_) | Err(Failure::Refused(_)) => {
                    log::debug!("nvme {}: queue {queue}: command {id:#06x} cannot be aborted", self.core.info.target);
                }
                Err(Failure::Dead | Failure::Late) => return,
            }
        }
    }
}
