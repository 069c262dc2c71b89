//! [`Pool`]: a device's Channels, shared by threads that block.
//!
//! There are more threads than queues: nbdkit has 16 for each connection, and a device often has one queue. So each thread puts
//! its request into a [`Lane`] under its lock, and waits. One of the waiting threads leads: it reaps for all, sleeps for all when
//! nothing completes, and wakes each thread whose request has ended. When its own request has ended, it passes the lead to the
//! thread that has waited for the shortest time, which will need it for the longest. A thread that is alone leads itself, without
//! a switch.

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

use crate::{abi, host};
use blkdev::{
    Buf, Channel, Counters, Counts, Device, Done, Error, Extent, Info, Io, Plan,
    thread::Role,
    wake::{Watcher, wait},
};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::eventfd::{EfdFlags, EventFd},
};

/// Longest part of a request in flight, in bytes. Longer requests go piece by piece, so that one client's 64 MiB leave memory for
/// others.
const PIECE: usize = 4 << 20;

/// Most bytes copied while the lane is locked. A longer copy would delay others more than locking twice does.
const COPY_LOCKED: usize = 32 << 10;

/// Most polls before sleeping …
const PATIENCE_MAX: u32 = 8;
/// … and the pause before each: about a microsecond, so that all of them cost less than a sleep and a wake-up.
const PAUSES: u32 = 32;

/// A device that has completed nothing for so long may never do.
const QUIET: Duration = if cfg!(test) { Duration::from_millis(300) } else { Duration::from_secs(4) };

/// Interval at which a thread that waits for memory checks whether the device is dead.
const LOOK: Duration = Duration::from_secs(1);

/// Interval at which it checks whether the queue has returned memory that it kept.
const BRIEFLY: Duration = Duration::from_millis(1);

/// Number of sleeps after which a lane that does not poll tries it again.
const TRIAL: u32 = 32;

/// An open device and its Channels.
pub(crate) struct Pool {
    /// Reaps lanes that no thread uses when the device dies or is back: only then do their queues leave the device.
    _watcher: Watcher,
    /// Declared before the device, so that its queues have drained when it closes.
    lanes: Box<[Arc<Lane>]>,
    device: Arc<dyn Device>,
    info: Info,
    piece: usize,
    /// Number of connections so far.
    connections: AtomicUsize,
}

impl Pool {
    /// Opens `count` channels, each with `memory` bytes for payload.
    ///
    /// # Errors
    /// An error of the device, or no memory.
    pub(crate) fn open(device: Arc<dyn Device>, count: usize, memory: usize) -> io::Result<Self> {
        let info = device.info().clone();
        let channels = Plan::new(memory).open(&device, count)?;
        let lanes = channels.into_iter().map(Lane::new).collect::<io::Result<Box<_>>>()?;
        let watcher = watch(&lanes)?;
        device.ring_at_death(watcher.wake());
        let (piece, connections) = (PIECE.min(memory / 4), AtomicUsize::new(0));
        Ok(Self { _watcher: watcher, lanes, device, info, piece, connections })
    }

    /// The counters of all channels together.
    pub(crate) fn counts(&self) -> Counts {
        let mut counts = Counts::default();
        self.lanes.iter().for_each(|lane| counts += &lane.counters.copy());
        counts
    }

    /// Limits and capabilities of the device.
    pub(crate) fn info(&self) -> &Info {
        &self.info
    }

    /// Present size of the device, in bytes.
    pub(crate) fn capacity(&self) -> u64 {
        self.device.capacity()
    }

    /// Returns the place of one more connection; `None`: the device is dead. All threads of a connection share one lane: with more
    /// threads, each wake-up brings more completions, and fewer wake-ups are needed.
    pub(crate) fn pick(&self) -> Option<Place> {
        let (first, count) = (self.connections.fetch_add(1, Ordering::Relaxed), self.lanes.len());
        (0..count).map(|n| first.wrapping_add(n) % count).find_map(|lane| {
            let losses = self.lanes[lane].losses()?;
            Some(Place { lane, losses })
        })
    }

    /// Fills `bytes` from the device.
    pub(crate) fn read(&self, place: Place, at: u64, bytes: &mut [u8]) -> Result<(), Error> {
        let lane = &self.lanes[place.lane];
        let _down = Down(lane);
        for (at, from, len) in pieces(at, bytes.len(), self.piece) {
            let (state, buf) = lane.alloc(at, len)?;
            match lane.run(place, state, Io::Read { at, buf }) {
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
    pub(crate) fn write(&self, place: Place, at: u64, bytes: &[u8], fua: bool) -> Result<(), Error> {
        let lane = &self.lanes[place.lane];
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
            match lane.run(place, state, Io::Write { at, buf, fua }) {
                Ok(Io::Write { buf, .. }) => lane.give_back(buf),
                Ok(io) => unreachable!("a write comes back as one, not as {io:?}"),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Runs a request without payload.
    pub(crate) fn run(&self, place: Place, io: Io) -> Result<(), Error> {
        let lane = &self.lanes[place.lane];
        let _down = Down(lane);
        lane.run(place, lane.lock()?, io).map(drop)
    }

    /// Returns the status of the range, at least from its start.
    pub(crate) fn status(&self, place: Place, at: u64, len: u64) -> Result<Vec<Extent>, Error> {
        let lane = &self.lanes[place.lane];
        let _down = Down(lane);
        match lane.run(place, lane.lock()?, Io::Status { at, len, extents: Vec::new() })? {
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

/// Cuts a request at multiples of `piece`, so that no cut causes an unaligned part. Returns `(at, first byte, length)` of each.
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

/// The place of a connection in the pool.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Place {
    lane: usize,
    /// Those of the channel when the connection began. After a loss it must not go on.
    losses: u32,
}

/// A Channel, and the threads that have requests on it.
struct Lane {
    this: Weak<Self>,
    /// A thread [guards](guard) it.
    is_guarded: AtomicBool,
    /// Replaces nbdkit's state in tests.
    #[cfg(test)]
    is_ending: AtomicBool,
    state: Mutex<State>,
    /// The channel's wake-up descriptor, for waiting without the lock.
    wake: Option<OwnedFd>,
    counters: Arc<Counters>,
    /// Wakes the leader when another thread did what it sleeps for.
    nudge: EventFd,
    /// Number of buffers that callers hold.
    held: AtomicUsize,
    /// Number of callers that wait for memory …
    hungry: AtomicUsize,
    /// … here, under the lock.
    memory: Condvar,
}

struct State {
    channel: Channel,
    /// The waiting thread of each request, by tag.
    seats: Vec<Option<Arc<Seat>>>,
    free: Vec<u32>,
    /// The tag of the newest request.
    newest: u32,
    lead: Lead,
    /// Number of requests that have ended.
    ended: u64,
    /// Kept for its capacity.
    done: Vec<Done>,
    woken: Vec<Arc<Seat>>,
    /// Callers that wait for memory are served in the order of their tickets.
    ticket: u64,
    served: u64,
    /// Polls that the leader does before it sleeps.
    patience: u32,
    /// Number of sleeps without a poll.
    sleeps: u32,
}

/// The state of the lead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lead {
    /// No leader: no request is in flight.
    Vacant,
    /// A thread leads and is awake, or was told to lead.
    Awake,
    /// The leader waits for the device, at most for this time.
    Asleep(Option<Duration>),
}

/// The place where a thread waits for its request.
struct Seat {
    thread: Thread,
    /// Bits of the calls to the thread.
    calls: AtomicU32,
    done: Mutex<Option<Done>>,
    /// Threads that it must wake as the leader. Swapped with [`State::woken`], so that neither allocates.
    woken: Mutex<Vec<Arc<Self>>>,
}

/// The request has ended.
const DONE: u32 = 1;
/// Take the lead.
const LEAD: u32 = 2;
/// The lane has broken down.
const LOST: u32 = 4;

thread_local! {
    /// The seat of this thread while it is not in use. A thread that leaves early abandons its seat: a late call must not count
    /// as the answer to a later request.
    static SEAT: Cell<Option<Arc<Seat>>> = const { Cell::new(None) };
}

impl Lane {
    fn new(channel: Channel) -> io::Result<Arc<Self>> {
        let counters = Arc::clone(channel.counters());
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
            counters,
            nudge,
            held: AtomicUsize::new(0),
            hungry: AtomicUsize::new(0),
            memory: Condvar::new(),
        }))
    }

    /// If a thread panicked with the lock, the state of the channel is unknown, so the lane is unusable.
    fn lock(&self) -> Result<MutexGuard<'_, State>, Error> {
        self.state.lock().map_err(|_| Error::Gone)
    }

    /// See [`Channel::losses`]. `None`: no request can succeed.
    fn losses(&self) -> Option<u32> {
        let state = self.reap_if_idle()?;
        (!state.channel.is_dead()).then(|| state.channel.losses())
    }

    /// Reaps if no request is in flight, and so no other thread does. `None`: the lane is unusable.
    fn reap_if_idle(&self) -> Option<MutexGuard<'_, State>> {
        let mut state = self.lock().ok()?;
        for _ in 0..2 {
            // The first call sees a loss, the next one that the device is back.
            if state.lead == Lead::Vacant {
                state.turn();
            }
        }
        Some(state)
    }

    /// Returns a buffer, and the lock with it. Waits in turn while others hold the memory.
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
                // Read this before checking: a buffer that is returned after the check has been counted.
                let held = self.held.load(Ordering::SeqCst);
                if let Some(buf) = state.channel.alloc(at, len) {
                    self.held.fetch_add(1, Ordering::SeqCst);
                    break Some(buf);
                }
                if held == 0 && !state.channel.awaits_memory() {
                    // No caller holds any, but it is not there: it was lost to a device that was declared dead.
                    break None;
                }
            }
            if state.channel.refuses() || state.channel.is_dead() {
                break None;
            }
            let mut pause = LOOK;
            if state.channel.awaits_memory() {
                if state.lead == Lead::Vacant {
                    // No request is in flight, so no other thread reaps.
                    state.turn();
                }
                pause = BRIEFLY;
            }
            state = match self.memory.wait_timeout(state, pause) {
                Ok((state, _)) => state,
                Err(_) => return Err(Error::Gone),
            };
        };
        self.hungry.fetch_sub(1, Ordering::SeqCst);
        // Out of turn only if the device is dead; then turns do not matter.
        state.served += 1;
        self.memory.notify_all();
        found.map(|buf| (state, buf)).ok_or(Error::Gone)
    }

    fn give_back_of(&self, io: Io) {
        if let Io::Read { buf, .. } | Io::Write { buf, .. } = io {
            self.give_back(buf);
        }
    }

    /// Frees a buffer, and wakes callers that wait for memory.
    fn give_back(&self, buf: Buf) {
        drop(buf);
        self.held.fetch_sub(1, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        if self.hungry.load(Ordering::SeqCst) > 0 {
            // Under the lock, so that no caller is between its check and its wait.
            let _state = self.state.lock();
            self.memory.notify_all();
        }
    }

    /// Sends a request and waits for its end. The caller has a [`Down`].
    fn run(&self, place: Place, mut state: MutexGuard<'_, State>, io: Io) -> Result<Io, Error> {
        if state.channel.losses() != place.losses {
            drop(state);
            self.give_back_of(io);
            return Err(Error::Gone);
        }
        let seat = SEAT.take().unwrap_or_else(Seat::new);
        seat.calls.store(0, Ordering::Relaxed);
        let buffer = matches!(io, Io::Read { .. } | Io::Write { .. });
        let tag = state.sit(&seat);
        let before = state.channel.in_flight();
        if abi::wants_latencies() {
            state.channel.tick(Instant::now());
        }
        state.channel.submit(tag.into(), io);
        match state.lead {
            Lead::Vacant => {
                state.channel.kick();
                state.lead = Lead::Awake;
                self.lead(state, &seat);
            }
            // The leader will poll in any case, and ring the doorbell for all new requests.
            Lead::Awake => drop(state),
            Lead::Asleep(until) => {
                state.channel.kick();
                // The request ended at once, which wakes no thread, or needs the leader earlier than it would wake up.
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

    /// Reaps for all until the request of `seat` has ended; then another thread takes over.
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
                // Other threads have probably sent requests in the meantime, and the device works anyway.
                let Ok(again) = self.lock() else { return self.lose() };
                state = again;
                continue;
            }
            if looks < state.patience {
                looks += 1;
                drop(state);
                // Not `yield_now`: on a busy machine it would give away milliseconds.
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

    /// Sends all threads away: one has panicked with the lock, so no thread will reap any more.
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

    /// Waits for the device, for a nudge, or until work is due.
    fn sleep(&self, due: Duration) {
        let Some(wake) = &self.wake else {
            // A queue that can only be polled.
            return thread::sleep(Duration::from_micros(20));
        };
        let mut fds =
            [PollFd::new(wake.as_fd(), PollFlags::POLLIN), PollFd::new(self.nudge.as_fd(), PollFlags::POLLIN)];
        // Rounded up, because returning too early would mean waiting twice.
        let timeout = PollTimeout::try_from(due.as_millis() as u64 + 1).unwrap_or(PollTimeout::MAX);
        // EINTR: the caller checks, and comes back.
        let _ = poll(&mut fds, timeout);
        if fds[1].any() == Some(true) {
            let _ = self.nudge.read();
        }
    }
}

/// A thread that reaps idle lanes whenever it is woken.
fn watch(lanes: &[Arc<Lane>]) -> io::Result<Watcher> {
    let lanes: Vec<_> = lanes.iter().map(Arc::downgrade).collect();
    Watcher::start(Role::Watcher, "nbdblk-lanes", move |stop| {
        while !stop.is_requested() {
            wait([stop.wake().as_fd()], None);
            stop.wake().clear();
            for lane in lanes.iter().filter_map(Weak::upgrade) {
                lane.reap_if_idle();
            }
        }
    })
}

/// Ensures that a device that does not answer cannot keep nbdkit from ending, whatever its time-out. If nbdkit waits for its
/// threads, and none of their requests ends for a while, this declares the device dead.
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
        // Once nbdkit is ending, it does not change its mind.
        if since.is_some() || is_ending(lane) {
            if since.get_or_insert_with(Instant::now).elapsed() >= QUIET {
                if let Some(lane) = lane.upgrade()
                    && let Ok(mut state) = lane.lock()
                {
                    host::error("nbdkit is ending and the device does not answer: its requests fail");
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

/// If this thread panics in the lane, this reports it to all other threads of the lane.
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

    /// One turn of the channel: takes everything that has ended to its seat.
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

    /// Reports how often the leader polled in vain, before it slept or something came. Adapts the number of polls: none for a
    /// slow device, except for a trial now and then.
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

    /// The leader leaves: the newest waiting thread takes over.
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
        liveness::Liveness,
        memory::Memory,
        reconnect::{self, Reconnect},
        wake::Wake,
    };

    use super::*;

    const MIB: usize = 1 << 20;

    fn pool(device: impl Device + 'static, lanes: usize, memory: usize) -> Pool {
        Pool::open(Arc::new(device), lanes, memory).unwrap()
    }

    /// A thread's own data, different for each block.
    fn fill(bytes: &mut [u8], seed: u64) {
        for (n, byte) in bytes.iter_mut().enumerate() {
            *byte = (seed.wrapping_mul(31) + n as u64 / 64) as u8;
        }
    }

    #[test]
    fn a_request_is_split_at_aligned_offsets() {
        let check = |at, len, expected: &[(u64, usize, usize)]| {
            assert_eq!(pieces(at, len, 4096).collect::<Vec<_>>(), expected, "{len} at {at}");
        };
        check(0, 0, &[]);
        check(0, 4096, &[(0, 0, 4096)]);
        check(100, 50, &[(100, 0, 50)]);
        check(100, 8192, &[(100, 0, 3996), (4096, 3996, 4096), (8192, 8092, 100)]);
    }

    /// Sixteen threads write and read back their own ranges, some longer than a lane's share of memory.
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
    fn a_device_that_dies_leaves_no_thread_waiting() {
        for seed in 0..16 {
            let faults = Faults { death: Some(100 + seed * 7), ..Faults::new(seed) };
            let pool = pool(Fault::new(Memory::new(64 * MIB as u64), faults), 1, 8 * MIB);
            thread::scope(|scope| {
                for n in 0..16u64 {
                    let pool = &pool;
                    scope.spawn(move || {
                        let mut bytes = vec![0; 256 << 10];
                        let ended =
                            (0..1000).find_map(|_| pool.read(Place::default(), n * MIB as u64, &mut bytes).err());
                        assert_eq!(ended, Some(Error::Gone), "seed {seed}");
                        assert_eq!(pool.write(Place::default(), 0, &bytes, false), Err(Error::Gone), "seed {seed}");
                    });
                }
            });
        }
    }

    /// A device with a bug: its queue panics at a certain call of `reap`.
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
            self.1 = self.1.checked_sub(1).expect("the bug, on purpose");
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
    fn a_driver_that_panics_costs_its_device_and_leaves_no_thread_waiting() {
        for calls in 0..12 {
            let device = Fault::new(Broken(Memory::new(16 * MIB as u64), calls * 5), Faults::new(calls.into()));
            let pool = pool(device, 1, 8 * MIB);
            thread::scope(|scope| {
                for n in 0..8 {
                    let pool = &pool;
                    scope.spawn(move || {
                        let mut bytes = vec![0; 4096];
                        let ended =
                            (0..10_000).find_map(|_| pool.read(Place::default(), n * MIB as u64, &mut bytes).err());
                        assert_eq!(ended, Some(Error::Gone));
                    });
                }
            });
            assert_eq!(pool.pick(), None, "a new client is refused");
        }
    }

    /// A device that can be opened again only when all of it is closed, such as one of VFIO.
    struct Exclusive(Memory, Arc<Liveness>, Arc<()>);

    struct ExclusiveQueue {
        queue: Box<dyn Queue>,
        life: Arc<Liveness>,
        _open: Arc<()>,
    }

    impl Device for Exclusive {
        fn info(&self) -> &Info {
            self.0.info()
        }
        fn capacity(&self) -> u64 {
            self.0.capacity()
        }
        fn register(&self, mapping: &Arc<Mapping>) -> io::Result<()> {
            self.0.register(mapping)
        }
        fn state(&self) -> blkdev::State {
            if self.1.is_dead() { blkdev::State::Dead } else { blkdev::State::Working }
        }
        fn ring_at_death(&self, bell: &Arc<Wake>) {
            self.1.ring_at_end(bell);
        }
        fn open_queue(&self, depth: u16) -> io::Result<Box<dyn Queue>> {
            let (queue, life) = (self.0.open_queue(depth)?, Arc::clone(&self.1));
            Ok(Box::new(ExclusiveQueue { queue, life, _open: Arc::clone(&self.2) }))
        }
    }

    impl Queue for ExclusiveQueue {
        fn push(&mut self, request: Request) -> Result<(), Request> {
            self.queue.push(request)
        }
        fn kick(&mut self) {
            self.queue.kick();
        }
        fn reap(&mut self, done: &mut Vec<Completion>) {
            self.queue.reap(done);
        }
        fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
            self.queue.wake_fd()
        }
        fn arm(&mut self) -> bool {
            self.queue.arm()
        }
        fn give_up(&mut self) {
            self.life.end("given up");
        }
        fn is_dead(&self) -> bool {
            self.life.is_dead()
        }
    }

    #[test]
    fn idle_lanes_leave_a_device_that_has_died() {
        let (opened, life) = (Arc::new(AtomicU32::new(0)), Liveness::new("exclusive".to_owned()));
        let current = Arc::new(Mutex::new((life, Weak::new())));
        let (count, now) = (Arc::clone(&opened), Arc::clone(&current));
        let open = move || {
            let mut now = now.lock().unwrap();
            if Weak::upgrade(&now.1).is_some() {
                return Err(io::ErrorKind::ResourceBusy.into());
            }
            count.fetch_add(1, Ordering::SeqCst);
            let (life, token) = (Liveness::new("exclusive".to_owned()), Arc::new(()));
            *now = (Arc::clone(&life), Arc::downgrade(&token));
            Ok(Arc::new(Exclusive(Memory::new(MIB as u64), life, token)) as Arc<dyn Device>)
        };
        let device = Reconnect::new(open().unwrap(), Box::new(open), reconnect::Options::default()).unwrap();
        let pool = pool(device, 2, 8 * MIB);
        let places = [pool.pick().unwrap(), pool.pick().unwrap()];
        for times in 2..5 {
            let life = Arc::clone(&current.lock().unwrap().0);
            life.end("it was removed");
            let start = Instant::now();
            while opened.load(Ordering::SeqCst) < times {
                assert!(start.elapsed() < Duration::from_secs(60), "an idle lane keeps the dead device open");
                thread::sleep(Duration::from_millis(1));
            }
            places.iter().for_each(|place| pool.run(*place, Io::Flush).unwrap());
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
                        pool.write(Place::default(), n * 5 * MIB as u64, &bytes, false).unwrap();
                        pool.read(Place::default(), n * 5 * MIB as u64, &mut back).unwrap();
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
                // The channel writes zeroes.
                info.caps.zero = false;
            });
            let pool = pool(Fault::new(memory, Faults::new(1)), 1, 8 * MIB);
            let held = drain(&pool.lanes[0]);
            assert!(held.len() > 1000);
            thread::scope(|scope| {
                // A waiting request comes first.
                let reader = scope.spawn(|| pool.read(Place::default(), 0, &mut [0; 4096]));
                while pool.lanes[0].hungry.load(Ordering::SeqCst) == 0 {
                    thread::yield_now();
                }
                assert_eq!(pool.run(Place::default(), Io::Flush), Ok(()));
                let zero = Io::Zero { at: 7, len: MIB as u64, fua: true, unmap: false, fast: false };
                assert_eq!(pool.run(Place::default(), zero), Ok(()));
                assert_eq!(pool.run(Place::default(), Io::Discard { at: 0, len: MIB as u64, fua: true }), Ok(()));
                assert!(pool.status(Place::default(), 0, MIB as u64).is_ok());
                held.into_iter().for_each(|buf| pool.lanes[0].give_back(buf));
                assert_eq!(reader.join().unwrap(), Ok(()));
            });
        }
    }

    #[test]
    fn a_thread_that_waits_for_memory_gets_the_death_of_the_device() {
        let faults = Faults { death: Some(3), ..Faults::new(1) };
        let pool = pool(Fault::new(Memory::new(64 * MIB as u64), faults), 1, 8 * MIB);
        assert!(pool.pick().is_some());
        // Never returned.
        let held = drain(&pool.lanes[0]);
        thread::scope(|scope| {
            let waiting: Vec<_> =
                (0..3).map(|_| scope.spawn(|| pool.read(Place::default(), 0, &mut [0; 4096]))).collect();
            while pool.lanes[0].hungry.load(Ordering::SeqCst) < 3 {
                thread::yield_now();
            }
            let ended = (0..100).find_map(|_| pool.status(Place::default(), 0, MIB as u64).err());
            assert_eq!(ended, Some(Error::Gone));
            for reader in waiting {
                assert_eq!(reader.join().unwrap(), Err(Error::Gone));
            }
        });
        assert_eq!(pool.pick(), None, "a new client is refused");
        drop(held);
        assert_eq!(pool.read(Place::default(), 0, &mut [0; 4096]), Err(Error::Gone));
    }

    #[test]
    fn a_silent_device_without_a_time_out_does_not_keep_nbdkit_from_ending() {
        let device = Memory::new(64 * MIB as u64).with(|info| info.timeout = None);
        let pool = pool(Fault::new(device, Faults { lost: 1.0, ..Faults::new(1) }), 1, 8 * MIB);
        thread::scope(|scope| {
            let waiting: Vec<_> =
                (0..40).map(|_| scope.spawn(|| pool.read(Place::default(), 0, &mut vec![0; MIB]))).collect();
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
    fn errors_reach_their_callers() {
        let pool = pool(Memory::new(1 << 20), 1, 8 * MIB);
        assert_eq!(pool.read(Place::default(), 1 << 20, &mut [0; 512]), Err(Error::OutOfRange));
        assert_eq!(pool.write(Place::default(), (1 << 20) - 1, &[0; 2], false), Err(Error::OutOfRange));
        assert_eq!(pool.run(Place::default(), Io::Discard { at: 0, len: 2 << 20, fua: false }), Err(Error::OutOfRange));
        assert_eq!(pool.read(Place::default(), 0, &mut [0; 512]), Ok(()));
        let extents = pool.status(Place::default(), 0, 1 << 20).unwrap();
        assert_eq!(extents[0].at, 0);
        assert!(extents[0].kind != ExtentKind::Data, "nothing was written");
    }
}
