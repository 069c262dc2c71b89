//! [`Control`]: the registers of a virtio PCI device (virtio 1.2, 4.1), as the transport of a virtio-blk device.

use std::{
    io,
    os::fd::BorrowedFd,
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use blkdev::Mapping;
use blkdev_vfio::{Bar, PciDevice};
use blkdev_virtio::{Doorbell, Liveness, Ring, Transport};

use crate::{
    layout::{Layout, Place},
    watch::Watch,
};

/// Register offsets in the common configuration (4.1.4.3).
const DEVICE_FEATURE_SELECT: usize = 0;
const DEVICE_FEATURE: usize = 4;
const DRIVER_FEATURE_SELECT: usize = 8;
const DRIVER_FEATURE: usize = 12;
const CONFIG_VECTOR: usize = 16;
const NUM_QUEUES: usize = 18;
const STATUS: usize = 20;
const GENERATION: usize = 21;
const QUEUE_SELECT: usize = 22;
const QUEUE_SIZE: usize = 24;
const QUEUE_VECTOR: usize = 26;
const QUEUE_ENABLE: usize = 28;
const QUEUE_NOTIFY_OFF: usize = 30;
const QUEUE_DESCRIPTORS: usize = 32;
const QUEUE_DRIVER: usize = 40;
const QUEUE_DEVICE: usize = 48;

/// Bits of the device status (2.1).
const ACKNOWLEDGE: u8 = 1;
const DRIVER: u8 = 2;
const DRIVER_OK: u8 = 4;
const FEATURES_OK: u8 = 8;
const NEEDS_RESET: u8 = 64;
/// The status register of a removed device reads as this.
const NOT_THERE: u8 = 0xff;

/// A vector register reads as this if the device could not allocate the vector.
const NO_VECTOR: u16 = 0xffff;

/// VIRTIO_F_ACCESS_PLATFORM: the device's accesses go through the IOMMU.
const ACCESS_PLATFORM: u64 = 1 << 33;
/// VIRTIO_F_ORDER_PLATFORM: the device needs the platform's memory barriers for devices. On x86 the CPU's barriers are enough.
const ORDER_PLATFORM: u64 = 1 << 36;

/// Longest reset of a device.
const RESET: Duration = Duration::from_secs(5);

pub(crate) struct Control {
    pci: Arc<dyn PciDevice>,
    target: String,
    life: Arc<Liveness>,
    layout: Layout,
    common: Arc<dyn Bar>,
    notify: Arc<dyn Bar>,
    device: Arc<dyn Bar>,
    queues_max: u16,
    /// Whether queue `n` has its own vector `n + 1`; otherwise all queues share the last vector.
    own_vectors: bool,
    vectors: u16,
    watch: Watch,
    /// Guards the registers of the selected queue or feature word: one thread at a time.
    select: Mutex<()>,
}

impl Control {
    /// Takes over the device and resets it. `vectors_max`: most interrupt vectors to use.
    pub(crate) fn open(pci: Arc<dyn PciDevice>, vectors_max: u16) -> io::Result<Self> {
        let unsupported = |why: &str| io::Error::new(io::ErrorKind::Unsupported, why);
        if pci.translation().is_some() {
            return Err(unsupported("virtio devices are not supported without an IOMMU"));
        }
        let layout = Layout::read(&*pci)?;
        let bar = |place: Place| {
            let bar = pci.bar(place.bar)?;
            let fits = place.at.checked_add(place.len).is_some_and(|end| end <= bar.len());
            let why = || unsupported("a capability names more registers than the device has");
            if fits { Ok(bar) } else { Err(why()) }
        };
        let (common, notify, device) = (bar(layout.common)?, bar(layout.notify)?, bar(layout.device)?);
        let queues_max = common.read16(layout.common.at + NUM_QUEUES);

        let vectors = pci.vectors().min(vectors_max);
        if vectors == 0 {
            return Err(unsupported("the device has no MSI-X vectors"));
        }
        // One vector for configuration changes and one for each queue, if the device has enough.
        let own_vectors = vectors > queues_max;
        let vectors = if own_vectors { queues_max + 1 } else { vectors.min(2) };
        let target = pci.address().to_owned();
        let life = Liveness::new(format!("virtio-pci {target}"));
        let watch = Watch::new(Arc::clone(&life), vectors, own_vectors)?;
        let control = Self {
            pci,
            target,
            life,
            layout,
            common,
            notify,
            device,
            queues_max,
            own_vectors,
            vectors,
            watch,
            select: Mutex::new(()),
        };
        control.reset()?;
        control.set_status(ACKNOWLEDGE);
        control.set_status(ACKNOWLEDGE | DRIVER);
        // Vector 0 is for configuration changes, unless it is the only one. Vectors of single queues are set when the queues
        // start.
        let mut fds = vec![control.watch.queues(); usize::from(vectors)];
        if vectors > 1 {
            fds[0] = control.watch.config_changes();
        }
        control.pci.enable_vectors(&fds)?;
        control.pci.watch_removal(control.watch.removal())?;
        control.write16(CONFIG_VECTOR, 0);
        if control.read16(CONFIG_VECTOR) == NO_VECTOR {
            return Err(unsupported("the device could not allocate an interrupt vector for configuration changes"));
        }
        Ok(control)
    }

    fn read8(&self, at: usize) -> u8 {
        self.common.read8(self.layout.common.at + at)
    }

    fn read16(&self, at: usize) -> u16 {
        self.common.read16(self.layout.common.at + at)
    }

    fn write16(&self, at: usize, value: u16) {
        self.common.write16(self.layout.common.at + at, value);
    }

    fn write32(&self, at: usize, value: u32) {
        self.common.write32(self.layout.common.at + at, value);
    }

    /// Writes two 32-bit halves: not every device accepts 64-bit accesses (4.1.3.1).
    fn write64(&self, at: usize, value: u64) {
        self.write32(at, value as u32);
        self.write32(at + 4, (value >> 32) as u32);
    }

    fn set_status(&self, status: u8) {
        self.common.write8(self.layout.common.at + STATUS, status);
    }

    /// Sets a bit of the device status. Returns the new status.
    fn add_status(&self, bit: u8) -> u8 {
        self.set_status(self.read8(STATUS) | bit);
        self.read8(STATUS)
    }

    /// Resets the device, and waits until the reset is complete (4.1.4.3.2).
    fn reset(&self) -> io::Result<()> {
        self.set_status(0);
        let end = Instant::now() + RESET;
        loop {
            match self.read8(STATUS) {
                0 => return Ok(()),
                NOT_THERE => return Err(io::Error::new(io::ErrorKind::NotConnected, "the device was removed")),
                status if Instant::now() >= end => {
                    let why = format!("the device did not complete a reset within {RESET:?} (status {status:#x})");
                    return Err(io::Error::new(io::ErrorKind::TimedOut, why));
                }
                _ => thread::sleep(Duration::from_millis(1)),
            }
        }
    }
}

impl Transport for Control {
    type Doorbell = Bell;

    const RESTARTS: bool = false;

    // QEMU declares a device broken if a request has more than 1024 memory pieces; behind an IOMMU each 4 KiB page can be one.
    // Linux's driver also sends shorter requests.
    const TRANSFER_MAX: u32 = 2 << 20;

    fn driver(&self) -> &'static str {
        "virtio-pci"
    }

    fn target(&self) -> &str {
        &self.target
    }

    fn life(&self) -> &Arc<Liveness> {
        &self.life
    }

    fn features(&self) -> u64 {
        let _one = self.select.lock().unwrap_or_else(PoisonError::into_inner);
        let word = |n: u32| {
            self.write32(DEVICE_FEATURE_SELECT, n);
            u64::from(self.common.read32(self.layout.common.at + DEVICE_FEATURE))
        };
        word(0) | word(1) << 32
    }

    fn accept(&self, features: u64) -> io::Result<()> {
        let unsupported = |why: String| Err(io::Error::new(io::ErrorKind::Unsupported, why));
        let offered = self.features();
        if offered & ACCESS_PLATFORM == 0 {
            let why =
                "the device bypasses the IOMMU: it does not offer VIRTIO_F_ACCESS_PLATFORM (qemu: iommu_platform=on)";
            return unsupported(why.to_owned());
        }
        let order = if cfg!(target_arch = "x86_64") { ORDER_PLATFORM } else { 0 };
        let features = features | offered & (ACCESS_PLATFORM | order);
        {
            let _one = self.select.lock().unwrap_or_else(PoisonError::into_inner);
            for (n, word) in [features as u32, (features >> 32) as u32].into_iter().enumerate() {
                self.write32(DRIVER_FEATURE_SELECT, n as u32);
                self.write32(DRIVER_FEATURE, word);
            }
        }
        if self.add_status(FEATURES_OK) & FEATURES_OK == 0 {
            return unsupported(format!("the device refuses the features {features:#x}, although it offers them"));
        }
        self.pci.set_bus_master(true)
    }

    fn read_config(&self, bytes: &mut [u8], _needed: usize) -> io::Result<usize> {
        match self.read8(STATUS) {
            NOT_THERE => return Err(io::Error::new(io::ErrorKind::NotConnected, "the device was removed")),
            status if status & NEEDS_RESET != 0 => {
                let why = "the device failed (status DEVICE_NEEDS_RESET)";
                return Err(io::Error::new(io::ErrorKind::NotConnected, why));
            }
            _ => {}
        }
        let Place { at, len, .. } = self.layout.device;
        let len = len.min(bytes.len());
        for _ in 0..1000 {
            // A read is consistent if the generation is the same before and after it (2.5.2).
            let generation = self.read8(GENERATION);
            for (n, byte) in bytes[..len].iter_mut().enumerate() {
                *byte = self.device.read8(at + n);
            }
            if self.read8(GENERATION) == generation {
                return Ok(len);
            }
        }
        Err(io::Error::new(io::ErrorKind::InvalidData, "the device's configuration keeps changing"))
    }

    fn write_config(&self, at: usize, bytes: &[u8]) -> io::Result<()> {
        let place = self.layout.device;
        if at + bytes.len() > place.len {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "the device's configuration space is too short"));
        }
        for (n, byte) in bytes.iter().enumerate() {
            self.device.write8(place.at + at + n, *byte);
        }
        Ok(())
    }

    fn config_changes(&self) -> Option<BorrowedFd<'_>> {
        Some(self.watch.config_changes())
    }

    fn queues_max(&self) -> u16 {
        self.queues_max
    }

    fn ring_max(&self, index: u16) -> u16 {
        let _one = self.select.lock().unwrap_or_else(PoisonError::into_inner);
        self.write16(QUEUE_SELECT, index);
        self.read16(QUEUE_SIZE)
    }

    fn register(&self, mapping: &Arc<Mapping>) -> io::Result<()> {
        self.pci.dma_map(mapping)
    }

    fn unregister(&self, mapping: &Arc<Mapping>) -> io::Result<()> {
        self.pci.dma_unmap(mapping)
    }

    fn start_queue(&self, index: u16, ring: &Ring<'_>) -> io::Result<Bell> {
        let fail = |why: &str| Err(io::Error::new(io::ErrorKind::InvalidData, format!("queue {index}: {why}")));
        let _one = self.select.lock().unwrap_or_else(PoisonError::into_inner);
        self.write16(QUEUE_SELECT, index);
        let size = self.read16(QUEUE_SIZE);
        if size < ring.size {
            return fail("the device has no such queue, or its queue is smaller than reported");
        }
        let vector = if self.own_vectors {
            self.pci.set_vector(index + 1, Some(ring.call))?;
            index + 1
        } else {
            self.watch.share(ring.call)?;
            self.vectors - 1
        };
        self.write16(QUEUE_SIZE, ring.size);
        self.write16(QUEUE_VECTOR, vector);
        if self.read16(QUEUE_VECTOR) == NO_VECTOR {
            let why = format!("queue {index}: the device could not allocate an interrupt vector");
            return Err(io::Error::new(io::ErrorKind::Unsupported, why));
        }
        self.write64(QUEUE_DESCRIPTORS, ring.descriptors.get());
        self.write64(QUEUE_DRIVER, ring.driver.get());
        self.write64(QUEUE_DEVICE, ring.device.get());
        let off = usize::from(self.read16(QUEUE_NOTIFY_OFF)).checked_mul(self.layout.multiplier);
        // The notify structure is aligned and has room for at least one register.
        let Some(off) = off.filter(|off| off.is_multiple_of(2) && *off <= self.layout.notify.len - 2) else {
            return fail("its doorbell lies outside of the notify structure");
        };
        self.write16(QUEUE_ENABLE, 1);
        Ok(Bell { bar: Arc::clone(&self.notify), at: self.layout.notify.at + off, index })
    }

    fn run(&self) -> io::Result<()> {
        let status = self.add_status(DRIVER_OK);
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
        // A removed device ignores writes, which does no harm.
        self.set_status(0);
        let _ = self.pci.set_bus_master(false);
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        // First the device stops using the memory; then dropping `pci` unmaps the memory.
        let _ = self.reset();
        let _ = self.pci.set_bus_master(false);
        let _ = self.pci.enable_vectors(&[]);
    }
}

/// The register that notifies the device about a queue (4.1.5.2).
#[derive(Clone, Debug)]
pub(crate) struct Bell {
    bar: Arc<dyn Bar>,
    at: usize,
    index: u16,
}

impl Doorbell for Bell {
    #[inline]
    fn ring(&self) {
        self.bar.write16(self.at, self.index);
    }
}

impl std::fmt::Debug for Control {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Control")
            .field("target", &self.target)
            .field("layout", &self.layout)
            .field("vectors", &self.vectors)
            .finish_non_exhaustive()
    }
}
