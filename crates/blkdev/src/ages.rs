//! [`Ages`]: the ages of requests in flight, from which it judges the device.

use std::time::{Duration, Instant};

/// An empty slot has no age.
pub(crate) const NEVER: u32 = u32::MAX;

/// The ages of requests in flight, and the time of the last completion. The unit is an eighth of the time-out, so that no request
/// costs a clock reading.
#[derive(Debug)]
pub(crate) struct Ages {
    pub(crate) unit: Option<Duration>,
    next: Option<Instant>,
    now: u32,
    /// Time of the last completion.
    progress: u32,
    /// When the youngest completed request was sent.
    newest: u32,
}

/// Units without any completion after which a device is stalled.
const STALLED: u32 = 8;
/// Units after which a single request is lost, if others have completed that were sent at least a time-out later: ten times the
/// time-out. (In a queue that is only slow, no request is overtaken by so much.)
const LOST: u32 = 10 * STALLED;

/// The verdict on the device, from the ages of its requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Fine,
    /// Nothing has completed for the whole time-out, and the oldest request is older than that.
    Stalled,
    /// The oldest request has waited for ten times the time-out, while others have overtaken it and completed.
    Lost,
}

impl Ages {
    pub(crate) fn new(timeout: Option<Duration>) -> Self {
        Self { unit: timeout.map(|t| t / STALLED), next: None, now: 0, progress: 0, newest: 0 }
    }

    /// The present time, for a request that is sent now.
    #[inline]
    pub(crate) fn now(&self) -> u32 {
        self.now
    }

    /// Reports a completion.
    #[inline]
    pub(crate) fn advance(&mut self) {
        self.progress = self.now;
    }

    /// Reports the completion of a request that was sent at `born`.
    #[inline]
    pub(crate) fn completed(&mut self, born: u32) {
        self.newest = self.newest.max(born);
    }

    /// Whether a request of this age is lost.
    pub(crate) fn is_lost(&self, born: u32) -> bool {
        self.now.wrapping_sub(born) > LOST && self.newest.saturating_sub(born) > STALLED
    }

    pub(crate) fn judge(&self, oldest: u32) -> Verdict {
        match self.now.wrapping_sub(oldest) {
            age if age > STALLED && self.now.wrapping_sub(self.progress) > STALLED => Verdict::Stalled,
            _ if self.is_lost(oldest) => Verdict::Lost,
            _ => Verdict::Fine,
        }
    }

    /// Returns whether a unit has passed. At most one unit passes between two calls, however far apart they are: a process that
    /// was stopped must first get the completions that have arrived in the meantime.
    #[inline]
    pub(crate) fn tick(&mut self, now: Instant) -> bool {
        let Some(unit) = self.unit else { return false };
        if self.next.is_some_and(|next| now < next) {
            return false;
        }
        self.next = now.checked_add(unit);
        // Must not equal the mark of a request that was not sent yet.
        self.now = (self.now + 1) % NEVER;
        true
    }
}
