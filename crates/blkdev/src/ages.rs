//! [`Ages`]: how long requests have been in flight, and what that says of the device.

use std::time::{Duration, Instant};

/// No slot, no age.
pub(crate) const NEVER: u32 = u32::MAX;

/// How long requests have been in flight, and when one of them last completed: counted in eighths of the time-out, so that no
/// request costs a clock reading.
#[derive(Debug)]
pub(crate) struct Ages {
    pub(crate) unit: Option<Duration>,
    next: Option<Instant>,
    now: u32,
    /// When something last completed.
    progress: u32,
    /// When the youngest of the requests was sent that have completed.
    newest: u32,
}

/// Units after which a device that completes nothing is taken for stalled.
const STALLED: u32 = 8;
/// Units after which a single request is taken for lost, if others have completed that were sent at least a time-out later: ten
/// times the time-out. (In a queue that is only slow nothing is overtaken by so much.)
const LOST: u32 = 10 * STALLED;

/// What the ages of the requests that the device has say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Fine,
    /// Nothing has completed for as long as the time-out, and the oldest request is older than that.
    Stalled,
    /// Others complete, and have overtaken the oldest request, which has waited for ten times the time-out.
    Lost,
}

impl Ages {
    pub(crate) fn new(timeout: Option<Duration>) -> Self {
        Self { unit: timeout.map(|t| t / STALLED), next: None, now: 0, progress: 0, newest: 0 }
    }

    /// Now, as the birth of a request.
    #[inline]
    pub(crate) fn now(&self) -> u32 {
        self.now
    }

    /// Something has completed.
    #[inline]
    pub(crate) fn advance(&mut self) {
        self.progress = self.now;
    }

    /// What has completed was born then.
    #[inline]
    pub(crate) fn completed(&mut self, born: u32) {
        self.newest = self.newest.max(born);
    }

    /// Whether a request of this age is taken for lost.
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

    /// Whether a unit has passed. However far apart two calls are, at most one unit passes between them: a process that was
    /// stopped for a while must first hear what has finished meanwhile.
    #[inline]
    pub(crate) fn tick(&mut self, now: Instant) -> bool {
        let Some(unit) = self.unit else { return false };
        if self.next.is_some_and(|next| now < next) {
            return false;
        }
        self.next = now.checked_add(unit);
        // Never the mark of what was not sent yet.
        self.now = (self.now + 1) % NEVER;
        true
    }
}
