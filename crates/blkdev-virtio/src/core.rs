//! [`Core`]: the state that a device and its queues share, and the start and stop of queues.

use std::{
    fmt, io,
    os::fd::AsFd,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use blkdev::{
    Info, Mapping, Op, Request,
    wake::{self, now},
    window::Window,
};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_OK, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN};

use crate::{
    config::{self, Config, WRITEBACK},
    layout::{Chain, Data, Layout, Place},
    liveness::Liveness,
    notifier::Notifier,
    options::WriteCache,
    ring::Virtqueue,
    slots::Slots,
    transport::{Doorbell, Format, Ring, Transport},
};

/// Bytes of memory for the requests sent during open: enough for the largest block.
pub(crate) const PROBE: usize = 65536;

/// Longest wait for requests in flight when a queue is dropped.
pub(crate) const DRAIN: Duration = Duration::from_secs(5);

/// Interval of liveness checks while a thread waits for the device.
pub(crate) const GLANCE: Duration = Duration::from_millis(200);

/// The state that a device and its queues share.
pub(crate) struct Core<T: Transport> {
    // First field, so dropped first: this ends the device's access to the memory below.
    pub(crate) transport: T,
    pub(crate) life: Arc<Liveness>,
    pub(crate) info: Info,
    /// As negotiated.
    pub(crate) features: u64,
    pub(crate) config: Config,
    /// In bytes, a multiple of the block size.
    pub(crate) capacity: AtomicU64,
    /// In bytes, as last reported by the device.
    pub(crate) block_size: AtomicU32,
    pub(crate) format: Format,
    pub(crate) indirect: bool,
    pub(crate) event_idx: bool,
    pub(crate) queue_size: u16,
    /// The device does not report written lengths: each read buffer is cleared before the read.
    pub(crate) clear_reads: bool,
    /// Ring memory: [`PROBE`] bytes, then one area of the largest layout for each queue.
    pub(crate) rings: Arc<Mapping>,
    /// One for each queue of the device.
    pub(crate) stations: Mutex<Vec<Station<T::Doorbell>>>,
}

/// A started queue: its ring, its doorbell, and its call eventfd, which the device writes.
pub(crate) type Started<T, V> = (V, <T as Transport>::Doorbell, Arc<Notifier>);

/// A queue of the device, open or closed.
#[derive(Debug)]
pub(crate) struct Station<D> {
    pub(crate) open: bool,
    /// The parts that survive a close, if the transport cannot restart queues.
    pub(crate) fixed: Option<Fixed<D>>,
}

/// A queue that stays started until the device closes.
#[derive(Clone, Debug)]
pub(crate) struct Fixed<D> {
    pub(crate) bell: D,
    pub(crate) call: Arc<Notifier>,
    /// Its position when it was last closed.
    pub(crate) place: Place,
}

/// Results of the requests sent during open.
pub(crate) struct Probe {
    pub(crate) serial: String,
    pub(crate) tells_len: bool,
}

impl<T: Transport> Core<T> {
    pub(crate) fn transport(&self) -> &T {
        &self.transport
    }

    pub(crate) fn life(&self) -> &Liveness {
        &self.life
    }

    pub(crate) fn stations(&self) -> MutexGuard<'_, Vec<Station<T::Doorbell>>> {
        self.stations.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn claim(&self) -> io::Result<u16> {
        let mut stations = self.stations();
        let index = stations.iter().position(|station| !station.open).ok_or_else(|| {
            io::Error::new(io::ErrorKind::ResourceBusy, format!("all {} queues of the device are open", stations.len()))
        })?;
        stations[index].open = true;
        Ok(index as u16)
    }

    pub(crate) fn release(&self, index: u16) {
        self.stations()[usize::from(index)].open = false;
    }

    /// The largest layout; every other layout fits in its memory.
    pub(crate) fn most(&self) -> Layout {
        Layout::new(self.format, self.queue_size, self.config.segments, self.indirect)
    }

    pub(crate) fn ring_at(&self, index: u16) -> usize {
        PROBE + usize::from(index) * self.most().len()
    }

    /// Starts a queue of the device on new rings.
    pub(crate) fn begin(&self, index: u16, layout: &Layout) -> io::Result<(T::Doorbell, Arc<Notifier>)> {
        let call = Arc::new(Notifier::new()?);
        let [descriptors, driver, device] = layout.addresses(&self.rings, self.ring_at(index));
        let ring = Ring { format: self.format, size: layout.size, descriptors, driver, device, call: call.as_fd() };
        let bell = self.transport.start_queue(index, &ring)?;
        Ok((bell, call))
    }

    /// Starts a queue that stays started until the device closes.
    pub(crate) fn fix(&self, index: u16) -> io::Result<()> {
        let (bell, call) = self.begin(index, &self.most())?;
        let place = Place::start(self.format);
        self.stations()[usize::from(index)].fixed = Some(Fixed { bell, call, place });
        Ok(())
    }

    pub(crate) fn start<V: Virtqueue<Request>>(&self, index: u16, depth: u16) -> io::Result<Started<T, V>> {
        if self.life.is_dead() {
            return Err(io::Error::new(io::ErrorKind::NotConnected, "the device is dead"));
        }
        let depth = depth.clamp(1, self.most().slots());
        let fixed = self.stations()[usize::from(index)].fixed.clone();
        let (layout, memory, place);
        let (bell, call) = if let Some(fixed) = fixed {
            (layout, place) = (self.most(), fixed.place);
            memory = Window::new(&self.rings, self.ring_at(index), layout.len());
            (fixed.bell, fixed.call)
        } else {
            layout = Layout::fitting(self.format, depth, self.config.segments, self.indirect, self.queue_size);
            place = Place::start(self.format);
            memory = Window::zeroed(&self.rings, self.ring_at(index), layout.len());
            self.begin(index, &layout)?
        };
        let slots = Slots::new(memory, layout, self.config.segment_max, depth);
        self.life.watch(&call);
        Ok((V::resume(slots, self.event_idx, place), bell, call))
    }

    /// Closes a queue with no requests in flight.
    pub(crate) fn stop<V: Virtqueue<Request>>(&self, index: u16, ring: &V) -> io::Result<()> {
        if T::RESTARTS {
            return self.transport.stop_queue(index);
        }
        if let Some(fixed) = &mut self.stations()[usize::from(index)].fixed {
            fixed.place = ring.place();
        }
        Ok(())
    }

    /// Reads the capacity again after a configuration change.
    pub(crate) fn config_changed(&self) {
        let name = format_args!("{} {}", self.info.driver, self.info.target);
        let mut bytes = [0; config::LEN];
        let now = match self.transport.read_config(&mut bytes, 8) {
            Ok(len) => {
                self.compare_blocks(&bytes[..len]);
                config::capacity(&bytes[..len], self.config.block_size)
            }
            Err(e) => {
                return self.end(&format!("cannot read the changed configuration: {e}"));
            }
        };
        match now {
            Ok(now) => {
                let before = self.capacity.swap(now, Ordering::Relaxed);
                if before != now {
                    log::info!("{name}: the capacity changed from {before} to {now} bytes");
                }
            }
            Err(e) => log::warn!("{name}: ignored a configuration change: {e}"),
        }
    }

    /// Callers rely on the block size, so a new one takes effect only when the device is opened again.
    pub(crate) fn compare_blocks(&self, bytes: &[u8]) {
        let Some(now) = config::block_size(bytes).filter(|_| self.config.tells_block_size) else { return };
        if self.block_size.swap(now, Ordering::Relaxed) != now && now != self.config.block_size {
            log::warn!(
                "{} {}: the block size changed from {} to {now} bytes; open the device again to use it",
                self.info.driver,
                self.info.target,
                self.config.block_size
            );
        }
    }

    /// Switches the write cache, and verifies that the device did it.
    pub(crate) fn switch_cache(&self, mode: WriteCache) -> io::Result<()> {
        let wanted = u8::from(mode == WriteCache::Writeback);
        self.transport.write_config(WRITEBACK, &[wanted])?;
        let mut bytes = [0; config::LEN];
        let len = self.transport.read_config(&mut bytes, WRITEBACK + 1)?;
        if len <= WRITEBACK || bytes[WRITEBACK] != wanted {
            let why = format!("the device did not switch its write cache to {mode:?} as requested");
            return Err(io::Error::new(io::ErrorKind::Unsupported, why.to_lowercase()));
        }
        Ok(())
    }

    pub(crate) fn end(&self, why: &str) {
        self.life.end(why);
        self.transport.cut_off();
    }

    /// Requests the serial number, and reads the first block to learn whether the device reports written lengths.
    pub(crate) fn probe<V: Virtqueue<Request>>(&self) -> io::Result<Probe> {
        let (mut ring, bell, call) = self.start::<V>(0, 1)?;
        let memory = Window::zeroed(&self.rings, 0, PROBE);
        let mut ask = |kind: u32, len: u32| {
            let chain = Chain { header: [u64::from(kind), 0], data: Data::In(memory.iova(0), len) };
            // A placeholder: this request has no caller.
            ring.push(&chain, Request { tag: 0, op: Op::Flush }).expect("the queue is empty");
            if ring.publish() {
                bell.ring();
            }
            let deadline = now() + self.info.timeout.unwrap_or(DRAIN);
            loop {
                match ring.pop() {
                    Ok(Some(used)) => return Ok(used),
                    Err(nonsense) => return Err(io::Error::new(io::ErrorKind::InvalidData, nonsense.to_string())),
                    Ok(None) if self.life.is_dead() => {
                        return Err(io::Error::new(io::ErrorKind::NotConnected, "the device died during open"));
                    }
                    Ok(None) => {}
                }
                call.drain();
                if ring.arm() && !self.life.is_dead() && !wait(&call, &self.life, deadline) {
                    let why = "the device does not answer a request for its serial number or its first block in time";
                    return Err(io::Error::new(io::ErrorKind::TimedOut, why));
                }
            }
        };
        let probe = ask(VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_ID_BYTES).and_then(|id| {
            let serial = match u32::from(id.status) {
                VIRTIO_BLK_S_OK => text(&memory, VIRTIO_BLK_ID_BYTES as usize),
                _ => String::new(),
            };
            let block = self.config.block_size;
            let tells_len = self.config.capacity == 0 || {
                let read = ask(VIRTIO_BLK_T_IN, block)?;
                u32::from(read.status) != VIRTIO_BLK_S_OK || read.len >= block
            };
            Ok(Probe { serial, tells_len })
        });
        self.life.unwatch(&call);
        match probe {
            Ok(probe) => self.stop(0, &ring).map(|()| probe),
            Err(e) => {
                self.transport.cut_off();
                Err(e)
            }
        }
    }
}

/// The text in the first `len` bytes: up to the first NUL, trimmed, without control characters.
fn text(memory: &Window, len: usize) -> String {
    let bytes: Vec<u8> = (0..len).map(|at| memory.load8(at, Ordering::Relaxed)).take_while(|b| *b != 0).collect();
    String::from_utf8_lossy(&bytes).trim().chars().filter(|c| !c.is_control()).collect()
}

/// Waits until `call` is readable or the device is dead. `false`: the deadline passed first.
pub(crate) fn wait(call: &Notifier, life: &Liveness, deadline: Instant) -> bool {
    loop {
        let left = deadline.saturating_duration_since(now());
        // A peer that shares the eventfd can swallow the wake-up, so the loop also checks `life` periodically.
        if wake::wait([call.as_fd()], Some(left.min(GLANCE))) == [true] || life.is_dead() {
            return true;
        }
        if left.is_zero() {
            return false;
        }
    }
}

impl<T: Transport> fmt::Debug for Core<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Core").field("info", &self.info).field("config", &self.config).finish_non_exhaustive()
    }
}
