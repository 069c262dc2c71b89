//! [`Lane`]: a channel that a worker serves, and the steps of its removal.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use blkdev::{Channel, Info, Pending};

use crate::{observe::LaneGauges, removal::Removal, seat::Seat};

/// Set in the tokens of lanes. The token of a connection is its number.
pub(super) const LANE: u64 = 1 << 32;

/// Time that a device has to complete its requests when the server stops, or its last client has gone.
pub(super) const WIND_UP: Duration = Duration::from_secs(2);

/// Interval of checks for an admitted client that has not arrived yet.
const BRIEFLY: Duration = Duration::from_millis(10);

/// A channel, and its users.
pub(super) struct Lane {
    pub(super) channel: Channel,
    pub(super) seat: Arc<Seat>,
    pub(super) gauges: Arc<LaneGauges>,
    /// Connections with a socket.
    pub(super) clients: usize,
    /// Connections, including those that only wait for the device.
    pub(super) conns: usize,
    pub(super) leaving: Option<Leaving>,
    /// Closed connections have requests to cancel.
    pub(super) cancels: bool,
    /// As last seen: see [`Channel::losses`].
    losses: u32,
}

/// The state of a lane that is being removed.
pub(super) struct Leaving {
    pub(super) removal: Removal,
    /// Deadline of the clients, or, when there are none left, of the device.
    pub(super) deadline: Option<Instant>,
}

/// The next step for a lane that is being removed.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Step {
    Nothing,
    /// The clients did not disconnect in time.
    CutOff,
    /// The device did not complete its requests in time.
    GiveUp,
    /// Nothing is left to wait for.
    Close,
}

impl Lane {
    pub(super) fn new(channel: Channel, seat: Arc<Seat>, gauges: Arc<LaneGauges>) -> Self {
        let losses = channel.losses();
        Self { channel, seat, gauges, clients: 0, conns: 0, leaving: None, cancels: false, losses }
    }

    /// Whether the device has lost changes since the last call, so that present clients must end.
    #[inline]
    pub(super) fn has_lost(&mut self) -> bool {
        let losses = self.channel.losses();
        std::mem::replace(&mut self.losses, losses) != losses
    }

    /// Publishes its gauges, and logs its oldest request if that is older than `slow`.
    pub(super) fn show(&self, oldest: Option<Pending>, now: Instant, slow: Option<Duration>) {
        let Self { channel, gauges, seat, .. } = self;
        gauges.oldest.set(oldest.map(|oldest| oldest.age));
        gauges.memory_used.set(channel.memory().saturating_sub(channel.memory_free()) as u64);
        gauges.stalled.set(channel.is_stalled().into());
        gauges.set_state(channel.queue_state());
        if let (Some(Pending { operation, at, len, age, .. }), Some(slow)) = (oldest, slow)
            && age >= slow
            && seat.may_report(now, slow)
        {
            let (name, state, count) = (&seat.name, channel.describe(), channel.in_flight());
            let Info { driver, target, .. } = channel.info();
            log::warn!(
                "export {name:?}: a slow request: {operation} of {len} bytes at {at} has not ended for {age:.1?}; {count} requests \
                 are in flight at {driver} {target}{state}"
            );
        }
    }

    /// Whether it refuses new clients. A hidden lane still serves clients that were admitted before.
    pub(super) fn refuses(&self) -> bool {
        self.leaving.as_ref().is_some_and(|leaving| leaving.removal > Removal::Hide)
    }

    /// Returns the next step of its removal.
    pub(super) fn step(&mut self, now: Instant) -> Step {
        let Some(leaving) = &mut self.leaving else { return Step::Nothing };
        if leaving.deadline.is_some_and(|deadline| deadline <= now) {
            leaving.deadline = None;
            if self.clients > 0 {
                return Step::CutOff;
            }
            if self.conns > 0 {
                return Step::GiveUp;
            }
        }
        let awaited = leaving.removal == Removal::Hide && self.seat.is_awaited();
        if self.conns == 0 && !awaited {
            return Step::Close;
        }
        if self.clients == 0 {
            leaving.deadline.get_or_insert(now + if self.conns == 0 { BRIEFLY } else { WIND_UP });
        }
        Step::Nothing
    }
}
