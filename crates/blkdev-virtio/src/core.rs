//! [`Core`]: what a device and its queues share, and how its queues are started and stopped.

use std::{
    fmt, io,
    os::fd::AsFd,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use blkdev::{Info, Mapping, Op, Request};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_OK, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN};

use crate::{
    config::{self, Config, WRITEBACK},
    layout::{Chain, Data, Layout, Place},
    liveness::Liveness,
    notifier::Notifier,
    options::WriteCache,
    ring::Virtqueue,
    shared::Shared,
    slots::Slots,
    transport::{Doorbell, Format, Ring, Transport},
};

/// Memory for the requests that are sent while the device is opened: room for the largest block.
pub(crate) const PROBE: usize = 65536;

/// How long a queue that is dropped waits for what is in flight.
pub(crate) const DRAIN: Duration = Duration::from_secs(5);

/// How often a thread that waits for the device looks whether it is dead.
pub(crate) const GLANCE: Duration = Duration::from_millis(200);

/// What the device and its queues share.
pub(crate) struct Core<T: Transport> {
    // First: with it goes the device's hold on the memory below.
    pub(crate) transport: T,
    pub(crate) life: Arc<Liveness>,
    pub(crate) info: Info,
    pub(crate) config: Config,
    /// Bytes, a multiple of the block size.
    pub(crate) capacity: AtomicU64,
    /// The device's latest report.
    pub(crate) block_size: AtomicU32,
    pub(crate) format: Format,
    pub(crate) indirect: bool,
    pub(crate) event_idx: bool,
    pub(crate) queue_size: u16,
    /// The device does not tell how much it has written: memory for reads is cleared first.
    pub(crate) clear_reads: bool,
    /// Ring memory: [`PROBE`] bytes, then as many for each queue as the largest layout takes.
    pub(crate) rings: Arc<Mapping>,
    /// One for each queue.
    pub(crate) stations: Mutex<Vec<Station<T::Doorbell>>>,
}

/// A started queue: its ring, its doorbell, and the eventfd that the device writes to.
pub(crate) type Started<T, V> = (V, <T as Transport>::Doorbell, Arc<Notifier>);

/// A queue of the device, open or not.
#[derive(Debug)]
pub(crate) struct Station<D> {
    pub(crate) open: bool,
    /// Where queues cannot be restarted: what stays as it is when the queue is closed and opened again.
    pub(crate) fixed: Option<Fixed<D>>,
}

/// A queue that was started for good.
#[derive(Clone, Debug)]
pub(crate) struct Fixed<D> {
    pub(crate) bell: D,
    pub(crate) call: Arc<Notifier>,
    /// How far it had got when it was closed.
    pub(crate) place: Place,
}

/// What the requests that are sent at open told.
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

    /// Room for the largest layout, and thus for every other.
    pub(crate) fn most(&self) -> Layout {
        Layout::new(self.format, self.queue_size, self.config.segments, self.indirect)
    }

    pub(crate) fn ring_at(&self, index: u16) -> usize {
        PROBE + usize::from(index) * self.most().len()
    }

    /// Makes the device begin to work on new rings.
    pub(crate) fn begin(&self, index: u16, layout: &Layout) -> io::Result<(T::Doorbell, Arc<Notifier>)> {
        let call = Arc::new(Notifier::new()?);
        let [descriptors, driver, device] = layout.addresses(&self.rings, self.ring_at(index));
        let ring = Ring { format: self.format, size: layout.size, descriptors, driver, device, call: call.as_fd() };
        let bell = self.transport.start_queue(index, &ring)?;
        Ok((bell, call))
    }

    /// Starts a queue for good.
    pub(crate) fn fix(&self, index: u16) -> io::Result<()> {
        let (bell, call) = self.begin(index, &self.most())?;
        let place = Place::start(self.format);
        self.stations()[usize::from(index)].fixed = Some(Fixed { bell, call, place });
        Ok(())
    }

    pub(crate) fn start<V: Virtqueue<Request>>(&self, index: u16, depth: u16) -> io::Result<Started<T, V>> {
        if self.life.is_dead() {
            return Err(io::Error::new(io::ErrorKind::NotConnected, "the device is gone"));
        }
        let depth = depth.clamp(1, self.most().slots());
        let fixed = self.stations()[usize::from(index)].fixed.clone();
        let (layout, memory, place);
        let (bell, call) = if let Some(fixed) = fixed {
            (layout, place) = (self.most(), fixed.place);
            memory = Shared::window(&self.rings, self.ring_at(index), layout.len());
            (fixed.bell, fixed.call)
        } else {
            layout = Layout::fitting(self.format, depth, self.config.segments, self.indirect, self.queue_size);
            place = Place::start(self.format);
            memory = Shared::zeroed(&self.rings, self.ring_at(index), layout.len());
            self.begin(index, &layout)?
        };
        let slots = Slots::new(memory, layout, self.config.segment_max, depth);
        self.life.watch(&call);
        Ok((V::resume(slots, self.event_idx, place), bell, call))
    }

    /// Closes a queue that nothing is in flight in.
    pub(crate) fn stop<V: Virtqueue<Request>>(&self, index: u16, ring: &V) -> io::Result<()> {
        if T::RESTARTS {
            return self.transport.stop_queue(index);
        }
        if let Some(fixed) = &mut self.stations()[usize::from(index)].fixed {
            fixed.place = ring.place();
        }
        Ok(())
    }

    /// Reads the capacity again, because the device says that its configuration has changed.
    pub(crate) fn config_changed(&self) {
        let name = format_args!("{} {}", self.info.driver, self.info.target);
        let mut bytes = [0; config::LEN];
        let now = match self.transport.read_config(&mut bytes, 8) {
            Ok(len) => {
                self.compare_blocks(&bytes[..len]);
                config::capacity(&bytes[..len], self.config.block_size)
            }
            Err(e) => {
                return self.end(&format!("after a change of configuration: {e}; the device is not used any more"));
            }
        };
        match now {
            Ok(now) => {
                let before = self.capacity.swap(now, Ordering::Relaxed);
                if before != now {
                    log::info!("{name}: the capacity has changed from {before} to {now} bytes");
                }
            }
            Err(e) => log::warn!("{name}: a change of configuration is left alone: {e}"),
        }
    }

    /// Callers rely on the block size, so a new one counts only for callers that open the device from now on.
    pub(crate) fn compare_blocks(&self, bytes: &[u8]) {
        let Some(now) = config::block_size(bytes).filter(|_| self.config.tells_block_size) else { return };
        if self.block_size.swap(now, Ordering::Relaxed) != now && now != self.config.block_size {
            log::warn!(
                "{} {}: the block size has changed from {} to {now} bytes; open the device again to use it",
                self.info.driver,
                self.info.target,
                self.config.block_size
            );
        }
    }

    /// Switches the write cache, and looks whether the device has done it.
    pub(crate) fn switch_cache(&self, mode: WriteCache) -> io::Result<()> {
        let wanted = u8::from(mode == WriteCache::Writeback);
        self.transport.write_config(WRITEBACK, &[wanted])?;
        let mut bytes = [0; config::LEN];
        let len = self.transport.read_config(&mut bytes, WRITEBACK + 1)?;
        if len <= WRITEBACK || bytes[WRITEBACK] != wanted {
            let why = format!("the device was asked to switch its write cache to {mode:?}, and has not done it");
            return Err(io::Error::other(why.to_lowercase()));
        }
        Ok(())
    }

    pub(crate) fn end(&self, why: &str) {
        self.life.end(why);
        self.transport.cut_off();
    }

    /// Asks for the serial number, and reads the first block to see whether the device tells how much it has written.
    pub(crate) fn probe<V: Virtqueue<Request>>(&self) -> io::Result<Probe> {
        let (mut ring, bell, call) = self.start::<V>(0, 1)?;
        let memory = Shared::zeroed(&self.rings, 0, PROBE);
        let mut ask = |kind: u32, len: u32| {
            let chain = Chain { header: [u64::from(kind), 0], data: Data::In(memory.iova(0), len) };
            // Nobody's: only what the device makes of it is asked for.
            ring.push(&chain, Request { tag: 0, op: Op::Flush }).expect("the queue is empty");
            if ring.publish() {
                bell.ring();
            }
            let deadline = Instant::now() + self.info.timeout.unwrap_or(DRAIN);
            loop {
                match ring.pop() {
                    Ok(Some(used)) => return Ok(used),
                    Err(nonsense) => return Err(io::Error::new(io::ErrorKind::InvalidData, nonsense.to_string())),
                    Ok(None) if self.life.is_dead() => {
                        return Err(io::Error::new(
                            io::ErrorKind::NotConnected,
                            "the device went away while it was opened",
                        ));
                    }
                    Ok(None) => {}
                }
                call.drain();
                if ring.arm() && !self.life.is_dead() && !wait(&call, &self.life, deadline) {
                    let why = "the device does not answer a request for its serial number or its first block";
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

/// The text in the first `len` bytes: up to the first NUL, without blanks around it and without control characters.
fn text(memory: &Shared, len: usize) -> String {
    let bytes: Vec<u8> = (0..len).map(|at| memory.load8(at, Ordering::Relaxed)).take_while(|b| *b != 0).collect();
    String::from_utf8_lossy(&bytes).trim().chars().filter(|c| !c.is_control()).collect()
}

/// Waits until `call` is readable or the device has died. `false`: neither was so in time.
pub(crate) fn wait(call: &Notifier, life: &Liveness, deadline: Instant) -> bool {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        // A peer that shares the eventfd can take the wake-up away, so `life` is looked at now and then. Rounded up: a wait of
        // 0 ms just before the deadline would spin.
        let timeout = PollTimeout::try_from(left.min(GLANCE) + Duration::from_micros(999)).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(call.as_fd(), PollFlags::POLLIN)], timeout) {
            Ok(0) | Err(nix::errno::Errno::EINTR) if life.is_dead() => return true,
            Ok(0) if left.is_zero() => return false,
            Ok(0) | Err(nix::errno::Errno::EINTR) => {}
            Ok(_) => return true,
            Err(_) => return false,
        }
    }
}

impl<T: Transport> fmt::Debug for Core<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Core").field("info", &self.info).field("config", &self.config).finish_non_exhaustive()
    }
}
