//! [`Lines`]: decides which connection gets payload memory next, and its share of the device's queue. First come, first served.
//!
//! A channel's memory has two parts, each with a line of waiting connections. Small requests of connections that hold little use
//! a reserve that is kept for them, so that a few clients with large requests cannot delay all others. All other requests wait
//! for the common part. Small requests may use the common part as well, but not while a connection waits for it.
//!
//! A connection takes memory only if no other one is ahead of it in its line. If others wait behind it, it gets memory for one
//! request, then goes to the end of the line.
//!
//! No connection waits in line for the queue. While more requests are in flight than the queue takes, a connection may have only
//! its share in flight: twice the queue's depth, divided by the number of connections that have requests in flight.

use std::collections::VecDeque;

/// The part of a channel's memory that a request uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The reserve: for small requests of connections that hold little.
    Reserve,
    /// The common part: for all other requests.
    Common,
}

/// The memory that a connection may take now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grant {
    /// It may use the reserve.
    pub reserve: bool,
    /// It may use the common part for small requests.
    pub spill: bool,
    /// It may use the common part for other requests.
    pub common: bool,
    /// Memory for one request only, because others wait.
    pub once: bool,
    /// Most requests that it may have in flight, while more are in flight than the queue takes.
    pub calls: usize,
    /// It has taken memory.
    pub used: bool,
}

impl Grant {
    /// All free memory: no connection waits.
    pub const ALL: Self =
        Self { reserve: true, spill: true, common: true, once: false, calls: usize::MAX, used: false };

    /// Notes that memory was taken.
    #[inline]
    pub(crate) fn take(&mut self) {
        self.used = true;
        if self.once {
            (self.reserve, self.spill, self.common) = (false, false, false);
        }
    }
}

/// The connections that wait for memory of one channel, identified by their numbers.
#[derive(Debug)]
pub struct Lines {
    reserve: VecDeque<u32>,
    common: VecDeque<u32>,
    /// Depth of the queue, in requests.
    depth: usize,
    /// Connections with requests in flight.
    busy: usize,
}

impl Lines {
    /// Returns empty lines for a channel whose queue takes `depth` requests.
    pub fn new(depth: usize) -> Self {
        Self { reserve: VecDeque::new(), common: VecDeque::new(), depth, busy: 0 }
    }

    /// Updates a connection's requests in flight from `before` to `now`.
    #[inline]
    pub fn count(&mut self, before: usize, now: usize) {
        self.busy = self.busy + usize::from(now > 0) - usize::from(before > 0);
    }

    /// The requests that each connection may have in flight, while more are in flight than the queue takes.
    #[inline]
    fn share(&self) -> usize {
        (2 * self.depth / self.busy.max(1)).max(1)
    }

    /// Whether no connection waits.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.reserve.is_empty() && self.common.is_empty()
    }

    /// The connection at the front of the line for a part of the memory.
    pub fn first(&self, part: Part) -> Option<u32> {
        self.line(part).front().copied()
    }

    /// Returns the memory that a connection may take now.
    #[inline]
    pub fn grant(&self, number: u32) -> Grant {
        if self.is_empty() {
            return Grant { calls: self.share(), ..Grant::ALL };
        }
        let ahead = |line: &VecDeque<u32>| line.front().is_some_and(|&first| first != number);
        let (reserve, common) = (!ahead(&self.reserve), !ahead(&self.common));
        let once = !(reserve && common && self.reserve.len() <= 1 && self.common.len() <= 1);
        let calls = self.share();
        Grant { reserve, spill: reserve && self.common.is_empty(), common, once, calls, used: false }
    }

    /// Ends a connection's turn under `grant`. `wants` is the memory that it waits for now.
    #[inline]
    pub fn settle(&mut self, number: u32, grant: Grant, wants: Option<Part>) {
        if wants.is_none() && self.is_empty() {
            return;
        }
        for part in [Part::Reserve, Part::Common] {
            let line = self.line_mut(part);
            let place = line.iter().position(|&other| other == number);
            match place {
                // It keeps its place until it gets memory.
                Some(_) if wants == Some(part) && !grant.used => {}
                Some(place) => {
                    line.remove(place);
                    if wants == Some(part) {
                        line.push_back(number);
                    }
                }
                None if wants == Some(part) => line.push_back(number),
                None => {}
            }
        }
    }

    /// Removes a closed connection.
    pub fn forget(&mut self, number: u32) {
        self.reserve.retain(|&other| other != number);
        self.common.retain(|&other| other != number);
    }

    fn line(&self, part: Part) -> &VecDeque<u32> {
        match part {
            Part::Reserve => &self.reserve,
            Part::Common => &self.common,
        }
    }

    fn line_mut(&mut self, part: Part) -> &mut VecDeque<u32> {
        match part {
            Part::Reserve => &mut self.reserve,
            Part::Common => &mut self.common,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_come_first_served() {
        let mut lines = Lines::new(256);
        for number in [7, 8, 9] {
            lines.settle(number, lines.grant(number), Some(Part::Common));
        }
        assert!(lines.grant(7).common && !lines.grant(8).common && !lines.grant(1).common);
        // Nothing was free: it stays first. Then it takes memory for one request, and goes to the end for the next.
        lines.settle(7, lines.grant(7), Some(Part::Common));
        assert_eq!(lines.first(Part::Common), Some(7));
        let mut grant = lines.grant(7);
        grant.take();
        assert!(!grant.common, "one request at a time");
        lines.settle(7, grant, Some(Part::Common));
        assert_eq!(lines.first(Part::Common), Some(8));
        lines.forget(8);
        lines.settle(9, lines.grant(9), None);
        assert_eq!(lines.first(Part::Common), Some(7));
    }

    #[test]
    fn small_requests_pass_large_ones_without_taking_their_memory() {
        let mut lines = Lines::new(256);
        lines.settle(1, lines.grant(1), Some(Part::Common));
        let grant = lines.grant(2);
        assert!(grant.reserve && !grant.spill && !grant.common);
        lines.settle(2, grant, Some(Part::Reserve));
        assert!(!lines.grant(3).reserve && lines.grant(2).reserve && lines.grant(1).common);
        lines.settle(1, lines.grant(1), None);
        assert!(lines.grant(2).spill && !lines.grant(3).spill);
    }

    #[test]
    fn busy_connections_share_the_queue() {
        let mut lines = Lines::new(8);
        assert_eq!(lines.grant(1).calls, 16);
        for _ in 0..4 {
            lines.count(0, 3);
            lines.count(3, 5);
        }
        assert_eq!(lines.grant(1).calls, 4);
        (0..100).for_each(|_| lines.count(0, 1));
        assert_eq!(lines.grant(1).calls, 1, "each connection may have one");
        (0..103).for_each(|_| lines.count(1, 0));
        assert_eq!(lines.grant(1).calls, 16);
    }
}
