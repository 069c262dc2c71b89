//! [`Conn`]: a connection with its socket and its session.

use std::{
    fmt, io,
    os::fd::OwnedFd,
    sync::{Arc, mpsc},
};

use blkdev::Channel;
use nbd_proto::Fatal;

use crate::{
    coalesce::Coalesce,
    continuation::Continuation,
    handover::KernelTls,
    lines::Grant,
    observe::{Entry, LaneGauges, Traffic},
    poll::{Interest, Poll},
    received::Received,
    session::Session,
    stream::Stream,
};

/// A connection in the transmission phase.
pub(super) struct Conn {
    /// `None`: the connection is closed, and waits only for its requests at the device.
    pub(super) stream: Option<Stream>,
    pub(super) session: Session,
    pub(super) lane: usize,
    /// Input that could not be taken yet. While there is some, nothing more is received.
    pub(super) backlog: Vec<u8>,
    pub(super) readable: bool,
    /// The client has closed: the remaining data must be read up to the end.
    pub(super) ended: bool,
    /// Its socket is full. Until the client reads replies, nothing more is received from it: a client that is behind gets no
    /// further service, and does not wake the worker with each request.
    pub(super) blocked: bool,
    /// A send is worth a try.
    pub(super) writable: bool,
    /// It is in `active`.
    pub(super) active: bool,
    /// Only for a unix socket, which reports its unread bytes.
    pub(super) coalesce: Option<Coalesce>,
    pub(super) is_tcp: bool,
    /// Its entry in the book of connections. `None`: it is closed.
    pub(super) entry: Option<Entry>,
    /// The reason to close it.
    pub(super) why: Option<Why>,
    /// It is counted among the connections that wait for memory.
    pub(super) is_waiting: bool,
    /// Dropped at the end of the connection, which the receiver notices.
    pub(super) over: Option<mpsc::Sender<()>>,
}

/// Why a connection ends.
#[derive(Debug)]
pub(super) enum Why {
    /// NBD_CMD_DISC.
    Disconnected,
    /// Without NBD_CMD_DISC.
    Closed,
    Broken(io::Error),
    Violation(Fatal),
    TooSlow,
    /// A partly sent reply could not be read again.
    Unreadable,
    /// The device has lost changes.
    Lost,
    Removed,
    /// An operator has requested it.
    Ended,
    Stopping,
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Disconnected => f.write_str("it has disconnected"),
            Self::Closed => f.write_str("it has closed the connection without a disconnect request"),
            Self::Broken(error) => write!(f, "the connection broke: {error}"),
            Self::Violation(fatal) => write!(f, "it was disconnected, because it violated the protocol: {fatal}"),
            Self::TooSlow => f.write_str("it was disconnected, because it sent a payload too slowly"),
            Self::Unreadable => f.write_str("it was disconnected, because the rest of a reply could not be read"),
            Self::Lost => f.write_str("it was disconnected, because the device has lost changes"),
            Self::Removed => f.write_str("it was disconnected, because its export was removed"),
            Self::Ended => f.write_str("it was disconnected by an operator"),
            Self::Stopping => f.write_str("it was disconnected, because the server stops"),
        }
    }
}

impl Conn {
    /// Publishes its figures.
    #[inline]
    pub(super) fn publish(&mut self, gauges: &LaneGauges) {
        if let Some(entry) = &self.entry {
            let refused = entry.client.publish(self.session.traffic(), self.session.in_flight());
            if refused > 0 {
                gauges.refused.add(refused);
            }
        }
        let is_waiting = self.session.wants().is_some() || self.session.is_held_back();
        if is_waiting != self.is_waiting {
            self.wait(is_waiting, gauges);
        }
    }

    /// It begins or stops to wait for memory.
    #[cold]
    fn wait(&mut self, is_waiting: bool, gauges: &LaneGauges) {
        self.is_waiting = is_waiting;
        if is_waiting {
            gauges.waits.add(1);
            gauges.waiting.add(1);
        } else {
            gauges.waiting.set(gauges.waiting.get() - 1);
        }
    }

    /// Logs its end, and removes it from the book of connections.
    #[cold]
    pub(super) fn check_out(&mut self, why: &Why, gauges: &LaneGauges) {
        self.publish(gauges);
        let Some(Entry { client, .. }) = &self.entry.take() else { return };
        let Traffic { requests, failed, read, written, .. } = self.session.traffic();
        log::info!(
            "{} leaves export {:?} after {:.1?}: {why}; {requests} requests ({failed} failed), {read} bytes read, {written} bytes \
             written",
            client.peer,
            client.export,
            client.since.elapsed()
        );
    }

    #[cold]
    fn fail(&mut self, why: Why) -> bool {
        self.why = Some(why);
        false
    }

    /// Whether it may have waited for its turn with data to take, which it takes now.
    #[inline]
    pub(super) fn waits(&self) -> bool {
        let Self { session, backlog, .. } = self;
        !backlog.is_empty()
            || session.stall().is_some()
            || session.wants().is_some()
            || session.is_held_back()
            || session.is_short()
    }

    /// Frees spare capacity after a burst.
    pub(super) fn shrink(&mut self) {
        self.session.shrink();
        if let Some(stream) = &mut self.stream {
            stream.shrink();
        }
        if self.backlog.is_empty() {
            self.backlog = Vec::new();
        }
    }

    /// Receives once, and takes the data. `false`: the connection has ended.
    pub(super) fn receive(&mut self, staging: &mut [u8], channel: &mut Channel, grant: &mut Grant) -> bool {
        let alive = self.receive_once(staging, channel, grant);
        // A unix socket wakes for every byte in any case. On vsock, a client may learn too late that the socket has room for the
        // rest.
        if let (true, false, Some(stream)) = (self.is_tcp, self.readable, &mut self.stream) {
            stream.expect(self.session.landing().map_or(0, |(buf, at)| buf.len() - at));
        }
        alive
    }

    fn receive_once(&mut self, staging: &mut [u8], channel: &mut Channel, grant: &mut Grant) -> bool {
        let Some(stream) = &mut self.stream else { return false };
        let Received { landed, staged, more } = match stream.receive(self.session.landing(), staging) {
            Ok(Some(received)) => received,
            Ok(None) => return self.fail(Why::Closed),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                self.readable = false;
                return true;
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => return true,
            Err(e) => return self.fail(Why::Broken(e)),
        };
        // If the end of the stream was reported with the last bytes, no other event reports it.
        self.readable = self.ended || more;
        self.session.landed(landed, channel);
        let mut input = &staging[..staged];
        match self.session.take(&mut input, channel, grant) {
            Ok(()) => {
                self.backlog.extend_from_slice(input);
                true
            }
            Err(fatal) => self.fail(Why::Violation(fatal)),
        }
    }

    /// Returns its socket and all that another process needs to continue it; `None`: that is impossible, now or at all.
    pub(super) fn suspend(&self) -> Option<(Arc<OwnedFd>, Option<KernelTls>, Continuation)> {
        let (socket, tls) = self.stream.as_ref()?.suspend().filter(|_| self.over.is_none())?;
        Some((Arc::clone(socket), tls, self.session.suspend(&self.backlog)?))
    }

    /// Whether it has something to do in a turn. `has_ended`: one of its requests has ended since the last turn, or all have.
    pub(super) fn is_ready(&self, has_ended: bool) -> bool {
        let has_input = self.readable || !self.backlog.is_empty();
        self.stream.is_some() && self.session.is_ready(has_input, self.blocked, has_ended)
    }

    /// Takes the backlog. `false`: the connection has ended.
    pub(super) fn take_backlog(&mut self, channel: &mut Channel, grant: &mut Grant) -> bool {
        let mut input = &self.backlog[..];
        match self.session.take(&mut input, channel, grant) {
            Ok(()) => {
                let taken = self.backlog.len() - input.len();
                self.backlog.drain(..taken);
                true
            }
            Err(fatal) => self.fail(Why::Violation(fatal)),
        }
    }

    /// Sends as much as the socket takes. `false`: the connection is broken.
    pub(super) fn send(&mut self, staging: &mut [u8], poll: &Poll, number: u32) -> bool {
        let Some(stream) = &mut self.stream else { return true };
        if (self.session.outbox().is_empty() && !self.blocked) || !self.writable {
            return true;
        }
        let all = match stream.send(self.session.outbox(), staging) {
            Ok(all) => all,
            Err(e) => return self.fail(Why::Broken(e)),
        };
        self.writable = all;
        if self.blocked != all {
            return true;
        }
        self.blocked = !all;
        let interest = if all { Interest::Read } else { Interest::Write };
        match poll.set_edge(stream, number.into(), interest) {
            Ok(()) => true,
            Err(e) => self.fail(Why::Broken(e)),
        }
    }
}
