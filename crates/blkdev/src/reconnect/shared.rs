//! [`Shared`]: what a [`Reconnect`](super::Reconnect), its queues and its thread have in common.

use std::{
    fmt, io,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock,
        atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering},
    },
};

use crate::{
    device::{Device, Info, Queue, State as DeviceState},
    mem::Mapping,
    peer::Peer,
    wake::Wake,
};

use super::{Options, Reopen, Unflushed, berth::Berth, log::Kept, memories::Memories};

pub(super) struct Shared {
    /// That of the device at first.
    pub(super) info: Info,
    pub(super) pins_memory: bool,
    pub(super) shares_memory: bool,
    pub(super) options: Options,
    pub(super) reopen: Reopen,
    /// `None` while the device is dead.
    current: RwLock<Option<Arc<dyn Device>>>,
    /// In bytes, as last seen.
    capacity: AtomicU64,
    state: Mutex<State>,
    /// Wakes the thread.
    bell: OnceLock<Arc<Wake>>,
    /// Rung when the device dies, and whenever the owners of queues wake.
    bells: Mutex<Vec<Arc<Wake>>>,
    /// Number of the next change.
    pub(super) number: AtomicU64,
    /// All changes before this number are durable.
    pub(super) flushed: AtomicU64,
    /// Most memory of changes that all queues keep, in bytes.
    pub(super) bound: AtomicUsize,
    /// Memory of changes that they keep, in bytes.
    pub(super) kept: AtomicUsize,
    /// Queues that have not sent everything again yet.
    pub(super) resending: AtomicUsize,
    /// The window is over: requests fail instead of waiting.
    pub(super) is_expired: AtomicBool,
    /// Changes were lost with the device: its users must end.
    pub(super) is_lost: AtomicBool,
    pub(super) losses: AtomicU32,
    /// How often the device has come back.
    pub(super) returns: AtomicU64,
    pub(super) is_closed: AtomicBool,
}

#[derive(Debug, Default)]
pub(super) struct State {
    /// Counts the devices.
    pub(super) generation: u64,
    /// The device that died. The thread drops it, since closing a device may take long.
    pub(super) dead: Option<Arc<dyn Device>>,
    pub(super) peer: Option<Arc<Peer>>,
    pub(super) memories: Memories,
    pub(super) berths: Vec<Arc<Berth>>,
    /// Changes of queues that were closed.
    pub(super) orphans: Vec<Kept>,
}

impl Shared {
    pub(super) fn new(device: Arc<dyn Device>, reopen: Reopen, options: Options) -> Arc<Self> {
        let state = State { generation: 1, peer: device.peer(), ..State::default() };
        Arc::new(Self {
            info: device.info().clone(),
            pins_memory: device.pins_memory(),
            shares_memory: device.shares_memory(),
            options,
            reopen,
            capacity: AtomicU64::new(device.capacity()),
            current: RwLock::new(Some(device)),
            state: Mutex::new(state),
            bell: OnceLock::new(),
            bells: Mutex::default(),
            number: AtomicU64::new(0),
            flushed: AtomicU64::new(0),
            bound: AtomicUsize::new(0),
            kept: AtomicUsize::new(0),
            resending: AtomicUsize::new(0),
            is_expired: AtomicBool::new(false),
            is_lost: AtomicBool::new(false),
            losses: AtomicU32::new(0),
            returns: AtomicU64::new(0),
            is_closed: AtomicBool::new(false),
        })
    }

    pub(super) fn set_bell(&self, bell: Arc<Wake>) {
        if let Some(device) = self.device() {
            device.ring_at_death(&bell);
        }
        let _ = self.bell.set(bell);
    }

    /// Rings `bell` when the device dies, and whenever the owners of queues wake.
    pub(super) fn add_bell(&self, bell: &Arc<Wake>) {
        self.bells.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::clone(bell));
        // It may have died before.
        if self.device().is_none_or(|device| device.state() == DeviceState::Dead) {
            bell.ring();
        }
    }

    /// Looks whether the device has died while no request was in flight.
    pub(super) fn look(&self) {
        if self.device().is_some_and(|device| device.state() == DeviceState::Dead) {
            self.bury(&mut self.state());
            self.wake_all();
        }
    }

    pub(super) fn ring(&self) {
        if let Some(bell) = self.bell.get() {
            bell.ring();
        }
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The device, unless it is known to be dead.
    pub(super) fn device(&self) -> Option<Arc<dyn Device>> {
        self.current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn set_device(&self, device: Option<Arc<dyn Device>>) -> Option<Arc<dyn Device>> {
        if let (Some(device), Some(bell)) = (&device, self.bell.get()) {
            device.ring_at_death(bell);
        }
        std::mem::replace(&mut *self.current.write().unwrap_or_else(PoisonError::into_inner), device)
    }

    pub(super) fn capacity(&self) -> u64 {
        match &*self.current.read().unwrap_or_else(PoisonError::into_inner) {
            Some(device) => {
                let now = device.capacity();
                if now != self.capacity.load(Ordering::Relaxed) {
                    self.capacity.store(now, Ordering::Relaxed);
                }
                now
            }
            None => self.capacity.load(Ordering::Relaxed),
        }
    }

    /// Whether changes that were not flushed matter.
    pub(super) fn tracks(&self) -> bool {
        self.info.caps.flush && self.options.unflushed != Unflushed::Trust
    }

    pub(super) fn register(&self, mapping: &Arc<Mapping>) -> io::Result<()> {
        let mut state = self.state();
        if let Some(device) = self.device() {
            let registered = device.register(mapping);
            // A device that has died gets the memory when it is back.
            if registered.is_err() && device.state() != DeviceState::Dead {
                return registered;
            }
        }
        state.memories.add(mapping);
        self.set_bound(&state);
        Ok(())
    }

    pub(super) fn unregister(&self, mapping: &Arc<Mapping>) {
        let mut state = self.state();
        let removed = state.memories.remove(mapping);
        self.set_bound(&state);
        if let Some(device) = self.device() {
            removed.iter().for_each(|mapping| device.unregister(mapping));
        }
    }

    /// Sets the memory for changes.
    fn set_bound(&self, state: &State) {
        self.bound.store(self.options.unflushed_memory.unwrap_or(state.memories.len() / 4), Ordering::Relaxed);
    }

    /// All changes before this number are durable: no queue keeps them any more.
    pub(super) fn forget(&self, end: u64) {
        self.flushed.fetch_max(end, Ordering::AcqRel);
        for berth in &self.state().berths {
            let freed = berth.place().log.forget(end);
            self.kept.fetch_sub(freed, Ordering::AcqRel);
        }
    }

    /// A place for a new queue, and the queue of the device, if it is alive.
    pub(super) fn board(&self, depth: u16) -> io::Result<Boarding> {
        let mut state = self.state();
        let mut queue = None;
        if let Some(device) = self.device() {
            match device.open_queue(depth) {
                Ok(open) => queue = Some(open),
                Err(e) if device.state() != DeviceState::Dead => return Err(e),
                Err(_) => self.bury(&mut state),
            }
        }
        let berth = Berth::new(depth, state.generation, queue.is_none())?;
        state.berths.push(Arc::clone(&berth));
        let (generation, peer) = (state.generation, state.peer.clone());
        Ok(Boarding { berth, queue, generation, peer })
    }

    /// A queue is closed.
    pub(super) fn leave(&self, berth: &Arc<Berth>) {
        let mut state = self.state();
        state.berths.retain(|known| !Arc::ptr_eq(known, berth));
        let mut place = berth.place();
        let (kept, memory) = place.log.take();
        self.kept.fetch_sub(memory, Ordering::AcqRel);
        let flushed = self.flushed.load(Ordering::Acquire);
        state.orphans.retain(|kept| kept.number >= flushed);
        state.orphans.extend(kept);
        let offer = place.offer.take();
        drop(place);
        drop(state);
        drop(offer);
        self.ring();
    }

    /// The device of this generation has died.
    pub(super) fn report_death(&self, generation: u64) {
        let mut state = self.state();
        if state.generation == generation {
            self.bury(&mut state);
        }
    }

    fn bury(&self, state: &mut State) {
        if let Some(dead) = self.set_device(None) {
            state.dead = Some(dead);
        }
        self.ring();
        self.ring_bells();
    }

    /// A queue has sent everything again.
    pub(super) fn has_resent(&self) {
        if self.resending.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.wake_all();
        }
    }

    pub(super) fn wake_all(&self) {
        self.state().berths.iter().for_each(|berth| berth.wake());
        self.ring_bells();
    }

    fn ring_bells(&self) {
        self.bells.lock().unwrap_or_else(PoisonError::into_inner).iter().for_each(|bell| bell.ring());
    }

    pub(super) fn close(&self) {
        self.is_closed.store(true, Ordering::Release);
        self.ring();
        let dead = self.state().dead.take();
        drop((self.set_device(None), dead));
    }
}

/// What a new queue begins with.
pub(super) struct Boarding {
    pub(super) berth: Arc<Berth>,
    pub(super) queue: Option<Box<dyn Queue>>,
    pub(super) generation: u64,
    pub(super) peer: Option<Arc<Peer>>,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").field("info", &self.info).field("options", &self.options).finish_non_exhaustive()
    }
}
