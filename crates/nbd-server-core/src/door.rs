//! The door: accepts connections and does their handshakes, on one thread apart from the workers. It never waits for a device.

use std::{
    cmp::Reverse,
    collections::HashMap,
    fmt, io, mem,
    os::fd::{AsFd, OwnedFd},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    time::{Duration, Instant},
};

use nbd_proto::{Handshake, Negotiated, Offer, Position, Step, limits::OPTIONS_MAX};
use nix::{
    errno::Errno,
    fcntl::{FcntlArg, OFlag, fcntl},
    sys::eventfd::EventFd,
};

use crate::{
    continuation::{Continuation, Unsent},
    end,
    end::End,
    handover::{Connection, Greeted, Handover, Pause},
    limits::Limits,
    listener::{self, Listener, Obstacle},
    observe::{Book, protocol},
    peer::{Party, Peer},
    poll::{Interest, Poll, Readiness},
    received::{Received, STAGING_MIN},
    roster::{View, Views},
    seat::Ticket,
    stream::Stream,
    tls::{Shaking, Tls},
    worker::{Arrival, Handle, Phase, least_loaded},
};

/// The accepting thread's state.
pub(crate) struct Door {
    poll: Poll,
    /// Indexed by number.
    listeners: Vec<Option<Ear>>,
    views: Arc<Views>,
    workers: Arc<[Handle]>,
    book: Arc<Book>,
    guests: Vec<Option<Guest>>,
    bell: Arc<EventFd>,
    pauses: mpsc::Receiver<Pause<Lobby>>,
    stop: Arc<AtomicBool>,
    limits: Limits,
    end: End,
    staging: Box<[u8]>,
    /// The door accepts no client until then: the process had no descriptors left.
    closed_until: Option<Instant>,
    turned_away: Seldom,
    cut_off: Seldom,
    closed: Seldom,
}

/// A listening socket.
struct Ear {
    socket: Arc<OwnedFd>,
    /// The poll set contains it.
    watched: bool,
}

/// A connection in its handshake.
struct Guest {
    stream: Stream,
    /// The TLS configuration that the server offered this client.
    tls: Option<Tls>,
    /// The TLS handshake in progress.
    shaking: Option<Shaking>,
    peer: Peer,
    /// Dropped at the end of the connection, which the receiver notices.
    over: Option<mpsc::Sender<()>>,
    handshake: Handshake,
    /// All that the client has sent, for a handover; `None`: that is too much.
    heard: Option<Vec<u8>>,
    /// Bytes to be sent.
    out: Vec<u8>,
    /// Bytes that came after the last option.
    sent: Vec<u8>,
    ending: Option<Ending>,
    /// Options that wait for a device that is dead.
    paused: Option<Vec<u8>>,
    /// They wait until then.
    patience: Instant,
    deadline: Instant,
    /// When the client last sent something; at first, when it connected.
    active: Instant,
}

/// What happens to a guest once `out` is sent.
enum Ending {
    Serve(Box<Negotiated>, Ticket),
    StartTls,
    Close,
}

const BELL: u64 = u64::MAX;
/// Set in the tokens of listeners. The token of a guest is its number.
const LISTENER: u64 = 1 << 32;

/// Bytes received at a time. Options are short; data after the last one is limited to this.
const STAGING: usize = STAGING_MIN;

/// Most bytes of a handshake that are kept for a handover: no usual client sends so many.
const HEARD_MAX: usize = 64 << 10;

/// Options that a client may send for each export, in addition to a fixed number for each client.
const OPTIONS_EACH: u32 = 8;

/// When the server has no room for another connection, it disconnects a client that has been silent in its handshake for this
/// long. Otherwise a silent client keeps its place until the handshake times out.
const SILENT: Duration = Duration::from_secs(1);

/// Interval of looks at a device that a client waits for.
const RETRY: Duration = Duration::from_millis(100);

/// A client that waits for a device gets its error this long before the handshake times out.
const NOTICE: Duration = Duration::from_secs(1);

/// Pause before the next accept when the process has no descriptors left.
const PAUSE: Duration = Duration::from_millis(100);

impl Door {
    /// `pauses` is looked at when `bell` rings.
    pub(crate) fn new(
        views: Arc<Views>,
        (workers, book): (Arc<[Handle]>, Arc<Book>),
        (bell, pauses): (Arc<EventFd>, mpsc::Receiver<Pause<Lobby>>),
        stop: Arc<AtomicBool>,
        limits: Limits,
        end: End,
    ) -> io::Result<Self> {
        let poll = Poll::new()?;
        poll.add_level(&*bell, BELL)?;
        Ok(Self {
            poll,
            listeners: Vec::new(),
            views,
            workers,
            book,
            guests: Vec::new(),
            bell,
            pauses,
            stop,
            limits,
            end,
            staging: vec![0; STAGING].into_boxed_slice(),
            closed_until: None,
            turned_away: Seldom::default(),
            cut_off: Seldom::default(),
            closed: Seldom::default(),
        })
    }

    /// Takes a source of connections.
    pub(crate) fn open_to(&mut self, listener: Listener) -> io::Result<()> {
        match listener {
            Listener::Listening(socket) => self.listen(Arc::new(socket))?,
            Listener::Connected { socket, over } => {
                let peer = listener::prepare(socket.as_fd())?;
                self.receive(socket, peer, Some(over));
            }
        }
        Ok(())
    }

    /// Accepts connections from a listening socket.
    pub(crate) fn listen(&mut self, socket: Arc<OwnedFd>) -> io::Result<()> {
        let flags = OFlag::from_bits_retain(fcntl(&socket, FcntlArg::F_GETFL)?);
        fcntl(&socket, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        self.poll.add_level(&socket, LISTENER | self.listeners.len() as u64)?;
        self.listeners.push(Some(Ear { socket, watched: true }));
        Ok(())
    }

    /// Continues a handshake that another process has begun.
    pub(crate) fn resume(&mut self, greeted: Greeted) {
        let Greeted { socket, tls, heard, unsent } = greeted;
        let peer = Peer::of(socket.as_fd());
        let mut guest = self.guest(socket.into(), peer, None);
        if policy(guest.tls.as_ref()) != tls {
            return log::info!("{} was disconnected: the TLS setting changed during its handshake", guest.peer);
        }
        // The client has got the replies already; only the state that they leave matters.
        let (view, mut replies) = (self.views.look(), Vec::new());
        let seen = view.exports.seen_by(&guest.peer, false);
        let stands = matches!(guest.handshake.next(&mut &heard[..], &seen, &mut replies), Ok(Step::More));
        drop(view);
        if !stands {
            return log::info!("{} was disconnected: the exports changed during its handshake", guest.peer);
        }
        (guest.heard, guest.out) = (Some(heard), unsent);
        self.admit(guest);
    }

    pub(crate) fn run(mut self) {
        while !self.stop.load(Ordering::Relaxed) {
            if let Err(e) = self.turn() {
                log::error!("the server accepts no more connections: {e}");
                return;
            }
        }
    }

    fn turn(&mut self) -> io::Result<()> {
        let now = Instant::now();
        let retry = |guest: &Guest| if guest.paused.is_some() { now + RETRY } else { guest.deadline };
        let guests = self.guests.iter().flatten();
        let deadlines = guests.map(|guest| guest.deadline.min(retry(guest))).chain(self.closed_until);
        let timeout = deadlines.min().map(|t| t.saturating_duration_since(now));
        let events: Vec<Readiness> = self.poll.wait(timeout)?.collect();
        // The wait may have been long.
        let now = Instant::now();
        for event in events {
            if event.token == BELL {
                let _ = self.bell.read();
                while let Ok(pause) = self.pauses.try_recv() {
                    self.pause(&pause);
                }
            } else if event.token & LISTENER != 0 {
                self.accept((event.token & !LISTENER) as usize, event.ended);
            } else {
                let number = event.token as usize;
                if let Some(guest) = self.guests[number].as_mut().filter(|_| event.readable) {
                    guest.active = now;
                }
                self.talk(number);
            }
        }
        for number in 0..self.guests.len() {
            if self.guests[number].as_ref().is_some_and(|guest| guest.paused.is_some()) {
                self.talk(number);
            }
        }
        let now = Instant::now();
        for number in 0..self.guests.len() {
            if let Some(guest) = self.guests[number].take_if(|g| g.deadline <= now) {
                let limit = self.limits.handshake_timeout;
                log::info!("{} did not finish its handshake within {limit:?}: disconnected", guest.peer);
            }
        }
        if self.closed_until.is_some_and(|t| t <= now) {
            self.open();
        }
        Ok(())
    }

    /// `ended`: the listening socket will have no further connections after the pending ones.
    fn accept(&mut self, number: usize, ended: bool) {
        // An earlier event of this turn may have closed the door.
        let Some(ear) = self.listeners[number].as_ref().filter(|_| self.closed_until.is_none()) else { return };
        match listener::accept(ear.socket.as_fd()) {
            Ok(socket) => match listener::prepare(socket.as_fd()) {
                Ok(peer) => self.receive(socket, peer, None),
                Err(e) => log::debug!("a client was disconnected before its handshake: {e}"),
            },
            // On some sockets that were shut down, accept(2) only returns EAGAIN.
            Err(Obstacle::None) if ended => self.give_up(number, &Errno::EINVAL.into()),
            Err(Obstacle::None | Obstacle::Gone) => {}
            // The connection stays in the backlog. If another client was disconnected for it, the next turn accepts it.
            Err(Obstacle::Room(_)) if self.make_room(SILENT) => {}
            Err(Obstacle::Room(e) | Obstacle::Other(e)) => {
                if let Some(times) = self.closed.due() {
                    log::warn!("cannot accept a connection: {e}{times}");
                }
                self.close();
            }
            Err(Obstacle::Dead(e)) => self.give_up(number, &e.into()),
        }
    }

    /// Accepts no client for a while. Without the pause the door would spin.
    fn close(&mut self) {
        for ear in self.listeners.iter_mut().flatten().filter(|ear| ear.watched) {
            // If this fails, events of the socket are ignored.
            ear.watched = self.poll.remove(&ear.socket).is_err();
        }
        self.closed_until = Some(Instant::now() + PAUSE);
    }

    fn open(&mut self) {
        self.closed_until = None;
        for (number, ear) in self.listeners.iter_mut().enumerate() {
            let Some(ear) = ear.as_mut().filter(|ear| !ear.watched) else { continue };
            match self.poll.add_level(&ear.socket, LISTENER | number as u64) {
                Ok(()) => ear.watched = true,
                Err(e) => {
                    if let Some(times) = self.closed.due() {
                        log::warn!("cannot wait for connections, will retry: {e}{times}");
                    }
                    self.closed_until = Some(Instant::now() + PAUSE);
                }
            }
        }
        if self.closed_until.is_some() {
            // All or none: `accept` relies on that.
            self.close();
        }
    }

    /// Closes a listening socket that can never return another connection.
    fn give_up(&mut self, number: usize, error: &io::Error) {
        log::error!("a listening socket is unusable and was closed: {error}");
        if let Some(ear) = self.listeners[number].take() {
            // Another process may hold a descriptor for the socket. Then closing ours would not end its events.
            let _ = self.poll.remove(&ear.socket);
        }
        if self.listeners.iter().all(Option::is_none) {
            self.end.failed(format_args!("no listening socket is left: {error}"));
        }
    }

    /// Begins a handshake, if there is room for one more or room can be made.
    fn receive(&mut self, socket: OwnedFd, peer: Peer, over: Option<mpsc::Sender<()>>) {
        let served: usize = self.workers.iter().filter(|worker| worker.is_alive()).map(Handle::load).sum();
        let shaking = self.guests.iter().flatten().count();
        let fits = (shaking < self.limits.handshakes || self.make_room(Duration::ZERO))
            && (self.guests.iter().flatten().count() + served < self.limits.connections || self.make_room(SILENT));
        if !fits {
            if let Some(times) = self.turned_away.due() {
                log::warn!("{peer} was rejected: {shaking} clients are in their handshake, {served} are served{times}");
            }
            return;
        }
        let guest = self.guest(socket.into(), peer, over);
        self.admit(guest);
    }

    /// A client whose handshake begins.
    fn guest(&self, stream: Stream, peer: Peer, over: Option<mpsc::Sender<()>>) -> Guest {
        let mut out = Vec::new();
        let view = self.views.look();
        let tls = view.tls.clone();
        let exports = u32::try_from(view.exports.list().len()).unwrap_or(u32::MAX);
        drop(view);
        let offer = Offer {
            tls: policy(tls.as_ref()),
            block_size_required: self.limits.block_size_required,
            options_max: OPTIONS_MAX.saturating_add(exports.saturating_mul(OPTIONS_EACH)),
            ..OFFER
        };
        let handshake = Handshake::new(offer, &mut out);
        let (sent, active) = (Vec::new(), Instant::now());
        let deadline = active + self.limits.handshake_timeout;
        let patience = deadline - NOTICE.min(self.limits.handshake_timeout / 4);
        let (shaking, ending, paused, heard) = (None, None, None, Some(Vec::new()));
        Guest {
            stream,
            tls,
            shaking,
            peer,
            over,
            handshake,
            heard,
            out,
            sent,
            ending,
            paused,
            patience,
            deadline,
            active,
        }
    }

    fn admit(&mut self, guest: Guest) {
        let number = self.guests.iter().position(Option::is_none).unwrap_or(self.guests.len());
        if let Err(e) = self.poll.add_edge(&guest.stream, number as u64, Interest::Both) {
            if let Some(times) = self.turned_away.due() {
                log::warn!("{} was rejected: cannot wait for its data: {e}{times}", guest.peer);
            }
            return;
        }
        if number == self.guests.len() {
            self.guests.push(None);
        }
        self.guests[number] = Some(guest);
        self.talk(number);
    }

    /// Does nothing until the sender of the orders is dropped. Clients wait in the backlog of the sockets.
    fn pause(&mut self, pause: &Pause<Lobby>) {
        let mut lobby = Lobby::default();
        lobby.state.listeners = self.listeners.iter().flatten().map(|ear| Arc::clone(&ear.socket)).collect();
        for guest in self.guests.iter().flatten() {
            match guest.suspend() {
                Some(Stage::Greeted(greeted)) => lobby.state.guests.push(greeted),
                Some(Stage::Served(connection)) => lobby.state.connections.push(connection),
                None => lobby.leaving += 1,
            }
        }
        let begun = Instant::now();
        if pause.report.send(Ok(lobby)).is_err() {
            return;
        }
        while pause.order(|| self.stop.load(Ordering::Relaxed)).is_some() {}
        // The pause does not count.
        let paused = begun.elapsed();
        self.guests.iter_mut().flatten().for_each(|guest| {
            (guest.deadline, guest.active) = (guest.deadline + paused, guest.active + paused);
        });
    }

    /// Disconnects a client that has been silent in its handshake for at least `silent`, if there is one.
    fn make_room(&mut self, silent: Duration) -> bool {
        let now = Instant::now();
        let guests = self.guests.iter().enumerate().filter_map(|(number, guest)| {
            let guest = guest.as_ref()?;
            let is_silent = now.saturating_duration_since(guest.active) >= silent;
            is_silent.then(|| (number, guest.peer.party(), guest.active))
        });
        let Some(guest) = most_idle(guests).and_then(|number| self.guests[number].take()) else { return false };
        if let Some(times) = self.cut_off.due() {
            let silence = now.saturating_duration_since(guest.active);
            log::info!(
                "{} was disconnected in its handshake after {silence:.1?} of silence, to make room for another client{times}",
                guest.peer
            );
        }
        true
    }

    /// Continues a handshake with the data that has arrived.
    fn talk(&mut self, number: usize) {
        let Some(guest) = &mut self.guests[number] else { return };
        // The handshake asks the device for its size, and that code may panic. The guest is dropped afterwards, so no
        // inconsistent state is left.
        let talked = catch_unwind(AssertUnwindSafe(|| guest.talk(&self.views, &mut self.staging)));
        let talked = talked.unwrap_or_else(|panic| {
            log::error!("{} was rejected: its handshake panicked: {}", guest.peer, end::words(&*panic));
            Err(io::Error::other("its handshake panicked"))
        });
        match talked {
            Ok(false) => {}
            Ok(true) => {
                let guest = self.guests[number].take().expect("just talked to");
                self.hand_over(guest);
            }
            Err(e) => {
                log::debug!("{} was disconnected in its handshake: {e}", guest.peer);
                self.guests[number] = None;
            }
        }
    }

    fn hand_over(&mut self, guest: Guest) {
        let Guest { mut stream, peer, over, sent, ending, .. } = guest;
        let Some(Ending::Serve(negotiated, ticket)) = ending else { return stream.close() };
        if let Err(e) = self.poll.remove(&stream) {
            return log::warn!("{peer} was rejected: {e}");
        }
        if let Err(e) = stream.offload() {
            return log::warn!("{peer} was rejected: {e}");
        }
        let name = &negotiated.export.name;
        let Some(worker) = least_loaded(&self.workers, &ticket) else {
            return log::error!("{peer} was rejected: no worker for export {name:?} is alive");
        };
        log::info!("{peer} opens export {name:?}: {stream:?}");
        let entry = self.book.enter(peer, name.clone(), format!("{stream:?}"), protocol(negotiated.terms.mode));
        worker.welcome(Arrival { stream, phase: Phase::Begins(negotiated, sent), ticket, entry, over });
    }
}

/// A guest that another process can continue.
enum Stage {
    Greeted(Greeted),
    /// Its handshake is over, except for unsent replies.
    Served(Connection),
}

/// The state of a paused door.
#[derive(Debug, Default)]
pub(crate) struct Lobby {
    pub(crate) state: Handover,
    /// Number of clients that no other process can continue.
    pub(crate) leaving: usize,
}

impl Guest {
    /// Returns all that another process needs to continue it; `None`: that is impossible.
    fn suspend(&self) -> Option<Stage> {
        let is_free = self.over.is_none() && self.shaking.is_none() && self.paused.is_none();
        let socket = self.stream.plain().filter(|_| is_free)?;
        let (socket, unsent) = (Arc::clone(socket), self.out.clone());
        match &self.ending {
            None => {
                let (tls, heard) = (policy(self.tls.as_ref()), self.heard.clone()?);
                Some(Stage::Greeted(Greeted { socket, tls, heard, unsent }))
            }
            Some(Ending::Serve(negotiated, _)) => {
                let (terms, position, input) = (negotiated.terms, Position::default(), self.sent.clone());
                let state =
                    Continuation { terms, reads: Vec::new(), position, input, output: vec![Unsent::Bytes(unsent)] };
                Some(Stage::Served(Connection { socket, tls: None, export: negotiated.export.name.clone(), state }))
            }
            Some(Ending::StartTls | Ending::Close) => None,
        }
    }

    /// Returns `true` when the handshake is over, successful or not, and everything is sent.
    fn talk(&mut self, views: &Views, staging: &mut [u8]) -> io::Result<bool> {
        self.check_policy(&views.look())?;
        loop {
            if let Some(mut shaking) = self.shaking.take() {
                if !shaking.go(self.stream.as_fd(), staging)? {
                    self.shaking = Some(shaking);
                    return Ok(false);
                }
                self.peer.identity = self.stream.protect(shaking)?;
                log::debug!("{} uses TLS: {:?}", self.peer, self.stream);
            }
            if !self.stream.send_bytes(&mut self.out, staging)? {
                return Ok(false);
            }
            match (&self.ending, &self.tls) {
                (None, _) => {}
                (Some(Ending::StartTls), Some(tls)) => {
                    self.shaking = Some(tls.begin()?);
                    self.ending = None;
                    continue;
                }
                _ => return Ok(true),
            }
            if let Some(options) = self.paused.take() {
                self.take(&options, views)?;
                if self.paused.is_some() {
                    return Ok(false);
                }
                continue;
            }
            let staged = match self.stream.receive(None, staging) {
                Ok(None) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(Some(Received { staged, .. })) => staged,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(e),
            };
            // The event that led here may have reported only room to send.
            self.active = Instant::now();
            self.heard = self.heard.take().filter(|heard| heard.len() + staged <= HEARD_MAX);
            if let Some(heard) = &mut self.heard {
                heard.extend_from_slice(&staging[..staged]);
            }
            self.take(&staging[..staged], views)?;
            if self.paused.is_some() {
                return Ok(false);
            }
        }
    }

    /// Takes options of the client.
    fn take(&mut self, options: &[u8], views: &Views) -> io::Result<()> {
        let mut input = options;
        let view = views.look();
        self.check_policy(&view)?;
        let seen = view.exports.seen_by(&self.peer, self.handshake.secure());
        let is_patient = seen.may_wait() && Instant::now() < self.patience;
        let before = is_patient.then(|| (self.handshake.clone(), self.out.len()));
        let step = self.handshake.next(&mut input, &seen, &mut self.out).map_err(io::Error::other)?;
        if let Some((handshake, len)) = before.filter(|_| seen.is_awaited()) {
            // As if nothing had been asked: it will be asked again.
            self.handshake = handshake;
            self.out.truncate(len);
            self.paused = Some(options.to_vec());
            return Ok(());
        }
        match step {
            Step::More => {}
            Step::Done(negotiated) => {
                self.sent = input.to_vec();
                let position = seen.position(&negotiated.name).expect("the handshake has just found it in this view");
                let ticket = view.ticket(position);
                self.ending = Some(Ending::Serve(negotiated, ticket));
            }
            // A client must wait for our reply. Data sent earlier could have been injected (CVE-2021-3716).
            Step::StartTls if !input.is_empty() => return Err(io::Error::other("plain text after STARTTLS")),
            Step::StartTls => self.ending = Some(Ending::StartTls),
            Step::Closed => self.ending = Some(Ending::Close),
        }
        Ok(())
    }

    /// Fails if the TLS policy has changed since the handshake began: the present exports may not be meant for a client without
    /// TLS.
    fn check_policy(&self, view: &View) -> io::Result<()> {
        match policy(self.tls.as_ref()) == policy(view.tls.as_ref()) {
            true => Ok(()),
            false => Err(io::Error::other("the TLS setting changed during its handshake")),
        }
    }
}

/// Returns the guest that has been silent for longest among the parties with the most guests.
fn most_idle(guests: impl Iterator<Item = (usize, Party, Instant)>) -> Option<usize> {
    let mut parties: HashMap<Party, (usize, Instant, usize)> = HashMap::new();
    for (number, party, heard) in guests {
        let (count, oldest, idle) = parties.entry(party).or_insert((0, heard, number));
        *count += 1;
        if heard < *oldest {
            (*oldest, *idle) = (heard, number);
        }
    }
    let worst = parties.into_values().max_by_key(|(count, oldest, _)| (*count, Reverse(*oldest)));
    worst.map(|(_, _, number)| number)
}

/// Limits how often a message is logged: clients can cause some events at any rate.
#[derive(Debug, Default)]
struct Seldom {
    last: Option<Instant>,
    unsaid: u32,
}

impl Seldom {
    /// `Some`: log the message now, with the number of messages that were suppressed before it.
    fn due(&mut self) -> Option<Unsaid> {
        let now = Instant::now();
        if self.last.is_some_and(|last| now.saturating_duration_since(last) < Duration::from_secs(1)) {
            self.unsaid = self.unsaid.saturating_add(1);
            return None;
        }
        self.last = Some(now);
        Some(Unsaid(mem::take(&mut self.unsaid)))
    }
}

/// The number of suppressed messages.
struct Unsaid(u32);

impl fmt::Display for Unsaid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            0 => Ok(()),
            count => write!(f, " ({count} more before that)"),
        }
    }
}

/// The TLS policy for the handshake.
fn policy(tls: Option<&Tls>) -> nbd_proto::Tls {
    tls.map_or(OFFER.tls, Tls::policy)
}

/// The offer that is the same for every client.
const OFFER: Offer = Offer {
    structured: true,
    extended: true,
    tls: nbd_proto::Tls::Off,
    block_size_required: false,
    enforce_alignment: false,
    options_max: OPTIONS_MAX,
};

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;

    #[test]
    fn the_most_idle_guest_of_the_most_crowded_party_is_chosen() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let ip = |text: &str| Party::Ip(text.parse::<IpAddr>().unwrap());
        let pick = |guests: &[(Party, u64)]| {
            most_idle(guests.iter().enumerate().map(|(number, (party, heard))| (number, *party, at(*heard))))
        };
        assert_eq!(pick(&[]), None);
        assert_eq!(pick(&[(Party::User(1), 5)]), Some(0));
        // A party with a single guest keeps it, however idle it is.
        assert_eq!(pick(&[(ip("::1"), 0), (Party::User(1), 7), (Party::User(1), 6), (Party::User(1), 8)]), Some(2));
        assert_eq!(pick(&[(Party::User(1), 0), (ip("::1"), 9), (ip("::1"), 8), (Party::Unknown, 1)]), Some(2));
        // Of two equally crowded parties, the one with the more idle guest.
        assert_eq!(pick(&[(Party::Machine(3), 4), (ip("::1"), 3), (Party::Machine(3), 2), (ip("::1"), 5)]), Some(2));
    }

    #[test]
    fn frequent_events_are_logged_rarely() {
        let mut seldom = Seldom::default();
        assert_eq!(seldom.due().unwrap().to_string(), "");
        assert!(seldom.due().is_none() && seldom.due().is_none());
        seldom.last = seldom.last.map(|last| last - Duration::from_secs(2));
        assert_eq!(seldom.due().unwrap().to_string(), " (2 more before that)");
    }
}
