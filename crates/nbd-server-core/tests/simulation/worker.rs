//! [`Worker`]: what a worker's thread does, without sockets: its turns in three steps, and its sleep.

use std::{
    os::fd::BorrowedFd,
    time::{Duration, Instant},
};

use blkdev::{Buf, Channel, Done, wake};
use nbd_server_core::{Connections, Fed, Grant, Part, Progress, Session, Turns};

use crate::{
    client::Client,
    model::{Order, Taken},
};

/// See `Limits::stall_timeout`.
pub(crate) const STALL_TIMEOUT: Duration = Duration::from_secs(10);

/// Where a client is served.
#[derive(Clone, Copy)]
pub(crate) struct Seat {
    pub(crate) disk: usize,
    pub(crate) worker: usize,
    pub(crate) lane: usize,
    /// Its number at the worker. A later client can get it when this one has gone.
    pub(crate) number: u32,
}

/// A channel of a worker.
pub(crate) struct Lane {
    pub(crate) channel: Channel,
    pub(crate) disk: usize,
    /// Memory that it must do without.
    pub(crate) kept: Vec<Buf>,
    order: Order,
    /// Closed connections have requests to cancel.
    cancels: bool,
}

/// One thread's connections and channels.
#[derive(Default)]
pub(crate) struct Worker {
    /// The policy of a worker, unchanged.
    pub(crate) turns: Turns,
    /// `None`: closed, or served by other workers only.
    pub(crate) lanes: Vec<Option<Lane>>,
    /// The client of each number.
    clients: Vec<Option<usize>>,
    free: Vec<u32>,
    step: Step,
    sleep: Option<Sleep>,
    /// Clients that were disconnected in this turn.
    ended: Vec<usize>,
}

/// The next step of a worker's turn. Other workers may have theirs in between.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Step {
    #[default]
    Take,
    Reap,
    Send,
}

/// A worker sleeps until a descriptor is readable, a client does something, or a time has come.
struct Sleep {
    until: Option<Instant>,
    is_rung: bool,
}

/// The state that [`Turns`] works on.
struct Floor<'a> {
    lanes: &'a mut [Option<Lane>],
    numbers: &'a mut Vec<Option<usize>>,
    free: &'a mut Vec<u32>,
    ended: &'a mut Vec<usize>,
    clients: &'a mut [Client],
}

impl Lane {
    fn is_woken(&self) -> bool {
        let is_readable = |fd: Option<BorrowedFd<'_>>| fd.is_some_and(|fd| wake::wait([fd], Some(Duration::ZERO))[0]);
        // A real worker does not rely on this alone: `Channel::due` is a second way out. Here, each turn must be announced.
        let has_turn = self.channel.waits_for_turn() && is_readable(self.channel.turn_fd());
        has_turn || self.channel.awaits_device() && is_readable(self.channel.wake_fd())
    }

    /// If its device refuses all requests, those that wait for memory get their errors at once.
    fn unused(&self) -> usize {
        if self.channel.refuses() { usize::MAX } else { self.channel.memory_unused() }
    }
}

impl Worker {
    pub(crate) fn open(&mut self, number: usize, disk: usize, channel: Channel, kept: Vec<Buf>) {
        if self.lanes.len() <= number {
            self.lanes.resize_with(number + 1, || None);
        }
        assert!(self.lanes[number].is_none(), "a lane number is reused only after its lane was closed");
        self.turns.open(number, channel.depth());
        self.lanes[number] = Some(Lane { channel, disk, kept, order: Order::default(), cancels: false });
    }

    /// Closes a lane without clients.
    pub(crate) fn close(&mut self, lane: usize) -> Option<Lane> {
        self.turns.close(lane);
        self.lanes[lane].take()
    }

    pub(crate) fn lane(&self, lane: usize) -> &Channel {
        &self.lanes[lane].as_ref().expect("the lane is open").channel
    }

    /// A number for a new client. The one of a client that has gone comes first.
    pub(crate) fn number(&self) -> u32 {
        self.free.last().copied().unwrap_or(self.clients.len() as u32)
    }

    /// Adds a client with this [number](Self::number).
    pub(crate) fn enter(&mut self, client: usize, number: u32, lane: usize) {
        if self.free.pop().is_none() {
            self.clients.push(None);
        }
        assert!(self.clients[number as usize].is_none(), "a number has one client");
        self.clients[number as usize] = Some(client);
        self.turns.enter(number, lane);
        self.ring();
    }

    /// Whether a lane has a client, or a request of a client that has gone.
    pub(crate) fn has_clients(&self, lane: usize, clients: &[Client]) -> bool {
        self.clients.iter().flatten().any(|&client| clients[client].seat.lane == lane)
    }

    pub(crate) fn enqueue(&mut self, number: u32) {
        self.turns.enqueue(number);
    }

    /// Wakes it.
    pub(crate) fn ring(&mut self) {
        if let Some(sleep) = &mut self.sleep {
            sleep.is_rung = true;
        }
    }

    /// Disconnects a client.
    pub(crate) fn bury(&mut self, client: usize, clients: &mut [Client]) {
        let number = clients[client].seat.number;
        self.floor(clients).hang_up(number);
        self.turns.leave(number);
    }

    /// Another session continues a client, as if the server were replaced, if none of its requests is at the device.
    pub(crate) fn hand_over(&mut self, client: usize, clients: &mut [Client]) {
        let Seat { number, lane, .. } = clients[client].seat;
        let one = &mut clients[client];
        let Some(state) = one.session.suspend(&one.arrived).filter(|_| self.is_between()) else { return };
        one.session.close();
        (one.session, one.arrived) = Session::resume(state, number);
        self.lanes[lane].as_mut().expect("a client has a lane").order.forget(client);
        self.turns.leave(number);
        self.turns.enter(number, lane);
        self.turns.enqueue(number);
        self.ring();
    }

    /// Clients that were disconnected since the last call.
    pub(crate) fn take_ended(&mut self) -> Vec<usize> {
        std::mem::take(&mut self.ended)
    }

    fn floor<'a>(&'a mut self, clients: &'a mut [Client]) -> Floor<'a> {
        let Self { lanes, clients: numbers, free, ended, .. } = self;
        Floor { lanes, numbers, free, ended, clients }
    }

    /// Between two turns.
    pub(crate) fn is_between(&self) -> bool {
        self.step == Step::Take
    }

    /// Does the next step of a turn, or sleeps. `piece` is a buffer for bytes on their way.
    pub(crate) fn advance(&mut self, clients: &mut [Client], now: Instant, piece: &mut [u8]) {
        match self.step {
            Step::Take => {
                if !self.is_awake(now) {
                    return;
                }
                self.sleep = None;
                self.take(clients, now);
                self.step = Step::Reap;
            }
            Step::Reap => {
                self.reap(clients);
                self.step = Step::Send;
            }
            Step::Send => {
                self.send(clients, piece);
                self.sweep(clients, now);
                self.check(clients);
                self.sleep = self.rest(now);
                self.step = Step::Take;
            }
        }
    }

    fn take(&mut self, clients: &mut [Client], now: Instant) {
        self.lanes.iter_mut().flatten().for_each(|lane| lane.channel.tick(now));
        let Self { turns, lanes, clients: numbers, free, ended, .. } = self;
        turns.round(&mut Floor { lanes, numbers, free, ended, clients });
    }

    fn reap(&mut self, clients: &mut [Client]) {
        let mut done: Vec<Done> = Vec::new();
        for lane in self.lanes.iter_mut().flatten() {
            if std::mem::take(&mut lane.cancels) {
                let gone = |number: u32| self.clients[number as usize].is_none_or(|client| clients[client].gone);
                lane.channel.cancel(|tag| gone(Session::number_of(tag)));
            }
            lane.channel.kick();
            lane.channel.reap(&mut done);
        }
        for done in done {
            let number = Session::number_of(done.tag);
            let n = self.clients[number as usize].expect("a number stays in use while it has requests at a device");
            let client = &mut clients[n];
            client.session.complete(done);
            if client.gone {
                self.floor(clients).release(number);
                continue;
            }
            client.is_active = true;
            if client.session.awaits_end() {
                self.turns.enqueue(number);
            }
        }
    }

    fn send(&mut self, clients: &mut [Client], piece: &mut [u8]) {
        for number in 0..self.clients.len() {
            let Some(n) = self.clients[number] else { continue };
            let client = &mut clients[n];
            if !std::mem::take(&mut client.is_active) || client.gone {
                continue;
            }
            client.send(piece);
            let in_flight = client.session.in_flight();
            self.turns.count(number as u32, in_flight);
            if client.session.is_broken() || client.session.is_over() && !client.is_blocked {
                self.bury(n, clients);
            } else if client.is_ready(in_flight == 0) {
                self.turns.enqueue(number as u32);
            }
        }
    }

    fn sweep(&mut self, clients: &mut [Client], now: Instant) {
        let Self { turns, lanes, clients: numbers, free, ended, .. } = self;
        let mut floor = Floor { lanes, numbers, free, ended, clients };
        for slow in turns.sweep(now, STALL_TIMEOUT, &mut floor) {
            let client = floor.client(slow);
            assert!(client.session.progress().filling > 0, "only a client that owes payload is disconnected");
            assert!(!floor.lane(slow).order.is_empty(), "and only if others wait");
            floor.hang_up(slow);
            turns.leave(slow);
        }
    }

    /// Compares the policy with the expected lines.
    fn check(&self, clients: &[Client]) {
        for (number, lane) in self.lanes.iter().enumerate() {
            let Some(lane) = lane else { continue };
            let lines = self.turns.lines(number).expect("an open lane has lines");
            for part in [Part::Reserve, Part::Common] {
                let first = lines.first(part).map(|number| self.clients[number as usize].expect("a client waits"));
                assert_eq!(first, lane.order.first(part), "the first client that waits for memory");
            }
            let is_held_back = |&n: &usize| {
                let client = &clients[n];
                client.seat.lane == number && !client.gone && client.session.is_held_back()
            };
            let waits = !lane.order.is_empty() || self.clients.iter().flatten().any(is_held_back);
            let due = self.turns.due(number, || lane.unused(), STALL_TIMEOUT);
            assert_eq!(due.is_some(), waits, "a time to look again, while a client waits");
        }
    }

    /// Goes to sleep, if there is nothing to do.
    fn rest(&mut self, now: Instant) -> Option<Sleep> {
        if !self.turns.is_empty() {
            return None;
        }
        let mut until = None;
        let mut wake_at = |time: Option<Duration>| {
            let time = time.map(|time| now + time);
            until = [until, time].into_iter().flatten().min();
        };
        for (number, lane) in self.lanes.iter_mut().enumerate() {
            let Some(lane) = lane else { continue };
            if lane.cancels {
                return None;
            }
            if lane.channel.awaits_device() {
                if !lane.channel.arm() {
                    return None;
                }
                if lane.channel.in_flight() > 0 {
                    wake_at(lane.channel.info().timeout.map(|timeout| timeout / 8));
                }
            }
            let due = self.turns.due(number, || lane.unused(), STALL_TIMEOUT);
            if due == Some(Duration::ZERO) {
                return None;
            }
            wake_at(due);
        }
        Some(Sleep { until, is_rung: false })
    }

    fn is_awake(&self, now: Instant) -> bool {
        let Some(sleep) = &self.sleep else { return true };
        sleep.is_rung
            || sleep.until.is_some_and(|until| until <= now)
            || !self.turns.is_empty()
            || self.lanes.iter().flatten().any(|lane| lane.cancels || lane.is_woken())
    }

    /// Whether nothing is left to do, now or without an event.
    pub(crate) fn is_at_rest(&self) -> bool {
        let is_due = |number: usize| {
            let Some(lane) = &self.lanes[number] else { return false };
            self.turns.due(number, || lane.channel.memory_unused(), STALL_TIMEOUT) == Some(Duration::ZERO)
        };
        self.turns.is_empty() && self.in_flight() == 0 && !(0..self.lanes.len()).any(is_due)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.clients.iter().all(Option::is_none)
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.lanes.iter().flatten().map(|lane| lane.channel.in_flight()).sum()
    }
}

impl Floor<'_> {
    fn client(&mut self, number: u32) -> &mut Client {
        &mut self.clients[self.numbers[number as usize].expect("the number is in use")]
    }

    fn lane(&mut self, number: u32) -> &mut Lane {
        let lane = self.client(number).seat.lane;
        self.lanes[lane].as_mut().expect("a client has a lane")
    }

    /// Closes a connection. Its requests at the device come back later.
    fn hang_up(&mut self, number: u32) {
        let n = self.numbers[number as usize].expect("the number is in use");
        let client = self.client(number);
        if std::mem::replace(&mut client.gone, true) {
            return;
        }
        client.session.close();
        let lane = self.lane(number);
        lane.order.forget(n);
        lane.cancels = true;
        self.ended.push(n);
        self.release(number);
    }

    /// Frees the number of a client that has gone, once it has no requests at the device.
    fn release(&mut self, number: u32) {
        if self.client(number).session.in_flight() == 0 {
            self.numbers[number as usize] = None;
            self.free.push(number);
        }
    }

    /// The requests that a client may have in flight while the queue is full.
    fn share(&mut self, number: u32) -> usize {
        let lane = self.client(number).seat.lane;
        let is_busy = |&n: &usize| {
            let client = &self.clients[n];
            client.seat.lane == lane && !client.gone && client.session.in_flight() > 0
        };
        let busy = self.numbers.iter().flatten().filter(|n| is_busy(n)).count();
        Order::share(self.lane(number).channel.depth(), busy)
    }
}

impl Connections for Floor<'_> {
    fn is_ready(&mut self, number: u32) -> bool {
        let client = self.client(number);
        client.is_active = true;
        client.is_ready(true)
    }

    fn feed(&mut self, number: u32, grant: &mut Grant) -> Option<Fed> {
        assert_eq!(grant.calls, self.share(number), "busy clients have equal shares of the queue");
        let n = self.numbers[number as usize].expect("the number is in use");
        let client = &mut self.clients[n];
        let Lane { channel, order, .. } = self.lanes[client.seat.lane].as_mut().expect("a client has a lane");
        client.is_active = true;
        if let Some((buf, at)) = client.session.landing() {
            // Directly into the buffer, as `receive` does it; further bytes go through `take`.
            let direct = client.arrived.len().min(buf.len() - at);
            buf.copy_from(at, &client.arrived[..direct]);
            client.session.landed(direct, channel);
            client.arrived.drain(..direct);
        }
        let (free, unused) = (channel.memory_free(), channel.memory_unused());
        let mut input = &client.arrived[..];
        let result = client.session.take(&mut input, channel, grant);
        // A queue that panics takes all memory with it.
        let is_exhausted = channel.memory_unused() == 0;
        let common = channel.memory_free() < free && !is_exhausted;
        // If little of the common part is free, its part of the difference is not known.
        let reserve = free > 0 && !common && channel.memory_unused() < unused && !is_exhausted;
        let taken = client.arrived.len() - input.len();
        client.arrived.drain(..taken);
        if let Err(fatal) = result {
            assert!(client.is_broken, "the client follows the protocol: {fatal:?}");
            self.hang_up(number);
            return None;
        }
        order.settle(n, *grant, Taken { common, reserve }, client.session.wants());
        Some(Fed::of(&client.session, 0))
    }

    fn memory_unused(&self, lane: usize) -> usize {
        self.lanes[lane].as_ref().map_or(0, |lane| lane.channel.memory_unused())
    }

    fn progress(&mut self, number: u32) -> Progress {
        self.client(number).session.progress()
    }

    fn reclaim(&mut self, number: u32) {
        self.client(number).session.reclaim();
    }
}
