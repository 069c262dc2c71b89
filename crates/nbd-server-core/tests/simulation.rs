//! Simulates a whole server without sockets and without a clock: clients, sessions, the policy of a worker ([`Turns`]), channels,
//! and devices that complete requests out of order. A seed drives everything, and a model checks it.
//!
//! Each seed makes one to three exports with other devices (block sizes, limits, capabilities), other protocol modes, another set of
//! faults, and several clients of each at once. Their bytes arrive and leave in pieces of any size; some clients vanish in the middle
//! of a request; exports are added and removed. Only the first export has faults, and the others must not notice. In every run, each
//! request of a living client gets exactly one reply, which is correct; acknowledged data is there; no buffer is lost; the worker
//! sleeps while nothing happens; and everything ends.
//!
//! TLS has a simulation of its own: the fuzz target `tls_session`, which the tests of `tls::fuzz` replay.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use blkdev::{
    Channel, Device, Done, Plan,
    fault::{Bug, Errors, Fault, Faults, Rng},
    memory::Memory,
};
use nbd_proto::{
    Cookie, Handshake, Mode, Offer, WireError,
    client::{self, Chunk, Decoder, Encoder, Negotiation, Wish},
    wire::{CommandFlags as Flags, CommandKind as Kind, TransmissionFlags as T},
};
use nbd_server_core::{Connections, Export, Exports, Fed, Grant, Peer, Progress, Session, Turns};

fn plan(memory: usize, reserve: usize, depth: u16) -> Plan {
    let mut plan = Plan::new(memory);
    (plan.reserve, plan.depth) = (reserve, depth);
    plan
}

#[test]
fn orderly_devices() {
    run_seeds(0, 5000, |_, _| {});
}

#[test]
fn failing_devices() {
    run_seeds(1, 2000, |rng, faults| {
        let some = rng.below(20) as f64 / 100.0;
        faults.errors =
            Errors { read: some, write: some, zero: some, discard: some, flush: some, status: some, prefetch: some };
        faults.torn = rng.chance(0.5);
    });
}

#[test]
fn dying_devices() {
    run_seeds(2, 1500, |rng, faults| faults.death = Some(rng.below(200)));
}

/// Some requests are never completed by the device. They must end all the same, and so must all requests behind them.
#[test]
fn silent_devices() {
    run_seeds(3, 1000, |rng, faults| faults.lost = 0.001 + rng.below(20) as f64 / 1000.0);
}

/// A driver that panics causes errors for its clients, and nothing else.
#[test]
fn faulty_drivers() {
    run_seeds(4, 500, |rng, faults| {
        let bug = *rng.pick(&[Bug::Panic, Bug::PanicOfDevice]);
        faults.bug = Some((1 + rng.below(100), bug));
    });
}

/// If many clients request long replies and read none of them, others get replies, and no client is disconnected.
#[test]
fn greedy_clients_do_not_delay_others() {
    for seed in 40_000..40_300 {
        let greedy = Rng::new(seed).range(1, 60) as usize;
        let mut world = World::crowd(seed, greedy + 1);
        for n in 0..greedy {
            for _ in 0..world.rng.range(1, 100) {
                let (client, len) = (&mut world.floor.clients[n], world.rng.range(17 << 10, DEVICE - 1));
                client.request(Kind::READ, 0, len);
            }
        }
        world.floor.clients[greedy].socket_len = 10 << 20;
        let has_contexts = !world.floor.clients[greedy].session.terms().contexts.is_empty();
        let long = (Kind::READ, 200 << 10);
        let requests =
            [(Kind::READ, 4096), long, (Kind::FLUSH, 0), (Kind::WRITE_ZEROES, 4096), (Kind::BLOCK_STATUS, 4096)];
        let (count, mut taken) = (if has_contexts { 5 } else { 4 }, 0);
        for n in 0..=greedy {
            let honest = n == greedy;
            for &(kind, len) in requests[..count].iter().filter(|_| honest) {
                world.floor.clients[n].request(kind, 0, len);
            }
            world.arrive(n, usize::MAX);
            for _ in 0..if honest { 2000 } else { 20 } {
                let client = &mut world.floor.clients[greedy];
                if taken > 0 && client.is_served() {
                    break;
                }
                world.turn();
                taken += world.take(greedy, usize::MAX).len();
            }
        }
        world.sleep();
        assert!(world.floor.clients.iter().all(|client| !client.gone), "seed {seed}: no client is disconnected");
        assert!(world.floor.clients[greedy].is_served(), "seed {seed}: the honest client is served");
        assert!(taken >= 16 * count, "seed {seed}: and gets its replies");
    }
}

/// If many clients fill the queue with requests, those of a later client do not wait behind all of them.
#[test]
fn a_flood_of_requests_does_not_fill_the_queue() {
    for seed in 50_000..50_050 {
        let mut rng = Rng::new(seed);
        let (depth, count) = (rng.range(1, 32) as u16, rng.range(1, 60) as usize);
        let mut world = World::with(seed, count, depth);
        // Unaligned zeroes wait for each other before they reach the queue.
        let (kind, at, len) =
            *world.rng.pick(&[(Kind::FLUSH, 0, 0), (Kind::READ, 0, 512), (Kind::WRITE_ZEROES, 1, 100)]);
        for client in &mut world.floor.clients {
            (0..500).for_each(|_| client.request(kind, at, len));
        }
        for _ in 0..200 {
            (0..count).for_each(|n| world.arrive(n, usize::MAX));
            world.turn();
            let most = (1..=count).map(|n| 2 * usize::from(depth) / n + 1).sum::<usize>() + 2 * usize::from(depth);
            let in_flight = world.floor.lane(0).in_flight();
            assert!(
                in_flight <= most,
                "seed {seed}: {in_flight} in flight of {count} clients, the queue takes {depth}"
            );
        }
        let busiest = world.floor.clients.iter().map(|client| client.session.in_flight()).max().unwrap();
        assert!(busiest <= 2 * usize::from(depth) + 1, "seed {seed}: {busiest} of one client");
    }
}

/// If many requests wait for memory that is held by a WRITE without its payload, the worker sleeps. Requests that need no memory
/// get replies, as long as their client does not have too many.
#[test]
fn a_worker_sleeps_while_requests_wait_for_memory() {
    for seed in 60_000..60_100 {
        let mut world = World::crowd(seed, 50);
        let last = world.take_memory(Kind::WRITE, 100 << 10);
        let count = *world.rng.pick(&[1, 1000, 1023, 1024, 1025, 1500]);
        let has_flush = world.rng.chance(0.5);
        let client = &mut world.floor.clients[last];
        client.socket_len = 10 << 20;
        (0..count).for_each(|_| client.request(Kind::READ, 0, 100 << 10));
        if has_flush {
            client.request(Kind::FLUSH, 0, 0);
        }
        world.arrive(last, usize::MAX);
        world.sleep();
        let flushed = world.take(last, usize::MAX).len() >= 16;
        assert_eq!(flushed, has_flush && count < 1024, "seed {seed}: {count} READs wait");
        // Time passes, and the writers are disconnected.
        while !world.floor.clients[..last].iter().all(|client| client.gone) {
            world.turn();
        }
        while !world.floor.clients[last].is_served() {
            world.turn();
            world.take(last, usize::MAX);
        }
    }
}

/// Clients that do not read replies must give up memory, so that a client with long requests gets more than the rest.
#[test]
fn memory_of_stopped_clients_is_given_to_others() {
    for seed in 70_000..70_100 {
        let mut world = World::crowd(seed, 50);
        let last = world.take_memory(Kind::READ, 60 << 10);
        let client = &mut world.floor.clients[last];
        client.socket_len = 10 << 20;
        (0..400).for_each(|_| client.request(Kind::READ, 0, 50 << 10));
        world.arrive(last, usize::MAX);
        let mut most = 0;
        while !world.floor.clients[last].is_served() {
            world.turn();
            world.take(last, usize::MAX);
            most = most.max(world.floor.clients[last].session.in_flight());
        }
        assert!(most >= 8, "seed {seed}: no more than {most} READs in flight");
        assert!(world.floor.clients.iter().all(|client| !client.gone), "seed {seed}: no client is disconnected");
    }
}

fn export(device: Arc<dyn Device>, read_only: bool) -> Export {
    let mut export = Export::new("disk", device);
    export.read_only = read_only;
    export
}

/// Runs `count` seeds of a group, 10,000 in all groups; or, for long runs, so many times as many as `SIMULATION_TIMES` says.
fn run_seeds(group: u64, count: u64, worsen: fn(&mut Rng, &mut Faults)) {
    let times = std::env::var("SIMULATION_TIMES").map_or(1, |times| times.parse().expect("a number"));
    let first = group << 32;
    for seed in first..first + count * times {
        // A panic reports the seed, which is enough to reproduce it.
        let result = std::panic::catch_unwind(|| World::new(seed, worsen).run());
        assert!(result.is_ok(), "seed {seed} fails");
    }
}

struct World {
    rng: Rng,
    /// Each is an export. Only the first one can have faults.
    disks: Vec<Disk>,
    floor: Floor,
    /// The policy of a worker, unchanged.
    turns: Turns,
    /// Number of requests that the clients have still to send.
    budget: u32,
    /// The time that the channels see.
    now: Instant,
}

/// An export with its device.
struct Disk {
    device: Arc<Fault<Memory>>,
    exports: Exports,
    plan: Plan,
    model: Model,
    /// The longest of the requests of its clients, in bytes.
    longest: u64,
    faulty: bool,
    /// Its export was removed, and its clients were disconnected.
    is_removed: bool,
}

/// The state that a worker serves.
struct Floor {
    /// By lane. `None`: closed.
    channels: Vec<Option<Channel>>,
    clients: Vec<Client>,
}

/// The expected content of the device: each byte has one value, or any.
struct Model {
    bytes: Vec<Option<u8>>,
    /// Ranges of requests in flight, by client and cookie, and whether they change data. Two overlap only if both read.
    busy: HashMap<(usize, u64), (u64, u64, bool)>,
}

struct Client {
    session: Session,
    disk: usize,
    lane: usize,
    mode: Mode,
    encoder: Encoder,
    decoder: Decoder,
    requests: HashMap<u64, Request>,
    next: u64,
    /// Encoded requests, not yet at the server.
    wire: Vec<u8>,
    /// Bytes at the server, not yet taken.
    arrived: Vec<u8>,
    /// Replies on their way to the client, with a limited length. The server sends no more until the client takes some.
    socket: Vec<u8>,
    socket_len: usize,
    is_blocked: bool,
    /// There may be replies for it.
    is_active: bool,
    /// The reply that is arriving: its request, and the offset of its next byte.
    incoming: Option<(u64, u64)>,
    goodbye: bool,
    gone: bool,
    /// The server begins no further request of it.
    refused: bool,
}

struct Request {
    kind: Kind,
    at: u64,
    len: u64,
    flags: Flags,
    data: Vec<u8>,
    /// The request is invalid on purpose; this is the expected error.
    expected: Option<WireError>,
}

const DEVICE: u64 = 256 << 10;

/// See `Limits::stall_timeout`.
const STALL_TIMEOUT: Duration = Duration::from_secs(10);

impl Disk {
    fn new(rng: &mut Rng, worsen: fn(&mut Rng, &mut Faults)) -> Self {
        let mut faults = Faults::new(rng.next());
        worsen(rng, &mut faults);
        let silent = faults.lost > 0.0;
        let faulty = silent || faults.death.is_some() || faults.bug.is_some() || faults.errors.read > 0.0;
        let block = *rng.pick(&[1u32, 512, 4096]);
        let memory = Memory::new(DEVICE).with(|info| {
            info.block_size = block;
            info.transfer_max = *rng.pick(&[4096, 12 << 10, 1 << 20]);
            info.zero_max = *rng.pick(&[4096, 64 << 10, u64::MAX]);
            info.discard_max = *rng.pick(&[8192, u64::MAX]);
            info.discard_alignment = block.max(*rng.pick(&[1, 4096]));
            info.queues_max = 4;
            info.timeout = silent.then_some(Duration::from_secs(8));
            let caps = &mut info.caps;
            caps.zero = rng.chance(0.7);
            caps.discard = rng.chance(0.8);
            caps.status = rng.chance(0.7);
            caps.fua = rng.chance(0.5);
            caps.flush = !caps.fua || rng.chance(0.5);
        });
        let mut content = vec![0; DEVICE as usize];
        if rng.chance(0.5) {
            rng.fill(&mut content[..DEVICE as usize / 2]);
            memory.write(0, &content);
        }
        let device = Arc::new(Fault::new(memory, faults));
        let dynamic: Arc<dyn Device> = Arc::<Fault<Memory>>::clone(&device);
        let plan = plan(*rng.pick(&[64 << 10, 256 << 10]), *rng.pick(&[0, 8 << 10]), rng.range(1, 32) as u16);
        let exports = Exports::new(vec![export(dynamic, rng.chance(0.1))], 1 << 20).unwrap();
        let model = Model { bytes: content.into_iter().map(Some).collect(), busy: HashMap::new() };
        // The longest request that fits the memory at any offset. With more memory, reads are long enough to have holes.
        let longest = plan.memory as u64 * 3 / 5;
        Self { device, exports, plan, model, longest, faulty, is_removed: false }
    }
}

impl World {
    fn new(seed: u64, worsen: fn(&mut Rng, &mut Faults)) -> Self {
        let mut rng = Rng::new(seed);
        let budget = rng.range(20, 200) as u32;
        let floor = Floor { channels: Vec::new(), clients: Vec::new() };
        let mut world = Self { rng, disks: Vec::new(), floor, turns: Turns::default(), budget, now: Instant::now() };
        world.add(worsen);
        for _ in 0..*world.rng.pick(&[0, 0, 1, 2]) {
            world.add(|_, _| {});
        }
        world
    }

    /// Adds an export, with its lanes and its clients.
    fn add(&mut self, worsen: fn(&mut Rng, &mut Faults)) {
        let disk = Disk::new(&mut self.rng, worsen);
        let dynamic: Arc<dyn Device> = Arc::<Fault<Memory>>::clone(&disk.device);
        let channels = disk.plan.open(&dynamic, self.rng.range(1, 4) as usize).unwrap();
        let first = self.floor.channels.len();
        for channel in channels {
            self.turns.open(self.floor.channels.len(), channel.depth());
            self.floor.channels.push(Some(channel));
        }
        let lanes = (self.floor.channels.len() - first) as u64;
        self.disks.push(disk);
        for _ in 0..self.rng.range(1, 5) {
            let lane = first + self.rng.below(lanes) as usize;
            self.enter(self.disks.len() - 1, lane);
        }
    }

    /// A client enters.
    fn enter(&mut self, disk: usize, lane: usize) {
        let number = self.floor.clients.len();
        let client = Client::shake_hands(&self.disks[disk].exports, number, disk, lane, &mut self.rng);
        self.floor.clients.push(client);
        self.turns.enter(number as u32, lane);
    }

    /// The export is removed, and its clients are disconnected.
    fn remove(&mut self, disk: usize) {
        self.disks[disk].is_removed = true;
        for n in 0..self.floor.clients.len() {
            if self.floor.clients[n].disk == disk {
                self.kill(n);
            }
        }
    }

    /// Closes the lanes of removed exports, once no client has a request there.
    fn close_lanes(&mut self) {
        for lane in 0..self.floor.channels.len() {
            let clients = || self.floor.clients.iter().filter(|client| client.lane == lane);
            let Some(disk) = clients().map(|client| client.disk).next() else { continue };
            if self.disks[disk].is_removed
                && clients().all(|client| client.session.in_flight() == 0)
                && let Some(channel) = self.floor.channels[lane].take()
            {
                self.turns.close(lane);
                self.check_memory(disk, &channel);
            }
        }
    }

    fn check_memory(&self, disk: usize, channel: &Channel) {
        assert!(self.disks[disk].faulty || channel.memory_free() == channel.memory(), "every buffer came back");
    }

    /// A server with 1 MiB of memory and `count` clients.
    fn crowd(seed: u64, count: usize) -> Self {
        Self::with(seed, count, 32)
    }

    /// The same, with a queue for `depth` requests.
    fn with(seed: u64, count: usize, depth: u16) -> Self {
        let mut world = Self::new(seed, |_, _| {});
        world.disks.truncate(1);
        world.turns = Turns::default();
        world.floor = Floor { channels: Vec::new(), clients: Vec::new() };
        let device: Arc<dyn Device> = Arc::<Fault<Memory>>::clone(&world.disks[0].device);
        let channel = plan(1 << 20, 128 << 10, depth).open(&device, 1).unwrap().remove(0);
        world.turns.open(0, channel.depth());
        world.floor.channels.push(Some(channel));
        world.disks[0].exports = Exports::new(vec![export(device, false)], 1 << 20).unwrap();
        (0..count).for_each(|_| world.enter(0, 0));
        world
    }

    /// Clients take most of the memory, with one request each, and do nothing more. Returns the first client without memory.
    fn take_memory(&mut self, kind: Kind, len: u64) -> usize {
        for n in 0.. {
            if self.floor.lane(0).memory_free() < len as usize {
                return n;
            }
            self.floor.clients[n].socket_len = 1;
            self.floor.clients[n].request(kind, 0, len);
            self.arrive(n, usize::MAX);
            self.sleep();
        }
        unreachable!("the memory is bounded")
    }

    fn run(mut self) {
        for step in 0.. {
            assert!(step < 200_000, "everything ends");
            if self.budget > 0 && self.rng.chance(0.5) {
                self.ask();
            }
            if self.rng.chance(0.002) {
                let n = self.rng.below(self.floor.clients.len() as u64) as usize;
                if !self.floor.clients[n].goodbye {
                    self.kill(n);
                }
            }
            if self.rng.chance(0.0005) {
                let disk = self.rng.below(self.disks.len() as u64) as usize;
                self.remove(disk);
            }
            if self.rng.chance(0.0005) && self.disks.len() < 5 {
                self.add(|_, _| {});
            }
            self.close_lanes();
            if self.rng.chance(0.001) {
                // Its export is removed softly.
                let client = self.rng.below(self.floor.clients.len() as u64) as usize;
                self.floor.clients[client].refused = true;
                self.floor.clients[client].session.refuse();
            }
            let n = self.rng.below(self.floor.clients.len() as u64) as usize;
            if self.rng.chance(0.02) {
                // As if other clients waited for its memory.
                self.floor.clients[n].session.reclaim();
            }
            if self.rng.chance(0.002) {
                self.sleep();
            }
            if self.rng.chance(0.01) {
                self.hand_over(n);
            }
            if self.rng.chance(0.002) {
                // The server is replaced.
                self.sleep();
                (0..self.floor.clients.len()).for_each(|n| self.hand_over(n));
            }
            match self.rng.below(4) {
                0 | 1 => self.deliver(n),
                2 => self.collect(n),
                _ => self.turn(),
            }
            if self.budget == 0 && self.is_over() {
                break;
            }
        }
        self.check_the_end();
    }

    /// Another session continues a client, if none of its requests is at the device.
    fn hand_over(&mut self, n: usize) {
        let client = &mut self.floor.clients[n];
        let Some(state) = client.session.suspend(&client.arrived) else { return };
        client.session.close();
        (client.session, client.arrived) = Session::resume(state, n as u32);
        self.turns.leave(n as u32);
        self.turns.enter(n as u32, client.lane);
        self.turns.enqueue(n as u32);
    }

    /// All requests are sent, and all have their replies.
    fn is_over(&mut self) -> bool {
        for client in self.floor.clients.iter_mut().filter(|c| !c.goodbye && !c.gone && c.requests.is_empty()) {
            client.goodbye = true;
            client.encoder.disconnect(&mut client.wire, Cookie(0));
        }
        self.floor.clients.iter().all(|c| if c.gone { c.session.in_flight() == 0 } else { c.session.is_over() })
    }

    /// A client creates a random request.
    fn ask(&mut self) {
        let n = self.rng.below(self.floor.clients.len() as u64) as usize;
        let rng = &mut self.rng;
        let client = &mut self.floor.clients[n];
        if client.gone || client.goodbye {
            self.budget -= 1;
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
        let disk = &mut self.disks[client.disk];
        let longest = *rng.pick(&[600, 9000, 40_000, disk.longest]);
        let mut len = rng.range(1, longest);
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
        self.arrive(n, len);
    }

    /// Moves `len` bytes of a client to the server.
    fn arrive(&mut self, n: usize, len: usize) {
        let client = &mut self.floor.clients[n];
        let len = len.min(client.wire.len());
        if client.gone || len == 0 {
            return;
        }
        client.arrived.extend(client.wire.drain(..len));
        self.turns.enqueue(n as u32);
    }

    /// A client takes `len` bytes of its replies, and the server learns that there is room for more.
    fn take(&mut self, n: usize, len: usize) -> Vec<u8> {
        let client = &mut self.floor.clients[n];
        let len = len.min(client.socket.len());
        if len > 0 && client.is_blocked {
            self.turns.enqueue(n as u32);
        }
        client.socket.drain(..len).collect()
    }

    /// Runs turns in which no client does anything: once the devices have completed everything, the worker must come to rest.
    fn sleep(&mut self) {
        let mut idle = 0;
        while idle < 100 {
            let mut lanes = 0..self.floor.channels.len();
            let is_due = |lane: usize| {
                let Some(channel) = &self.floor.channels[lane] else { return false };
                self.turns.due(lane, || channel.memory_unused(), STALL_TIMEOUT) == Some(Duration::ZERO)
            };
            let in_flight = self.floor.channels.iter().flatten().map(Channel::in_flight).sum::<usize>();
            if self.turns.is_empty() && in_flight == 0 && !lanes.any(is_due) {
                return;
            }
            if in_flight > 0 {
                idle = 0;
                self.turn();
            } else {
                idle += 1;
                self.turn_now();
            }
        }
        panic!("the worker never sleeps");
    }

    /// Delivers some bytes of replies to a client.
    fn collect(&mut self, n: usize) {
        if self.floor.clients[n].gone {
            return;
        }
        let longest = *self.rng.pick(&[1, 100, 10_000, 200_000]);
        let len = self.rng.range(0, longest) as usize + 1;
        let piece = self.take(n, len);
        let mut input = &piece[..];
        loop {
            let client = &mut self.floor.clients[n];
            match client.decoder.next(&mut input).expect("the server follows the protocol") {
                None => break,
                Some(client::Event::Simple(cookie, result)) => {
                    let request = &client.requests[&cookie.0];
                    assert!(client.mode == Mode::Simple || request.kind != Kind::READ, "reads are answered in chunks");
                    if request.kind == Kind::READ && result.is_ok() && request.len > 0 {
                        client.decoder.expect_payload(request.len as u32);
                        client.incoming = Some((cookie.0, request.at));
                    } else {
                        self.answered(n, cookie.0, result);
                    }
                }
                Some(client::Event::Chunk { cookie, done, chunk, .. }) => {
                    let request = &client.requests[&cookie.0];
                    match chunk {
                        Chunk::Data { at, len } => {
                            assert_eq!((request.kind, at), (Kind::READ, client.part(cookie)));
                            assert_eq!(done, at + u64::from(len) == request.at + request.len, "the last chunk says so");
                            assert!(
                                !request.flags.contains(Flags::DF) || done && at == request.at,
                                "DF asks for one chunk"
                            );
                            client.incoming = Some((cookie.0, at));
                        }
                        Chunk::Hole { at, len } => {
                            assert_eq!((request.kind, at), (Kind::READ, client.part(cookie)));
                            assert!(!request.flags.contains(Flags::DF), "DF asks for data");
                            let next = at + u64::from(len);
                            assert_eq!(done, next == request.at + request.len, "the last chunk says so");
                            client.incoming = Some((cookie.0, next));
                            self.disks[client.disk].model.must_be_zero(at, next);
                            if done {
                                self.answered(n, cookie.0, Ok(()));
                            }
                        }
                        Chunk::Status { context: 0, extents } => {
                            let (mut at, end) = (request.at, request.at + request.len);
                            assert!(!request.flags.contains(Flags::REQ_ONE) || extents.len() == 1);
                            for e in &extents {
                                if e.flags & 2 != 0 {
                                    self.disks[client.disk].model.must_be_zero(at, (at + e.len).min(end));
                                }
                                at += e.len;
                            }
                            assert!(extents.iter().all(|e| e.len > 0) && at <= end && done);
                            self.answered(n, cookie.0, Ok(()));
                        }
                        Chunk::Error { error, .. } => self.answered(n, cookie.0, Err(error)),
                        Chunk::None => self.answered(n, cookie.0, Ok(())),
                        other => panic!("an unexpected chunk: {other:?}"),
                    }
                }
                Some(client::Event::Payload(bytes)) => {
                    let (cookie, at) = client.incoming.expect("data belongs to a read");
                    self.disks[client.disk].model.must_hold(at, bytes);
                    let request = &client.requests[&cookie];
                    let next = at + bytes.len() as u64;
                    client.incoming = Some((cookie, next));
                    if next == request.at + request.len {
                        self.answered(n, cookie, Ok(()));
                    }
                }
            }
        }
    }

    /// Checks the reply to a request: exactly one, and correct.
    fn answered(&mut self, n: usize, cookie: u64, result: Result<(), WireError>) {
        let client = &mut self.floor.clients[n];
        let request = client.requests.remove(&cookie).expect("one answer for each request");
        let disk = &mut self.disks[client.disk];
        disk.model.busy.remove(&(n, cookie));
        if result == Err(WireError::Shutdown) {
            // Nothing has changed, so the model does not change either.
            return assert!(client.refused, "ESHUTDOWN only for refused clients");
        }
        if let Some(expected) = request.expected {
            return assert_eq!(result, Err(expected), "{:?} {:?}", request.kind, request.flags);
        }
        let range = request.at as usize..(request.at + request.len) as usize;
        match result {
            Ok(()) => match request.kind {
                Kind::WRITE => {
                    disk.model.bytes[range].iter_mut().zip(&request.data).for_each(|(byte, new)| *byte = Some(*new));
                }
                Kind::WRITE_ZEROES => disk.model.bytes[range].fill(Some(0)),
                Kind::TRIM => disk.model.bytes[range].fill(None),
                _ => {}
            },
            // The request must not have changed anything.
            Err(WireError::NotSup) => assert!(request.flags.contains(Flags::FAST_ZERO)),
            Err(error) => {
                assert!(disk.faulty, "{:?} of {} at {} failed with {error:?}", request.kind, request.len, request.at);
                disk.model.forget(&request);
            }
        }
    }

    /// A turn of the server's loop.
    fn turn(&mut self) {
        self.now += Duration::from_millis(self.rng.below(600));
        self.turn_now();
    }

    fn turn_now(&mut self) {
        self.floor.channels.iter_mut().flatten().for_each(|channel| channel.tick(self.now));
        self.turns.round(&mut self.floor);
        for lane in 0..self.floor.channels.len() {
            let mut done: Vec<Done> = Vec::new();
            let Some(channel) = &mut self.floor.channels[lane] else { continue };
            channel.kick();
            channel.reap(&mut done);
            for done in done {
                let n = Session::number_of(done.tag);
                let client = &mut self.floor.clients[n as usize];
                client.session.complete(done);
                client.is_active = true;
                if client.session.awaits_end() {
                    self.turns.enqueue(n);
                }
            }
        }
        for n in 0..self.floor.clients.len() {
            let client = &mut self.floor.clients[n];
            if !std::mem::take(&mut client.is_active) || client.gone {
                continue;
            }
            client.send();
            let in_flight = client.session.in_flight();
            self.turns.count(n as u32, in_flight);
            if client.session.is_broken() {
                assert!(self.disks[client.disk].faulty, "only a faulty device cannot be read again");
                self.kill(n);
            } else if client.is_ready(in_flight == 0) {
                self.turns.enqueue(n as u32);
            }
        }
        for slow in self.turns.sweep(self.now, STALL_TIMEOUT, &mut self.floor) {
            self.kill(slow as usize);
        }
    }

    /// Disconnects a client.
    fn kill(&mut self, n: usize) {
        let client = &mut self.floor.clients[n];
        if client.gone {
            return;
        }
        client.gone = true;
        client.session.close();
        self.turns.leave(n as u32);
        let channel = self.floor.channels[client.lane].as_mut().expect("a client has a lane");
        channel.cancel(|tag| Session::number_of(tag) == n as u32);
        let model = &mut self.disks[client.disk].model;
        for (cookie, request) in client.requests.drain() {
            model.forget(&request);
            // The device may still execute its requests: no other request may touch their ranges until the end.
            if let Some((.., changes)) = model.busy.get_mut(&(n, cookie)) {
                *changes = true;
            }
        }
    }

    fn check_the_end(mut self) {
        for (lane, channel) in self.floor.channels.iter().enumerate() {
            let Some(channel) = channel else { continue };
            assert_eq!(channel.in_flight(), 0);
            let client = self.floor.clients.iter().find(|client| client.lane == lane);
            if let Some(client) = client {
                self.check_memory(client.disk, channel);
            }
        }
        assert!(self.floor.clients.iter().all(|c| c.gone || c.requests.is_empty()), "every request was answered");
        self.floor.channels.clear();
        for disk in &self.disks {
            let mut content = vec![0; DEVICE as usize];
            disk.device.device().read(0, &mut content);
            disk.model.must_hold(0, &content);
        }
    }
}

impl Floor {
    fn lane(&self, lane: usize) -> &Channel {
        self.channels[lane].as_ref().expect("the lane is open")
    }
}

impl Connections for Floor {
    fn is_ready(&mut self, number: u32) -> bool {
        let client = &mut self.clients[number as usize];
        client.is_active = true;
        client.is_ready(true)
    }

    fn feed(&mut self, number: u32, grant: &mut Grant) -> Option<Fed> {
        let client = &mut self.clients[number as usize];
        let channel = self.channels[client.lane].as_mut().expect("a client has a lane");
        client.is_active = true;
        if let Some((buf, at)) = client.session.landing() {
            // Directly into the buffer, as `receive` does it; further bytes go through `take`.
            let direct = client.arrived.len().min(buf.len() - at);
            buf.copy_from(at, &client.arrived[..direct]);
            client.session.landed(direct, channel);
            client.arrived.drain(..direct);
        }
        let (free, may) = (channel.memory_unused(), grant.reserve || grant.common);
        let mut input = &client.arrived[..];
        client.session.take(&mut input, channel, grant).expect("the client follows the protocol");
        // First come, first served: a session with others ahead of it in both lines gets no memory.
        assert!(may || channel.memory_unused() == free, "memory was allocated out of turn");
        let taken = client.arrived.len() - input.len();
        client.arrived.drain(..taken);
        Some(Fed::of(&client.session, 0))
    }

    fn memory_unused(&self, lane: usize) -> usize {
        self.lane(lane).memory_unused()
    }

    fn progress(&mut self, number: u32) -> Progress {
        self.clients[number as usize].session.progress()
    }

    fn reclaim(&mut self, number: u32) {
        self.clients[number as usize].session.reclaim();
    }
}

impl Model {
    fn is_free(&self, at: u64, len: u64, changes: bool) -> bool {
        self.busy.values().all(|&(b, n, c)| at + len <= b || b + n <= at || !(c || changes))
    }

    fn must_hold(&self, at: u64, bytes: &[u8]) {
        let known = &self.bytes[at as usize..at as usize + bytes.len()];
        if let Some(n) = known.iter().zip(bytes).position(|(known, byte)| known.is_some_and(|k| k != *byte)) {
            panic!("byte {} is {} and should be {:?}", at + n as u64, bytes[n], known[n]);
        }
    }

    fn must_be_zero(&self, at: u64, end: u64) {
        assert!(self.bytes[at as usize..end as usize].iter().all(|b| b.is_none_or(|b| b == 0)), "a hole holds zeroes");
    }

    /// The request may have happened or not: every byte may be old or new.
    fn forget(&mut self, request: &Request) {
        let range = request.at as usize..(request.at + request.len).min(DEVICE) as usize;
        match request.kind {
            _ if request.expected.is_some() => {}
            Kind::WRITE | Kind::WRITE_ZEROES | Kind::TRIM => self.bytes[range].fill(None),
            _ => {}
        }
    }
}

impl Client {
    /// Where the next part of a reply to a read must begin: parts are consecutive, without gaps.
    fn part(&self, cookie: Cookie) -> u64 {
        let begun = self.incoming.filter(|incoming| incoming.0 == cookie.0);
        begun.map_or(self.requests[&cookie.0].at, |(_, at)| at)
    }

    /// Sends a request whose reply is not checked.
    fn request(&mut self, kind: Kind, at: u64, len: u64) {
        self.next += 1;
        self.encoder.request(&mut self.wire, Cookie(self.next), kind, Flags::NONE, at, len);
    }

    fn is_ready(&self, has_ended: bool) -> bool {
        self.session.is_ready(!self.arrived.is_empty(), self.is_blocked, has_ended)
    }

    /// Whether all requests that have arrived have their replies.
    fn is_served(&mut self) -> bool {
        let session = &mut self.session;
        let waits = session.in_flight() > 0 || session.wants().is_some() || session.is_held_back();
        !waits && self.arrived.is_empty() && session.outbox().is_empty()
    }

    /// Sends replies to the socket, as far as it has room.
    fn send(&mut self) {
        let mut piece = vec![0; 64 << 10];
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
    fn shake_hands(exports: &Exports, number: usize, disk: usize, lane: usize, rng: &mut Rng) -> Self {
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
            session: Session::new(&negotiated, number as u32),
            disk,
            lane,
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
        }
    }
}
