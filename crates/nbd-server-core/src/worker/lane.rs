//! [`Lane`]: a channel that a worker serves, and how that ends.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use blkdev::Channel;

use crate::{removal::Removal, seat::Seat};

/// Tokens of lanes have this bit; those of connections are their numbers.
pub(super) const LANE: u64 = 1 << 32;

/// How long a device has to finish when the server stops, or its last client has gone.
pub(super) const WIND_UP: Duration = Duration::from_secs(2);

/// How often to look whether a client that was let in is still to come.
const BRIEFLY: Duration = Duration::from_millis(10);

/// A channel, and who uses it.
pub(super) struct Lane {
    pub(super) channel: Channel,
    pub(super) seat: Arc<Seat>,
    /// Connections with a socket.
    pub(super) clients: usize,
    /// Connections, with those that only wait for the device.
    pub(super) conns: usize,
    pub(super) leaving: Option<Leaving>,
    /// Connections have gone whose requests are to be cancelled.
    pub(super) cancels: bool,
}

/// How a lane ends.
pub(super) struct Leaving {
    pub(super) removal: Removal,
    /// Until when the clients have time, or, when there are none any more, the device.
    pub(super) deadline: Option<Instant>,
}

/// What is to be done about a lane that is leaving.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Step {
    Nothing,
    /// The clients did not leave in time.
    CutOff,
    /// The device did not finish in time.
    GiveUp,
    /// Nothing is left of it.
    Close,
}

impl Lane {
    pub(super) fn new(channel: Channel, seat: Arc<Seat>) -> Self {
        Self { channel, seat, clients: 0, conns: 0, leaving: None, cancels: false }
    }

    /// Whether no new client is served. Hidden, it is still there for those who were let in before.
    pub(super) fn refuses(&self) -> bool {
        self.leaving.as_ref().is_some_and(|leaving| leaving.removal > Removal::Hide)
    }

    /// What is to be done now so that it comes to an end.
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
