//! [`ReconnectQueue`]: a queue that goes on when its device was opened again.

use std::{
    collections::VecDeque,
    io,
    os::fd::{AsFd, BorrowedFd},
    sync::{Arc, atomic::Ordering},
};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};

use crate::{
    arena::Arena,
    device::{Completion, Op, Queue, Request},
    error::Error,
    peer::Peer,
};

use super::{
    berth::{Berth, Offer},
    shared::{Boarding, Shared},
    track::{At, Track},
};

pub(super) struct ReconnectQueue {
    /// `None`: the device is dead.
    inner: Option<Box<dyn Queue>>,
    /// New requests go to the device.
    is_open: bool,
    /// `None`: changes that were not flushed do not matter.
    track: Option<Track>,
    shared: Arc<Shared>,
    berth: Arc<Berth>,
    generation: u64,
    peer: Option<Arc<Peer>>,
    /// Readable if the queue of the device or the berth's signal is.
    epoll: Epoll,
    /// Requests to send again, in order.
    parked: VecDeque<Request>,
    /// It is counted in [`Shared::resending`].
    is_counted: bool,
    /// Requests that ended without the device.
    ended: Vec<Completion>,
    unfinished: Vec<Request>,
    is_given_up: bool,
    /// Changes were lost: requests of present users fail. At least until the next reap, so that its owner sees it.
    is_lost: bool,
    losses: u32,
    /// The queue of the device has a descriptor.
    can_wake: bool,
}

impl ReconnectQueue {
    pub(super) fn open(shared: &Arc<Shared>, depth: u16) -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let Boarding { berth, queue, generation, peer } = shared.board(depth)?;
        let queue = Self {
            is_open: queue.is_some(),
            can_wake: queue.as_ref().is_none_or(|queue| queue.wake_fd().is_some()),
            inner: queue,
            track: shared.tracks().then(|| Track::new(shared.options.unflushed)),
            shared: Arc::clone(shared),
            berth,
            generation,
            peer,
            epoll,
            parked: VecDeque::new(),
            is_counted: false,
            ended: Vec::new(),
            unfinished: Vec::new(),
            is_given_up: false,
            is_lost: false,
            losses: shared.losses.load(Ordering::Acquire),
        };
        queue.epoll.add(&queue.berth.signal, EpollEvent::new(EpollFlags::EPOLLIN, 0))?;
        queue.watch_inner()?;
        Ok(queue)
    }

    fn watch_inner(&self) -> io::Result<()> {
        if let Some(fd) = self.inner.as_ref().and_then(|inner| inner.wake_fd()) {
            self.epoll.add(fd, EpollEvent::new(EpollFlags::EPOLLIN, 0))?;
        }
        Ok(())
    }

    /// Takes what the device has completed.
    #[inline]
    fn collect(&mut self, done: &mut Vec<Completion>) {
        let start = done.len();
        let Some(inner) = &mut self.inner else { return };
        inner.reap_unfinished(done, &mut self.unfinished);
        let is_dead = inner.is_dead();
        if is_dead {
            take_unsent(done, start, &mut self.unfinished);
        }
        if let Some(track) = &mut self.track {
            let at = At { shared: &self.shared, berth: &self.berth, generation: self.generation };
            let mut again = Vec::new();
            track.note(done, start, &at, &mut again);
            self.parked.extend(again);
            if !is_dead {
                track.flush(&mut **inner, &self.shared);
            }
        }
        if is_dead {
            self.leave();
        }
    }

    /// Leaves a dead device, with the requests in flight.
    #[cold]
    fn leave(&mut self) {
        let Some(inner) = self.inner.take() else { return };
        if let Some(fd) = inner.wake_fd() {
            // Closing it is not enough: a peer may have it too.
            let _ = self.epoll.delete(fd);
        }
        drop(inner);
        self.is_open = false;
        if let Some(track) = &mut self.track {
            track.reset(&mut self.unfinished);
        }
        // Those that wait to be sent again are younger than those that were sent.
        let waiting = std::mem::take(&mut self.parked);
        self.parked.extend(self.unfinished.drain(..));
        self.parked.extend(waiting);
        let memory = self.parked.iter().map(|request| memory_of(&request.op)).sum();
        if !std::mem::replace(&mut self.is_counted, true) {
            self.shared.resending.fetch_add(1, Ordering::AcqRel);
        }
        let mut place = self.berth.place();
        (place.has_left, place.memory, place.peer) = (true, memory, self.peer.clone());
        drop(place);
        self.shared.report_death(self.generation);
    }

    /// While the device is dead, or others have not sent everything again.
    #[cold]
    fn stand_by(&mut self) {
        if self.is_given_up {
            return self.fail_parked(Error::Gone);
        }
        let losses = self.shared.losses.load(Ordering::Acquire);
        if self.losses != losses {
            (self.losses, self.is_lost) = (losses, true);
            return self.fail_parked(Error::Gone);
        }
        if self.inner.is_none() {
            self.is_lost = self.is_lost && self.shared.is_lost.load(Ordering::Acquire);
            let offer = self.berth.place().offer.take();
            match offer {
                Some(offer) => self.join(offer),
                None if self.shared.is_expired.load(Ordering::Acquire) => self.fail_parked(Error::Io),
                None => {}
            }
        }
        self.resend();
    }

    /// Goes on with a queue of the device that was opened again.
    fn join(&mut self, Offer { queue, generation, peer, spare }: Offer) {
        self.inner = Some(queue);
        self.generation = generation;
        let old = std::mem::replace(&mut self.peer, peer);
        // The thread takes back what is not used.
        if old.is_some_and(|old| old.may_live()) {
            self.replace_memory(spare);
        }
        self.shared.ring();
        let mut place = self.berth.place();
        (place.has_left, place.memory, place.peer) = (false, 0, None);
        drop(place);
        if let Err(e) = self.watch_inner() {
            log::error!("{} {}: {e}", self.shared.info.driver, self.shared.info.target);
            self.give_up();
        }
    }

    /// Moves reads to other memory, because the peer of the dead device may still write to theirs. Its reads from the memory of
    /// writes do no harm: the content stays.
    fn replace_memory(&mut self, mut spare: Option<Arena>) {
        for mut request in std::mem::take(&mut self.parked) {
            let moved = match &mut request.op {
                Op::Read { buf, .. } if !buf.is_loan() => {
                    let fresh = spare.as_mut().and_then(|spare| spare.alloc(buf.len()));
                    fresh.is_some_and(|fresh| {
                        std::mem::replace(buf, fresh).abandon();
                        true
                    })
                }
                // Its memory belongs to a longer request.
                Op::Read { .. } => false,
                _ => true,
            };
            if moved {
                self.parked.push_back(request);
            } else {
                self.ended.push(request.lose());
            }
        }
    }

    /// Sends parked requests, as many as the queue takes.
    fn resend(&mut self) {
        let Some(inner) = &mut self.inner else { return };
        let mut has_sent = false;
        while let Some(request) = self.parked.pop_front() {
            let pushed = match &mut self.track {
                Some(track) => track.push(&mut **inner, request, &self.shared),
                None => inner.push(request),
            };
            if let Err(request) = pushed {
                self.parked.push_front(request);
                break;
            }
            has_sent = true;
        }
        if has_sent {
            inner.kick();
        }
        if self.parked.is_empty() {
            if std::mem::take(&mut self.is_counted) {
                self.shared.has_resent();
            }
            self.is_open = self.shared.resending.load(Ordering::Acquire) == 0 && !self.is_given_up;
        }
    }

    fn fail_parked(&mut self, error: Error) {
        for mut request in std::mem::take(&mut self.parked) {
            // The peer may still access its memory. When the device is back, the channel gets other memory anyway.
            if self.peer.is_some() {
                request.op.abandon();
            }
            self.ended.push(request.refuse(error));
        }
        // Nothing is left that new requests could overtake.
        if std::mem::take(&mut self.is_counted) {
            self.shared.has_resent();
        }
    }

    #[cold]
    fn push_closed(&mut self, request: Request) -> Result<(), Request> {
        let error = if self.is_given_up {
            Error::Gone
        } else if self.inner.is_some() {
            return Err(request);
        } else if self.is_lost {
            Error::Gone
        } else if self.shared.is_expired.load(Ordering::Acquire) {
            Error::Io
        } else {
            return Err(request);
        };
        self.ended.push(request.refuse(error));
        Ok(())
    }

    /// Whether a wake-up would come for nothing that is there already.
    #[cold]
    fn arm_closed(&mut self) -> bool {
        if let Some(inner) = &mut self.inner {
            let is_held_back = self.is_given_up || self.shared.resending.load(Ordering::Acquire) > 0;
            return is_held_back && inner.arm();
        }
        let has_news = self.losses != self.shared.losses.load(Ordering::Acquire)
            || self.is_lost != self.shared.is_lost.load(Ordering::Acquire)
            || !self.parked.is_empty() && self.shared.is_expired.load(Ordering::Acquire)
            || self.berth.place().offer.is_some();
        self.is_given_up || !has_news
    }
}

impl Queue for ReconnectQueue {
    #[inline]
    fn push(&mut self, request: Request) -> Result<(), Request> {
        let Some(inner) = self.inner.as_mut().filter(|_| self.is_open) else { return self.push_closed(request) };
        let Some(track) = &mut self.track else { return inner.push(request) };
        if track.admits(&request.op, &self.shared) {
            return track.push(&mut **inner, request, &self.shared);
        }
        track.flush(&mut **inner, &self.shared);
        Err(request)
    }

    #[inline]
    fn kick(&mut self) {
        if let Some(inner) = &mut self.inner {
            inner.kick();
        }
    }

    #[inline]
    fn reap(&mut self, done: &mut Vec<Completion>) {
        self.collect(done);
        if !self.is_open {
            self.stand_by();
        }
        done.append(&mut self.ended);
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        self.can_wake.then(|| self.epoll.0.as_fd())
    }

    fn arm(&mut self) -> bool {
        self.berth.clear();
        if !self.ended.is_empty() {
            return false;
        }
        match &mut self.inner {
            Some(inner) if self.is_open => inner.arm(),
            _ => self.arm_closed(),
        }
    }

    fn give_up(&mut self) {
        self.is_given_up = true;
        self.is_open = false;
        if let Some(inner) = &mut self.inner {
            inner.give_up();
        }
        self.fail_parked(Error::Gone);
    }

    fn is_dead(&self) -> bool {
        self.is_given_up || self.is_lost
    }

    fn recover(&mut self) -> bool {
        if let Some(inner) = &mut self.inner {
            inner.give_up();
        }
        !self.is_given_up
    }

    fn relieve(&mut self) -> bool {
        let is_open = self.is_open;
        self.track.as_mut().is_some_and(|track| {
            // What was kept waits for the device.
            let soon = !is_open | track.shorten(&self.berth);
            if let Some(inner) = &mut self.inner {
                track.flush(&mut **inner, &self.shared);
            }
            soon
        })
    }

    fn relieves(&self) -> bool {
        self.track.as_ref().is_some_and(|track| !self.is_open || track.shortens())
    }

    fn describe(&self) -> String {
        let parked = self.parked.len();
        match &self.inner {
            None => format!("reconnecting: {parked} requests wait for the device"),
            Some(inner) if parked > 0 => format!("{}; {parked} requests are still to be sent again", inner.describe()),
            Some(inner) => inner.describe(),
        }
    }

    fn losses(&self) -> u32 {
        self.losses
    }
}

impl Drop for ReconnectQueue {
    fn drop(&mut self) {
        self.is_given_up = true;
        // Drains what is in flight.
        self.inner = None;
        self.fail_parked(Error::Gone);
        self.shared.leave(&self.berth);
    }
}

/// Moves requests that a dead device has never seen to the others.
#[cold]
fn take_unsent(done: &mut Vec<Completion>, start: usize, unfinished: &mut Vec<Request>) {
    let is_whole = |op: &Op| !matches!(op, Op::Read { buf, .. } | Op::Write { buf, .. } if buf.is_empty());
    let unsent = done.extract_if(start.., |c| c.result == Err(Error::Gone) && is_whole(&c.op));
    unfinished.extend(unsent.map(|Completion { tag, op, .. }| Request { tag, op }));
}

/// Memory that a read needs if it must move, in bytes.
fn memory_of(op: &Op) -> usize {
    match op {
        Op::Read { buf, .. } if !buf.is_loan() => buf.len().next_multiple_of(crate::arena::PAGE),
        _ => 0,
    }
}
