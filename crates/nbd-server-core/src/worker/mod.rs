//! [`Worker`]: one thread that moves bytes between its connections and its channels, in turns.
//!
//! A turn takes data from all readable clients (only as much as fits the cache, where that helps), rings each device once, takes
//! completions from the devices and sends the replies. So under load everything happens in batches, without a lock, an allocation
//! or another thread. [`Turns`] decides the order of the connections.

mod conn;
mod floor;
mod handle;
mod lane;
mod pause;

use std::{
    io,
    os::fd::AsFd,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
        mpsc,
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use blkdev::{
    Channel, socket,
    thread::{Role, spawn},
};
use nix::sys::{eventfd::EventFd, prctl};

use crate::{
    end::End,
    limits::Limits,
    observe::WorkerGauges,
    poll::{Poll, Readiness, bell},
    turns::Turns,
};
use conn::{Conn, Why};
use floor::Floor;
use handle::Message;
pub(crate) use handle::{Arrival, Handle, Phase, least_loaded};
use lane::{LANE, Lane, Step, WIND_UP};

/// The token of the bell.
const BELL: u64 = u64::MAX;

/// Interval of checks of all requests in flight.
const PATROL: Duration = Duration::from_secs(1);

/// Idle time after which unused memory is freed.
const TIDY: Duration = Duration::from_secs(2);

/// One thread's connections and channels.
struct Worker {
    poll: Poll,
    inbox: mpsc::Receiver<Message>,
    bell: Arc<EventFd>,
    stop: Arc<AtomicBool>,
    turns: Turns,
    floor: Floor,
    /// Number of lanes that are being removed.
    leaving: usize,
    closers: mpsc::Sender<JoinHandle<()>>,
    now: Instant,
    swept: Instant,
    tidied: Instant,
    /// Since when the worker has had nothing to do.
    idle: Option<Instant>,
    stall_timeout: Duration,
    farewell: Duration,
    slow: Option<Duration>,
    /// Time of the next patrol, if it is active then.
    patrol_at: Instant,
    /// Something has happened since the last patrol, or a request is in flight.
    is_active: bool,
    gauges: Arc<WorkerGauges>,
    /// When the last sleep ended, if no turn has begun since.
    woken: Option<Instant>,
}

/// Starts a worker. `closers` receives the threads that close its devices. If the worker ends too early, it reports that to
/// `end`.
///
/// # Errors
/// No descriptors or threads left.
pub(crate) fn start(
    name: String,
    limits: &Limits,
    stop: &Arc<AtomicBool>,
    closers: mpsc::Sender<JoinHandle<()>>,
    end: &End,
) -> io::Result<(Handle, JoinHandle<()>)> {
    let (sender, inbox) = mpsc::channel();
    let (poll, bell, load) = (Poll::new()?, Arc::new(bell()?), Arc::new(AtomicUsize::new(0)));
    poll.add_level(&*bell, BELL)?;
    let alive = Arc::new(AtomicBool::new(true));
    let now = Instant::now();
    let gauges = Arc::new(WorkerGauges::default());
    let (rings, loads, lives) = (Arc::clone(&bell), Arc::clone(&load), Arc::clone(&alive));
    let handle = Handle::new(sender, rings, loads, lives, poll.watch(), Arc::clone(&gauges));
    let worker = Worker {
        poll,
        inbox,
        bell,
        stop: Arc::clone(stop),
        turns: Turns::default(),
        floor: Floor::new(limits, load),
        leaving: 0,
        closers,
        now,
        swept: now,
        tidied: now,
        idle: None,
        stall_timeout: limits.stall_timeout,
        farewell: limits.farewell,
        slow: limits.slow,
        patrol_at: now,
        is_active: false,
        gauges,
        woken: None,
    };
    let (end, stop) = (end.clone(), Arc::clone(stop));
    let thread = spawn(Role::Worker, name.clone(), move || {
        end.watch(&name, &stop, || {
            let _death = Death(alive);
            worker.run();
        });
    })?;
    Ok((handle, thread))
}

/// Marks the worker dead when dropped, even after a panic.
struct Death(Arc<AtomicBool>);

impl Drop for Death {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Relaxed);
    }
}

impl Worker {
    fn run(mut self) {
        // The default timer slack would make the sleeps of `Coalesce` longer than intended. A failure has no other effect.
        let _ = prctl::set_timerslack(1);
        self.gauges.begin();
        while !self.stop.load(Ordering::Relaxed) {
            self.turn();
            self.rest();
            if let Err(e) = self.wait() {
                log::error!("a worker cannot wait for events: {e}");
                break;
            }
        }
        self.wind_up();
    }

    fn turn(&mut self) {
        self.now = self.woken.take().unwrap_or_else(Instant::now);
        self.gauges.turns.add(1);
        self.floor.tick(self.now);
        if !self.turns.is_empty() {
            self.idle = None;
        }
        self.turns.round(&mut self.floor);
        if self.idle.is_none() && self.floor.is_busy() {
            // A request may end in the turn in which it began. Its latency is the time between.
            self.now = Instant::now();
            self.floor.tick(self.now);
            self.is_active = true;
        }
        if self.floor.reap(&mut self.turns) > 0 {
            self.idle = None;
            self.is_active = true;
        }
        self.floor.output(&self.poll, &mut self.turns);
        if self.now.duration_since(self.swept) >= Turns::interval(self.stall_timeout) {
            self.sweep();
        }
        if self.floor.is_untidy && self.now.duration_since(self.tidied) >= TIDY {
            self.tidied = self.now;
            self.floor.tidy();
        }
        if self.leaving > 0 {
            self.let_go();
        }
        if self.is_active && self.now >= self.patrol_at {
            self.patrol_at = self.now + PATROL;
            self.floor.patrol(self.now, self.slow);
            self.is_active = self.floor.is_busy();
        }
    }

    /// Disconnects clients that are too slow while others wait for their memory.
    fn sweep(&mut self) {
        self.swept = self.now;
        for number in self.turns.sweep(self.now, self.stall_timeout, &mut self.floor) {
            log::warn!(
                "a client was disconnected: others wait for the memory of its WRITE, and at its pace it would need longer than \
                 {:?} to send the payload",
                self.stall_timeout
            );
            self.floor.bury(number, &mut self.turns, Why::TooSlow);
        }
    }

    /// If a lone client has unread replies and no request in flight, pauses so that it can read them.
    fn rest(&mut self) {
        let Some(number) = self.floor.behind.take() else { return };
        if self.turns.is_empty()
            && self.floor.load.load(Ordering::Relaxed) == 1
            && let Some(Conn { coalesce: Some(coalesce), stream: Some(stream), session, .. }) =
                &mut self.floor.conns[number as usize]
            && session.in_flight() == 0
        {
            coalesce.rest(|| socket::unread(stream.as_fd()) > 0);
        }
    }

    /// Whether to busy-poll instead of sleeping, with nothing to do.
    fn spins(&mut self) -> bool {
        let awaits_device = self.floor.lanes.iter().flatten().any(|lane| lane.channel.in_flight() > 0);
        let idle = *self.idle.get_or_insert(self.now);
        self.now.duration_since(idle) < self.floor.spin.time(awaits_device)
    }

    /// Waits until there is something to do; only polls if there already is.
    fn wait(&mut self) -> io::Result<()> {
        let timeout = if !self.turns.is_empty() {
            Some(Duration::ZERO)
        } else if self.spins() {
            // Other threads on this CPU, such as the client or the device, go first.
            thread::yield_now();
            self.gauges.polls.add(1);
            Some(Duration::ZERO)
        } else {
            self.timeout()
        };
        if timeout != Some(Duration::ZERO) {
            self.gauges.sleeps.add(1);
        }
        let mut rung = false;
        for Readiness { token, readable, ended } in self.poll.wait(timeout)? {
            if token == BELL {
                rung = true;
            } else if token & LANE == 0
                && let Some(conn) = &mut self.floor.conns[token as usize]
            {
                conn.readable |= readable;
                conn.ended |= ended;
                // A blocked connection waits for nothing else.
                conn.writable |= conn.blocked;
                self.turns.enqueue(token as u32);
            }
        }
        if timeout != Some(Duration::ZERO) {
            let now = Instant::now();
            if let Some(idle) = self.idle {
                self.floor.spin.slept(now.duration_since(idle));
            }
            self.woken = Some(now);
        }
        if rung {
            let _ = self.bell.read();
            // The sleep may have been long.
            self.now = Instant::now();
            while let Ok(message) = self.inbox.try_recv() {
                self.hear(message);
            }
        }
        Ok(())
    }

    /// Returns the time to sleep, with nothing to do. Arms the devices for a wake-up.
    fn timeout(&mut self) -> Option<Duration> {
        let tidy = || TIDY.saturating_sub(self.now.duration_since(self.tidied));
        let patrol = || self.patrol_at.saturating_duration_since(self.now);
        let mut timeout = sooner(self.floor.is_untidy.then(tidy), self.is_active.then(patrol));
        for (number, lane) in self.floor.lanes.iter_mut().enumerate() {
            let Some(lane) = lane else { continue };
            if lane.cancels {
                return Some(Duration::ZERO);
            }
            if lane.channel.awaits_device() {
                if !lane.channel.arm() {
                    return Some(Duration::ZERO);
                }
                timeout = sooner(timeout, lane.channel.due());
            }
            // If a device refuses all requests, requests that wait for memory get their errors at once.
            let unused = || if lane.channel.refuses() { usize::MAX } else { lane.channel.memory_unused() };
            timeout = sooner(timeout, self.turns.due(number, unused, self.stall_timeout));
            let deadline = lane.leaving.as_ref().and_then(|leaving| leaving.deadline);
            timeout = sooner(timeout, deadline.map(|deadline| deadline.saturating_duration_since(self.now)));
        }
        timeout
    }

    fn hear(&mut self, message: Message) {
        match message {
            Message::Arrival(arrival) => {
                let lane = arrival.ticket.lane;
                if let Some(number) = self.floor.welcome(arrival, &self.poll) {
                    self.turns.enter(number, lane);
                    self.turns.enqueue(number);
                }
            }
            Message::Pause(pause) => self.pause(&pause),
            Message::Open(seat, gauges, channel) => {
                self.turns.open(seat.lane, channel.depth());
                self.floor.open(seat, gauges, *channel);
            }
            Message::Disconnect(id) => {
                if let Some(number) = self.floor.find(id) {
                    self.floor.bury(number, &mut self.turns, Why::Ended);
                }
            }
            Message::Retire(lane, removal) => {
                let farewell = self.now + self.farewell;
                self.leaving += usize::from(self.floor.retire(lane, removal, farewell, &mut self.turns));
            }
        }
    }

    /// Takes the next steps of all lanes that are being removed.
    fn let_go(&mut self) {
        for number in 0..self.floor.lanes.len() {
            while let Some(lane) = &mut self.floor.lanes[number] {
                match lane.step(self.now) {
                    Step::Nothing => break,
                    Step::CutOff => {
                        log::warn!("{} clients of a removed export did not leave: disconnected", lane.clients);
                        self.floor.bury_all(number, &mut self.turns, || Why::Removed);
                    }
                    Step::GiveUp => {
                        log::warn!(
                            "{}: the device did not complete its requests in time: abandoned",
                            lane.channel.info().target
                        );
                        lane.channel.give_up();
                    }
                    Step::Close => {
                        let Lane { channel, seat, .. } = self.floor.lanes[number].take().expect("checked above");
                        self.turns.close(number);
                        self.leaving -= 1;
                        // A thread that finds the device closed must find the export gone.
                        drop(seat);
                        self.close(channel);
                    }
                }
            }
        }
    }

    /// Closes a channel on another thread. Closing a device can take long, and other clients must not wait for it.
    fn close(&self, channel: Channel) {
        for fd in [channel.wake_fd(), channel.turn_fd()].into_iter().flatten() {
            // Closing the descriptor would do the same, unless a duplicate of it exists.
            let _ = self.poll.remove(fd);
        }
        match spawn(Role::Helper, "closing", move || drop(channel)) {
            Ok(thread) => drop(self.closers.send(thread)),
            Err(e) => log::warn!("cannot start a thread to close a device, so clients had to wait for it: {e}"),
        }
    }

    /// Closes all connections, and lets the devices complete their requests, in bounded time.
    fn wind_up(&mut self) {
        for number in 0..self.floor.conns.len() as u32 {
            self.floor.bury(number, &mut self.turns, Why::Stopping);
        }
        let (start, mut done) = (Instant::now(), Vec::new());
        for lane in self.floor.lanes.iter_mut().flatten() {
            lane.channel.cancel(|_| true);
            while lane.channel.in_flight() > 0 && start.elapsed() < WIND_UP {
                lane.channel.reap(&mut done);
                done.clear();
                thread::sleep(Duration::from_millis(1));
            }
            if lane.channel.in_flight() > 0 {
                log::warn!(
                    "{}: the device did not complete its requests in time: abandoned",
                    lane.channel.info().target
                );
                lane.channel.give_up();
                lane.channel.reap(&mut done);
                done.clear();
            }
        }
    }
}

/// The shorter of two optional times.
fn sooner(one: Option<Duration>, other: Option<Duration>) -> Option<Duration> {
    [one, other].into_iter().flatten().min()
}
