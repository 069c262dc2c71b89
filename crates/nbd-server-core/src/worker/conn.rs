//! [`Conn`]: a connection, its socket and its session.

use std::{io, sync::mpsc};

use blkdev::Channel;

use crate::{
    coalesce::Coalesce,
    lines::Grant,
    poll::{Interest, Poll},
    received::Received,
    session::Session,
    stream::Stream,
};

/// A connection in the transmission phase.
pub(super) struct Conn {
    /// `None`: gone, and only waiting for what is still at the device.
    pub(super) stream: Option<Stream>,
    pub(super) session: Session,
    pub(super) lane: usize,
    /// Input that could not be taken yet. While there is any, no more is received.
    pub(super) backlog: Vec<u8>,
    pub(super) readable: bool,
    /// The client has closed: what is left is to be read up to the end.
    pub(super) ended: bool,
    /// Its socket is full. Until it takes replies again nothing more is read from it: a client that is behind is not to be
    /// served further, and not to wake us with every word it sends.
    pub(super) blocked: bool,
    /// Worth a try to send.
    pub(super) writable: bool,
    /// In `active`.
    pub(super) active: bool,
    /// Only of a unix socket, which tells what its peer has not read.
    pub(super) coalesce: Option<Coalesce>,
    pub(super) is_tcp: bool,
    /// Whoever waits for its end sees that this is dropped.
    pub(super) _over: Option<mpsc::Sender<()>>,
}

impl Conn {
    /// Whether it may have waited for its turn with something to take, which it takes now.
    #[inline]
    pub(super) fn waits(&self) -> bool {
        let Self { session, backlog, .. } = self;
        !backlog.is_empty()
            || session.stall().is_some()
            || session.wants().is_some()
            || session.is_held_back()
            || session.is_short()
    }

    /// Returns what a burst has left of capacity.
    pub(super) fn shrink(&mut self) {
        self.session.shrink();
        if let Some(stream) = &mut self.stream {
            stream.shrink();
        }
        if self.backlog.is_empty() {
            self.backlog = Vec::new();
        }
    }

    /// Receives once, and takes it. `false`: the connection is at its end.
    pub(super) fn receive(&mut self, staging: &mut [u8], channel: &mut Channel, grant: &mut Grant) -> bool {
        let alive = self.receive_once(staging, channel, grant);
        // A unix socket wakes for everything, and on vsock a client may be told too late that there is room for what is due.
        if let (true, false, Some(stream)) = (self.is_tcp, self.readable, &mut self.stream) {
            stream.expect(self.session.landing().map_or(0, |(buf, at)| buf.len() - at));
        }
        alive
    }

    fn receive_once(&mut self, staging: &mut [u8], channel: &mut Channel, grant: &mut Grant) -> bool {
        let Some(stream) = &mut self.stream else { return false };
        let Received { landed, staged, more } = match stream.receive(self.session.landing(), staging) {
            Ok(Some(received)) => received,
            Ok(None) => return false,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                self.readable = false;
                return true;
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => return true,
            Err(_) => return false,
        };
        // The end of the stream is no event of its own when it was told together with the last bytes.
        self.readable = self.ended || more;
        self.session.landed(landed, channel);
        let mut input = &staging[..staged];
        match self.session.take(&mut input, channel, grant) {
            Ok(()) => {
                self.backlog.extend_from_slice(input);
                true
            }
            Err(fatal) => {
                log::info!("a client was dropped: {fatal}");
                false
            }
        }
    }

    /// Whether it has something to do in a turn. `has_ended`: a request of it has ended since its last one, or all have.
    pub(super) fn is_ready(&self, has_ended: bool) -> bool {
        let has_input = self.readable || !self.backlog.is_empty();
        self.stream.is_some() && self.session.is_ready(has_input, self.blocked, has_ended)
    }

    /// Takes what had to wait. `false`: the connection is at its end.
    pub(super) fn take_backlog(&mut self, channel: &mut Channel, grant: &mut Grant) -> bool {
        let mut input = &self.backlog[..];
        match self.session.take(&mut input, channel, grant) {
            Ok(()) => {
                let taken = self.backlog.len() - input.len();
                self.backlog.drain(..taken);
                true
            }
            Err(fatal) => {
                log::info!("a client was dropped: {fatal}");
                false
            }
        }
    }

    /// Sends what the socket takes. `false`: the connection is broken.
    pub(super) fn send(&mut self, staging: &mut [u8], poll: &Poll, number: u32) -> bool {
        let Some(stream) = &mut self.stream else { return true };
        if (self.session.outbox().is_empty() && !self.blocked) || !self.writable {
            return true;
        }
        let Ok(all) = stream.send(self.session.outbox(), staging) else { return false };
        self.writable = all;
        if self.blocked != all {
            return true;
        }
        self.blocked = !all;
        let interest = if all { Interest::Read } else { Interest::Write };
        poll.set_edge(stream, number.into(), interest).is_ok()
    }
}
