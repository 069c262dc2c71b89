//! [`Pace`]: whether a client acts fast enough on memory that others wait for.

use std::time::{Duration, Instant};

use crate::Session;

/// A client's progress since the first check while others waited.
#[derive(Debug)]
pub(crate) struct Pace {
    since: Instant,
    sent: u64,
    landed: u64,
    /// Bytes of replies that it had to take then.
    unsent: usize,
    /// Bytes of the payload that it had to send then.
    filling: usize,
}

/// Parts of the time that a client has for all of it, after each of which it must have done its share.
const SHARES: u32 = 5;

impl Pace {
    fn of(session: &mut Session, now: Instant) -> Self {
        let (filling, landed) = (session.filling(), session.landed_bytes());
        let outbox = session.outbox();
        Self { since: now, sent: outbox.sent(), landed, unsent: outbox.held(), filling }
    }

    /// How often to look, if a client has `limit` for all that it holds.
    pub(crate) fn interval(limit: Duration) -> Duration {
        (limit / SHARES / 2).clamp(Duration::from_millis(1), Duration::from_secs(1))
    }

    /// Whether a client is too slow: it has to take replies, or to send a payload, whose memory others wait for, and needs longer
    /// than `limit` for all of it at the pace of the last fifth of that time.
    pub(crate) fn is_too_slow(pace: &mut Option<Self>, session: &mut Session, now: Instant, limit: Duration) -> bool {
        let Some(before) = pace else {
            *pace = Some(Self::of(session, now));
            return false;
        };
        let elapsed = now.saturating_duration_since(before.since);
        if elapsed < limit / SHARES {
            return false;
        }
        let due = |bytes: usize| (bytes as f64 * elapsed.as_secs_f64() / limit.as_secs_f64()) as u64;
        let after = Self::of(session, now);
        let slow = |was: usize, is: usize, done: u64| was > 0 && is > 0 && done < due(was.min(is)).max(1);
        let too_slow = slow(before.unsent, after.unsent, after.sent - before.sent)
            || slow(before.filling, after.filling, after.landed - before.landed);
        *before = after;
        too_slow
    }
}
