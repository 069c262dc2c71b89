//! [`Client`]: one client with its connection: the session at the server, and the bytes between both.

use std::collections::HashMap;

use blkdev::fault::Rng;
use nbd_proto::{
    Cookie, Handshake, Mode, Offer, WireError,
    client::{self, Decoder, Encoder, Negotiation, Wish},
    wire::{CommandFlags as Flags, CommandKind as Kind},
};
use nbd_server_core::{Exports, Peer, Session};

use crate::worker::Seat;

pub(crate) struct Client {
    pub(crate) session: Session,
    pub(crate) seat: Seat,
    pub(crate) mode: Mode,
    pub(crate) encoder: Encoder,
    pub(crate) decoder: Decoder,
    pub(crate) requests: HashMap<u64, Request>,
    pub(crate) next: u64,
    /// Encoded requests, not yet at the server.
    pub(crate) wire: Vec<u8>,
    /// Bytes at the server, not yet taken.
    pub(crate) arrived: Vec<u8>,
    /// Replies on their way to the client, with a limited length. The server sends no more until the client takes some.
    pub(crate) socket: Vec<u8>,
    pub(crate) socket_len: usize,
    pub(crate) is_blocked: bool,
    /// There may be replies for it.
    pub(crate) is_active: bool,
    /// The reply that is arriving: its request, and the offset of its next byte.
    pub(crate) incoming: Option<(u64, u64)>,
    pub(crate) goodbye: bool,
    pub(crate) gone: bool,
    /// The server begins no further request of it.
    pub(crate) refused: bool,
    /// It has sent bytes that are no request.
    pub(crate) is_broken: bool,
    /// It neither sends nor takes anything until all others have their replies.
    pub(crate) is_stopped: bool,
}

pub(crate) struct Request {
    pub(crate) kind: Kind,
    pub(crate) at: u64,
    pub(crate) len: u64,
    pub(crate) flags: Flags,
    pub(crate) data: Vec<u8>,
    /// The request is invalid on purpose; this is the expected error.
    pub(crate) expected: Option<WireError>,
}

impl Client {
    /// Whether it may send another request.
    pub(crate) fn can_ask(&self) -> bool {
        !(self.gone || self.goodbye || self.is_broken || self.is_stopped)
    }

    pub(crate) fn say_goodbye(&mut self) {
        self.goodbye = true;
        self.encoder.disconnect(&mut self.wire, Cookie(0));
    }

    /// Where the next part of a reply to a read must begin: parts are consecutive, without gaps.
    pub(crate) fn part(&self, cookie: Cookie) -> u64 {
        let begun = self.incoming.filter(|incoming| incoming.0 == cookie.0);
        begun.map_or(self.requests[&cookie.0].at, |(_, at)| at)
    }

    /// Sends a request whose reply is not checked.
    pub(crate) fn request(&mut self, kind: Kind, at: u64, len: u64) {
        self.next += 1;
        self.encoder.request(&mut self.wire, Cookie(self.next), kind, Flags::NONE, at, len);
    }

    pub(crate) fn is_ready(&self, has_ended: bool) -> bool {
        self.session.is_ready(!self.arrived.is_empty(), self.is_blocked, has_ended)
    }

    /// Whether all requests that have arrived have their replies.
    pub(crate) fn is_served(&mut self) -> bool {
        let session = &mut self.session;
        let waits = session.in_flight() > 0 || session.wants().is_some() || session.is_held_back();
        !waits && self.arrived.is_empty() && session.outbox().is_empty()
    }

    /// Sends replies to the socket, as far as it has room.
    pub(crate) fn send(&mut self, piece: &mut [u8]) {
        loop {
            let room = (self.socket_len - self.socket.len()).min(piece.len());
            let len = self.session.outbox().read(&mut piece[..room]);
            self.socket.extend_from_slice(&piece[..len]);
            if len == 0 {
                self.is_blocked = room == 0 && !self.session.outbox().is_empty();
                return;
            }
        }
    }

    /// Runs the handshake of both sides, in pieces of any size.
    pub(crate) fn shake_hands(exports: &Exports, seat: Seat, rng: &mut Rng) -> Self {
        let mode = *rng.pick(&[Mode::Simple, Mode::Structured, Mode::Extended]);
        let contexts = if rng.chance(0.8) { vec!["base:allocation".to_owned()] } else { Vec::new() };
        let name = rng.pick(&["", "disk"]).to_string();
        let mut course = Negotiation::new(Wish { name, mode, contexts, tls: false });
        let (mut to_client, mut to_server) = (Vec::new(), Vec::new());
        let mut handshake = Handshake::new(Offer::default(), &mut to_client);
        let (mut negotiated, mut agreed) = (None, None);
        let peer = Peer::default();
        while negotiated.is_none() || agreed.is_none() {
            let piece = (rng.below(50) as usize + 1).min(to_client.len());
            let mut input = &to_client[..piece];
            if agreed.is_none()
                && let client::Step::Done(terms) = course.next(&mut input, &mut to_server).unwrap()
            {
                agreed = Some(terms);
            }
            to_client.drain(..piece);
            let piece = (rng.below(50) as usize + 1).min(to_server.len());
            let mut input = &to_server[..piece];
            if negotiated.is_none()
                && let nbd_proto::Step::Done(terms) =
                    handshake.next(&mut input, &exports.seen_by(&peer, false), &mut to_client).unwrap()
            {
                negotiated = Some(terms);
            }
            to_server.drain(..piece);
        }
        let (negotiated, agreed) = (negotiated.unwrap(), agreed.unwrap());
        assert_eq!(negotiated.terms.flags, agreed.terms.flags);
        let mode = agreed.terms.mode;
        Self {
            session: Session::new(&negotiated, seat.number),
            seat,
            mode,
            encoder: Encoder::new(mode),
            decoder: Decoder::new(mode),
            requests: HashMap::new(),
            next: 1,
            wire: Vec::new(),
            arrived: Vec::new(),
            incoming: None,
            socket: Vec::new(),
            socket_len: *rng.pick(&[1, 500, 100_000, 10 << 20]),
            is_blocked: false,
            is_active: false,
            goodbye: false,
            gone: false,
            refused: false,
            is_broken: false,
            is_stopped: false,
        }
    }
}
