//! [`Control`]: a vhost-vdpa device, as the transport of a virtio-blk device.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{Arc, Mutex, PoisonError},
    thread,
};

use blkdev::{
    Context, Mapping, Peer,
    wake::{Wake, Watcher},
};
use blkdev_virtio::{Doorbell, Format, Liveness, Ring, Transport};
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};

use crate::{
    maker::Maker,
    place::Place,
    remains::{GRACE, Remains, iotlb, reset},
    sys::{BACKEND_F_IOTLB_BATCH, BACKEND_F_IOTLB_MSG_V2, CONFIG_MAX, Iotlb, Vhost},
    watch::watch,
};

/// Device id of virtio-blk (virtio 1.2, 5).
const DEVICE_BLOCK: u32 = 2;

/// Bits of the device status (2.1).
const ACKNOWLEDGE: u8 = 1;
const DRIVER: u8 = 2;
const DRIVER_OK: u8 = 4;
const FEATURES_OK: u8 = 8;
const NEEDS_RESET: u8 = 64;

/// VIRTIO_F_ACCESS_PLATFORM: descriptor addresses are translated by the IOTLB. All vDPA devices work like this.
const ACCESS_PLATFORM: u64 = 1 << 33;
/// VIRTIO_F_ORDER_PLATFORM: the device needs the platform's memory barriers for devices. On x86 the CPU's barriers are enough.
const ORDER_PLATFORM: u64 = 1 << 36;

/// Memory that the device has mapped.
#[derive(Debug, Default)]
struct Mappings {
    used: Vec<Arc<Mapping>>,
    /// Unregistered, but still mapped, because the device is one of VDUSE. Each change makes the kernel invalidate all memory of the
    /// process behind it. With a request in flight, qemu-storage-daemon 10 then writes the status to memory that is unmapped, and
    /// crashes. So this memory stays until the next change.
    unused: Vec<Arc<Mapping>>,
}

pub(crate) struct Control {
    vhost: Arc<Vhost>,
    target: String,
    /// The name of the vDPA device, or empty.
    name: String,
    life: Arc<Liveness>,
    features: u64,
    /// Backend features in use.
    backend: u64,
    range: (u64, u64),
    queues_max: u16,
    ring_max: u16,
    config_changes: Option<Wake>,
    /// Memory that the device has mapped.
    mappings: Mutex<Mappings>,
    /// Addresses of the driver area and the device area of each split ring.
    rings: Mutex<Vec<[u64; 2]>>,
    /// Ends the life of the device when it is removed, or when its process ends.
    _watcher: Option<Watcher>,
    /// The process behind the device, if it is one of VDUSE.
    maker: Option<Maker>,
}

impl Control {
    /// Takes over the device and resets it.
    pub(crate) fn open(fd: OwnedFd, target: String) -> io::Result<Self> {
        let vhost = Arc::new(Vhost::new(fd));
        let id = vhost.get_device_id();
        let id = id.map_err(|e| {
            Context::with_kind(io::ErrorKind::InvalidInput, format!("it is not a vhost-vdpa device ({e})"), e)
        })?;
        if id != DEVICE_BLOCK {
            let why = format!("virtio device {id} is not a block device ({DEVICE_BLOCK})");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        }
        vhost.set_owner().map_err(|e| match e.kind() {
            io::ErrorKind::ResourceBusy => Context::wrap(format!("{e}; another process uses the same open file"), e),
            _ => e,
        })?;
        reset(&vhost)?;
        vhost.set_status(ACKNOWLEDGE)?;
        vhost.set_status(ACKNOWLEDGE | DRIVER)?;
        let features = vhost.get_features()?;

        let mut backend = vhost.get_backend_features().unwrap_or(0);
        backend &= BACKEND_F_IOTLB_MSG_V2 | BACKEND_F_IOTLB_BATCH;
        if backend & BACKEND_F_IOTLB_MSG_V2 == 0 {
            backend = 0;
        }
        if backend != 0 {
            vhost.set_backend_features(backend)?;
        }
        // A kernel without this ioctl has no limit.
        let range = vhost.get_iova_range().unwrap_or((0, u64::MAX));
        let queues_max = vhost.get_vqs_count().map_or(u16::MAX, |n| u16::try_from(n).unwrap_or(u16::MAX));
        let ring_max = vhost.get_vring_num()?;

        let call = Wake::new()?;
        let config_changes = vhost.set_config_call(call.as_fd()).is_ok().then_some(call);
        let life = Liveness::new(format!("vdpa {target}"));
        let place = Place::of(vhost.as_fd());
        let (maker, watcher) = match &place {
            Some(place) => {
                let (maker, processes) = Maker::at(place, life.name())?.unzip();
                (maker, Some(watch(place.clone(), processes.unwrap_or_default(), &life)?))
            }
            None => (None, None),
        };
        Ok(Self {
            vhost,
            life,
            target,
            name: place.and_then(|place| place.name()).unwrap_or_default(),
            features,
            backend,
            range,
            queues_max,
            ring_max,
            config_changes,
            mappings: Mutex::default(),
            rings: Mutex::default(),
            _watcher: watcher,
            maker,
        })
    }

    fn iotlb(&self, what: Iotlb, mapping: &Arc<Mapping>) -> io::Result<()> {
        iotlb(&self.vhost, self.backend, what, [mapping])
    }

    fn add_status(&self, bit: u8) -> io::Result<u8> {
        let status = self.vhost.get_status()? | bit;
        self.vhost.set_status(status)?;
        self.vhost.get_status()
    }
}

/// Explains a failure to map `len` bytes when `mapped` bytes are mapped already. The kernel returns EFAULT whatever the reason.
fn explain(error: io::Error, len: u64, mapped: u64) -> io::Error {
    let what = format!("cannot map {} MiB of memory for the device: {error}", len >> 20);
    let pieces = "; if physical memory is fragmented, this takes more entries than the IOTLB of vhost has: reserve huge \
                  pages (vm.nr_hugepages), raise the parameter max_iotlb_entries of the module vhost, or use less memory";
    let why = match getrlimit(Resource::RLIMIT_MEMLOCK) {
        Ok((limit, _)) if limit != RLIM_INFINITY => format!(
            "; RLIMIT_MEMLOCK is {} MiB, this device alone needs {} MiB; raise it (ulimit -l, LimitMEMLOCK= in a systemd \
             unit), or use less memory",
            limit >> 20,
            (mapped + len) >> 20
        ),
        _ => pieces.to_owned(),
    };
    Context::wrap(what + &why, error)
}

impl Transport for Control {
    type Doorbell = Kick;

    const RESTARTS: bool = false;

    // As for virtio-pci: the kernel's vp-vdpa exports the same devices here.
    const TRANSFER_MAX: u32 = 2 << 20;

    fn driver(&self) -> &'static str {
        "vdpa"
    }

    fn target(&self) -> &str {
        &self.target
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn life(&self) -> &Arc<Liveness> {
        &self.life
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn accept(&self, features: u64) -> io::Result<()> {
        let order = if cfg!(target_arch = "x86_64") { ORDER_PLATFORM } else { 0 };
        self.vhost.set_features(features | self.features & (ACCESS_PLATFORM | order))?;
        if self.add_status(FEATURES_OK)? & FEATURES_OK == 0 {
            let why = format!("the device refuses the features {features:#x}, although it offers them");
            return Err(io::Error::new(io::ErrorKind::Unsupported, why));
        }
        Ok(())
    }

    fn read_config(&self, bytes: &mut [u8], needed: usize) -> io::Result<usize> {
        let status = self.vhost.get_status()?;
        if status & NEEDS_RESET != 0 {
            let why = "the device failed (status DEVICE_NEEDS_RESET)";
            return Err(io::Error::new(io::ErrorKind::NotConnected, why));
        }
        let size = self.vhost.get_config_size().map_or(needed, |size| size as usize);
        let len = size.min(bytes.len()).min(CONFIG_MAX);
        // vhost-vdpa has no configuration generation. Two equal reads mean that nothing changed in between.
        let mut again = vec![0; len];
        for _ in 0..100 {
            self.vhost.get_config(&mut bytes[..len])?;
            self.vhost.get_config(&mut again)?;
            if bytes[..len] == again[..] {
                return Ok(len);
            }
        }
        Err(io::Error::new(io::ErrorKind::InvalidData, "the device's configuration keeps changing"))
    }

    fn write_config(&self, at: usize, bytes: &[u8]) -> io::Result<()> {
        self.vhost.set_config(at, bytes)
    }

    fn config_changes(&self) -> Option<BorrowedFd<'_>> {
        self.config_changes.as_ref().map(AsFd::as_fd)
    }

    fn queues_max(&self) -> u16 {
        self.queues_max
    }

    fn ring_max(&self, index: u16) -> u16 {
        let size = self.vhost.get_vring_size(index).map_or(self.ring_max, |n| u16::try_from(n).unwrap_or(u16::MAX));
        size.min(self.ring_max)
    }

    fn register(&self, mapping: &Arc<Mapping>) -> io::Result<()> {
        let mut mappings = self.mappings.lock().unwrap_or_else(PoisonError::into_inner);
        if mappings.used.iter().any(|known| Arc::ptr_eq(known, mapping)) {
            return Ok(());
        }
        if let Some(at) = mappings.unused.iter().position(|known| Arc::ptr_eq(known, mapping)) {
            let known = mappings.unused.swap_remove(at);
            mappings.used.push(known);
            return Ok(());
        }
        let (at, len) = (mapping.iova().get(), mapping.len() as u64);
        let (first, last) = self.range;
        if at < first || at + (len - 1) > last {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                format!("cannot map {len} bytes at {at:#x}: the device can access only {first:#x} to {last:#x}"),
            ));
        }
        // Hardware drivers pin the memory, and vhost's table has room for few pieces.
        mapping.consolidate();
        // The memory of the process is invalidated in any case.
        while let Some(mapping) = mappings.unused.last() {
            self.iotlb(Iotlb::Invalidate, mapping)?;
            mappings.unused.pop();
        }
        let mapped = mappings.used.iter().map(|mapping| mapping.len() as u64).sum();
        self.iotlb(Iotlb::Update, mapping).map_err(|e| explain(e, len, mapped))?;
        mappings.used.push(Arc::clone(mapping));
        Ok(())
    }

    fn unregister(&self, mapping: &Arc<Mapping>) -> io::Result<()> {
        if self.life.is_dead() {
            // It may still be in use: it stays mapped until drop resets the device.
            return Ok(());
        }
        let mut mappings = self.mappings.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(at) = mappings.used.iter().position(|known| Arc::ptr_eq(known, mapping)) else { return Ok(()) };
        if self.maker.is_some() {
            let mapping = mappings.used.swap_remove(at);
            mappings.unused.push(mapping);
        } else {
            self.iotlb(Iotlb::Invalidate, mapping)?;
            mappings.used.swap_remove(at);
        }
        Ok(())
    }

    fn peer(&self) -> Option<Arc<Peer>> {
        self.maker.as_ref().map(|maker| Arc::clone(maker.peer()))
    }

    fn start_queue(&self, index: u16, ring: &Ring<'_>) -> io::Result<Kick> {
        let kick = Wake::new()?;
        let set_up = || {
            self.vhost.set_vring_num(index, ring.size)?;
            // Index 0; in a packed ring both wrap counters 1.
            self.vhost.set_vring_base(index, if ring.format == Format::Packed { 0x8000_8000 } else { 0 })?;
            self.vhost.set_vring_addr(index, [ring.descriptors, ring.driver, ring.device].map(|at| at.get()))?;
            self.vhost.set_vring_call(index, ring.call)?;
            self.vhost.set_vring_kick(index, kick.as_fd())?;
            self.vhost.enable_vring(index)
        };
        if ring.format == Format::Split {
            self.rings.lock().unwrap_or_else(PoisonError::into_inner).push([ring.driver.get(), ring.device.get()]);
        }
        set_up().map_err(|e: io::Error| Context::wrap(format!("queue {index}: {e}"), e))?;
        Ok(Kick(Arc::new(kick)))
    }

    fn run(&self) -> io::Result<()> {
        let status = self.add_status(DRIVER_OK)?;
        if status & DRIVER_OK == 0 || status & NEEDS_RESET != 0 {
            let why = format!("the device did not start (status {status:#x})");
            return Err(io::Error::new(io::ErrorKind::NotConnected, why));
        }
        Ok(())
    }

    fn stop_queue(&self, _index: u16) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn cut_off(&self) {
        // No reset here, while requests are in flight: qemu-storage-daemon (VDUSE) would abort, and the kernel may wait half a
        // minute for a hung one, on a data-plane thread. The memory that the device may still access stays as it is until then.
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        let mappings = std::mem::take(self.mappings.get_mut().unwrap_or_else(PoisonError::into_inner));
        let remains = Remains {
            vhost: Arc::clone(&self.vhost),
            backend: self.backend,
            mappings: mappings.used.into_iter().chain(mappings.unused).collect(),
            rings: std::mem::take(self.rings.get_mut().unwrap_or_else(PoisonError::into_inner)),
        };
        match self.maker.take() {
            Some(maker) => maker.close(remains, self.life.is_dead(), self.life.name()),
            None => {
                if self.life.is_dead() {
                    // Time for the requests that were in flight when the device was declared dead.
                    thread::sleep(GRACE);
                }
                let _ = remains.reset();
            }
        }
    }
}

/// The kick eventfd of a queue.
#[derive(Clone, Debug)]
pub(crate) struct Kick(Arc<Wake>);

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
            .field("features", &format_args!("{:#x}", self.features))
            .field("backend", &self.backend)
            .field("range", &self.range)
            .finish_non_exhaustive()
    }
}
