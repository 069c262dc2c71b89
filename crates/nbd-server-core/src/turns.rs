//! [`Turns`]: decides which connection has the next turn, and what it may take. This is the whole policy of a worker. It has no
//! socket and no clock, so the seeded simulation runs it unchanged.
//!
//! In a round, connections that wait for memory come first, in the order of their [`Lines`]. Then come those that have something
//! to do, in the order of their requests, until they have taken as much memory as fits the cache.
//!
//! While a connection waits for memory, the pace of those that hold memory is measured. Replies that a client does not read lose
//! their memory. A connection that does not send the payload of its WRITE must be disconnected.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use crate::{
    lines::{Grant, Lines, Part},
    pace::{Limit, Pace, Progress},
    session::{Session, TURN},
};

/// The interface of [`Turns`] to the owner of the connections.
pub trait Connections {
    /// Called when a connection has its turn. Returns whether it has something to take.
    fn is_ready(&mut self, number: u32) -> bool;

    /// Makes a connection take what it has received, as far as `grant` allows. `None`: it has ended.
    fn feed(&mut self, number: u32, grant: &mut Grant) -> Option<Fed>;

    /// Free memory of a lane's channel, in bytes.
    fn memory_unused(&self, lane: usize) -> usize;

    /// The progress of a connection.
    fn progress(&mut self, number: u32) -> Progress;

    /// Frees the memory of a connection's unsent replies.
    fn reclaim(&mut self, number: u32);
}

/// The state of a connection after it was fed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fed {
    /// The part of memory that it waits for.
    pub wants: Option<Part>,
    /// It waits until it holds less memory itself.
    pub held_back: bool,
    /// Its requests in flight, a number.
    pub in_flight: usize,
    /// Its share of this round: bytes of memory, if the device answers by the end of the round.
    pub taken: usize,
}

impl Fed {
    /// The state of a session that has taken `taken` bytes.
    #[inline]
    pub fn of(session: &Session, taken: usize) -> Self {
        let held_back = session.is_held_back();
        Self { wants: session.wants(), held_back, in_flight: session.in_flight(), taken }
    }
}

/// The connections of a worker, and the order of their turns.
#[derive(Debug, Default)]
pub struct Turns {
    /// Connections with something to do.
    queue: VecDeque<u32>,
    /// Indexed by number.
    members: Vec<Option<Member>>,
    /// Indexed by number.
    lanes: Vec<Option<Lane>>,
}

#[derive(Debug)]
struct Member {
    lane: usize,
    /// It is in `queue`.
    queued: bool,
    /// It is counted as one with requests in flight.
    busy: bool,
    /// It is counted as one that waits until it holds less memory.
    held_back: bool,
    /// Its pace in reading replies, and in sending payload, while others wait for the memory.
    taking: Option<Pace>,
    sending: Option<Pace>,
}

/// The policy's state for one channel.
#[derive(Debug)]
struct Lane {
    lines: Lines,
    /// Free memory that was not enough for the connections at the front.
    too_little: usize,
    /// Number of connections that wait until they hold less memory.
    held_back: usize,
}

impl Turns {
    /// Adds a channel, whose queue takes `depth` requests.
    pub fn open(&mut self, lane: usize, depth: usize) {
        if self.lanes.len() <= lane {
            self.lanes.resize_with(lane + 1, || None);
        }
        self.lanes[lane] = Some(Lane { lines: Lines::new(depth), too_little: 0, held_back: 0 });
    }

    /// Removes a channel that has no connections.
    pub fn close(&mut self, lane: usize) {
        self.lanes[lane] = None;
    }

    /// Adds a connection to an open lane.
    pub fn enter(&mut self, number: u32, lane: usize) {
        let index = number as usize;
        if self.members.len() <= index {
            self.members.resize_with(index + 1, || None);
        }
        self.members[index] =
            Some(Member { lane, queued: false, busy: false, held_back: false, taking: None, sending: None });
    }

    /// Removes a connection that has ended.
    pub fn leave(&mut self, number: u32) {
        let Some(member) = self.members[number as usize].take() else { return };
        if let Some(lane) = &mut self.lanes[member.lane] {
            lane.lines.forget(number);
            lane.lines.count(member.busy.into(), 0);
            lane.held_back -= usize::from(member.held_back);
        }
    }

    /// Gives a turn to a connection that has something to do.
    #[inline]
    pub fn enqueue(&mut self, number: u32) {
        if let Some(member) = &mut self.members[number as usize]
            && !member.queued
        {
            member.queued = true;
            self.queue.push_back(number);
        }
    }

    /// Whether no connection has something to do.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// Updates a connection's number of requests in flight.
    #[inline]
    pub fn count(&mut self, number: u32, in_flight: usize) {
        let Some(member) = &mut self.members[number as usize] else { return };
        let busy = in_flight > 0;
        if busy != member.busy
            && let Some(lane) = &mut self.lanes[member.lane]
        {
            lane.lines.count(member.busy.into(), busy.into());
            member.busy = busy;
        }
    }

    /// How soon a [round](Self::round) or a [sweep](Self::sweep) can help connections that wait for memory, even if nothing else
    /// happens. `unused` returns the free memory of the lane's channel. `None`: none waits.
    #[inline]
    pub fn due(&self, lane: usize, unused: impl FnOnce() -> usize, stall_timeout: Duration) -> Option<Duration> {
        let Lane { lines, too_little, held_back } = self.lanes[lane].as_ref()?;
        if !lines.is_empty() {
            // Replies that were sent have freed memory since the waiting connections had their turn.
            let at_once = unused() > *too_little;
            Some(if at_once { Duration::ZERO } else { Self::interval(stall_timeout) })
        } else {
            (*held_back > 0).then(|| Limit::stopped(stall_timeout).interval())
        }
    }

    /// The lines of a lane's waiting connections, for tests.
    pub fn lines(&self, lane: usize) -> Option<&Lines> {
        self.lanes[lane].as_ref().map(|lane| &lane.lines)
    }

    /// Feeds connections with what they have received, in turn.
    pub fn round(&mut self, connections: &mut impl Connections) {
        self.feed_waiting(connections);
        let mut room = TURN;
        while room > 0
            && let Some(number) = self.queue.pop_front()
        {
            // The entry may belong to a connection that has ended, or to an earlier one with the same number.
            let Some(member) = self.members[number as usize].as_mut().filter(|member| member.queued) else { continue };
            member.queued = false;
            if connections.is_ready(number)
                && let Some(fed) = self.feed(number, connections)
            {
                room = room.saturating_sub(fed.taken);
            }
        }
    }

    /// Feeds connections that wait for memory, in order, as far as memory is free.
    fn feed_waiting(&mut self, connections: &mut impl Connections) {
        for lane in 0..self.lanes.len() {
            let mut short = false;
            for part in [Part::Reserve, Part::Common] {
                // Each of them once, at most: one that is at the end of the line again has had its turn.
                let mut last = None;
                while let Some(number) = self.lanes[lane].as_ref().and_then(|lane| lane.lines.first(part)) {
                    if last == Some(number) {
                        break;
                    }
                    let alive = self.feed(number, connections).is_some();
                    if alive && self.lanes[lane].as_ref().is_some_and(|lane| lane.lines.first(part) == Some(number)) {
                        // Nothing is free for it, or it is alone and has got all that was free.
                        short = true;
                        break;
                    }
                    last.get_or_insert(number);
                }
            }
            if short && let Some(place) = &mut self.lanes[lane] {
                place.too_little = connections.memory_unused(lane);
            }
        }
    }

    /// Gives a connection its turn, and then its place in line. `None`: it has ended.
    #[inline]
    fn feed(&mut self, number: u32, connections: &mut impl Connections) -> Option<Fed> {
        let lane = self.members[number as usize].as_ref()?.lane;
        let mut grant = self.lanes[lane].as_ref()?.lines.grant(number);
        let Some(fed) = connections.feed(number, &mut grant) else {
            self.leave(number);
            return None;
        };
        self.count(number, fed.in_flight);
        let (member, lane) = (self.members[number as usize].as_mut()?, self.lanes[lane].as_mut()?);
        lane.held_back = lane.held_back + usize::from(fed.held_back) - usize::from(member.held_back);
        member.held_back = fed.held_back;
        lane.lines.settle(number, grant, fed.wants);
        Some(fed)
    }

    /// Forgets the paces of all connections: the worker has not served them for a while.
    pub fn restart_paces(&mut self) {
        for member in self.members.iter_mut().flatten() {
            (member.taking, member.sending) = (None, None);
        }
    }

    /// Interval of calls to [`sweep`](Self::sweep).
    pub fn interval(stall_timeout: Duration) -> Duration {
        Limit::taking(stall_timeout).interval()
    }

    /// Reclaims memory that others wait for from connections that are too slow. Returns those that must be disconnected; see
    /// [`Limits::stall_timeout`](crate::Limits::stall_timeout).
    pub fn sweep(&mut self, now: Instant, stall_timeout: Duration, connections: &mut impl Connections) -> Vec<u32> {
        let mut slow = Vec::new();
        for number in 0..self.members.len() as u32 {
            let Some(member) = &mut self.members[number as usize] else { continue };
            let Some(lane) = &self.lanes[member.lane] else { continue };
            let awaited = !lane.lines.is_empty();
            // A connection that is held back still makes progress. So only connections that do nothing at all lose memory for it.
            let (taking, sending) = match awaited {
                true => (Limit::taking(stall_timeout), Some(Limit::sending(stall_timeout))),
                false if lane.held_back > usize::from(member.held_back) => (Limit::stopped(stall_timeout), None),
                false => {
                    (member.taking, member.sending) = (None, None);
                    continue;
                }
            };
            let Progress { sent, unsent, landed, filling } = connections.progress(number);
            if Pace::is_too_slow(&mut member.taking, sent, unsent, now, taking) {
                connections.reclaim(number);
            }
            match sending {
                None => member.sending = None,
                Some(limit) if Pace::is_too_slow(&mut member.sending, landed, filling, now, limit) => slow.push(number),
                Some(_) => {}
            }
        }
        slow
    }
}
