//! [`Handle`]: the interface of a worker for other threads.

use std::{
    io,
    os::fd::OwnedFd,
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
    continuation::Continuation,
    handover::{KernelTls, Pause},
    observe::{Entry, LaneGauges, MemoryView, WorkerGauges, WorkerView},
    poll::Watch,
    removal::Removal,
    seat::{Seat, Ticket},
    stream::Stream,
};

/// A client whose handshake is done.
#[derive(Debug)]
pub(crate) struct Arrival {
    pub(crate) stream: Stream,
    pub(crate) phase: Phase,
    /// Where the client will be served.
    pub(crate) ticket: Ticket,
    /// Its entry in the book of connections.
    pub(crate) entry: Entry,
    /// Kept until nothing of the connection is left.
    pub(crate) over: Option<mpsc::Sender<()>>,
}

/// Where its transmission phase begins.
#[derive(Debug)]
pub(crate) enum Phase {
    /// After the handshake, with the bytes that it sent after the last option.
    Begins(Box<Negotiated>, Vec<u8>),
    /// Where another process has stopped.
    Continues(Box<Continuation>),
}

/// The worker with the fewest connections that serves the seat of a ticket; `None`: none of them is alive.
pub(crate) fn least_loaded<'a>(workers: &'a [Handle], ticket: &Ticket) -> Option<&'a Handle> {
    let living = ticket.workers.iter().map(|n| &workers[*n]).filter(|worker| worker.is_alive());
    living.min_by_key(|worker| worker.load())
}

/// A message to a worker.
#[derive(Debug)]
pub(super) enum Message {
    Arrival(Arrival),
    /// A channel that the worker serves from now on.
    Open(Arc<Seat>, Arc<LaneGauges>, Box<Channel>),
    /// No new clients come to this lane.
    Retire(usize, Removal),
    /// Completes the requests that have begun, and begins no other one until the end of the pause.
    Pause(Pause<Standstill>),
    /// Disconnects the client with this id, on behalf of an operator.
    Disconnect(u64),
}

/// The connections of a paused worker.
#[derive(Debug, Default)]
pub(crate) struct Standstill {
    /// Each with its lane, its socket, and its TLS in the kernel.
    pub(crate) connections: Vec<(usize, Arc<OwnedFd>, Option<KernelTls>, Continuation)>,
    /// Number of those that no other process can continue.
    pub(crate) leaving: usize,
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
    gauges: Arc<WorkerGauges>,
}

impl Handle {
    pub(super) fn new(
        inbox: mpsc::Sender<Message>,
        bell: Arc<EventFd>,
        load: Arc<AtomicUsize>,
        alive: Arc<AtomicBool>,
        watch: Watch,
        gauges: Arc<WorkerGauges>,
    ) -> Self {
        Self { inbox, bell, load, alive, watch, gauges }
    }

    /// The state and the counters of the worker, without those of its queues.
    pub(crate) fn view(&self) -> WorkerView {
        let Self { gauges, .. } = self;
        WorkerView {
            is_alive: self.is_alive(),
            connections: self.load(),
            turns: gauges.turns.get(),
            polls: gauges.polls.get(),
            sleeps: gauges.sleeps.get(),
            busy: gauges.busy(),
            memory: MemoryView::default(),
        }
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
    pub(crate) fn open(&self, seat: Arc<Seat>, gauges: Arc<LaneGauges>, channel: Channel) {
        self.send(Message::Open(seat, gauges, Box::new(channel)));
    }

    /// Makes it pause.
    pub(crate) fn pause(&self, pause: Pause<Standstill>) {
        self.send(Message::Pause(pause));
    }

    /// Makes it release a channel when its clients have gone.
    pub(crate) fn retire(&self, lane: usize, removal: Removal) {
        self.send(Message::Retire(lane, removal));
    }

    /// Makes it disconnect a client, if this worker serves the client.
    pub(crate) fn disconnect(&self, id: u64) {
        self.send(Message::Disconnect(id));
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
