//! [`Pace`]: whether a client is fast enough while it holds memory that others wait for.

use std::time::{Duration, Instant};

/// Progress of a connection that holds memory, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Bytes that the client has received since the connection began …
    pub sent: u64,
    /// … and bytes that it has still to receive.
    pub unsent: usize,
    /// Bytes of payload that the client has sent …
    pub landed: u64,
    /// … and the length of the payload that it is sending.
    pub filling: usize,
}

/// A client's progress since the last check while others waited.
#[derive(Debug)]
pub(crate) struct Pace {
    since: Instant,
    /// Bytes that it had received or sent then.
    done: u64,
    /// Bytes that it had to receive or send then.
    due: usize,
}

/// The slowest pace that is allowed while others wait.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limit {
    /// At its pace, the client must be able to finish all due bytes within this time …
    pub(crate) all: Duration,
    /// … measured over this window.
    pub(crate) window: Duration,
}

impl Limit {
    /// For receiving replies. A slower client loses nothing: its replies are read again when it continues. So this is short, and
    /// others wait only briefly.
    pub(crate) fn taking(stall_timeout: Duration) -> Self {
        Self { all: stall_timeout / 10, window: (stall_timeout / 200).max(Duration::from_millis(1)) }
    }

    /// For receiving replies, if others only have less memory than they could use: any progress is enough.
    pub(crate) fn stopped(stall_timeout: Duration) -> Self {
        Self { all: Duration::MAX, window: stall_timeout / 10 }
    }

    /// For sending payloads. A slower client is disconnected. A client that stops right after a burst passes one window and fails
    /// the next, so others wait for two: together less than two seconds.
    pub(crate) fn sending(stall_timeout: Duration) -> Self {
        Self { all: stall_timeout, window: stall_timeout / 12 }
    }

    /// Interval of the checks.
    pub(crate) fn interval(self) -> Duration {
        (self.window / 2).clamp(Duration::from_millis(1), Duration::from_secs(1))
    }
}

impl Pace {
    /// Whether a client is too slow that has done `done` bytes so far, and has `due` more to do.
    pub(crate) fn is_too_slow(pace: &mut Option<Self>, done: u64, due: usize, now: Instant, limit: Limit) -> bool {
        if due == 0 {
            *pace = None;
            return false;
        }
        let Some(before) = pace else {
            *pace = Some(Self { since: now, done, due });
            return false;
        };
        let elapsed = now.saturating_duration_since(before.since);
        if elapsed < limit.window {
            return false;
        }
        let share = before.due.min(due) as f64 * elapsed.as_secs_f64() / limit.all.as_secs_f64();
        let too_slow = done - before.done < (share as u64).max(1);
        *before = Self { since: now, done, due };
        too_slow
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::Limits;

    #[test]
    fn a_client_must_keep_up_with_its_share() {
        let (start, limit) = (Instant::now(), Limit::sending(Duration::from_secs(12)));
        let at = |ms| start + Duration::from_millis(ms);
        let mut pace = None;
        assert!(!Pace::is_too_slow(&mut pace, 0, 1200, at(0), limit));
        assert!(!Pace::is_too_slow(&mut pace, 0, 1200, at(900), limit), "not before the window has passed");
        assert!(!Pace::is_too_slow(&mut pace, 100, 1100, at(1000), limit));
        assert!(Pace::is_too_slow(&mut pace, 180, 1020, at(2000), limit), "85 were due");
        assert!(!Pace::is_too_slow(&mut pace, 180, 0, at(2100), limit), "nothing is due");
        assert!(!Pace::is_too_slow(&mut pace, 180, 1, at(9000), limit), "the measurement begins again");
        assert!(Pace::is_too_slow(&mut pace, 180, 1, at(10_000), limit), "no byte at all");
    }

    /// Others wait for its memory that long, and no healthy client may wait for more than two seconds.
    #[test]
    fn a_client_that_stops_in_a_payload_is_found_within_two_seconds() {
        let timeout = Limits::default().stall_timeout;
        let (start, limit, interval) = (Instant::now(), Limit::sending(timeout), Limit::taking(timeout).interval());
        for burst in [0, 1, 500, 999] {
            let (mut pace, mut now) = (None, start);
            assert!(!Pace::is_too_slow(&mut pace, 0, 1000, now, limit));
            while !Pace::is_too_slow(&mut pace, burst, 1000 - burst as usize, now, limit) {
                now += interval;
                assert!(now < start + Duration::from_millis(1900), "after {burst} bytes of 1000");
            }
        }
    }
}
