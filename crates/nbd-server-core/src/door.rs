//! The door: accepts connections and shakes hands, on one thread, away from the workers. It never touches a device.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    time::{Duration, Instant},
};

use nbd_proto::{Handshake, Negotiated, Offer, Step};
use nix::{errno::Errno, sys::eventfd::EventFd};
use rustix::io::ioctl_fionbio;

use crate::{
    Limits, Listener, Peer, listener,
    poll::{Happened, Interest, Poll},
    roster::{Ticket, View, lock},
    stream::{Received, STAGING_MIN, Stream},
    tls::{Shaking, Tls},
    worker::{Arrival, Handle},
};

/// The accepting thread's state.
pub(crate) struct Door {
    poll: Poll,
    listeners: Vec<OwnedFd>,
    view: Arc<Mutex<View>>,
    workers: Arc<[Handle]>,
    guests: Vec<Option<Guest>>,
    bell: Arc<EventFd>,
    stop: Arc<AtomicBool>,
    limits: Limits,
    staging: Box<[u8]>,
    /// Until when nobody is let in: there were no descriptors left.
    closed_until: Option<Instant>,
}

/// A connection in its handshake.
struct Guest {
    stream: Stream,
    /// What it was offered.
    tls: Option<Tls>,
    /// TLS that is being agreed on.
    shaking: Option<Shaking>,
    peer: Peer,
    /// Whoever waits for its end sees that this is dropped.
    over: Option<mpsc::Sender<()>>,
    handshake: Handshake,
    /// What is still to be sent.
    out: Vec<u8>,
    /// What came after the last option.
    sent: Vec<u8>,
    ending: Option<Ending>,
    deadline: Instant,
}

/// What becomes of a guest when `out` is sent.
enum Ending {
    Serve(Box<Negotiated>, Ticket),
    StartTls,
    Close,
}

const BELL: u64 = u64::MAX;
/// Tokens of listeners have this bit; those of guests are their numbers.
const LISTENER: u64 = 1 << 32;

/// Received at a time. Options are short, and what comes after them is bounded by this.
const STAGING: usize = STAGING_MIN;

/// How long to wait when there are no descriptors left for another connection.
const PAUSE: Duration = Duration::from_millis(100);

impl Door {
    pub(crate) fn new(
        listeners: Vec<Listener>,
        view: Arc<Mutex<View>>,
        workers: Arc<[Handle]>,
        bell: Arc<EventFd>,
        stop: Arc<AtomicBool>,
        limits: Limits,
    ) -> io::Result<Self> {
        let poll = Poll::new()?;
        poll.add_level(&*bell, BELL)?;
        let mut door = Self {
            poll,
            listeners: Vec::new(),
            view,
            workers,
            guests: Vec::new(),
            bell,
            stop,
            limits,
            staging: vec![0; STAGING].into_boxed_slice(),
            closed_until: None,
        };
        for listener in listeners {
            match listener {
                Listener::Listening(socket) => {
                    ioctl_fionbio(&socket, true)?;
                    door.poll.add_level(&socket, LISTENER | door.listeners.len() as u64)?;
                    door.listeners.push(socket);
                }
                Listener::Connected { socket, over } => {
                    let peer = listener::prepare(socket.as_fd())?;
                    door.receive(socket, peer, Some(over))?;
                }
            }
        }
        Ok(door)
    }

    pub(crate) fn run(mut self) {
        while !self.stop.load(Ordering::Relaxed) {
            if let Err(e) = self.turn() {
                log::error!("no more connections are accepted: {e}");
                return;
            }
        }
    }

    fn turn(&mut self) -> io::Result<()> {
        let now = Instant::now();
        let deadlines = self.guests.iter().flatten().map(|g| g.deadline).chain(self.closed_until);
        let timeout = deadlines.min().map(|t| t.saturating_duration_since(now));
        let happened: Vec<Happened> = self.poll.wait(timeout)?.collect();
        for event in happened {
            if event.token == BELL {
                let _ = self.bell.read();
            } else if event.token & LISTENER != 0 {
                self.accept((event.token & !LISTENER) as usize)?;
            } else {
                self.talk(event.token as usize);
            }
        }
        let now = Instant::now();
        for number in 0..self.guests.len() {
            if let Some(guest) = self.guests[number].take_if(|g| g.deadline <= now) {
                let limit = self.limits.handshake_timeout;
                log::info!("{} did not finish its handshake within {limit:?}: cut off", guest.peer);
            }
        }
        if self.closed_until.is_some_and(|t| t <= now) {
            self.closed_until = None;
            for (n, listener) in self.listeners.iter().enumerate() {
                self.poll.add_level(listener, LISTENER | n as u64)?;
            }
        }
        Ok(())
    }

    fn accept(&mut self, listener: usize) -> io::Result<()> {
        let (socket, peer) = match listener::accept(self.listeners[listener].as_fd()) {
            Ok(accepted) => accepted,
            Err(e) if is_out_of_room(&e) => {
                // The connection stays in the backlog; without a pause this loop would only spin.
                log::warn!("cannot accept a connection: {e}");
                if self.closed_until.is_none() {
                    for listener in &self.listeners {
                        self.poll.remove(listener)?;
                    }
                    self.closed_until = Some(Instant::now() + PAUSE);
                }
                return Ok(());
            }
            // The client has gone again, or somebody else took it.
            Err(_) => return Ok(()),
        };
        self.receive(socket, peer, None)
    }

    /// Begins a handshake, if there is room for one more.
    fn receive(&mut self, socket: OwnedFd, peer: Peer, over: Option<mpsc::Sender<()>>) -> io::Result<()> {
        let number = self.guests.iter().position(Option::is_none).unwrap_or(self.guests.len());
        let served: usize = self.workers.iter().map(Handle::load).sum();
        let shaking = self.guests.iter().flatten().count();
        if shaking >= self.limits.handshakes || shaking + served >= self.limits.connections {
            log::warn!("{peer} was turned away: {shaking} are in their handshake, {served} are served");
            return Ok(());
        }
        let mut out = Vec::new();
        let tls = lock(&self.view).tls.clone();
        let handshake = Handshake::new(
            Offer { tls: policy(tls.as_ref()), block_size_required: self.limits.block_size_required, ..OFFER },
            &mut out,
        );
        let deadline = Instant::now() + self.limits.handshake_timeout;
        self.poll.add_edge(&socket, number as u64, Interest::Both)?;
        let (stream, sent) = (socket.into(), Vec::new());
        let guest = Guest { stream, tls, shaking: None, peer, over, handshake, out, sent, ending: None, deadline };
        if number == self.guests.len() {
            self.guests.push(None);
        }
        self.guests[number] = Some(guest);
        self.talk(number);
        Ok(())
    }

    /// Goes on with a handshake as far as the client has.
    fn talk(&mut self, number: usize) {
        let Some(guest) = &mut self.guests[number] else { return };
        let talked = guest.talk(&lock(&self.view), &mut self.staging);
        match talked {
            Ok(false) => {}
            Ok(true) => {
                let guest = self.guests[number].take().expect("just talked to");
                self.hand_over(guest);
            }
            Err(e) => {
                log::debug!("{} was dropped in its handshake: {e}", guest.peer);
                self.guests[number] = None;
            }
        }
    }

    fn hand_over(&mut self, guest: Guest) {
        let Guest { mut stream, peer, over, sent, ending, .. } = guest;
        let Some(Ending::Serve(negotiated, ticket)) = ending else { return stream.close(&mut self.staging) };
        if let Err(e) = self.poll.remove(&stream) {
            return log::warn!("{peer} was turned away: {e}");
        }
        if let Err(e) = stream.offload() {
            return log::warn!("{peer} was turned away: {e}");
        }
        log::info!("{peer} opens export {:?}: {stream:?}", negotiated.export.name);
        if let Some(worker) = ticket.workers.iter().map(|n| &self.workers[*n]).min_by_key(|worker| worker.load()) {
            worker.welcome(Arrival { stream, negotiated, ticket, sent, over });
        }
    }
}

impl Guest {
    /// `true`: the handshake is over, one way or the other, and all is sent.
    fn talk(&mut self, view: &View, staging: &mut [u8]) -> io::Result<bool> {
        // What is there now may be meant for nobody without TLS.
        if policy(self.tls.as_ref()) != policy(view.tls.as_ref()) {
            return Err(io::Error::other("it began before TLS was switched on or off"));
        }
        loop {
            if let Some(mut shaking) = self.shaking.take() {
                if !shaking.go(self.stream.as_fd(), staging)? {
                    self.shaking = Some(shaking);
                    return Ok(false);
                }
                self.peer.identity = self.stream.protect(shaking)?;
                log::debug!("{} is under TLS: {:?}", self.peer, self.stream);
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
            let staged = match self.stream.receive(None, staging) {
                Ok(None) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(Some(Received { staged, .. })) => staged,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(e),
            };
            let mut input = &staging[..staged];
            let seen = view.exports.seen_by(&self.peer, self.handshake.secure());
            match self.handshake.next(&mut input, &seen, &mut self.out).map_err(io::Error::other)? {
                Step::More => {}
                Step::Done(negotiated) => {
                    self.sent = input.to_vec();
                    let position =
                        seen.position(&negotiated.name).expect("the handshake has just found it in this view");
                    let ticket = view.ticket(position);
                    self.ending = Some(Ending::Serve(negotiated, ticket));
                }
                // Nobody may send before the answer: what somebody did may have been put there by somebody else.
                Step::StartTls if !input.is_empty() => return Err(io::Error::other("plain text after STARTTLS")),
                Step::StartTls => self.ending = Some(Ending::StartTls),
                Step::Closed => self.ending = Some(Ending::Close),
            }
        }
    }
}

/// What the handshake is to say of TLS.
fn policy(tls: Option<&Tls>) -> nbd_proto::Tls {
    tls.map_or(OFFER.tls, Tls::policy)
}

/// What every client is offered.
const OFFER: Offer = Offer {
    structured: true,
    extended: true,
    tls: nbd_proto::Tls::Off,
    block_size_required: false,
    enforce_alignment: false,
};

/// Whether the system has nothing left for another connection.
fn is_out_of_room(error: &io::Error) -> bool {
    let errno = error.raw_os_error().map(Errno::from_raw);
    matches!(errno, Some(Errno::EMFILE | Errno::ENFILE | Errno::ENOBUFS | Errno::ENOMEM))
}
