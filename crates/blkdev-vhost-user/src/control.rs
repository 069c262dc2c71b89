//! [`Control`]: the control socket of a vhost-user back end, as the transport of a virtio-blk device.
#![allow(unsafe_code)]

use std::{
    collections::BTreeMap,
    io::{self, Read, Write},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd},
        unix::net::UnixStream,
    },
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use blkdev::{Context, Mapping, Peer};
use blkdev_virtio::{Doorbell, Format, Liveness, Notifier, Ring, Transport};
use nix::sys::socket::{MsgFlags, getsockopt, recv, sockopt};
use vhost::{
    VhostBackend, VhostUserMemoryRegionInfo, VringConfigData,
    vhost_user::{
        Frontend, VhostUserFrontend,
        message::{VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures, VhostUserVirtioFeatures},
    },
};
use vmm_sys_util::eventfd::EventFd;

use crate::{
    connect::{Name, greet},
    requests::Requests,
    watch::{GONE, LATE, Watch},
};

/// Memory regions in one SET_MEM_TABLE that every back end supports (VHOST_MEMORY_BASELINE_NREGIONS in the specification).
const REGIONS_MAX: usize = 8;

/// Message ids.
const SET_VRING_BASE: u32 = 10;
const GET_CONFIG: u32 = 24;

/// Length of a message header in bytes: request, flags, payload size.
const HEADER: usize = 12;

/// Length of offset, size and flags at the start of GET_CONFIG's payload, in bytes.
const CONFIG_HEADER: usize = 12;

/// The longest accepted message, in bytes.
const MESSAGE_MAX: usize = 4096;

/// A control socket with negotiated protocol features.
pub(crate) struct Control {
    target: String,
    name: Name,
    life: Arc<Liveness>,
    timeout: Duration,
    huge_pages: bool,
    peer: Arc<Peer>,
    features: u64,
    protocol: VhostUserProtocolFeatures,
    queues_max: u16,
    slots_max: usize,
    /// The socket of `frontend`, for messages that `vhost` does not support. Used with `state` locked.
    stream: UnixStream,
    state: Mutex<State>,
    // Last field, so dropped last: its thread keeps the socket open until it is stopped, so it cannot mistake the close for the
    // back end's.
    watch: Watch,
}

struct State {
    frontend: Frontend,
    /// Memory that the back end has mapped.
    regions: Vec<Arc<Mapping>>,
    running: BTreeMap<u16, Running>,
}

/// The parameters to start a queue again.
struct Running {
    format: Format,
    config: VringConfigData,
    kick: EventFd,
    call: EventFd,
    /// The kick eventfd of the queue's owner.
    bell: Arc<Notifier>,
    /// A duplicate for the thread that restarts the queue.
    nudge: Arc<Notifier>,
}

/// The back end's offer.
struct Offer {
    features: u64,
    /// The protocol features that both sides support.
    protocol: VhostUserProtocolFeatures,
    queues: u64,
    /// Most memory regions.
    slots: u64,
}

impl Offer {
    /// Negotiates the protocol features, and asks for the limits that depend on them. `requests` is the back end's side of the
    /// channel for its own requests.
    fn ask(frontend: &mut Frontend, requests: &dyn AsRawFd) -> vhost::Result<Self> {
        let features = frontend.get_features()?;
        let mut protocol = VhostUserProtocolFeatures::empty();
        if features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() != 0 {
            let wanted = VhostUserProtocolFeatures::MQ
                | VhostUserProtocolFeatures::REPLY_ACK
                | VhostUserProtocolFeatures::CONFIG
                | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
                | VhostUserProtocolFeatures::BACKEND_REQ;
            protocol = frontend.get_protocol_features()? & wanted;
            frontend.set_protocol_features(protocol)?;
        }
        if protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
            frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
        if protocol.contains(VhostUserProtocolFeatures::BACKEND_REQ) {
            frontend.set_backend_request_fd(requests)?;
        }
        let mq = protocol.contains(VhostUserProtocolFeatures::MQ);
        let queues = if mq { frontend.get_queue_num()? } else { 1 };
        let slots = protocol.contains(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS);
        let slots = if slots { frontend.get_max_mem_slots()? } else { REGIONS_MAX as u64 };
        Ok(Self { features, protocol, queues, slots })
    }
}

impl Control {
    /// Greets the back end, and negotiates features. `left`: rest of the time for connecting. `timeout`: limit of every later
    /// exchange.
    pub(crate) fn negotiate(
        stream: UnixStream,
        target: String,
        name: Name,
        left: Duration,
        timeout: Duration,
        huge_pages: bool,
    ) -> io::Result<Self> {
        let life = Liveness::in_another_process(format!("vhost-user {target}"));
        let (ours, requests) = UnixStream::pair()?;
        let watch = Watch::new(stream.try_clone()?, Requests::new(ours)?, Arc::clone(&life))?;
        let mut control = Self {
            target,
            name,
            life,
            timeout: left,
            huge_pages,
            peer: Arc::new(peer(&stream)),
            features: 0,
            protocol: VhostUserProtocolFeatures::empty(),
            queues_max: 1,
            slots_max: REGIONS_MAX,
            stream: stream.try_clone()?,
            state: Mutex::new(State {
                frontend: Frontend::from_stream(stream, 1),
                regions: Vec::new(),
                running: BTreeMap::new(),
            }),
            watch,
        };
        control.watch.within(left, || greet(&control.stream)).map_err(|e| match control.watch.was_late() {
            true => control.explain("cannot negotiate", e),
            false => e,
        })?;
        let offer = control.exchange("cannot negotiate", |state| Offer::ask(&mut state.frontend, &requests))?;
        control.timeout = timeout;
        control.features = offer.features;
        control.protocol = offer.protocol;
        control.queues_max = u16::try_from(offer.queues).unwrap_or(u16::MAX);
        control.slots_max = usize::try_from(offer.slots).unwrap_or(usize::MAX);
        Ok(control)
    }

    /// Marks the connect as complete.
    pub(crate) fn established(&self) -> io::Result<()> {
        self.watch.established();
        if self.life.is_dead() {
            return Err(io::Error::new(io::ErrorKind::ConnectionReset, "the back end closed the connection"));
        }
        Ok(())
    }

    fn has(&self, feature: VhostUserProtocolFeatures) -> bool {
        self.protocol.contains(feature)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Exchanges messages with the back end, in bounded time. After any error except a refusal the stream is out of step, so
    /// the device ends.
    fn exchange<R>(&self, what: &str, talk: impl FnOnce(&mut State) -> vhost::Result<R>) -> io::Result<R> {
        let mut state = self.state();
        self.in_step().map_err(|e| self.fatal(what, e))?;
        let result = self.watch.within(self.timeout, || talk(&mut state));
        result.map_err(|e| if is_refusal(&e) { self.explain(what, plain(e)) } else { self.fatal(what, plain(e)) })
    }

    /// Checks that no unexpected bytes are pending. They would be taken for the next reply, and every later reply would be off
    /// by one.
    fn in_step(&self) -> io::Result<()> {
        let peek = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        match recv(self.stream.as_raw_fd(), &mut [0; 1], peek) {
            Ok(1..) => Err(io::Error::new(io::ErrorKind::InvalidData, "the back end sent an unrequested reply")),
            // A closed connection shows up in the exchange.
            _ => Ok(()),
        }
    }

    /// The error of an exchange that makes further exchanges impossible.
    fn fatal(&self, what: &str, error: io::Error) -> io::Error {
        let error = self.explain(what, error);
        match error.kind() {
            io::ErrorKind::TimedOut => self.watch.end(LATE),
            io::ErrorKind::ConnectionReset => self.watch.end(GONE),
            _ => self.watch.end(&error.to_string()),
        }
        error
    }

    fn explain(&self, what: &str, error: io::Error) -> io::Error {
        if self.watch.was_late() {
            let busy = if self.features == 0 { "; is the back end busy with another front end?" } else { "" };
            let why = format!("{what}: no reply within {:?}{busy}", self.timeout);
            return Context::with_kind(io::ErrorKind::TimedOut, why, error);
        }
        if self.life.is_dead() || self.is_closed() {
            let why = format!("{what}: the back end closed the connection ({error})");
            return Context::with_kind(io::ErrorKind::ConnectionReset, why, error);
        }
        Context::wrap(format!("{what}: {error}"), error)
    }

    fn is_closed(&self) -> bool {
        let peek = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        !matches!(recv(self.stream.as_raw_fd(), &mut [0; 1], peek), Ok(1..) | Err(nix::errno::Errno::EAGAIN))
    }

    /// Sends one GET_CONFIG. `Ok(0)`: the back end refused the size.
    ///
    /// `Frontend::get_config` accepts only a reply of exactly the requested length, and loses its place in the stream at any
    /// other. But some back ends always reply with their whole configuration, and some with an empty one.
    fn ask_config(&self, want: usize, config: &mut [u8]) -> io::Result<usize> {
        let mut message = [0; HEADER + CONFIG_HEADER + 256];
        let fields = [GET_CONFIG, 1, (CONFIG_HEADER + want) as u32, 0, want as u32, 0];
        for (n, field) in fields.into_iter().enumerate() {
            message[4 * n..4 * n + 4].copy_from_slice(&field.to_ne_bytes());
        }
        let mut stream = &self.stream;
        stream.write_all(&message[..HEADER + CONFIG_HEADER + want])?;

        let mut header = [0; HEADER];
        stream.read_exact(&mut header)?;
        let field =
            |n: usize| u32::from_ne_bytes([header[4 * n], header[4 * n + 1], header[4 * n + 2], header[4 * n + 3]]);
        let len = field(2) as usize;
        if field(0) != GET_CONFIG || field(1) & 0b111 != 0b101 || len > MESSAGE_MAX {
            let why =
                format!("message {} with flags {:#x} and {len} bytes is not a reply to GET_CONFIG", field(0), field(1));
            return Err(io::Error::new(io::ErrorKind::InvalidData, why));
        }
        let mut payload = vec![0; len];
        stream.read_exact(&mut payload)?;
        let Some(body) = payload.get(CONFIG_HEADER..) else { return Ok(0) };
        let word = |at: usize| u32::from_ne_bytes([payload[at], payload[at + 1], payload[at + 2], payload[at + 3]]);
        if word(0) != 0 {
            let why = format!("the reply starts at byte {} of the configuration, not at byte 0", word(0));
            return Err(io::Error::new(io::ErrorKind::InvalidData, why));
        }
        let size = word(4) as usize;
        let count = body.len().min(size).min(config.len());
        config[..count].copy_from_slice(&body[..count]);
        Ok(count)
    }

    /// Stops the queue. Returns the position to resume from: the next available index. For a packed ring: position and wrap
    /// counter of the next available element in the low 16 bits, of the next used element in the high 16 bits.
    fn stop(frontend: &Frontend, index: u16) -> vhost::Result<u32> {
        frontend.get_vring_base(usize::from(index))
    }

    /// SET_VRING_BASE with the 32 bits that a packed ring needs; `Frontend` supports 16.
    fn set_base(&self, index: usize, base: u32) -> vhost::Result<()> {
        let fields = [SET_VRING_BASE, 1, 8, index as u32, base];
        let message = fields.map(u32::to_ne_bytes).concat();
        let sent = (&self.stream).write_all(&message);
        sent.map_err(|e| vhost::Error::VhostUserProtocol(vhost::vhost_user::Error::SocketError(e)))
    }

    /// Replaces the back end's memory table by one of all `regions`. Requests in flight use the old table, so the queues are
    /// stopped meanwhile. A stop waits for the requests that the back end has taken; others stay in the ring until the restart.
    /// After an error queues may be stopped, and the device is dead.
    fn replace_table(&self, state: &mut State) -> vhost::Result<()> {
        let State { frontend, regions, running } = state;
        let mut replace = || {
            let mut stopped = Vec::new();
            for index in running.keys() {
                stopped.push((*index, Self::stop(frontend, *index)?));
            }
            let table: Vec<_> = regions.iter().map(region).collect();
            frontend.set_mem_table(&table)?;
            for (index, base) in stopped {
                let ring = &running[&index];
                self.start(frontend, index, base, ring)?;
                // For requests published while the queue was stopped.
                ring.nudge.ring();
            }
            Ok(())
        };
        let replaced = replace();
        if let Err(e) = &replaced
            && !running.is_empty()
        {
            // `fatal` has reported every error except a refusal.
            if is_refusal(e) {
                let why = format!("the back end refuses a new memory table ({e})");
                self.watch.end(&why);
            }
        }
        replaced
    }

    fn start(&self, frontend: &mut Frontend, index: u16, base: u32, ring: &Running) -> vhost::Result<()> {
        let index = usize::from(index);
        frontend.set_vring_num(index, ring.config.queue_size)?;
        match ring.format {
            Format::Split => frontend.set_vring_base(index, base as u16)?,
            Format::Packed => self.set_base(index, base)?,
        }
        frontend.set_vring_addr(index, &ring.config)?;
        frontend.set_vring_call(index, &ring.call)?;
        frontend.set_vring_kick(index, &ring.kick)?;
        // Without protocol features a ring is enabled at start.
        if self.features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() != 0 {
            frontend.set_vring_enable(index, true)?;
        }
        if !self.has(VhostUserProtocolFeatures::REPLY_ACK) {
            // A back end may lose a kick that arrives before the ring is enabled. It handles messages in order, so the reply to
            // this one means that the ring is enabled.
            frontend.get_features()?;
        }
        Ok(())
    }
}

impl Transport for Control {
    type Doorbell = Kick;

    const RESTARTS: bool = true;

    fn driver(&self) -> &'static str {
        "vhost-user"
    }

    fn target(&self) -> &str {
        &self.target
    }

    fn life(&self) -> &Arc<Liveness> {
        &self.life
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn accept(&self, features: u64) -> io::Result<()> {
        let all = features | self.features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        self.exchange("cannot set the features", |state| state.frontend.set_features(all))
    }

    fn read_config(&self, bytes: &mut [u8], needed: usize) -> io::Result<usize> {
        if !self.has(VhostUserProtocolFeatures::CONFIG) {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "the back end does not offer the protocol feature CONFIG; without it, its capacity is unknown",
            ));
        }
        let _locked = self.state();
        // Try the whole configuration, the required part, the part of virtio 1.0, and the capacity alone.
        let mut best = 0;
        for want in [bytes.len(), needed, 36, 24, 8] {
            if want > bytes.len() || want <= best {
                continue;
            }
            let count = self.in_step().and_then(|()| self.watch.within(self.timeout, || self.ask_config(want, bytes)));
            best = best.max(count.map_err(|e| self.fatal("cannot read the configuration", e))?);
            if best >= needed {
                break;
            }
        }
        if best == 0 {
            let why = "the back end refuses to return its configuration";
            return Err(io::Error::new(io::ErrorKind::Unsupported, why));
        }
        Ok(best)
    }

    fn write_config(&self, at: usize, bytes: &[u8]) -> io::Result<()> {
        self.exchange("cannot write the configuration", |state| {
            state.frontend.set_config(at as u32, VhostUserConfigFlags::empty(), bytes)
        })
    }

    fn config_changes(&self) -> Option<BorrowedFd<'_>> {
        self.has(VhostUserProtocolFeatures::BACKEND_REQ).then(|| self.watch.config_changes())
    }

    fn queues_max(&self) -> u16 {
        self.queues_max
    }

    fn ring_max(&self, _index: u16) -> u16 {
        u16::MAX
    }

    fn register(&self, mapping: &Arc<Mapping>) -> io::Result<()> {
        if !mapping.is_shareable() {
            let len = mapping.len();
            let why = format!(
                "{len} bytes of memory cannot be shared with the back end: a file of that size exceeds ulimit -f (LimitFSIZE=); \
                 raise that, or use less memory (--memory)"
            );
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, why));
        }
        self.exchange("cannot add memory", |state| {
            let State { frontend, regions, .. } = state;
            if regions.iter().any(|known| Arc::ptr_eq(known, mapping)) {
                return Ok(Ok(()));
            }
            if regions.len() >= self.slots_max {
                let why = format!(
                    "the back end supports at most {} memory regions; use fewer and larger ones",
                    self.slots_max
                );
                return Ok(Err(io::Error::new(io::ErrorKind::QuotaExceeded, why)));
            }
            if self.has(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS) {
                frontend.add_mem_region(&region(mapping))?;
                regions.push(Arc::clone(mapping));
                return Ok(Ok(()));
            }
            regions.push(Arc::clone(mapping));
            let replaced = self.replace_table(state);
            if replaced.is_err() {
                state.regions.pop();
            }
            replaced.map(Ok)
        })?
    }

    fn unregister(&self, mapping: &Arc<Mapping>) -> io::Result<()> {
        let is_it = |known: &Arc<Mapping>| Arc::ptr_eq(known, mapping);
        if self.life.is_dead() {
            self.state().regions.retain(|known| !is_it(known));
            return Ok(());
        }
        self.exchange("cannot remove memory", |state| {
            let Some(at) = state.regions.iter().position(is_it) else { return Ok(()) };
            if self.has(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS) {
                // If the back end refuses, the slot stays in use.
                state.frontend.remove_mem_region(&region(mapping))?;
                state.regions.remove(at);
                return Ok(());
            }
            state.regions.remove(at);
            self.replace_table(state)
        })
    }

    fn is_replaced(&self) -> bool {
        self.name.is_of_another()
    }

    fn shares_memory(&self) -> bool {
        !self.huge_pages
    }

    fn peer(&self) -> Option<Arc<Peer>> {
        Some(Arc::clone(&self.peer))
    }

    fn start_queue(&self, index: u16, ring: &Ring<'_>) -> io::Result<Kick> {
        let bell = Arc::new(Notifier::new()?);
        let nudge = Arc::new(bell.duplicate()?);
        let running = Running {
            format: ring.format,
            config: VringConfigData {
                queue_max_size: ring.size,
                queue_size: ring.size,
                flags: 0,
                desc_table_addr: ring.descriptors.get(),
                used_ring_addr: ring.device.get(),
                avail_ring_addr: ring.driver.get(),
                log_addr: None,
            },
            kick: duplicate(bell.as_fd())?,
            call: duplicate(ring.call)?,
            bell: Arc::clone(&bell),
            nudge,
        };
        self.exchange("cannot start a queue", |state| {
            // Index 0; in a packed ring both wrap counters 1.
            let base = if running.format == Format::Packed { 0x8000_8000 } else { 0 };
            if let Err(e) = self.start(&mut state.frontend, index, base, &running) {
                // The back end may have started to use memory that the next queue will get.
                Self::stop(&state.frontend, index)?;
                return Err(e);
            }
            self.watch.guard([&running.bell, &running.nudge]);
            state.running.insert(index, running);
            Ok(())
        })?;
        Ok(Kick(bell))
    }

    fn run(&self) -> io::Result<()> {
        Ok(())
    }

    fn stop_queue(&self, index: u16) -> io::Result<()> {
        self.exchange("GET_VRING_BASE", |state| {
            if let Some(Running { bell, nudge, .. }) = state.running.remove(&index) {
                self.watch.unguard([&bell, &nudge]);
            }
            Self::stop(&state.frontend, index).map(drop)
        })
    }

    fn cut_off(&self) {
        self.watch.shut_down();
    }
}

/// The process at the other end.
fn peer(stream: &UnixStream) -> Peer {
    // Linux before 6.5 knows no pidfd of a peer.
    let Ok(pidfd) = getsockopt(stream, sockopt::PeerPidfd) else { return Peer::unknown() };
    let id = getsockopt(stream, sockopt::PeerCredentials).map_or(0, |credentials| credentials.pid());
    Peer::new(pidfd, u32::try_from(id).unwrap_or(0))
}

/// The mapping as the back end sees it: our addresses are also the device's addresses.
fn region(mapping: &Arc<Mapping>) -> VhostUserMemoryRegionInfo {
    VhostUserMemoryRegionInfo {
        guest_phys_addr: mapping.iova().get(),
        memory_size: mapping.len() as u64,
        userspace_addr: mapping.iova().get(),
        mmap_offset: 0,
        mmap_handle: mapping.as_fd().as_raw_fd(),
    }
}

/// Whether the back end refused in its reply, or was not asked at all. Any other error may leave a reply, or a part of one,
/// which would be taken for the next message's reply.
fn is_refusal(error: &vhost::Error) -> bool {
    use vhost::vhost_user::Error::{BackendInternalError, InactiveFeature, InactiveOperation, InvalidParam};
    let vhost::Error::VhostUserProtocol(error) = error else { return false };
    matches!(error, BackendInternalError | InactiveFeature(_) | InactiveOperation(_) | InvalidParam)
}

/// The error of an exchange with the kind of its cause.
fn plain(error: vhost::Error) -> io::Error {
    use vhost::vhost_user::Error as User;
    let kind = match &error {
        vhost::Error::IOError(e) => e.kind(),
        vhost::Error::VhostUserProtocol(error) => match error {
            User::SocketError(e) | User::SocketRetry(e) | User::SocketConnect(e) => e.kind(),
            User::Disconnected | User::SocketBroken(_) => io::ErrorKind::ConnectionReset,
            User::InvalidMessage | User::PartialMessage | User::OversizedMsg | User::IncorrectFds => {
                io::ErrorKind::InvalidData
            }
            User::InvalidParam => io::ErrorKind::InvalidInput,
            User::InactiveFeature(_) | User::InactiveOperation(_) | User::FeatureMismatch => io::ErrorKind::Unsupported,
            // The back end refuses, and the protocol has no reasons.
            _ => io::ErrorKind::Other,
        },
        _ => io::ErrorKind::Other,
    };
    io::Error::new(kind, error)
}

/// Duplicates the eventfd into the type that `vhost` takes.
fn duplicate(eventfd: BorrowedFd<'_>) -> io::Result<EventFd> {
    let fd = eventfd.try_clone_to_owned()?.into_raw_fd();
    // SAFETY: this descriptor was duplicated just now and has no other owner; `EventFd` closes it.
    Ok(unsafe { EventFd::from_raw_fd(fd) })
}

/// The kick eventfd of a queue.
#[derive(Clone, Debug)]
pub(crate) struct Kick(Arc<Notifier>);

impl Doorbell for Kick {
    #[inline]
    fn ring(&self) {
        self.0.ring();
    }
}

impl std::fmt::Debug for Control {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Control")
            .field("target", &self.target)
            .field("protocol", &self.protocol)
            .field("queues_max", &self.queues_max)
            .finish_non_exhaustive()
    }
}
