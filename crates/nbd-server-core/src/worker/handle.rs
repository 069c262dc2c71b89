//! [`Handle`]: the interface of a worker for other threads.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
        mpsc,
    },
};

use blkdev::Channel;
use nbd_proto::Negotiated;
use nix::sys::eventfd::EventFd;

use super::lane::LANE;
use crate::{
    poll::Watch,
    removal::Removal,
    seat::{Seat, Ticket},
    stream::Stream,
};

/// A client whose handshake is done.
#[derive(Debug)]
pub(crate) struct Arrival {
    pub(crate) stream: Stream,
    pub(crate) negotiated: Box<Negotiated>,
    /// Where the client will be served.
    pub(crate) ticket: Ticket,
    /// Bytes that it sent after the last option.
    pub(crate) sent: Vec<u8>,
    /// Kept until nothing of the connection is left.
    pub(crate) over: Option<mpsc::Sender<()>>,
}

/// A message to a worker.
#[derive(Debug)]
pub(super) enum Message {
    Arrival(Arrival),
    /// A channel that the worker serves from now on.
    Open(Arc<Seat>, Box<Channel>),
    /// No new clients come to this lane.
    Retire(usize, Removal),
}

/// The interface of a worker for other threads.
#[derive(Debug)]
pub(crate) struct Handle {
    inbox: mpsc::Sender<Message>,
    bell: Arc<EventFd>,
    /// Number of its connections.
    load: Arc<AtomicUsize>,
    alive: Arc<AtomicBool>,
    watch: Watch,
}

impl Handle {
    pub(super) fn new(
        inbox: mpsc::Sender<Message>,
        bell: Arc<EventFd>,
        load: Arc<AtomicUsize>,
        alive: Arc<AtomicBool>,
        watch: Watch,
    ) -> Self {
        Self { inbox, bell, load, alive, watch }
    }

    /// Whether its thread runs, and serves the clients that are sent to it.
    pub(crate) fn is_alive(&self) -> bool {
        self.alive.load(Ordering::Relaxed)
    }

    /// Number of its connections.
    pub(crate) fn load(&self) -> usize {
        self.load.load(Ordering::Relaxed)
    }

    /// Hands a connection over.
    pub(crate) fn welcome(&self, arrival: Arrival) {
        self.load.fetch_add(1, Ordering::Relaxed);
        arrival.ticket.clients.fetch_add(1, Ordering::Relaxed);
        self.send(Message::Arrival(arrival));
    }

    /// Lets a channel's events wake the worker, before it gets the channel.
    pub(crate) fn watch(&self, lane: usize, channel: &Channel) -> io::Result<()> {
        let fds = [channel.wake_fd(), channel.turn_fd()];
        fds.into_iter().flatten().try_for_each(|fd| self.watch.add_wake(fd, LANE | lane as u64))
    }

    /// Gives it a channel.
    pub(crate) fn open(&self, seat: Arc<Seat>, channel: Channel) {
        self.send(Message::Open(seat, Box::new(channel)));
    }

    /// Makes it release a channel when its clients have gone.
    pub(crate) fn retire(&self, lane: usize, removal: Removal) {
        self.send(Message::Retire(lane, removal));
    }

    /// Sends a message. A worker that has ended does not need it.
    fn send(&self, message: Message) {
        let _ = self.inbox.send(message);
        self.ring();
    }

    /// Wakes it.
    pub(crate) fn ring(&self) -> bool {
        self.bell.write(1).is_ok()
    }
}
