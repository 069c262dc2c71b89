//! [`Pool`]: a device's Channels, shared by threads that block.
//!
//! There are more threads than queues (nbdkit has 16 for a connection; a device often has one queue). So each thread puts its
//! request into a [`Lane`] under its lock, and waits. One of those that wait leads: it reaps for all, sleeps for all when
//! nothing comes, and wakes the others when theirs is done. When its own is done it hands the lead over to the one that has
//! waited for the shortest time, which will need it for the longest. A thread that is alone leads itself: no switch at all.

use std::{
    cell::Cell,
    fmt, hint, io,
    os::fd::{AsFd, OwnedFd},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering, fence},
    },
    thread::{self, Thread},
    time::{Duration, Instant},
};

use crate::host;
use blkdev::{Buf, Channel, Device, Done, Error, Extent, Info, Io, Plan};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::eventfd::{EfdFlags, EventFd},
};

/// The longest part of a request that is under way at a time: longer ones go piece by piece, so that one client's 64 MiB
/// leave memory for others.
const PIECE: usize = 4 << 20;

/// What is copied while the lane is locked; more than that would keep others waiting longer than locking twice does.
const COPY_LOCKED: usize = 32 << 10;

/// The most looks before sleeping …
const PATIENCE_MAX: u32 = 8;
/// … and the pause before each: about a microsecond, so that all of them are less than a sleep and a wake-up cost.
const PAUSES: u32 = 32;

/// A device that has not answered for so long may never do.
const QUIET: Duration = if cfg!(test) { Duration::from_millis(300) } else { Duration::from_secs(4) };

/// How long one that waits for memory goes without looking whether the device is dead.
const LOOK: Duration = Duration::from_secs(1);

/// Sleeps after which a lane that has lost its patience tries again.
const TRIAL: u32 = 32;

/// A device, open, and the Channels on it.
pub(crate) struct Pool {
    /// Before the device, so that its queues have drained when it closes.
    lanes: Box<[Arc<Lane>]>,
    device: Arc<dyn Device>,
    info: Info,
    piece: usize,
    /// So many were there so far.
    connections: AtomicUsize,
}

impl Pool {
    /// Opens `count` channels, each with `memory` bytes for payload.
    ///
    /// # Errors
    /// What the device said, or no memory.
    pub(crate) fn open(device: Arc<dyn Device>, count: usize, memory: usize) -> io::Result<Self> {
        let info = device.info().clone();
        let channels = Plan { memory, ..Plan::default() }.open(&device, count)?;
        let lanes = channels.into_iter().map(Lane::new).collect::<io::Result<_>>()?;
        Ok(Self { lanes, device, info, piece: PIECE.min(memory / 4), connections: AtomicUsize::new(0) })
    }

    /// Limits and capabilities of the device.
    pub(crate) fn info(&self) -> &Info {
        &self.info
    }

    /// Size of the device in bytes, now.
    pub(crate) fn capacity(&self) -> u64 {
        self.device.capacity()
    }

    /// A lane for one more connection; `None`: the device is dead. All threads of a connection share one: the more there are,
    /// the more each wake-up brings, and the fewer there are to be paid for.
    pub(crate) fn pick(&self) -> Option<usize> {
        let (first, count) = (self.connections.fetch_add(1, Ordering::Relaxed), self.lanes.len());
        (0..count).map(|n| first.wrapping_add(n) % count).find(|lane| self.lanes[*lane].is_alive())
    }

    /// Fills `bytes` from the device.
    pub(crate) fn read(&self, lane: usize, at: u64, bytes: &mut [u8]) -> Result<(), Error> {
        let lane = &self.lanes[lane];
        let _down = Down(lane);
        for (at, from, len) in pieces(at, bytes.len(), self.piece) {
            let (state, buf) = lane.alloc(at, len)?;
            match lane.run(state, Io::Read { at, buf }) {
                Ok(Io::Read { buf, .. }) => {
                    buf.copy_to(0, &mut bytes[from..from + len]);
                    lane.give_back(buf);
                }
                Ok(io) => unreachable!("a read comes back as one, not as {io:?}"),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Writes `bytes` to the device.
    pub(crate) fn write(&self, lane: usize, at: u64, bytes: &[u8], fua: bool) -> Result<(), Error> {
        let lane = &self.lanes[lane];
        let _down = Down(lane);
        for (at, from, len) in pieces(at, bytes.len(), self.piece) {
            let (mut state, mut buf) = lane.alloc(at, len)?;
            if len > COPY_LOCKED {
                drop(state);
                buf.copy_from(0, &bytes[from..from + len]);
                state = lane.lock()?;
            } else {
                buf.copy_from(0, &bytes[from..from + len]);
            }
            // Where FUA is a flush, the last piece's does for all.
            let fua = fua && (self.info.caps.fua || from + len == bytes.len());
            match lane.run(state, Io::Write { at, buf, fua }) {
                Ok(Io::Write { buf, .. }) => lane.give_back(buf),
                Ok(io) => unreachable!("a write comes back as one, not as {io:?}"),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// A request without payload.
    pub(crate) fn run(&self, lane: usize, io: Io) -> Result<(), Error> {
        let lane = &self.lanes[lane];
        let _down = Down(lane);
        lane.run(lane.lock()?, io).map(drop)
    }

    /// What the range holds, at least from its start.
    pub(crate) fn status(&self, lane: usize, at: u64, len: u64) -> Result<Vec<Extent>, Error> {
        let lane = &self.lanes[lane];
        let _down = Down(lane);
        match lane.run(lane.lock()?, Io::Status { at, len, extents: Vec::new() })? {
            Io::Status { extents, .. } => Ok(extents),
            io => unreachable!("a question comes back as one, not as {io:?}"),
        }
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool").field("device", &self.device).field("lanes", &self.lanes.len()).finish()
    }
}

/// Cuts a request at multiples of `piece`, so that no cut makes a part unaligned: `(at, first byte, length)` of each.
fn pieces(at: u64, len: usize, piece: usize) -> impl Iterator<Item = (u64, usize, usize)> {
    let mut from = 0;
    std::iter::from_fn(move || {
        let start = at + from as u64;
        let step = (piece - (start % piece as u64) as usize).min(len - from);
        let part = (start, from, step);
        from += step;
        (step > 0).then_some(part)
    })
}

/// A Channel, and the threads that have requests on it.
struct Lane {
    this: Weak<Self>,
    /// There is a thread that [guards](guard) it.
    is_guarded: AtomicBool,
    /// In place of nbdkit.
    #[cfg(test)]
    is_ending: AtomicBool,
    state: Mutex<State>,
    /// The channel's wake-up, to be waited for without the lock.
    wake: Option<OwnedFd>,
    /// Wakes the leader when somebody else did what it sleeps for.
    nudge: EventFd,
    /// Buffers that callers have.
    held: AtomicUsize,
    /// Callers that wait for memory …
    hungry: AtomicUsize,
    /// … here, under the lock.
    memory: Condvar,
}

struct State {
    channel: Channel,
    /// Who waits for the request with that tag.
    seats: Vec<Option<Arc<Seat>>>,
    free: Vec<u32>,
    /// The tag given out last.
    newest: u32,
    lead: Lead,
    /// Requests that have ended so far.
    ended: u64,
    /// Kept for their capacity.
    done: Vec<Done>,
    woken: Vec<Arc<Seat>>,
    /// Those who wait for memory are served in the order of these.
    ticket: u64,
    served: u64,
    /// Looks that the leader takes before it sleeps.
    patience: u32,
    /// Times that it slept without a look.
    sleeps: u32,
}

/// Who reaps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lead {
    /// Nobody: no request is under way.
    Vacant,
    /// A thread that runs, or was told to.
    Awake,
    /// A thread that waits for the device, for so long at most.
    Asleep(Option<Duration>),
}

/// Where a thread waits for its request.
struct Seat {
    thread: Thread,
    /// Bits: what has been called out to it.
    calls: AtomicU32,
    done: Mutex<Option<Done>>,
    /// Whom it has to wake as the leader: changes places with [`State::woken`], so that neither allocates.
    woken: Mutex<Vec<Arc<Self>>>,
}

/// The request has ended.
const DONE: u32 = 1;
/// Take the lead.
const LEAD: u32 = 2;
/// The lane has broken down.
const LOST: u32 = 4;

thread_local! {
    /// The seat of this thread, while it does not sit on it. A thread that leaves early leaves its seat behind: what is
    /// still to come for it must not be taken for the answer to a later request.
    static SEAT: Cell<Option<Arc<Seat>>> = const { Cell::new(None) };
}

impl Lane {
    fn new(channel: Channel) -> io::Result<Arc<Self>> {
        let wake = channel.wake_fd().map(|fd| fd.try_clone_to_owned()).transpose()?;
        let state = State {
            channel,
            seats: Vec::new(),
            free: Vec::new(),
            newest: 0,
            lead: Lead::Vacant,
            ended: 0,
            done: Vec::new(),
            woken: Vec::new(),
            ticket: 0,
            served: 0,
            patience: 2,
            sleeps: 0,
        };
        let nudge = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?;
        Ok(Arc::new_cyclic(|this| Self {
            this: this.clone(),
            is_guarded: AtomicBool::new(false),
            #[cfg(test)]
            is_ending: AtomicBool::new(false),
            state: Mutex::new(state),
            wake,
            nudge,
            held: AtomicUsize::new(0),
            hungry: AtomicUsize::new(0),
            memory: Condvar::new(),
        }))
    }

    /// A thread that panicked in here has left the channel in a state that nobody knows: the lane is of no use any more.
    fn lock(&self) -> Result<MutexGuard<'_, State>, Error> {
        self.state.lock().map_err(|_| Error::Gone)
    }

    /// Whether requests here have a chance.
    fn is_alive(&self) -> bool {
        self.lock().is_ok_and(|state| !state.channel.is_dead())
    }

    /// A buffer, and the lock with it. Waits while others have the memory, in turn.
    fn alloc(&self, at: u64, len: usize) -> Result<(MutexGuard<'_, State>, Buf), Error> {
        let mut state = self.lock()?;
        if state.ticket == state.served
            && let Some(buf) = state.channel.alloc(at, len)
        {
            self.held.fetch_add(1, Ordering::SeqCst);
            return Ok((state, buf));
        }
        self.alloc_in_turn(state, at, len)
    }

    #[cold]
    fn alloc_in_turn<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        at: u64,
        len: usize,
    ) -> Result<(MutexGuard<'a, State>, Buf), Error> {
        let ticket = state.ticket;
        state.ticket += 1;
        self.hungry.fetch_add(1, Ordering::SeqCst);
        // Pairs with the fence in `give_back`: either we see the pages, or they see that we are hungry.
        fence(Ordering::SeqCst);
        let found = loop {
            if state.served == ticket {
                // Before looking: what is given back after this look has been counted in it.
                let held = self.held.load(Ordering::SeqCst);
                if let Some(buf) = state.channel.alloc(at, len) {
                    self.held.fetch_add(1, Ordering::SeqCst);
                    break Some(buf);
                }
                if held == 0 {
                    // Nobody has any, and yet it is not there: it was lost to a device that was given up.
                    break None;
                }
            }
            if state.channel.refuses() || state.channel.is_dead() {
                break None;
            }
            state = match self.memory.wait_timeout(state, LOOK) {
                Ok((state, _)) => state,
                Err(_) => return Err(Error::Gone),
            };
        };
        self.hungry.fetch_sub(1, Ordering::SeqCst);
        // Not in turn only where the device is dead, and turns do not matter any more.
        state.served += 1;
        self.memory.notify_all();
        found.map(|buf| (state, buf)).ok_or(Error::Gone)
    }

    /// Frees a buffer, and tells those who wait for one.
    fn give_back(&self, buf: Buf) {
        drop(buf);
        self.held.fetch_sub(1, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        if self.hungry.load(Ordering::SeqCst) > 0 {
            // Under the lock, so that nobody is between looking and waiting.
            let _state = self.state.lock();
            self.memory.notify_all();
        }
    }

    /// Sends a request and waits for its end. The caller has a [`Down`].
    fn run(&self, mut state: MutexGuard<'_, State>, io: Io) -> Result<Io, Error> {
        let seat = SEAT.take().unwrap_or_else(Seat::new);
        seat.calls.store(0, Ordering::Relaxed);
        let buffer = matches!(io, Io::Read { .. } | Io::Write { .. });
        let tag = state.sit(&seat);
        let before = state.channel.in_flight();
        state.channel.submit(tag.into(), io);
        match state.lead {
            Lead::Vacant => {
                state.channel.kick();
                state.lead = Lead::Awake;
                self.lead(state, &seat);
            }
            // It will look in any case, and ring the bell for all that have come meanwhile.
            Lead::Awake => drop(state),
            Lead::Asleep(until) => {
                state.channel.kick();
                // It ended at once, which wakes nobody, or asks for a look sooner than the leader would have one.
                let due = state.channel.due();
                if state.channel.in_flight() == before || due.is_some_and(|due| until.is_none_or(|until| due < until)) {
                    let _ = self.nudge.write(1);
                }
                drop(state);
            }
        }
        while seat.calls.load(Ordering::Acquire) & (DONE | LOST) == 0 {
            if seat.calls.fetch_and(!LEAD, Ordering::AcqRel) & LEAD == 0 {
                thread::park();
            } else {
                match self.lock() {
                    Ok(state) => self.lead(state, &seat),
                    Err(_) => self.lose(),
                }
            }
        }
        let done = seat.done.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(Done { io, result, .. }) = done else { return Err(Error::Gone) };
        SEAT.set(Some(seat));
        match result {
            Ok(()) => Ok(io),
            Err(error) => {
                match io {
                    Io::Read { buf, .. } | Io::Write { buf, .. } if buffer => self.give_back(buf),
                    _ => {}
                }
                Err(error)
            }
        }
    }

    /// Reaps for all until the request of `seat` has ended; then somebody else does.
    fn lead<'a>(&'a self, mut state: MutexGuard<'a, State>, seat: &Seat) {
        let (mut looks, mut quiet) = (0, None);
        loop {
            state.turn();
            let ended = seat.calls.load(Ordering::Relaxed) & DONE != 0;
            if ended {
                state.hand_over();
            }
            if ended || !state.woken.is_empty() {
                quiet = None;
                state.learn(looks, false);
                looks = 0;
                let mut woken = seat.woken.lock().unwrap_or_else(PoisonError::into_inner);
                std::mem::swap(&mut state.woken, &mut woken);
                drop(state);
                for other in woken.drain(..) {
                    if !std::ptr::eq(&*other, seat) {
                        other.thread.unpark();
                    }
                }
                if ended {
                    return;
                }
                // The others have sent something meanwhile, most likely; and the device goes on anyway.
                let Ok(again) = self.lock() else { return self.lose() };
                state = again;
                continue;
            }
            if looks < state.patience {
                looks += 1;
                drop(state);
                // Not `yield_now`: on a busy machine that gives away milliseconds.
                for _ in 0..PAUSES {
                    hint::spin_loop();
                }
                let Ok(again) = self.lock() else { return self.lose() };
                state = again;
                continue;
            }
            if !state.channel.arm() {
                continue;
            }
            state.learn(looks, true);
            looks = 0;
            let due = state.channel.due();
            state.lead = Lead::Asleep(due);
            drop(state);
            self.sleep(due.map_or(QUIET, |due| due.min(QUIET)));
            if quiet.get_or_insert_with(Instant::now).elapsed() >= QUIET
                && !self.is_guarded.swap(true, Ordering::AcqRel)
            {
                let lane = Weak::clone(&self.this);
                let guard = thread::Builder::new().name("nbdblk-guard".to_owned()).spawn(move || guard(&lane));
                self.is_guarded.store(guard.is_ok(), Ordering::Release);
            }
            let Ok(again) = self.lock() else { return self.lose() };
            state = again;
            state.lead = Lead::Awake;
        }
    }

    /// Sends everybody away: somebody has panicked with the lock, and nobody will reap any more.
    #[cold]
    fn lose(&self) {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        for seat in state.seats.iter().flatten() {
            seat.call(LOST);
            seat.thread.unpark();
        }
        drop(state);
        self.memory.notify_all();
        let _ = self.nudge.write(1);
    }

    /// Waits for the device, for a nudge, or until it is due.
    fn sleep(&self, due: Duration) {
        let Some(wake) = &self.wake else {
            // A queue that can only be polled.
            return thread::sleep(Duration::from_micros(20));
        };
        let mut fds =
            [PollFd::new(wake.as_fd(), PollFlags::POLLIN), PollFd::new(self.nudge.as_fd(), PollFlags::POLLIN)];
        // Rounded up: to come back too soon would be to come back twice.
        let timeout = PollTimeout::try_from(due.as_millis() as u64 + 1).unwrap_or(PollTimeout::MAX);
        // EINTR: we look, and come back.
        let _ = poll(&mut fds, timeout);
        if fds[1].any() == Some(true) {
            let _ = self.nudge.read();
        }
    }
}

/// Sees to it that a device that does not answer does not keep nbdkit from ending, whatever its time-out. Where nbdkit waits
/// for its threads, and none of their requests ends for a while, it declares the device dead.
fn guard(lane: &Weak<Lane>) {
    let look = || {
        let lane = lane.upgrade()?;
        let state = lane.lock().ok()?;
        let seen = (state.ended, state.channel.in_flight() > 0);
        drop(state);
        Some(seen)
    };
    let Some((mut before, mut is_busy)) = look() else { return };
    let mut since = None;
    while is_busy {
        // nbdkit does not change its mind.
        if since.is_some() || is_ending(lane) {
            if since.get_or_insert_with(Instant::now).elapsed() >= QUIET {
                if let Some(lane) = lane.upgrade()
                    && let Ok(mut state) = lane.lock()
                {
                    host::error("nbdkit ends, and the device does not answer: its requests fail");
                    state.channel.give_up();
                    let _ = lane.nudge.write(1);
                }
                return;
            }
            thread::sleep(Duration::from_millis(100));
        }
        let Some((ended, busy)) = look() else { return };
        if ended != before {
            before = ended;
            since = since.map(|_| Instant::now());
        }
        is_busy = busy;
    }
    if let Some(lane) = lane.upgrade() {
        lane.is_guarded.store(false, Ordering::Release);
    }
}

fn is_ending(lane: &Weak<Lane>) -> bool {
    #[cfg(not(test))]
    return lane.strong_count() > 0 && host::is_ending();
    #[cfg(test)]
    {
        thread::sleep(Duration::from_millis(10));
        lane.upgrade().is_some_and(|lane| lane.is_ending.load(Ordering::SeqCst))
    }
}

/// Tells everybody on the lane when this thread panics in it.
struct Down<'a>(&'a Lane);

impl Drop for Down<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.lose();
        }
    }
}

impl State {
    /// Gives a request its tag.
    fn sit(&mut self, seat: &Arc<Seat>) -> u32 {
        let tag = self.free.pop().unwrap_or_else(|| {
            self.seats.push(None);
            (self.seats.len() - 1).try_into().expect("fewer threads than tags")
        });
        self.seats[tag as usize] = Some(Arc::clone(seat));
        self.newest = tag;
        tag
    }

    /// A turn of the channel: everything that has ended is brought to its seat.
    fn turn(&mut self) {
        self.channel.tick(Instant::now());
        let mut done = std::mem::take(&mut self.done);
        self.channel.reap(&mut done);
        self.ended += done.len() as u64;
        for done in done.drain(..) {
            let tag = done.tag as u32;
            let seat = self.seats[tag as usize].take().expect("a request ends once");
            self.free.push(tag);
            *seat.done.lock().unwrap_or_else(PoisonError::into_inner) = Some(done);
            seat.call(DONE);
            self.woken.push(seat);
        }
        self.done = done;
    }

    /// The leader has looked so many times and found nothing; then it went to sleep, or something came. Learns how many
    /// times are worth it: none for a slow device, but for a trial now and then.
    fn learn(&mut self, looks: u32, slept: bool) {
        match (slept, looks) {
            (false, 0) => {}
            (false, _) => self.patience = (self.patience + 2).min(PATIENCE_MAX),
            (true, 0) => {
                self.sleeps += 1;
                if self.sleeps.is_multiple_of(TRIAL) {
                    self.patience = 2;
                }
            }
            (true, _) => self.patience /= 2,
        }
    }

    /// The leader leaves: the newest of those who still wait takes over.
    fn hand_over(&mut self) {
        let newest = self.seats[self.newest as usize].as_ref();
        let Some(next) = newest.or_else(|| self.seats.iter().flatten().next()) else {
            self.lead = Lead::Vacant;
            return;
        };
        next.call(LEAD);
        self.woken.push(Arc::clone(next));
    }
}

impl Seat {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            thread: thread::current(),
            calls: AtomicU32::new(0),
            done: Mutex::default(),
            woken: Mutex::default(),
        })
    }

    fn call(&self, what: u32) {
        self.calls.fetch_or(what, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::BorrowedFd;

    use blkdev::{
        Completion, ExtentKind, Mapping, Queue, Request,
        fault::{Fault, Faults},
        memory::Memory,
    };

    use super::*;

    const MIB: usize = 1 << 20;

    fn pool(device: impl Device + 'static, lanes: usize, memory: usize) -> Pool {
        Pool::open(Arc::new(device), lanes, memory).unwrap()
    }

    /// A thread's own bytes, different for each block.
    fn fill(bytes: &mut [u8], seed: u64) {
        for (n, byte) in bytes.iter_mut().enumerate() {
            *byte = (seed.wrapping_mul(31) + n as u64 / 64) as u8;
        }
    }

    #[test]
    fn a_request_is_cut_at_aligned_places() {
        let check = |at, len, expected: &[(u64, usize, usize)]| {
            assert_eq!(pieces(at, len, 4096).collect::<Vec<_>>(), expected, "{len} at {at}");
        };
        check(0, 0, &[]);
        check(0, 4096, &[(0, 0, 4096)]);
        check(100, 50, &[(100, 0, 50)]);
        check(100, 8192, &[(100, 0, 3996), (4096, 3996, 4096), (8192, 8092, 100)]);
    }

    /// Sixteen threads write and read back ranges of their own, some longer than a lane's share of memory.
    fn stir(pool: &Pool) {
        thread::scope(|scope| {
            for n in 0..16u64 {
                scope.spawn(move || {
                    let lane = pool.pick().unwrap();
                    for turn in 0..100u64 {
                        let len = if turn % 50 == 7 { 3 * MIB } else { [512, 4096, 65536][turn as usize % 3] };
                        let at = n * 4 * MIB as u64 + turn % 7;
                        let (mut out, mut back) = (vec![0; len], vec![0; len]);
                        fill(&mut out, n * 1000 + turn);
                        pool.write(lane, at, &out, turn % 5 == 0).unwrap();
                        pool.read(lane, at, &mut back).unwrap();
                        assert!(out == back, "thread {n}, turn {turn}");
                    }
                    pool.run(lane, Io::Flush).unwrap();
                });
            }
        });
    }

    #[test]
    fn many_threads_on_few_lanes_each_find_their_own_data() {
        for lanes in [1, 2] {
            stir(&pool(Memory::new(64 * MIB as u64), lanes, 8 * MIB));
        }
    }

    #[test]
    fn completions_that_are_late_and_out_of_order_find_their_threads() {
        for seed in 0..4 {
            stir(&pool(Fault::new(Memory::new(64 * MIB as u64), Faults::new(seed)), 1, 8 * MIB));
        }
    }

    #[test]
    fn a_device_that_dies_leaves_nobody_waiting() {
        for seed in 0..16 {
            let faults = Faults { death: Some(100 + seed * 7), ..Faults::new(seed) };
            let pool = pool(Fault::new(Memory::new(64 * MIB as u64), faults), 1, 8 * MIB);
            thread::scope(|scope| {
                for n in 0..16u64 {
                    let pool = &pool;
                    scope.spawn(move || {
                        let mut bytes = vec![0; 256 << 10];
                        let ended = (0..1000).find_map(|_| pool.read(0, n * MIB as u64, &mut bytes).err());
                        assert_eq!(ended, Some(Error::Gone), "seed {seed}");
                        assert_eq!(pool.write(0, 0, &bytes, false), Err(Error::Gone), "seed {seed}");
                    });
                }
            });
        }
    }

    /// A device with a mistake in it: its queue panics at a certain call of `reap`.
    struct Broken(Memory, u32);

    #[derive(Debug)]
    struct BrokenQueue(Box<dyn Queue>, u32);

    impl Device for Broken {
        fn info(&self) -> &Info {
            self.0.info()
        }
        fn capacity(&self) -> u64 {
            self.0.capacity()
        }
        fn register(&self, mapping: &Arc<Mapping>) -> io::Result<()> {
            self.0.register(mapping)
        }
        fn open_queue(&self, depth: u16) -> io::Result<Box<dyn Queue>> {
            Ok(Box::new(BrokenQueue(self.0.open_queue(depth)?, self.1)))
        }
    }

    impl Queue for BrokenQueue {
        fn push(&mut self, request: Request) -> Result<(), Request> {
            self.0.push(request)
        }
        fn kick(&mut self) {
            self.0.kick();
        }
        fn reap(&mut self, done: &mut Vec<Completion>) {
            self.1 = self.1.checked_sub(1).expect("the mistake is made");
            self.0.reap(done);
        }
        fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
            self.0.wake_fd()
        }
        fn arm(&mut self) -> bool {
            self.0.arm()
        }
        fn give_up(&mut self) {
            self.0.give_up();
        }
    }

    #[test]
    fn a_panic_in_a_driver_costs_the_lane_and_leaves_nobody_waiting() {
        for calls in 0..12 {
            let device = Fault::new(Broken(Memory::new(16 * MIB as u64), calls * 5), Faults::new(calls.into()));
            let pool = pool(device, 1, 8 * MIB);
            let panics: usize = thread::scope(|scope| {
                let pool = &pool;
                let threads: Vec<_> = (0..8u64)
                    .map(|n| {
                        scope.spawn(move || {
                            let mut bytes = vec![0; 4096];
                            let ended = (0..10_000).find_map(|_| pool.read(0, n * MIB as u64, &mut bytes).err());
                            assert_eq!(ended, Some(Error::Gone));
                        })
                    })
                    .collect();
                threads.into_iter().map(|thread| usize::from(thread.join().is_err())).sum()
            });
            assert_eq!(panics, 1, "one thread meets the mistake, the others hear of it");
            assert_eq!(pool.pick(), None, "a new client is refused");
        }
    }

    #[test]
    fn threads_wait_for_memory_and_all_get_it() {
        let pool = pool(Memory::new(64 * MIB as u64), 1, 8 * MIB);
        thread::scope(|scope| {
            for n in 0..12u64 {
                let pool = &pool;
                scope.spawn(move || {
                    let mut bytes = vec![0; 2 * MIB + 512];
                    fill(&mut bytes, n);
                    let mut back = vec![0; bytes.len()];
                    for _ in 0..20 {
                        pool.write(0, n * 5 * MIB as u64, &bytes, false).unwrap();
                        pool.read(0, n * 5 * MIB as u64, &mut back).unwrap();
                        assert!(bytes == back);
                    }
                });
            }
        });
    }

    /// Takes all memory of a lane.
    fn drain(lane: &Lane) -> Vec<Buf> {
        std::iter::from_fn(|| lane.lock().unwrap().channel.alloc(0, 4096))
            .inspect(|_| {
                lane.held.fetch_add(1, Ordering::SeqCst);
            })
            .collect()
    }

    #[test]
    fn requests_without_payload_need_no_memory() {
        for block_size in [1, 4096] {
            let memory = Memory::new(64 * MIB as u64).with(|info| {
                info.block_size = block_size;
                // Zeroes are written one by one.
                info.caps.zero = false;
            });
            let pool = pool(Fault::new(memory, Faults::new(1)), 1, 8 * MIB);
            let held = drain(&pool.lanes[0]);
            assert!(held.len() > 1000);
            thread::scope(|scope| {
                // A waiting request comes first.
                let reader = scope.spawn(|| pool.read(0, 0, &mut [0; 4096]));
                while pool.lanes[0].hungry.load(Ordering::SeqCst) == 0 {
                    thread::yield_now();
                }
                assert_eq!(pool.run(0, Io::Flush), Ok(()));
                let zero = Io::Zero { at: 7, len: MIB as u64, fua: true, unmap: false, fast: false };
                assert_eq!(pool.run(0, zero), Ok(()));
                assert_eq!(pool.run(0, Io::Discard { at: 0, len: MIB as u64, fua: true }), Ok(()));
                assert!(pool.status(0, 0, MIB as u64).is_ok());
                held.into_iter().for_each(|buf| pool.lanes[0].give_back(buf));
                assert_eq!(reader.join().unwrap(), Ok(()));
            });
        }
    }

    #[test]
    fn one_that_waits_for_memory_hears_that_the_device_has_died() {
        let faults = Faults { death: Some(3), ..Faults::new(1) };
        let pool = pool(Fault::new(Memory::new(64 * MIB as u64), faults), 1, 8 * MIB);
        assert!(pool.pick().is_some());
        // Never given back.
        let held = drain(&pool.lanes[0]);
        thread::scope(|scope| {
            let waiting: Vec<_> = (0..3).map(|_| scope.spawn(|| pool.read(0, 0, &mut [0; 4096]))).collect();
            while pool.lanes[0].hungry.load(Ordering::SeqCst) < 3 {
                thread::yield_now();
            }
            let ended = (0..100).find_map(|_| pool.status(0, 0, MIB as u64).err());
            assert_eq!(ended, Some(Error::Gone));
            for reader in waiting {
                assert_eq!(reader.join().unwrap(), Err(Error::Gone));
            }
        });
        assert_eq!(pool.pick(), None, "a new client is refused");
        drop(held);
        assert_eq!(pool.read(0, 0, &mut [0; 4096]), Err(Error::Gone));
    }

    #[test]
    fn a_silent_device_without_a_time_out_does_not_keep_nbdkit_from_ending() {
        let device = Memory::new(64 * MIB as u64).with(|info| info.timeout = None);
        let pool = pool(Fault::new(device, Faults { lost: 1.0, ..Faults::new(1) }), 1, 8 * MIB);
        thread::scope(|scope| {
            let waiting: Vec<_> = (0..40).map(|_| scope.spawn(|| pool.read(0, 0, &mut vec![0; MIB]))).collect();
            thread::sleep(3 * QUIET);
            assert!(!waiting.iter().any(thread::ScopedJoinHandle::is_finished), "a device may be slow");
            pool.lanes[0].is_ending.store(true, Ordering::SeqCst);
            for reader in waiting {
                assert_eq!(reader.join().unwrap(), Err(Error::Gone));
            }
        });
        assert_eq!(pool.pick(), None);
    }

    #[test]
    fn errors_reach_who_asked() {
        let pool = pool(Memory::new(1 << 20), 1, 8 * MIB);
        assert_eq!(pool.read(0, 1 << 20, &mut [0; 512]), Err(Error::OutOfRange));
        assert_eq!(pool.write(0, (1 << 20) - 1, &[0; 2], false), Err(Error::OutOfRange));
        assert_eq!(pool.run(0, Io::Discard { at: 0, len: 2 << 20, fua: false }), Err(Error::OutOfRange));
        assert_eq!(pool.read(0, 0, &mut [0; 512]), Ok(()));
        let extents = pool.status(0, 0, 1 << 20).unwrap();
        assert_eq!(extents[0].at, 0);
        assert!(extents[0].kind != ExtentKind::Data, "nothing was written");
    }
}
