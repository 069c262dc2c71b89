//! [`Model`]: the expected content of a device. [`Order`]: the expected order of the clients that wait for a channel's memory.

use std::collections::{HashMap, VecDeque};

use nbd_proto::wire::CommandKind as Kind;
use nbd_server_core::{Grant, Part};

use crate::{client::Request, disk::DEVICE};

/// The expected content of the device: each byte has one value, or any.
pub(crate) struct Model {
    pub(crate) bytes: Vec<Option<u8>>,
    /// Ranges of requests in flight, by client and cookie, and whether they change data. Two overlap only if both read.
    pub(crate) busy: HashMap<(usize, u64), (u64, u64, bool)>,
    /// The driver completes requests that the device has not executed: the content can be anything.
    pub(crate) is_void: bool,
}

impl Model {
    pub(crate) fn is_free(&self, at: u64, len: u64, changes: bool) -> bool {
        self.busy.values().all(|&(b, n, c)| at + len <= b || b + n <= at || !(c || changes))
    }

    pub(crate) fn must_hold(&self, at: u64, bytes: &[u8]) {
        if self.is_void {
            return;
        }
        let known = &self.bytes[at as usize..at as usize + bytes.len()];
        if let Some(n) = known.iter().zip(bytes).position(|(known, byte)| known.is_some_and(|k| k != *byte)) {
            panic!("byte {} is {} and should be {:?}", at + n as u64, bytes[n], known[n]);
        }
    }

    pub(crate) fn must_be_zero(&self, at: u64, end: u64) {
        let mut bytes = self.bytes[at as usize..end as usize].iter();
        assert!(self.is_void || bytes.all(|b| b.is_none_or(|b| b == 0)), "a hole holds zeroes");
    }

    /// The request has succeeded.
    pub(crate) fn apply(&mut self, request: &Request) {
        let bytes = &mut self.bytes[request.at as usize..(request.at + request.len) as usize];
        match request.kind {
            Kind::WRITE => bytes.iter_mut().zip(&request.data).for_each(|(byte, new)| *byte = Some(*new)),
            Kind::WRITE_ZEROES => bytes.fill(Some(0)),
            Kind::TRIM => bytes.fill(None),
            _ => {}
        }
    }

    /// The request may have happened or not: every byte may be old or new.
    pub(crate) fn forget(&mut self, request: &Request) {
        let range = request.at as usize..(request.at + request.len).min(DEVICE) as usize;
        match request.kind {
            _ if request.expected.is_some() => {}
            Kind::WRITE | Kind::WRITE_ZEROES | Kind::TRIM => self.bytes[range].fill(None),
            _ => {}
        }
    }
}

/// The clients that wait for memory of one channel: the lines as they should be, known from what clients take and want.
#[derive(Default)]
pub(crate) struct Order {
    reserve: VecDeque<usize>,
    common: VecDeque<usize>,
}

/// What a client has taken in a turn.
#[derive(Clone, Copy)]
pub(crate) struct Taken {
    /// Of the common part.
    pub(crate) common: bool,
    /// Of the reserve.
    pub(crate) reserve: bool,
}

impl Order {
    pub(crate) fn first(&self, part: Part) -> Option<usize> {
        match part {
            Part::Reserve => self.reserve.front().copied(),
            Part::Common => self.common.front().copied(),
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.reserve.is_empty() && self.common.is_empty()
    }

    /// The requests that a client may have in flight, of `busy` clients with requests in flight.
    pub(crate) fn share(depth: usize, busy: usize) -> usize {
        (2 * depth / busy.max(1)).max(1)
    }

    /// A client has had its turn under `grant`: checks that others were not ahead of it, and gives it its place.
    pub(crate) fn settle(&mut self, client: usize, grant: Grant, taken: Taken, wants: Option<Part>) {
        let is_ahead = |part| self.first(part).is_some_and(|first| first != client);
        assert!(!(taken.common && is_ahead(Part::Common)), "memory was taken before the first in line had its own");
        assert!(
            !(taken.reserve && is_ahead(Part::Reserve)),
            "the reserve was taken before the first in line had its own"
        );
        assert!(grant.used || !(taken.common || taken.reserve), "memory was taken unnoticed");
        for part in [Part::Reserve, Part::Common] {
            let line = match part {
                Part::Reserve => &mut self.reserve,
                Part::Common => &mut self.common,
            };
            let keeps = wants == Some(part) && !grant.used && line.contains(&client);
            if !keeps {
                line.retain(|&other| other != client);
                line.extend((wants == Some(part)).then_some(client));
            }
        }
    }

    /// A client has left.
    pub(crate) fn forget(&mut self, client: usize) {
        self.reserve.retain(|&other| other != client);
        self.common.retain(|&other| other != client);
    }
}
