//! [`World`]: everything that happens in a run.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    time::{Duration, Instant},
};

use blkdev::{
    Device,
    fault::{Fault, Faults, Rng},
    memory::Memory,
};
use nbd_proto::{
    Cookie, WireError,
    wire::{CommandFlags as Flags, CommandKind as Kind, TransmissionFlags as T},
};
use nbd_server_core::Exports;

use crate::{
    client::{Client, Request},
    disk::{DEVICE, Disk, WORKERS, export, plan},
    worker::{Lane, Seat, Worker},
};

pub(crate) struct World {
    pub(crate) rng: Rng,
    /// Each is an export. Only the first one can have faults.
    pub(crate) disks: Vec<Disk>,
    pub(crate) workers: Vec<Worker>,
    /// All clients that ever were.
    pub(crate) clients: Vec<Client>,
    /// Number of requests that the clients have still to send.
    budget: u32,
    habits: Habits,
    /// The time that the workers see.
    now: Instant,
    /// For bytes on their way.
    piece: Vec<u8>,
}

/// What the clients of a run are like.
struct Habits {
    /// How often a request is a READ, as long as any.
    greed: f64,
    /// How often a client takes no replies although it could, while it sends requests.
    sloth: f64,
    /// How many of them stop, of all clients.
    stops: f64,
    /// Least length of a client's socket, in bytes.
    socket: usize,
    /// How much time passes between the turns of the workers, in milliseconds; now and then, more does.
    step: u64,
    /// Most clients at a time that enter an export with it …
    crowd: u64,
    /// … and at all workers, later.
    present: usize,
}

impl Habits {
    fn new(rng: &mut Rng) -> Self {
        Self {
            greed: *rng.pick(&[0.0, 0.3, 0.8]),
            sloth: *rng.pick(&[0.0, 0.5, 0.9]),
            stops: *rng.pick(&[0.0, 0.1, 0.3]),
            socket: 1,
            step: *rng.pick(&[1, 5, 100, 600]),
            crowd: *rng.pick(&[4, 4, 12]),
            present: *rng.pick(&[8, 16]),
        }
    }
}

impl World {
    pub(crate) fn new(seed: u64, worsen: fn(&mut Rng, &mut Faults)) -> Self {
        let mut world = Self::empty(seed);
        let workers = *world.rng.pick(&[1, 1, 2, 3, WORKERS]) as usize;
        world.workers.resize_with(workers, Worker::default);
        world.add(worsen);
        for _ in 0..*world.rng.pick(&[0, 0, 1, 2]) {
            world.add(|_, _| {});
        }
        world
    }

    /// A server with many clients at one or two workers.
    pub(crate) fn throng(seed: u64) -> Self {
        let mut world = Self::empty(seed);
        (world.habits.crowd, world.habits.socket) = (world.rng.range(20, 100), 500);
        world.habits.sloth = *world.rng.pick(&[0.5, 0.9]);
        world.budget = 600;
        let workers = world.rng.range(1, 3) as usize;
        world.workers.resize_with(workers, Worker::default);
        world.add(|_, _| {});
        world
    }

    fn empty(seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let (budget, habits) = (rng.range(20, 400) as u32, Habits::new(&mut rng));
        let (disks, workers, clients) = (Vec::new(), Vec::new(), Vec::new());
        Self { rng, disks, workers, clients, budget, habits, now: Instant::now(), piece: vec![0; 64 << 10] }
    }

    /// Adds an export, with its lanes and its clients.
    fn add(&mut self, worsen: fn(&mut Rng, &mut Faults)) {
        let mut disk = Disk::new(&mut self.rng, worsen);
        let (count, of) = (self.rng.range(1, self.workers.len() as u64 + 1) as usize, self.workers.len());
        let first = self.rng.below(of as u64) as usize;
        let number = self.disks.len();
        disk.lane = (0..).find(|&lane| self.disks.iter().all(|disk| disk.is_closed || disk.lane != lane)).unwrap();
        disk.workers = (first..first + count).map(|n| n % of).collect();
        for (&worker, (channel, kept)) in disk.workers.iter().zip(disk.open(count)) {
            self.workers[worker].open(disk.lane, number, channel, kept);
        }
        self.disks.push(disk);
        for _ in 0..self.rng.range(1, self.habits.crowd + 1) {
            self.enter(number);
        }
    }

    /// A client enters.
    fn enter(&mut self, disk: usize) {
        let Disk { lane, workers, exports, faulty, .. } = &self.disks[disk];
        let worker = *self.rng.pick(workers);
        let number = self.workers[worker].number();
        let seat = Seat { disk, worker, lane: *lane, number };
        // A panic of the driver turns the client away, as it does at the door.
        let talk = AssertUnwindSafe(|| Client::shake_hands(exports, seat, &mut self.rng));
        match catch_unwind(talk) {
            Ok(mut client) => {
                client.is_stopped = self.rng.chance(self.habits.stops);
                client.socket_len = client.socket_len.max(self.habits.socket);
                self.workers[worker].enter(self.clients.len(), number, *lane);
                self.clients.push(client);
            }
            Err(_) => assert!(faulty, "a handshake failed"),
        }
    }

    /// The export is removed, and its clients are disconnected.
    fn remove(&mut self, disk: usize) {
        self.disks[disk].is_removed = true;
        for n in 0..self.clients.len() {
            if self.clients[n].seat.disk == disk {
                self.kill(n);
            }
        }
    }

    /// Closes the lanes of removed exports, once no client has a request there.
    fn close_lanes(&mut self) {
        for number in 0..self.disks.len() {
            let disk = &self.disks[number];
            if !disk.is_removed || disk.is_closed {
                continue;
            }
            let lane = disk.lane;
            for worker in disk.workers.clone() {
                let worker = &mut self.workers[worker];
                if worker.is_between() && !worker.has_clients(lane, &self.clients) {
                    let lane = worker.close(lane);
                    lane.into_iter().for_each(|lane| self.check_memory(lane));
                }
            }
            let disk = &self.disks[number];
            let is_closed = disk.workers.iter().all(|&worker| self.workers[worker].lanes[lane].is_none());
            self.disks[number].is_closed = is_closed;
        }
    }

    fn check_memory(&self, lane: Lane) {
        let Lane { channel, kept, disk, .. } = lane;
        drop(kept);
        assert!(self.disks[disk].faulty || channel.memory_free() == channel.memory(), "every buffer came back");
    }

    /// A server with 1 MiB of memory and `count` clients.
    pub(crate) fn crowd(seed: u64, count: usize) -> Self {
        Self::with(seed, count, 32)
    }

    /// The same, with a queue for `depth` requests.
    pub(crate) fn with(seed: u64, count: usize, depth: u16) -> Self {
        let mut world = Self::empty(seed);
        let mut disk = Disk::new(&mut world.rng, |_, _| {});
        let device: Arc<dyn Device> = Arc::<Fault<Memory>>::clone(&disk.device);
        let mut channels = plan(1 << 20, 128 << 10, depth).open(&device, 1).unwrap();
        world.workers.push(Worker::default());
        world.workers[0].open(0, 0, channels.remove(0), Vec::new());
        disk.exports = Exports::new(vec![export(device, false)], 1 << 20).unwrap();
        disk.workers = vec![0];
        world.disks.push(disk);
        (0..count).for_each(|_| world.enter(0));
        world.clients.iter_mut().for_each(|client| client.is_stopped = false);
        world
    }

    /// Clients take most of the memory, with one request each, and do nothing more. Returns the first client without memory.
    pub(crate) fn take_memory(&mut self, kind: Kind, len: u64) -> usize {
        for n in 0.. {
            if self.workers[0].lane(0).memory_free() < len as usize {
                return n;
            }
            self.clients[n].socket_len = 1;
            self.clients[n].request(kind, 0, len);
            self.arrive(n, usize::MAX);
            self.sleep();
        }
        unreachable!("the memory is bounded")
    }

    pub(crate) fn run(mut self) {
        for step in 0.. {
            assert!(step < 200_000, "everything ends");
            if self.budget > 0 && self.rng.chance(0.5) {
                self.ask();
            }
            if self.rng.chance(0.015) {
                self.come_and_go();
            }
            self.close_lanes();
            let n = self.any_client();
            if self.rng.chance(0.02) {
                // As if other clients waited for its memory.
                self.clients[n].session.reclaim();
                self.workers[self.clients[n].seat.worker].ring();
            }
            if self.rng.chance(0.01) {
                self.hand_over(n);
            }
            if self.rng.chance(0.002) {
                self.sleep();
                if self.rng.chance(0.5) {
                    (0..self.clients.len()).for_each(|n| self.hand_over(n));
                }
            }
            match self.rng.below(4) {
                0 | 1 => self.deliver(n),
                2 if self.budget > 0 && self.rng.chance(self.habits.sloth) => {}
                2 => self.collect(n),
                _ => self.work(),
            }
            if self.budget == 0 && self.is_over() {
                break;
            }
        }
        self.check_the_end();
    }

    fn hand_over(&mut self, n: usize) {
        if !self.clients[n].gone {
            self.workers[self.clients[n].seat.worker].hand_over(n, &mut self.clients);
        }
    }

    /// Most often one that is connected.
    fn any_client(&mut self) -> usize {
        let mut n = 0;
        for _ in 0..5 {
            n = self.rng.below(self.clients.len() as u64) as usize;
            if !self.clients[n].gone {
                break;
            }
        }
        n
    }

    /// A client vanishes, breaks the protocol, leaves or enters, or an export is removed or added.
    fn come_and_go(&mut self) {
        self.free_ranges();
        let n = self.any_client();
        let disk = self.rng.below(self.disks.len() as u64) as usize;
        let client = &mut self.clients[n];
        match self.rng.below(20) {
            0..6 if !client.goodbye => self.kill(n),
            6..8 if client.can_ask() => {
                client.is_broken = true;
                client.wire.extend_from_slice(&[0xff; 64]);
            }
            8..10 if client.can_ask() && client.requests.is_empty() => client.say_goodbye(),
            10..16 => self.enter_if_possible(disk),
            16 => self.remove(disk),
            17 if self.disks.iter().filter(|disk| !disk.is_removed).count() < 4 => self.add(|_, _| {}),
            18 => {
                // Its export is removed softly.
                client.refused = true;
                client.session.refuse();
                self.workers[client.seat.worker].ring();
            }
            _ => {}
        }
    }

    /// Requests of clients that have gone have ended: others may touch their ranges. A silent device may execute them later.
    fn free_ranges(&mut self) {
        let has_ended = |client: &Client| client.gone && client.session.in_flight() == 0;
        for disk in self.disks.iter_mut().filter(|disk| !disk.silent) {
            disk.model.busy.retain(|&(n, _), _| !has_ended(&self.clients[n]));
        }
    }

    /// A client enters an export that is there, unless there are many.
    fn enter_if_possible(&mut self, disk: usize) {
        let present = self.clients.iter().filter(|client| !client.gone).count();
        if self.budget > 0 && !self.disks[disk].is_removed && present < self.habits.present {
            self.enter(disk);
        }
    }

    /// All requests are sent, and all have their replies. Clients that have stopped go on when the others have theirs.
    fn is_over(&mut self) -> bool {
        for client in self.clients.iter_mut().filter(|client| client.can_ask() && client.requests.is_empty()) {
            client.say_goodbye();
        }
        let is_over = |client: &Client| client.gone && client.session.in_flight() == 0;
        if !self.clients.iter().all(|client| is_over(client) || client.is_stopped) {
            return false;
        }
        self.clients.iter_mut().for_each(|client| client.is_stopped = false);
        self.clients.iter().all(is_over)
    }

    /// A client creates a random request.
    fn ask(&mut self) {
        let n = self.any_client();
        let rng = &mut self.rng;
        let client = &mut self.clients[n];
        if !client.can_ask() {
            self.budget -= u32::from(rng.chance(0.1));
            return;
        }
        let kind = *rng.pick(&[
            Kind::READ,
            Kind::READ,
            Kind::WRITE,
            Kind::WRITE,
            Kind::WRITE_ZEROES,
            Kind::TRIM,
            Kind::FLUSH,
            Kind::CACHE,
            Kind::BLOCK_STATUS,
            Kind(77),
        ]);
        let disk = &mut self.disks[client.seat.disk];
        let is_greedy = rng.chance(self.habits.greed);
        let kind = if is_greedy { Kind::READ } else { kind };
        let longest = if is_greedy { disk.longest } else { *rng.pick(&[600, 9000, 40_000, disk.longest]) };
        let mut len = rng.range(if is_greedy { longest / 2 } else { 1 }, longest);
        let mut at = rng.below(DEVICE - len);
        if rng.chance(0.4) {
            // Aligned, as most requests of real clients are.
            (at, len) = (at & !4095, len.next_multiple_of(4096).min(DEVICE - (at & !4095)));
        }
        if rng.chance(0.02) {
            at = DEVICE - len / 2;
        }
        let fua = rng.chance(0.2);
        let terms = client.session.terms();
        let mut flags = Flags::NONE.with_if(fua, Flags::FUA);
        if kind == Kind::WRITE_ZEROES {
            flags = flags
                .with_if(rng.chance(0.5), Flags::NO_HOLE)
                .with_if(rng.chance(0.3) && terms.flags.contains(T::SEND_FAST_ZERO), Flags::FAST_ZERO);
        }
        if kind == Kind::READ {
            flags = flags.with_if(rng.chance(0.2) && terms.flags.contains(T::SEND_DF), Flags::DF);
        }
        if kind == Kind::BLOCK_STATUS {
            flags = flags.with_if(rng.chance(0.3), Flags::REQ_ONE);
        }
        if kind == Kind::FLUSH || kind == Kind(77) {
            (at, len) = (0, 0);
        }
        let changes = matches!(kind, Kind::WRITE | Kind::WRITE_ZEROES | Kind::TRIM);
        let expected = match kind {
            Kind(77) => Some(WireError::Inval),
            Kind::BLOCK_STATUS if terms.contexts.is_empty() => Some(WireError::Inval),
            _ if changes && terms.flags.contains(T::READ_ONLY) => Some(WireError::Perm),
            Kind::TRIM if !terms.flags.contains(T::SEND_TRIM) => Some(WireError::Inval),
            Kind::WRITE | Kind::WRITE_ZEROES if at + len > DEVICE => Some(WireError::NoSpc),
            _ if at + len > DEVICE => Some(WireError::Inval),
            _ => None,
        };
        if expected.is_none() && !disk.model.is_free(at, len, changes) {
            self.budget -= u32::from(rng.chance(0.1));
            return;
        }
        let (cookie, mut data) = (client.next, Vec::new());
        client.next += 1;
        client.encoder.request(&mut client.wire, Cookie(cookie), kind, flags, at, len);
        if kind == Kind::WRITE {
            data = vec![0; len as usize];
            rng.fill(&mut data);
            client.wire.extend_from_slice(&data);
        }
        if expected.is_none() {
            disk.model.busy.insert((n, cookie), (at, len, changes));
        }
        client.requests.insert(cookie, Request { kind, at, len, flags, data, expected });
        self.budget -= 1;
    }

    /// Delivers some bytes of a client to its session, as a socket would.
    fn deliver(&mut self, n: usize) {
        let longest = *self.rng.pick(&[1, 40, 5000, 100_000]);
        let len = self.rng.range(0, longest) as usize + 1;
        if !self.clients[n].is_stopped {
            self.arrive(n, len);
        }
    }

    /// Moves `len` bytes of a client to the server.
    pub(crate) fn arrive(&mut self, n: usize, len: usize) {
        let client = &mut self.clients[n];
        let len = len.min(client.wire.len());
        if client.gone || len == 0 {
            return;
        }
        client.arrived.extend(client.wire.drain(..len));
        self.workers[client.seat.worker].enqueue(client.seat.number);
    }

    /// A client takes `len` bytes of its replies, and the server learns that there is room for more.
    pub(crate) fn take(&mut self, n: usize, len: usize) -> Vec<u8> {
        let client = &mut self.clients[n];
        let len = len.min(client.socket.len());
        if len > 0 && client.is_blocked && !client.gone {
            self.workers[client.seat.worker].enqueue(client.seat.number);
        }
        client.socket.drain(..len).collect()
    }

    /// Runs turns in which no client does anything: once the devices have completed everything, all workers must come to rest.
    pub(crate) fn sleep(&mut self) {
        let mut idle = 0;
        while idle < 100 {
            if self.workers.iter().all(Worker::is_at_rest) {
                return;
            }
            if self.workers.iter().any(|worker| worker.in_flight() > 0) {
                idle = 0;
                self.turn();
            } else {
                idle += 1;
                self.turn_now();
            }
        }
        panic!("the worker never sleeps");
    }

    /// A turn of each worker.
    pub(crate) fn turn(&mut self) {
        self.now += Duration::from_millis(self.rng.below(600));
        self.turn_now();
    }

    fn turn_now(&mut self) {
        for worker in 0..self.workers.len() {
            self.workers[worker].ring();
            self.advance(worker);
            while !self.workers[worker].is_between() {
                self.advance(worker);
            }
        }
    }

    /// Steps of some workers, in any order.
    fn work(&mut self) {
        let step = if self.rng.chance(0.05) { 600 } else { self.habits.step };
        self.now += Duration::from_millis(self.rng.below(step));
        for _ in 0..self.rng.range(1, 1 + 4 * self.workers.len() as u64) {
            let worker = self.rng.below(self.workers.len() as u64) as usize;
            self.advance(worker);
        }
    }

    fn advance(&mut self, worker: usize) {
        self.workers[worker].advance(&mut self.clients, self.now, &mut self.piece);
        self.bury(worker);
    }

    /// A client vanishes.
    fn kill(&mut self, n: usize) {
        let client = &self.clients[n];
        let worker = client.seat.worker;
        if !client.gone {
            self.workers[worker].bury(n, &mut self.clients);
            self.bury(worker);
        }
    }

    /// Clients were disconnected, whose requests may still be executed: for now, no other request may touch their ranges.
    fn bury(&mut self, worker: usize) {
        for n in self.workers[worker].take_ended() {
            let client = &mut self.clients[n];
            let model = &mut self.disks[client.seat.disk].model;
            for (cookie, request) in client.requests.drain() {
                model.forget(&request);
                if let Some((.., changes)) = model.busy.get_mut(&(n, cookie)) {
                    *changes = true;
                }
            }
        }
    }

    fn check_the_end(mut self) {
        for worker in std::mem::take(&mut self.workers) {
            assert!(worker.is_empty(), "every client has left");
            for lane in worker.lanes.into_iter().flatten() {
                assert_eq!(lane.channel.in_flight(), 0);
                self.check_memory(lane);
            }
        }
        assert!(self.clients.iter().all(|client| client.gone), "every request was answered");
        for disk in &self.disks {
            let mut content = vec![0; DEVICE as usize];
            disk.device.device().read(0, &mut content);
            disk.model.must_hold(0, &content);
        }
    }
}
