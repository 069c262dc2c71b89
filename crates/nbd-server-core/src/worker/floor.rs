//! [`Floor`]: a worker's connections and lanes, and the code that moves bytes between them.

use std::{
    os::fd::{AsFd, AsRawFd},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use blkdev::{Channel, Done, socket};
use nbd_proto::wire::REQUEST_LEN;
use nix::sys::socket::{SockaddrStorage, getsockname};

use super::{
    conn::{Conn, Why},
    handle::{Arrival, Phase, Standstill},
    lane::{Lane, Leaving},
};
use crate::{
    coalesce::Coalesce,
    limits::Limits,
    lines::Grant,
    observe::LaneGauges,
    pace::Progress,
    poll::{Interest, Poll},
    received::STAGING_MIN,
    removal::Removal,
    seat::Seat,
    session::{Session, Stall},
    spin::Spin,
    turns::{Connections, Fed, Turns},
};

/// Bytes received at a time: a hundred small writes, or thousands of other requests. More would save few system calls, and would
/// not fit the cache.
const STAGING: usize = 256 << 10;
const _: () = assert!(STAGING >= STAGING_MIN);

/// Receives of one connection in a turn before the next connection has its turn.
const RECEIVES: usize = 4;

/// Why a connection's lane always exists.
const SERVED: &str = "a connection has a lane";

pub(super) struct Floor {
    /// Indexed by number; `None` where other workers serve the export, or there is none.
    pub(super) lanes: Vec<Option<Lane>>,
    /// Indexed by number. A number stays in use while a request of its connection is at a device.
    pub(super) conns: Vec<Option<Conn>>,
    free: Vec<u32>,
    /// Connections of this turn that may have new replies.
    active: Vec<u32>,
    /// A client that had unread replies when those of this turn were sent.
    pub(super) behind: Option<u32>,
    staging: Box<[u8]>,
    done: Vec<Done>,
    pub(super) spin: Spin,
    /// A buffer has grown, or memory was used, since the last tidying.
    pub(super) is_untidy: bool,
    /// Number of connections, for other threads.
    pub(super) load: Arc<AtomicUsize>,
}

impl Floor {
    pub(super) fn new(limits: &Limits, load: Arc<AtomicUsize>) -> Self {
        Self {
            lanes: Vec::new(),
            conns: Vec::new(),
            free: Vec::new(),
            active: Vec::new(),
            behind: None,
            staging: vec![0; STAGING].into_boxed_slice(),
            done: Vec::new(),
            spin: Spin::new(limits.poll),
            is_untidy: false,
            load,
        }
    }

    pub(super) fn open(&mut self, seat: Arc<Seat>, gauges: Arc<LaneGauges>, channel: Channel) {
        let number = seat.lane;
        if self.lanes.len() <= number {
            self.lanes.resize_with(number + 1, || None);
        }
        assert!(self.lanes[number].is_none(), "a lane number is reused only after its seat is gone");
        self.lanes[number] = Some(Lane::new(channel, seat, gauges));
    }

    /// Advances the clocks of all channels.
    #[inline]
    pub(super) fn tick(&mut self, now: Instant) {
        self.lanes.iter_mut().flatten().for_each(|lane| lane.channel.tick(now));
    }

    /// Adds a connection. Returns its number; `None` if its export was removed.
    pub(super) fn welcome(&mut self, arrival: Arrival, poll: &Poll) -> Option<u32> {
        let Arrival { mut stream, phase, ticket, entry, over } = arrival;
        let turned_away = |load: &AtomicUsize| {
            load.fetch_sub(1, Ordering::Relaxed);
            ticket.clients.fetch_sub(1, Ordering::Relaxed);
        };
        let Some(lane) = self.lanes[ticket.lane].as_mut().filter(|lane| !lane.refuses()) else {
            turned_away(&self.load);
            return None;
        };
        let number = self.free.pop().unwrap_or_else(|| {
            self.conns.push(None);
            self.conns.len() as u32 - 1
        });
        if let Err(e) = poll.add_edge(&stream, number.into(), Interest::Read) {
            log::warn!("a client was rejected: {e}");
            turned_away(&self.load);
            self.free.push(number);
            return None;
        }
        (lane.clients, lane.conns) = (lane.clients + 1, lane.conns + 1);
        if let Some(leaving) = &mut lane.leaving {
            leaving.deadline = None;
        }
        let name = getsockname::<SockaddrStorage>(stream.as_fd().as_raw_fd()).ok();
        let is_unix = name.is_some_and(|name| name.as_unix_addr().is_some());
        let is_tcp = name.is_some_and(|name| name.as_sockaddr_in().is_some() || name.as_sockaddr_in6().is_some());
        let (session, backlog) = match phase {
            Phase::Begins(negotiated, sent) => (Session::new(&negotiated, number), sent),
            Phase::Continues(state) => {
                stream.forget_mark();
                Session::resume(*state, number)
            }
        };
        self.conns[number as usize] = Some(Conn {
            stream: Some(stream),
            session,
            lane: ticket.lane,
            backlog,
            readable: true,
            ended: false,
            blocked: false,
            writable: true,
            active: false,
            coalesce: is_unix.then(Coalesce::default),
            is_tcp,
            entry: Some(entry),
            why: None,
            is_waiting: false,
            over,
        });
        Some(number)
    }

    /// Applies a removal to a lane, which gets no new clients. Returns whether the lane begins to leave with this call.
    pub(super) fn retire(&mut self, number: usize, removal: Removal, farewell: Instant, turns: &mut Turns) -> bool {
        // The lane may have closed after an earlier removal.
        let Some(lane) = &mut self.lanes[number] else { return false };
        let deadline = (removal == Removal::Soft).then_some(farewell);
        let begins = lane.leaving.is_none();
        lane.leaving = Some(Leaving { removal, deadline });
        match removal {
            Removal::Hide => {}
            Removal::Soft => {
                self.conns.iter_mut().flatten().filter(|conn| conn.lane == number).for_each(|c| c.session.refuse());
            }
            Removal::Hard => self.bury_all(number, turns, || Why::Removed),
        }
        begins
    }

    pub(super) fn bury_all(&mut self, lane: usize, turns: &mut Turns, why: impl Fn() -> Why) {
        for number in 0..self.conns.len() as u32 {
            if self.conns[number as usize].as_ref().is_some_and(|conn| conn.lane == lane) {
                self.bury(number, turns, why());
            }
        }
    }

    /// Ends a connection. `why` applies if the connection has no reason of its own.
    pub(super) fn bury(&mut self, number: u32, turns: &mut Turns, why: Why) {
        self.hang_up(number, why);
        turns.leave(number);
    }

    /// The connection of the client with this id.
    pub(super) fn find(&self, id: u64) -> Option<u32> {
        let is_it = |conn: &Option<Conn>| {
            conn.as_ref().is_some_and(|conn| conn.entry.as_ref().is_some_and(|entry| entry.client.id == id))
        };
        self.conns.iter().position(is_it).map(|number| number as u32)
    }

    /// Closes a connection. Its requests at the device come back later; all others are dropped.
    fn hang_up(&mut self, number: u32, why: Why) {
        let slot = &mut self.conns[number as usize];
        let Some(conn) = slot else { return };
        let Some(mut stream) = conn.stream.take() else { return };
        stream.close();
        let why = conn.why.take().unwrap_or(why);
        self.load.fetch_sub(1, Ordering::Relaxed);
        self.is_untidy = true;
        conn.session.close();
        let lane = self.lanes[conn.lane].as_mut().expect(SERVED);
        conn.check_out(&why, &lane.gauges);
        lane.clients -= 1;
        lane.seat.clients.fetch_sub(1, Ordering::Relaxed);
        if conn.session.in_flight() == 0 {
            lane.conns -= 1;
            *slot = None;
            self.free.push(number);
        } else {
            // Cancels later, for all connections that close in this turn: each cancellation looks at every request.
            lane.cancels = true;
        }
    }

    /// Rings the devices, and turns their completions into replies. Returns the number of completions.
    pub(super) fn reap(&mut self, turns: &mut Turns) -> usize {
        let (mut in_flight, mut lost) = (0, Vec::new());
        for (number, lane) in self.lanes.iter_mut().enumerate() {
            let Some(lane) = lane else { continue };
            // Cancel first: when reaped, the channel sends the requests that it held back.
            if std::mem::take(&mut lane.cancels) {
                let conns = &self.conns;
                let gone = |number: u32| conns[number as usize].as_ref().is_none_or(|conn| conn.stream.is_none());
                lane.channel.cancel(|tag| gone(Session::number_of(tag)));
            }
            lane.channel.kick();
            lane.channel.reap(&mut self.done);
            in_flight += lane.channel.in_flight();
            if lane.has_lost() {
                lost.push(number);
            }
        }
        lost.into_iter().for_each(|lane| self.lose(lane));
        let mut done = std::mem::take(&mut self.done);
        let count = done.len();
        if count > 0 {
            self.is_untidy = true;
            self.spin.count(count + in_flight);
        }
        for done in done.drain(..) {
            self.complete(done, turns);
        }
        self.done = done;
        count
    }

    /// The device of a lane has lost changes that clients know to be done.
    #[cold]
    fn lose(&mut self, lane: usize) {
        for (number, conn) in self.conns.iter_mut().enumerate() {
            if let Some(conn) = conn.as_mut().filter(|conn| conn.lane == lane && conn.stream.is_some()) {
                conn.session.lose();
                activate(&mut self.active, number as u32, conn);
            }
        }
    }

    #[inline]
    fn complete(&mut self, done: Done, turns: &mut Turns) {
        let number = Session::number_of(done.tag);
        let slot = &mut self.conns[number as usize];
        let conn = slot.as_mut().expect("a number stays in use while it has requests at a device");
        if let Some(coalesce) = &mut conn.coalesce {
            coalesce.count(&done.io);
        }
        conn.session.complete(done);
        if conn.stream.is_some() {
            activate(&mut self.active, number, conn);
            if conn.session.awaits_end() {
                turns.enqueue(number);
            }
        } else if conn.session.in_flight() == 0 {
            self.lanes[conn.lane].as_mut().expect(SERVED).conns -= 1;
            *slot = None;
            self.free.push(number);
        }
    }

    /// Sends replies, and gives another turn to connections that have more to do.
    pub(super) fn output(&mut self, poll: &Poll, turns: &mut Turns) {
        let mut active = std::mem::take(&mut self.active);
        for number in active.drain(..) {
            let Some(conn) = &mut self.conns[number as usize] else { continue };
            conn.active = false;
            let Some(stream) = &conn.stream else { continue };
            if let Some(coalesce) = &mut conn.coalesce
                && coalesce.is_due()
                && socket::unread(stream.as_fd()) > 0
            {
                self.behind = Some(number);
            }
            let alive = conn.send(&mut self.staging, poll, number);
            conn.publish(&self.lanes[conn.lane].as_ref().expect(SERVED).gauges);
            let over = conn.session.is_over() && !conn.blocked;
            let in_flight = conn.session.in_flight();
            turns.count(number, in_flight);
            if conn.session.is_broken() {
                self.bury(number, turns, Why::Unreadable);
            } else if !alive || over {
                let why = if conn.session.is_lost() { Why::Lost } else { Why::Disconnected };
                self.bury(number, turns, why);
            } else if conn.is_ready(in_flight == 0) {
                // Each request that ends makes room, and queues the connection again.
                turns.enqueue(number);
            }
        }
        self.active = active;
    }

    /// Describes all connections, none of which has a request at a device.
    #[cold]
    pub(super) fn suspend(&self) -> Standstill {
        let mut standstill = Standstill::default();
        for conn in self.conns.iter().flatten().filter(|conn| conn.stream.is_some()) {
            match conn.suspend().filter(|_| !self.is_leaving(conn.lane)) {
                Some((socket, tls, state)) => standstill.connections.push((conn.lane, socket, tls, state)),
                None => standstill.leaving += 1,
            }
        }
        standstill
    }

    /// Whether the export of a lane was removed.
    pub(super) fn is_leaving(&self, lane: usize) -> bool {
        self.lanes[lane].as_ref().is_none_or(|lane| lane.leaving.is_some())
    }

    /// Checks all requests in flight: publishes the ages of the oldest, and logs requests that are older than `slow`.
    #[cold]
    pub(super) fn patrol(&mut self, now: Instant, slow: Option<Duration>) {
        let mut ages = vec![None; self.conns.len()];
        for lane in self.lanes.iter_mut().flatten() {
            let oldest = lane.channel.pending().max_by_key(|pending| {
                if let Some(age) = ages.get_mut(Session::number_of(pending.tag) as usize) {
                    *age = (*age).max(Some(pending.age));
                }
                pending.age
            });
            lane.show(oldest, now, slow);
        }
        for (conn, age) in self.conns.iter().zip(ages) {
            if let Some(Conn { entry: Some(entry), .. }) = conn {
                entry.client.oldest.set(age);
            }
        }
    }

    /// Whether a request is in flight at a device.
    pub(super) fn is_busy(&self) -> bool {
        self.lanes.iter().flatten().any(|lane| lane.channel.in_flight() > 0)
    }

    /// Frees memory that has not been used for a while.
    #[cold]
    pub(super) fn tidy(&mut self) {
        self.is_untidy = false;
        for lane in self.lanes.iter_mut().flatten() {
            self.is_untidy |= lane.channel.trim();
        }
        self.conns.iter_mut().flatten().for_each(Conn::shrink);
    }
}

impl Connections for Floor {
    fn is_ready(&mut self, number: u32) -> bool {
        let Some(conn) = &mut self.conns[number as usize] else { return false };
        activate(&mut self.active, number, conn);
        conn.is_ready(true)
    }

    /// Takes what a connection has sent until all is taken, the connection must wait, or others should have their turn.
    fn feed(&mut self, number: u32, grant: &mut Grant) -> Option<Fed> {
        let conn = self.conns[number as usize].as_mut()?;
        activate(&mut self.active, number, conn);
        let lane = self.lanes[conn.lane].as_mut().expect(SERVED);
        let held = conn.session.held();
        let mut alive = !conn.waits() || conn.take_backlog(&mut lane.channel, grant);
        for _ in 0..RECEIVES {
            if !alive || conn.session.stall().is_some() || conn.blocked || !conn.readable {
                break;
            }
            alive = conn.receive(&mut self.staging, &mut lane.channel, grant);
        }
        if !alive {
            self.hang_up(number, Why::Closed);
            return None;
        }
        if conn.session.stall() == Some(Stall::Turn) {
            // The backlog is mostly headers.
            self.spin.count(conn.backlog.len() / REQUEST_LEN);
        }
        let taken = conn.session.held().saturating_sub(held) + conn.session.spent();
        let taken = if lane.channel.is_prompt() { taken } else { 0 };
        Some(Fed::of(&conn.session, taken))
    }

    fn memory_unused(&self, lane: usize) -> usize {
        self.lanes[lane].as_ref().map_or(0, |lane| lane.channel.memory_unused())
    }

    fn progress(&mut self, number: u32) -> Progress {
        self.conns[number as usize].as_mut().map_or(Progress::default(), |conn| conn.session.progress())
    }

    fn reclaim(&mut self, number: u32) {
        if let Some(conn) = &mut self.conns[number as usize] {
            conn.session.reclaim();
        }
    }
}

#[inline]
fn activate(active: &mut Vec<u32>, number: u32, conn: &mut Conn) {
    if !conn.active {
        conn.active = true;
        active.push(number);
    }
}
