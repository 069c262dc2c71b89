//! [`Lines`]: which connection gets payload memory next. First come, first served.
//!
//! A channel's memory has two parts, and a line of waiting connections for each. Small requests of connections that hold little
//! are served from a reserve that nothing else can use up, so that a few clients with large requests keep no other client
//! waiting. All other requests wait for the common part. Small requests may use the common part as well, but not while
//! a connection waits for it.
//!
//! A connection takes memory only when no other one is ahead of it in its line. Where others wait behind it, it gets
//! memory for one request at a time, and goes to the end of the line for the next.

use std::collections::VecDeque;

/// Which part of a channel's memory a request is served from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The reserve: the request is small, and so is all that its connection holds.
    Reserve,
    /// The rest.
    Common,
}

/// What memory a connection may take now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grant {
    /// Of the reserve.
    pub reserve: bool,
    /// Of the common part, for small requests.
    pub spill: bool,
    /// Of the common part, for others.
    pub common: bool,
    /// For one request only, since others wait.
    pub once: bool,
    /// Memory was taken.
    pub used: bool,
}

impl Grant {
    /// Everything that is free: no connection waits.
    pub const ALL: Self = Self { reserve: true, spill: true, common: true, once: false, used: false };

    /// Notes that memory was taken.
    #[inline]
    pub(crate) fn take(&mut self) {
        self.used = true;
        if self.once {
            (self.reserve, self.spill, self.common) = (false, false, false);
        }
    }
}

/// The connections that wait for memory of one channel, by their numbers.
#[derive(Debug, Default)]
pub struct Lines {
    reserve: VecDeque<u32>,
    common: VecDeque<u32>,
}

impl Lines {
    /// Whether no connection waits.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.reserve.is_empty() && self.common.is_empty()
    }

    /// The connection whose turn it is for a part of the memory.
    pub fn first(&self, part: Part) -> Option<u32> {
        self.line(part).front().copied()
    }

    /// What a connection may take.
    #[inline]
    pub fn grant(&self, number: u32) -> Grant {
        if self.is_empty() {
            return Grant::ALL;
        }
        let ahead = |line: &VecDeque<u32>| line.front().is_some_and(|&first| first != number);
        let (reserve, common) = (!ahead(&self.reserve), !ahead(&self.common));
        let once = !(reserve && common && self.reserve.len() <= 1 && self.common.len() <= 1);
        Grant { reserve, spill: reserve && self.common.is_empty(), common, once, used: false }
    }

    /// A connection had its turn under `grant`, and waits now for `wants`.
    #[inline]
    pub fn settle(&mut self, number: u32, grant: Grant, wants: Option<Part>) {
        if wants.is_none() && self.is_empty() {
            return;
        }
        for part in [Part::Reserve, Part::Common] {
            let line = self.line_mut(part);
            let place = line.iter().position(|&other| other == number);
            match place {
                // It keeps its place until it has got something.
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

    /// A connection has closed.
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
        let mut lines = Lines::default();
        for number in [7, 8, 9] {
            lines.settle(number, lines.grant(number), Some(Part::Common));
        }
        assert!(lines.grant(7).common && !lines.grant(8).common && !lines.grant(1).common);
        // Nothing was free: it stays the first. Then it takes for one request, and goes to the end for the next.
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
    fn small_requests_pass_large_ones_but_take_nothing_of_theirs() {
        let mut lines = Lines::default();
        lines.settle(1, lines.grant(1), Some(Part::Common));
        let grant = lines.grant(2);
        assert!(grant.reserve && !grant.spill && !grant.common);
        lines.settle(2, grant, Some(Part::Reserve));
        assert!(!lines.grant(3).reserve && lines.grant(2).reserve && lines.grant(1).common);
        lines.settle(1, lines.grant(1), None);
        assert!(lines.grant(2).spill && !lines.grant(3).spill);
    }
}
