//! [`Client`]: the gauges of a connection.

use std::time::Instant;

use blkdev::Gauge;

use super::{
    age::Age,
    views::{ClientView, Traffic},
};
use crate::peer::Peer;

/// A connection in the transmission phase. Its worker writes, others read.
#[derive(Debug)]
pub(crate) struct Client {
    pub(crate) id: u64,
    pub(crate) peer: Peer,
    pub(crate) export: String,
    pub(crate) security: String,
    pub(crate) protocol: &'static str,
    pub(crate) since: Instant,
    in_flight: Gauge,
    pub(crate) oldest: Age,
    requests: Gauge,
    failed: Gauge,
    refused: Gauge,
    read: Gauge,
    written: Gauge,
}

impl Client {
    pub(crate) fn new(id: u64, peer: Peer, export: String, security: String, protocol: &'static str) -> Self {
        Self {
            id,
            peer,
            export,
            security,
            protocol,
            since: Instant::now(),
            in_flight: Gauge::default(),
            oldest: Age::default(),
            requests: Gauge::default(),
            failed: Gauge::default(),
            refused: Gauge::default(),
            read: Gauge::default(),
            written: Gauge::default(),
        }
    }

    /// Publishes the figures of the connection. Returns the number of requests refused since the last call.
    #[inline]
    pub(crate) fn publish(&self, traffic: &Traffic, in_flight: usize) -> u64 {
        self.in_flight.set(in_flight as u64);
        self.requests.set(traffic.requests);
        self.read.set(traffic.read);
        self.written.set(traffic.written);
        if self.failed.get() == traffic.failed {
            return 0;
        }
        let refused = traffic.refused - self.refused.get();
        self.failed.set(traffic.failed);
        self.refused.set(traffic.refused);
        refused
    }

    pub(crate) fn traffic(&self) -> Traffic {
        Traffic {
            requests: self.requests.get(),
            failed: self.failed.get(),
            refused: self.refused.get(),
            read: self.read.get(),
            written: self.written.get(),
        }
    }

    pub(super) fn view(&self, now: Instant) -> ClientView {
        let in_flight = self.in_flight.get();
        ClientView {
            id: self.id,
            peer: self.peer.clone(),
            export: self.export.clone(),
            security: self.security.clone(),
            protocol: self.protocol,
            connected: now.saturating_duration_since(self.since),
            in_flight,
            oldest: self.oldest.get().filter(|_| in_flight > 0),
            traffic: self.traffic(),
        }
    }
}
