//! [`Worker`]: one thread that moves bytes between its connections and its channels, in turns.
//!
//! A turn takes what all readable clients have sent, where that helps only as much as fits the cache, rings each device once,
//! takes what the devices have finished and sends it. So under load everything happens in batches, without a lock, an
//! allocation or another thread.

use std::{
    collections::VecDeque,
    io,
    os::fd::{AsFd, AsRawFd},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
        mpsc,
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use blkdev::{Channel, Done, socket};
use nbd_proto::{Negotiated, wire::REQUEST_LEN};
use nix::sys::{
    eventfd::EventFd,
    prctl,
    socket::{SockaddrStorage, getsockname},
};

use crate::{
    End, Grant, Limits, Lines, Part, Removal, Session, Stall,
    lull::Lull,
    pace::{Limit, Pace},
    poll::{Happened, Interest, Poll, Watch, bell},
    roster::{Seat, Ticket},
    session::TURN,
    spin::Spin,
    stream::{Received, STAGING_MIN, Stream},
};

/// A client whose handshake is done.
#[derive(Debug)]
pub(crate) struct Arrival {
    pub(crate) stream: Stream,
    pub(crate) negotiated: Box<Negotiated>,
    /// Where it is to be served.
    pub(crate) ticket: Ticket,
    /// What it sent after the last option.
    pub(crate) sent: Vec<u8>,
    /// Kept until nothing of the connection is left.
    pub(crate) over: Option<mpsc::Sender<()>>,
}

/// What a worker is told.
#[derive(Debug)]
enum Message {
    Arrival(Arrival),
    /// A channel to serve from now on.
    Open(Arc<Seat>, Box<Channel>),
    /// Nobody new comes to this lane.
    Retire(usize, Removal),
}

/// The way to a worker, for other threads.
#[derive(Debug)]
pub(crate) struct Handle {
    inbox: mpsc::Sender<Message>,
    bell: Arc<EventFd>,
    /// Connections it has.
    load: Arc<AtomicUsize>,
    alive: Arc<AtomicBool>,
    watch: Watch,
}

impl Handle {
    /// Whether it serves clients that are sent to it: its thread has not ended.
    pub(crate) fn is_alive(&self) -> bool {
        self.alive.load(Ordering::Relaxed)
    }

    /// How many connections it has.
    pub(crate) fn load(&self) -> usize {
        self.load.load(Ordering::Relaxed)
    }

    /// Hands a connection over.
    pub(crate) fn welcome(&self, arrival: Arrival) {
        self.load.fetch_add(1, Ordering::Relaxed);
        arrival.ticket.clients.fetch_add(1, Ordering::Relaxed);
        self.send(Message::Arrival(arrival));
    }

    /// Wakes the worker for a channel that it will be given.
    pub(crate) fn watch(&self, lane: usize, channel: &Channel) -> io::Result<()> {
        let fds = [channel.wake_fd(), channel.turn_fd()];
        fds.into_iter().flatten().try_for_each(|fd| self.watch.add_wake(fd, LANE | lane as u64))
    }

    /// Gives it a channel.
    pub(crate) fn open(&self, seat: Arc<Seat>, channel: Channel) {
        self.send(Message::Open(seat, Box::new(channel)));
    }

    /// Has it let go of a channel, when its clients have gone.
    pub(crate) fn retire(&self, lane: usize, removal: Removal) {
        self.send(Message::Retire(lane, removal));
    }

    /// A worker that has ended needs to know nothing any more.
    fn send(&self, message: Message) {
        let _ = self.inbox.send(message);
        self.ring();
    }

    /// Wakes it.
    pub(crate) fn ring(&self) -> bool {
        self.bell.write(1).is_ok()
    }
}

/// One thread's connections and channels.
struct Worker {
    poll: Poll,
    inbox: mpsc::Receiver<Message>,
    bell: Arc<EventFd>,
    load: Arc<AtomicUsize>,
    stop: Arc<AtomicBool>,
    /// By number; `None` where others serve the export, and where there is none.
    lanes: Vec<Option<Lane>>,
    /// Lanes that are to be let go of.
    leaving: usize,
    closers: mpsc::Sender<JoinHandle<()>>,
    /// By number; a number stays taken until nothing of its connection is at a device.
    conns: Vec<Option<Conn>>,
    free: Vec<u32>,
    /// Connections with something to do, in the order of their turns.
    queue: VecDeque<u32>,
    /// Those of this turn, that replies may have come together for.
    active: Vec<u32>,
    /// A client that had not read its earlier replies when those of this turn were sent.
    behind: Option<u32>,
    staging: Box<[u8]>,
    done: Vec<Done>,
    now: Instant,
    swept: Instant,
    tidied: Instant,
    /// Something has grown, or memory was used, since it was last tidied up.
    is_untidy: bool,
    /// Since when there is nothing to do.
    idle: Option<Instant>,
    spin: Spin,
    stall_timeout: Duration,
    farewell: Duration,
}

/// A channel, and the connections that wait for its memory.
struct Lane {
    channel: Channel,
    seat: Arc<Seat>,
    /// Connections with a socket.
    clients: usize,
    /// Connections, with those that only wait for the device.
    conns: usize,
    leaving: Option<Leaving>,
    lines: Lines,
    /// Connections have gone whose requests are to be cancelled.
    cancels: bool,
    /// Memory that was free when it did not suffice for those at the front.
    too_little: usize,
}

/// How a lane ends.
struct Leaving {
    removal: Removal,
    /// Until when the clients have time, or, when there are none any more, the device.
    deadline: Option<Instant>,
}

impl Lane {
    /// Whether nobody needs it any more.
    fn is_over(&self) -> bool {
        let awaits = |leaving: &Leaving| leaving.removal == Removal::Hide && self.seat.is_awaited();
        self.conns == 0 && self.leaving.as_ref().is_some_and(|leaving| !awaits(leaving))
    }
}

struct Conn {
    /// `None`: gone, and only waiting for what is still at the device.
    stream: Option<Stream>,
    session: Session,
    lane: usize,
    /// Input that could not be taken yet. While there is any, no more is received.
    backlog: Vec<u8>,
    stall: Option<Stall>,
    readable: bool,
    /// The client has closed: what is left is to be read up to the end.
    ended: bool,
    /// Its socket is full. Until it takes replies again nothing more is read from it: a client that is behind is not to be
    /// served further, and not to wake us with every word it sends.
    blocked: bool,
    /// Worth a try to send.
    writable: bool,
    /// In `queue`.
    queued: bool,
    /// In `active`.
    active: bool,
    /// How fast it takes replies, and sends payload, whose memory others wait for.
    taking: Option<Pace>,
    sending: Option<Pace>,
    /// Counted as one with requests in flight.
    busy: bool,
    /// Only of a unix socket, which tells what its peer has not read.
    lull: Option<Lull>,
    is_tcp: bool,
    /// Whoever waits for its end sees that this is dropped.
    _over: Option<mpsc::Sender<()>>,
}

/// Bytes received at a time: a hundred small writes, or thousands of other requests. Larger does not save system calls that
/// matter, and would fall out of the cache.
const STAGING: usize = 256 << 10;
const _: () = assert!(STAGING >= STAGING_MIN);

/// Receives of one connection in a turn, before others have theirs.
const RECEIVES: usize = 4;

const BELL: u64 = u64::MAX;
/// Tokens of lanes have this bit; those of connections are their numbers.
const LANE: u64 = 1 << 32;

/// Starts a worker. `closers` receives the threads that close its devices; `end` learns when it ends too early.
///
/// # Errors
/// No descriptors or threads left.
pub(crate) fn start(
    name: String,
    limits: &Limits,
    stop: &Arc<AtomicBool>,
    closers: mpsc::Sender<JoinHandle<()>>,
    end: &End,
) -> io::Result<(Handle, JoinHandle<()>)> {
    let (sender, inbox) = mpsc::channel();
    let (poll, bell, load) = (Poll::new()?, Arc::new(bell()?), Arc::new(AtomicUsize::new(0)));
    poll.add_level(&*bell, BELL)?;
    let alive = Arc::new(AtomicBool::new(true));
    let handle = Handle {
        inbox: sender,
        bell: Arc::clone(&bell),
        load: Arc::clone(&load),
        alive: Arc::clone(&alive),
        watch: poll.watch(),
    };
    let now = Instant::now();
    let worker = Worker {
        poll,
        inbox,
        bell,
        load,
        stop: Arc::clone(stop),
        lanes: Vec::new(),
        leaving: 0,
        closers,
        conns: Vec::new(),
        free: Vec::new(),
        queue: VecDeque::new(),
        active: Vec::new(),
        behind: None,
        staging: vec![0; STAGING].into_boxed_slice(),
        done: Vec::new(),
        now,
        swept: now,
        tidied: now,
        is_untidy: false,
        idle: None,
        spin: Spin::new(limits.poll),
        stall_timeout: limits.stall_timeout,
        farewell: limits.farewell,
    };
    let (end, stop) = (end.clone(), Arc::clone(stop));
    let thread = thread::Builder::new().name(name.clone()).spawn(move || {
        end.watch(&name, &stop, || {
            let _death = Death(alive);
            worker.run();
        });
    })?;
    Ok((handle, thread))
}

/// Marks the worker dead when dropped, for whatever reason.
struct Death(Arc<AtomicBool>);

impl Drop for Death {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Relaxed);
    }
}

impl Worker {
    fn run(mut self) {
        // So that `Lull` sleeps for as short a time as it says. That it may not be set only makes it longer.
        let _ = prctl::set_timerslack(1);
        while !self.stop.load(Ordering::Relaxed) {
            self.turn();
            self.rest();
            if let Err(e) = self.wait() {
                log::error!("a worker cannot wait for events any more: {e}");
                break;
            }
        }
        self.wind_up();
    }

    fn turn(&mut self) {
        self.now = Instant::now();
        for lane in self.lanes.iter_mut().flatten() {
            lane.channel.tick(self.now);
        }
        self.feed_waiting();
        if !self.queue.is_empty() {
            self.idle = None;
        }
        let mut room = TURN;
        while room > 0
            && let Some(number) = self.queue.pop_front()
        {
            room = room.saturating_sub(self.input(number));
        }
        self.reap();
        self.output();
        if self.now.duration_since(self.swept) >= Limit::taking(self.stall_timeout).interval() {
            self.sweep();
        }
        if self.is_untidy && self.now.duration_since(self.tidied) >= TIDY {
            self.tidy();
        }
        if self.leaving > 0 {
            self.let_go();
        }
    }

    /// Lets a lone client that is behind with reading its replies go on alone for a moment, when all is answered.
    fn rest(&mut self) {
        let Some(number) = self.behind.take() else { return };
        if self.queue.is_empty()
            && self.load.load(Ordering::Relaxed) == 1
            && let Some(Conn { lull: Some(lull), stream: Some(stream), session, .. }) = &mut self.conns[number as usize]
            && session.in_flight() == 0
        {
            lull.rest(|| socket::unread(stream.as_fd()) > 0);
        }
    }

    /// Whether to look again rather than to sleep, with nothing to do.
    fn spins(&mut self) -> bool {
        let awaits_device = self.lanes.iter().flatten().any(|lane| lane.channel.in_flight() > 0);
        let idle = *self.idle.get_or_insert_with(Instant::now);
        self.now.duration_since(idle) < self.spin.time(awaits_device)
    }

    /// Waits until there is something to do, or only looks when there is already.
    fn wait(&mut self) -> io::Result<()> {
        let mut timeout = None;
        if !self.queue.is_empty() {
            timeout = Some(Duration::ZERO);
        } else if self.spins() {
            // Whoever else wants this processor has it first: the client, or the device.
            thread::yield_now();
            timeout = Some(Duration::ZERO);
        } else {
            if self.is_untidy {
                timeout = Some(TIDY.saturating_sub(self.now.duration_since(self.tidied)));
            }
            for lane in self.lanes.iter_mut().flatten() {
                if lane.cancels {
                    timeout = Some(Duration::ZERO);
                    break;
                }
                if lane.channel.awaits_device() {
                    if !lane.channel.arm() {
                        timeout = Some(Duration::ZERO);
                        break;
                    }
                    timeout = [timeout, lane.channel.due()].into_iter().flatten().min();
                }
                if !lane.lines.is_empty() {
                    // Replies that have left freed memory after the waiting connections had their turn. And memory is taken
                    // from clients that are too slow.
                    let freed = lane.channel.memory_unused() > lane.too_little || lane.channel.refuses();
                    let again = if freed { Duration::ZERO } else { Limit::taking(self.stall_timeout).interval() };
                    timeout = Some(timeout.map_or(again, |t| t.min(again)));
                }
                if let Some(deadline) = lane.leaving.as_ref().and_then(|leaving| leaving.deadline) {
                    let left = deadline.saturating_duration_since(self.now);
                    timeout = Some(timeout.map_or(left, |t| t.min(left)));
                }
            }
        }
        let mut rung = false;
        for Happened { token, readable, ended } in self.poll.wait(timeout)? {
            if token == BELL {
                rung = true;
            } else if token & LANE == 0
                && let Some(conn) = &mut self.conns[token as usize]
            {
                conn.readable |= readable;
                conn.ended |= ended;
                // While it is blocked nothing else is waited for.
                conn.writable |= conn.blocked;
                enqueue(&mut self.queue, token as u32, conn);
            }
        }
        if timeout != Some(Duration::ZERO)
            && let Some(idle) = self.idle
        {
            self.spin.slept(idle.elapsed());
        }
        if rung {
            let _ = self.bell.read();
            // It may have been a long sleep.
            self.now = Instant::now();
            while let Ok(message) = self.inbox.try_recv() {
                match message {
                    Message::Arrival(arrival) => self.welcome(arrival),
                    Message::Open(seat, channel) => self.open(seat, *channel),
                    Message::Retire(lane, removal) => self.retire(lane, removal),
                }
            }
        }
        Ok(())
    }

    fn open(&mut self, seat: Arc<Seat>, channel: Channel) {
        let number = seat.lane;
        if self.lanes.len() <= number {
            self.lanes.resize_with(number + 1, || None);
        }
        assert!(self.lanes[number].is_none(), "a number is free when nobody knows its seat any more");
        let (lines, cancels, too_little) = (Lines::new(channel.depth()), false, 0);
        let lane = Lane { channel, seat, clients: 0, conns: 0, leaving: None, lines, cancels, too_little };
        self.lanes[number] = Some(lane);
    }

    /// Deals with the clients of a lane that nobody new comes to. The rest is `let_go`'s.
    fn retire(&mut self, number: usize, removal: Removal) {
        // Its last client may have left after an earlier removal.
        let Some(lane) = &mut self.lanes[number] else { return };
        let deadline = (removal == Removal::Soft).then(|| self.now + self.farewell);
        self.leaving += usize::from(lane.leaving.is_none());
        lane.leaving = Some(Leaving { removal, deadline });
        match removal {
            Removal::Hide => {}
            Removal::Soft => {
                self.conns.iter_mut().flatten().filter(|conn| conn.lane == number).for_each(|c| c.session.refuse());
            }
            Removal::Hard => self.bury_all(number),
        }
    }

    /// Lets go of lanes that nobody needs any more, and sees to it that this comes to an end.
    fn let_go(&mut self) {
        for number in 0..self.lanes.len() {
            let Some(lane) = &mut self.lanes[number] else { continue };
            let Some(leaving) = &mut lane.leaving else { continue };
            let due = leaving.deadline.is_some_and(|deadline| deadline <= self.now);
            if due && lane.clients > 0 {
                log::warn!("{} clients of a removed export did not leave: cut off", lane.clients);
                leaving.deadline = None;
                self.bury_all(number);
            } else if due && lane.conns == 0 {
                leaving.deadline = None;
            } else if due {
                log::warn!("{}: gave up waiting for requests at the device", lane.channel.info().target);
                leaving.deadline = None;
                lane.channel.give_up();
            }
            match &mut self.lanes[number] {
                lane if lane.as_ref().is_some_and(Lane::is_over) => {
                    let Lane { channel, seat, .. } = lane.take().expect("just looked at");
                    self.leaving -= 1;
                    // Whoever finds the device closed is to find the export gone.
                    drop(seat);
                    self.close(channel);
                }
                Some(Lane { clients: 0, conns, leaving: Some(leaving), .. }) => {
                    let wait = if *conns == 0 { BRIEFLY } else { WIND_UP };
                    leaving.deadline.get_or_insert(self.now + wait);
                }
                _ => {}
            }
        }
    }

    /// Closing a device can take its time, which is not that of other clients.
    fn close(&self, channel: Channel) {
        for fd in [channel.wake_fd(), channel.turn_fd()].into_iter().flatten() {
            // Closing the descriptor does the same, unless there is another one for it somewhere.
            let _ = self.poll.remove(fd);
        }
        match thread::Builder::new().name("closing".into()).spawn(move || drop(channel)) {
            Ok(thread) => drop(self.closers.send(thread)),
            Err(e) => log::warn!("a device was closed while clients waited: no thread for it: {e}"),
        }
    }

    fn bury_all(&mut self, lane: usize) {
        for number in 0..self.conns.len() as u32 {
            if self.conns[number as usize].as_ref().is_some_and(|conn| conn.lane == lane) {
                self.bury(number);
            }
        }
    }

    fn welcome(&mut self, arrival: Arrival) {
        let Arrival { stream, negotiated, ticket, sent, over } = arrival;
        // Hidden, it is still there for those who have got as far as this.
        let refused = |lane: &Lane| lane.leaving.as_ref().is_some_and(|leaving| leaving.removal > Removal::Hide);
        let Some(lane) = self.lanes[ticket.lane].as_mut().filter(|lane| !refused(lane)) else {
            self.load.fetch_sub(1, Ordering::Relaxed);
            ticket.clients.fetch_sub(1, Ordering::Relaxed);
            return;
        };
        let number = self.free.pop().unwrap_or_else(|| {
            self.conns.push(None);
            self.conns.len() as u32 - 1
        });
        if let Err(e) = self.poll.add_edge(&stream, number.into(), Interest::Read) {
            log::warn!("a client was turned away: {e}");
            self.load.fetch_sub(1, Ordering::Relaxed);
            ticket.clients.fetch_sub(1, Ordering::Relaxed);
            return self.free.push(number);
        }
        (lane.clients, lane.conns) = (lane.clients + 1, lane.conns + 1);
        if let Some(leaving) = &mut lane.leaving {
            leaving.deadline = None;
        }
        let name = getsockname::<SockaddrStorage>(stream.as_fd().as_raw_fd()).ok();
        let is_unix = name.is_some_and(|name| name.as_unix_addr().is_some());
        let is_tcp = name.is_some_and(|name| name.as_sockaddr_in().is_some() || name.as_sockaddr_in6().is_some());
        let lull = is_unix.then(Lull::default);
        let conn = self.conns[number as usize].insert(Conn {
            stream: Some(stream),
            session: Session::new(&negotiated, number),
            lane: ticket.lane,
            backlog: sent,
            stall: None,
            readable: true,
            ended: false,
            blocked: false,
            writable: true,
            queued: false,
            active: false,
            taking: None,
            sending: None,
            busy: false,
            lull,
            is_tcp,
            _over: over,
        });
        enqueue(&mut self.queue, number, conn);
    }

    /// Lets connections that wait for memory go on, in order, as far as there is some now.
    fn feed_waiting(&mut self) {
        for lane in 0..self.lanes.len() {
            let mut short = false;
            for part in [Part::Reserve, Part::Common] {
                // Each of them once, at most: those at the end of the line again have had their turn.
                let mut last = None;
                while let Some(number) = self.lanes[lane].as_ref().and_then(|lane| lane.lines.first(part)) {
                    let conn = self.conns[number as usize].as_mut().expect("a waiting connection is there");
                    if last == Some(number) {
                        break;
                    }
                    activate(&mut self.active, number, conn);
                    if self.feed(number)
                        && self.lanes[lane].as_ref().is_some_and(|lane| lane.lines.first(part) == Some(number))
                    {
                        // There is nothing for it, or it is alone and has got what there was.
                        short = true;
                        break;
                    }
                    last.get_or_insert(number);
                }
            }
            if short && let Some(lane) = &mut self.lanes[lane] {
                lane.too_little = lane.channel.memory_unused();
            }
        }
    }

    /// Takes what a connection has sent, now that it is its turn. Returns how many bytes of [`TURN`] that took.
    fn input(&mut self, number: u32) -> usize {
        // What is left of one that has gone, or of one that had this number before.
        let Some(conn) = self.conns[number as usize].as_mut().filter(|conn| conn.queued) else { return 0 };
        conn.queued = false;
        activate(&mut self.active, number, conn);
        let held = conn.session.held();
        if !conn.wants_turn(true) {
            return 0;
        }
        self.feed(number);
        let Some(conn) = &self.conns[number as usize] else { return 0 };
        if conn.stall == Some(Stall::Turn) {
            // Nothing but headers, mostly.
            self.spin.count(conn.backlog.len() / REQUEST_LEN);
        }
        let lane = self.lanes[conn.lane].as_mut().expect("a connection is where its export is served");
        let taken = conn.session.held().saturating_sub(held) + conn.session.spent();
        if lane.channel.is_prompt() { taken } else { 0 }
    }

    /// Takes what a connection has sent until that is all, it must wait, or others should have their turn. `false`: it was at
    /// its end, and is buried.
    fn feed(&mut self, number: u32) -> bool {
        let Some(conn) = &mut self.conns[number as usize] else { return false };
        let lane = self.lanes[conn.lane].as_mut().expect("a connection is where its export is served");
        let mut grant = lane.lines.grant(number);
        let waited = conn.stall.take().is_some()
            || !conn.backlog.is_empty()
            || conn.session.wants().is_some()
            || conn.session.is_short();
        let mut alive = !waited || conn.take_backlog(&mut lane.channel, &mut grant);
        for _ in 0..RECEIVES {
            if !alive || conn.stall.is_some() || conn.blocked || !conn.readable {
                break;
            }
            alive = conn.receive(&mut self.staging, &mut lane.channel, &mut grant);
        }
        if alive {
            conn.count(&mut lane.lines);
            lane.lines.settle(number, grant, conn.session.wants());
        } else {
            self.bury(number);
        }
        alive
    }

    /// Rings the devices, and turns what they have finished into replies.
    fn reap(&mut self) {
        let mut in_flight = 0;
        for lane in self.lanes.iter_mut().flatten() {
            // First: the channel sends what it held back when it is reaped.
            if std::mem::take(&mut lane.cancels) {
                let conns = &self.conns;
                let gone = |number: u32| conns[number as usize].as_ref().is_none_or(|conn| conn.stream.is_none());
                lane.channel.cancel(|tag| gone(Session::number_of(tag)));
            }
            lane.channel.kick();
            lane.channel.reap(&mut self.done);
            in_flight += lane.channel.in_flight();
        }
        let mut done = std::mem::take(&mut self.done);
        if !done.is_empty() {
            self.idle = None;
            self.is_untidy = true;
            self.spin.count(done.len() + in_flight);
        }
        for done in done.drain(..) {
            let number = Session::number_of(done.tag);
            let slot = &mut self.conns[number as usize];
            let conn = slot.as_mut().expect("a number is kept while something of it is at a device");
            if let Some(lull) = &mut conn.lull {
                lull.count(&done.io);
            }
            conn.session.complete(done);
            if conn.stream.is_some() {
                activate(&mut self.active, number, conn);
                if conn.stall == Some(Stall::Calls) {
                    enqueue(&mut self.queue, number, conn);
                }
            } else if conn.session.in_flight() == 0 {
                let lane = self.lanes[conn.lane].as_mut().expect("a connection is where its export is served");
                lane.conns -= 1;
                *slot = None;
                self.free.push(number);
            }
        }
        self.done = done;
    }

    /// Sends replies, and gives another turn to who has still something to do.
    fn output(&mut self) {
        let mut active = std::mem::take(&mut self.active);
        for number in active.drain(..) {
            let Some(conn) = &mut self.conns[number as usize] else { continue };
            conn.active = false;
            let Some(stream) = &conn.stream else { continue };
            if let Some(lull) = &mut conn.lull
                && lull.is_due()
                && socket::unread(stream.as_fd()) > 0
            {
                self.behind = Some(number);
            }
            if let Some(lane) = &mut self.lanes[conn.lane] {
                conn.count(&mut lane.lines);
            }
            let alive = conn.send(&mut self.staging, &self.poll, number);
            let over = (conn.session.is_over() && !conn.blocked) || conn.session.is_broken();
            // Each request that ends makes room, and queues it again.
            let has_room = conn.session.in_flight() == 0;
            if !alive || over {
                self.bury(number);
            } else if conn.wants_turn(has_room) {
                enqueue(&mut self.queue, number, conn);
            }
        }
        self.active = active;
    }

    /// Closes a connection. What it has at the device comes back later; what has not got there never will.
    fn bury(&mut self, number: u32) {
        let slot = &mut self.conns[number as usize];
        let Some(conn) = slot else { return };
        let Some(mut stream) = conn.stream.take() else { return };
        stream.close(&mut self.staging);
        self.load.fetch_sub(1, Ordering::Relaxed);
        self.is_untidy = true;
        conn.session.close();
        let lane = self.lanes[conn.lane].as_mut().expect("a connection is where its export is served");
        lane.lines.forget(number);
        if std::mem::take(&mut conn.busy) {
            lane.lines.count(1, 0);
        }
        lane.clients -= 1;
        lane.seat.clients.fetch_sub(1, Ordering::Relaxed);
        if conn.session.in_flight() == 0 {
            lane.conns -= 1;
            *slot = None;
            self.free.push(number);
        } else {
            // Later, for all that have gone in this turn at once: each time costs a look at every request.
            lane.cancels = true;
        }
    }

    /// Takes memory that others wait for from clients that are too slow: those that do not take their replies get them later,
    /// and those that do not send their payloads are cut off.
    fn sweep(&mut self) {
        self.swept = self.now;
        let (taking, sending) = (Limit::taking(self.stall_timeout), Limit::sending(self.stall_timeout));
        for number in 0..self.conns.len() as u32 {
            let Some(conn) = &mut self.conns[number as usize] else { continue };
            let awaited = self.lanes[conn.lane].as_ref().is_some_and(|lane| !lane.lines.is_empty());
            if !awaited || conn.stream.is_none() {
                (conn.taking, conn.sending) = (None, None);
                continue;
            }
            let session = &mut conn.session;
            let (sent, unsent) = (session.outbox().sent(), session.outbox().held());
            if Pace::is_too_slow(&mut conn.taking, sent, unsent, self.now, taking) {
                session.reclaim();
            }
            if Pace::is_too_slow(&mut conn.sending, session.landed_bytes(), session.filling(), self.now, sending) {
                log::warn!(
                    "a client was cut off: others wait for the memory of its WRITE, and at its pace it would need longer than \
                     {:?} to send the payload",
                    self.stall_timeout
                );
                self.bury(number);
            }
        }
    }

    /// Returns memory that was not used for a while.
    #[cold]
    fn tidy(&mut self) {
        self.tidied = self.now;
        self.is_untidy = false;
        for lane in self.lanes.iter_mut().flatten() {
            self.is_untidy |= lane.channel.trim();
        }
        for conn in self.conns.iter_mut().flatten() {
            conn.session.shrink();
            if let Some(stream) = &mut conn.stream {
                stream.shrink();
            }
            if conn.backlog.is_empty() {
                conn.backlog = Vec::new();
            }
        }
    }

    /// Ends all connections, and lets the devices finish what they have, in bounded time.
    fn wind_up(&mut self) {
        for number in 0..self.conns.len() as u32 {
            self.bury(number);
        }
        let start = Instant::now();
        for lane in self.lanes.iter_mut().flatten() {
            lane.channel.cancel(|_| true);
            while lane.channel.in_flight() > 0 && start.elapsed() < WIND_UP {
                lane.channel.reap(&mut self.done);
                self.done.clear();
                thread::sleep(Duration::from_millis(1));
            }
            if lane.channel.in_flight() > 0 {
                log::warn!("{}: gave up waiting for requests at the device", lane.channel.info().target);
                lane.channel.give_up();
                lane.channel.reap(&mut self.done);
                self.done.clear();
            }
        }
    }
}

/// How long a device has to finish when the server stops, or its last client has gone.
const WIND_UP: Duration = Duration::from_secs(2);

/// How long memory stays where it is when it is not used.
const TIDY: Duration = Duration::from_secs(2);

/// How often to look whether a client that was let in is still to come.
const BRIEFLY: Duration = Duration::from_millis(10);

fn enqueue(queue: &mut VecDeque<u32>, number: u32, conn: &mut Conn) {
    if !conn.queued {
        conn.queued = true;
        queue.push_back(number);
    }
}

fn activate(active: &mut Vec<u32>, number: u32, conn: &mut Conn) {
    if !conn.active {
        conn.active = true;
        active.push(number);
    }
}

impl Conn {
    /// Receives once, and takes it. `false`: the connection is at its end.
    fn receive(&mut self, staging: &mut [u8], channel: &mut Channel, grant: &mut Grant) -> bool {
        let alive = self.receive_once(staging, channel, grant);
        // A unix socket wakes for everything, and on vsock a client may be told too late that there is room for what is due.
        if let (true, false, Some(stream)) = (self.is_tcp, self.readable, &mut self.stream) {
            stream.expect(self.session.landing().map_or(0, |(buf, at)| buf.len() - at));
        }
        alive
    }

    fn receive_once(&mut self, staging: &mut [u8], channel: &mut Channel, grant: &mut Grant) -> bool {
        let Some(stream) = &mut self.stream else { return false };
        let Received { landed, staged, more } = match stream.receive(self.session.landing(), staging) {
            Ok(Some(received)) => received,
            Ok(None) => return false,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                self.readable = false;
                return true;
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => return true,
            Err(_) => return false,
        };
        // The end of the stream is no event of its own when it was told together with the last bytes.
        self.readable = self.ended || more;
        self.session.landed(landed, channel);
        let mut input = &staging[..staged];
        match self.session.take(&mut input, channel, grant) {
            Ok(stall) => {
                self.stall = stall;
                self.backlog.extend_from_slice(input);
                true
            }
            Err(fatal) => {
                log::info!("a client was dropped: {fatal}");
                false
            }
        }
    }

    /// Notes for the others whether it has requests in flight.
    #[inline]
    fn count(&mut self, lines: &mut Lines) {
        let busy = self.session.in_flight() > 0;
        if busy != self.busy {
            lines.count(self.busy.into(), busy.into());
            self.busy = busy;
        }
    }

    /// Whether it has something to do in a turn. `has_room`: for one more of its requests, if that is what it waits for.
    fn wants_turn(&mut self, has_room: bool) -> bool {
        match self.stall {
            _ if self.stream.is_none() => false,
            // A reply must be read again, and the socket has room for it.
            _ if self.session.is_short() && !self.blocked => self.session.wants() != Some(Part::Reserve),
            // Blocked or not, so that there are replies to send when there is room for them again, but not too many.
            Some(Stall::Turn) => self.session.outbox().held() < TURN,
            _ if self.blocked => false,
            None => self.readable || !self.backlog.is_empty(),
            Some(Stall::Calls) => has_room,
            Some(Stall::Memory | Stall::Disconnect) => false,
        }
    }

    /// Takes what had to wait. `false`: the connection is at its end.
    fn take_backlog(&mut self, channel: &mut Channel, grant: &mut Grant) -> bool {
        let mut input = &self.backlog[..];
        match self.session.take(&mut input, channel, grant) {
            Ok(stall) => {
                let taken = self.backlog.len() - input.len();
                self.backlog.drain(..taken);
                self.stall = stall;
                true
            }
            Err(fatal) => {
                log::info!("a client was dropped: {fatal}");
                false
            }
        }
    }

    /// Sends what the socket takes. `false`: the connection is broken.
    fn send(&mut self, staging: &mut [u8], poll: &Poll, number: u32) -> bool {
        let Some(stream) = &mut self.stream else { return true };
        if (self.session.outbox().is_empty() && !self.blocked) || !self.writable {
            return true;
        }
        let Ok(all) = stream.send(self.session.outbox(), staging) else { return false };
        self.writable = all;
        if self.blocked != all {
            return true;
        }
        self.blocked = !all;
        let interest = if all { Interest::Read } else { Interest::Write };
        poll.set_edge(stream, number.into(), interest).is_ok()
    }
}
