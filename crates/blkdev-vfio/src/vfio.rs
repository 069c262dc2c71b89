//! [`Vfio`]: a PCI device of this machine as a [`PciDevice`].

use std::{
    ffi::CString,
    fs::{File, OpenOptions},
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::fs::FileExt,
    },
    path::Path,
    sync::Arc,
};

use blkdev::{Context, Mapping};
use vfio_bindings::bindings::vfio::{
    VFIO_DEVICE_FLAGS_PCI, VFIO_DEVICE_FLAGS_RESET, VFIO_GROUP_FLAGS_VIABLE, VFIO_IRQ_SET_ACTION_TRIGGER,
    VFIO_IRQ_SET_DATA_EVENTFD, VFIO_IRQ_SET_DATA_NONE, VFIO_NOIOMMU_IOMMU, VFIO_PCI_CONFIG_REGION_INDEX,
    VFIO_PCI_ERR_IRQ_INDEX, VFIO_PCI_MSIX_IRQ_INDEX, VFIO_PCI_REQ_IRQ_INDEX, VFIO_REGION_INFO_CAP_MSIX_MAPPABLE,
    VFIO_REGION_INFO_CAP_SPARSE_MMAP, VFIO_TYPE1v2_IOMMU,
};

use crate::{
    bar::Region,
    dma::{Dma, Way, capabilities},
    locate::Location,
    pci::{Bar, COMMAND, COMMAND_BUS_MASTER, COMMAND_INTX_OFF, COMMAND_MEMORY, PciDevice},
    sys::{self, Exchange, Packet},
    translation::Translation,
};

/// Settings for opening a device. There may be more fields later.
#[derive(Clone, Copy, Debug, Default)]
#[non_exhaustive]
pub struct Options {
    /// Use a device without an IOMMU. Such a device can write to all of the machine's memory, so this must be requested
    /// explicitly. It needs root, huge pages, and the kernel's permission (`vfio.enable_unsafe_noiommu_mode`). Default: no.
    pub no_iommu: bool,
}

/// An open device, bound to `vfio-pci`.
#[derive(Debug)]
pub struct Vfio {
    address: String,
    /// Before `dma`: fields are dropped in declaration order.
    device: Arc<OwnedFd>,
    file: File,
    config: u64,
    vectors: u16,
    can_reset: bool,
    /// The kernel interface in use, for the log.
    way: &'static str,
    dma: Dma,
}

impl Vfio {
    /// Opens the device at a PCI address (`01:00.0`, `0000:01:00.0`) or path in sysfs, for exclusive use. Its bus mastering and
    /// its interrupts are off.
    ///
    /// # Errors
    /// The text names the reason and the remedy.
    ///
    /// - [`NotFound`](io::ErrorKind::NotFound): there is no such PCI device.
    /// - [`PermissionDenied`](io::ErrorKind::PermissionDenied): VFIO is not available to this user.
    /// - [`ResourceBusy`](io::ErrorKind::ResourceBusy): another process uses the device, or its IOMMU group has devices with
    ///   other drivers.
    /// - [`InvalidInput`](io::ErrorKind::InvalidInput): `name` is not that of a PCI device, or the device is not bound to
    ///   `vfio-pci`.
    /// - [`Unsupported`](io::ErrorKind::Unsupported): the kernel has no VFIO, or there is no IOMMU and [`Options::no_iommu`]
    ///   is not set.
    /// - [`NotConnected`](io::ErrorKind::NotConnected): the device does not answer.
    ///
    /// Any other error of the system has its own kind; [`Context::os_error`](blkdev::Context::os_error) returns its errno.
    pub fn open(name: &str, options: &Options) -> io::Result<Self> {
        let location = Location::find(name)?;
        Self::open_at(&location, options)
            .map_err(|e| Context::wrap(format!("{}: {e}", location.address), e))
            .inspect(|vfio| log::debug!("{}: opened by {}", vfio.address, vfio.way))
    }

    fn open_at(location: &Location, options: &Options) -> io::Result<Self> {
        location.check_driver()?;
        let (device, way, name) = match by_cdev(location) {
            Some(Ok((device, way))) => (device, way, "iommufd"),
            Some(Err(e)) => {
                log::debug!("{}: cannot use iommufd: {e}", location.address);
                by_group(location, options)?
            }
            None => by_group(location, options)?,
        };
        let dma = Dma::new(way)?;

        let mut info = Packet::new(24);
        sys::exchange(device.as_fd(), Exchange::DEVICE_INFO, &mut info).map_err(|e| said("VFIO_DEVICE_GET_INFO", e))?;
        let flags = info.read32(4).unwrap_or(0);
        if flags & VFIO_DEVICE_FLAGS_PCI == 0 {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "VFIO reports that this is not a PCI device"));
        }
        let config = region(device.as_fd(), VFIO_PCI_CONFIG_REGION_INDEX)?.start;
        let mut irqs = Packet::new(16);
        irqs.put32(8, VFIO_PCI_MSIX_IRQ_INDEX);
        sys::exchange(device.as_fd(), Exchange::IRQ_INFO, &mut irqs)
            .map_err(|e| said("VFIO_DEVICE_GET_IRQ_INFO", e))?;
        let vectors = irqs.read32(12).unwrap_or(0).min(2048) as u16;
        let vfio = Self {
            address: location.address.clone(),
            file: File::from(device.try_clone()?),
            device: Arc::new(device),
            config,
            vectors,
            can_reset: flags & VFIO_DEVICE_FLAGS_RESET != 0,
            way: name,
            dma,
        };
        let mut command = [0; 2];
        vfio.read_config(COMMAND, &mut command)?;
        let command = u16::from_le_bytes(command);
        if command == u16::MAX {
            return Err(io::Error::new(io::ErrorKind::NotConnected, "the device does not answer"));
        }
        let command = (command | COMMAND_MEMORY | COMMAND_INTX_OFF) & !COMMAND_BUS_MASTER;
        vfio.write_config(COMMAND, &command.to_le_bytes())?;
        Ok(vfio)
    }

    fn set_irqs(&self, index: u32, start: u32, fds: &[i32]) -> io::Result<()> {
        let mut packet = Packet::new(20 + 4 * fds.len());
        packet.put32(4, VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER);
        packet.put32(8, index);
        packet.put32(12, start);
        packet.put32(16, fds.len() as u32);
        for (n, fd) in fds.iter().enumerate() {
            packet.put32(20 + 4 * n, *fd as u32);
        }
        sys::exchange(self.device.as_fd(), Exchange::SET_IRQS, &mut packet)
            .map(drop)
            .map_err(|e| said("VFIO_DEVICE_SET_IRQS", e))
    }

    fn disable_irqs(&self, index: u32) -> io::Result<()> {
        let mut packet = Packet::new(20);
        packet.put32(4, VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_ACTION_TRIGGER);
        packet.put32(8, index);
        sys::exchange(self.device.as_fd(), Exchange::SET_IRQS, &mut packet)
            .map(drop)
            .map_err(|e| said("VFIO_DEVICE_SET_IRQS", e))
    }
}

impl PciDevice for Vfio {
    fn address(&self) -> &str {
        &self.address
    }

    fn read_config(&self, at: u16, bytes: &mut [u8]) -> io::Result<()> {
        let at = self.config.saturating_add(at.into());
        self.file.read_exact_at(bytes, at).map_err(|e| said("cannot read configuration space", e))
    }

    fn write_config(&self, at: u16, bytes: &[u8]) -> io::Result<()> {
        let at = self.config.saturating_add(at.into());
        self.file.write_all_at(bytes, at).map_err(|e| said("cannot write configuration space", e))
    }

    fn bar(&self, index: u8) -> io::Result<Arc<dyn Bar>> {
        let what = |e: io::Error| Context::wrap(format!("{}: BAR {index}: {e}", self.address), e);
        let region = region(self.device.as_fd(), index.min(5).into()).map_err(what)?;
        if index > 5 || region.len == 0 {
            return Err(what(io::Error::new(io::ErrorKind::Unsupported, "the device has no such BAR")));
        }
        Ok(Arc::new(Region::new(&self.device, region.start, region.len, &region.areas).map_err(what)?))
    }

    fn dma_map(&self, mapping: &Arc<Mapping>) -> io::Result<()> {
        self.dma.map(mapping)
    }

    fn dma_unmap(&self, mapping: &Arc<Mapping>) -> io::Result<()> {
        self.dma.unmap(mapping)
    }

    fn translation(&self) -> Option<Arc<Translation>> {
        self.dma.translation()
    }

    fn vectors(&self) -> u16 {
        self.vectors
    }

    fn enable_vectors(&self, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        if fds.len() > usize::from(self.vectors) {
            let text =
                format!("{}: {} vectors requested, but the device has {}", self.address, fds.len(), self.vectors);
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        // Disable all first: on some kernels the number of enabled vectors cannot grow (VFIO_IRQ_INFO_NORESIZE). EINVAL: none
        // were enabled.
        let disabled = self.disable_irqs(VFIO_PCI_MSIX_IRQ_INDEX);
        if fds.is_empty() {
            return disabled.or_else(|e| if e.kind() == io::ErrorKind::InvalidInput { Ok(()) } else { Err(e) });
        }
        let fds: Vec<_> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        self.set_irqs(VFIO_PCI_MSIX_IRQ_INDEX, 0, &fds)
    }

    fn set_vector(&self, index: u16, fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
        self.set_irqs(VFIO_PCI_MSIX_IRQ_INDEX, index.into(), &[fd.map_or(-1, |fd| fd.as_raw_fd())])
    }

    fn watch_removal(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        self.set_irqs(VFIO_PCI_REQ_IRQ_INDEX, 0, &[fd.as_raw_fd()])?;
        // Errors are reported on PCI Express only.
        if let Err(e) = self.set_irqs(VFIO_PCI_ERR_IRQ_INDEX, 0, &[fd.as_raw_fd()]) {
            log::debug!("{}: link errors are not reported: {e}", self.address);
        }
        Ok(())
    }

    fn reset(&self) -> io::Result<()> {
        if !self.can_reset {
            let text = format!("{}: the device does not support a function reset", self.address);
            return Err(io::Error::new(io::ErrorKind::Unsupported, text));
        }
        sys::reset(self.device.as_fd()).map_err(|e| said(&format!("{}: VFIO_DEVICE_RESET", self.address), e))
    }
}

/// Stops the device before the memory that it can access is unmapped.
impl Drop for Vfio {
    fn drop(&mut self) {
        let stopped = self.set_bus_master(false);
        for irqs in [VFIO_PCI_MSIX_IRQ_INDEX, VFIO_PCI_REQ_IRQ_INDEX, VFIO_PCI_ERR_IRQ_INDEX] {
            // A removed device has no interrupts any more.
            let _ = self.disable_irqs(irqs);
        }
        let reset = if self.can_reset { self.reset() } else { Ok(()) };
        if let (Err(first), Err(second)) = (&stopped, &reset) {
            // Behind an IOMMU this is harmless. Without one, the device may write to memory that is reused.
            log::warn!("{}: cannot stop the device: {first}; {second}", self.address);
            if self.dma.translation().is_some() {
                self.dma.leak();
            }
        }
    }
}

/// Opens the device through its own file and iommufd. `None`: the kernel does not support them.
fn by_cdev(location: &Location) -> Option<io::Result<(OwnedFd, Way)>> {
    let path = location.cdev()?;
    let iommu = Path::new("/dev/iommu");
    iommu.exists().then(|| {
        let (device, iommu) = (open(&path)?, open(iommu)?);
        let mut bind = Packet::new(16);
        bind.put32(8, iommu.as_raw_fd() as u32);
        sys::exchange(device.as_fd(), Exchange::BIND_IOMMUFD, &mut bind)
            .map_err(|e| said("VFIO_DEVICE_BIND_IOMMUFD", e))?;
        let mut alloc = Packet::new(12);
        sys::exchange(iommu.as_fd(), Exchange::IOAS_ALLOC, &mut alloc).map_err(|e| said("IOMMU_IOAS_ALLOC", e))?;
        let ioas = alloc.read32(8).unwrap_or(0);
        let mut attach = Packet::new(12);
        attach.put32(8, ioas);
        sys::exchange(device.as_fd(), Exchange::ATTACH_IOAS, &mut attach)
            .map_err(|e| said("VFIO_DEVICE_ATTACH_IOMMUFD_PT", e))?;
        Ok((device, Way::Iommufd { iommu, ioas }))
    })
}

/// Opens the device through its IOMMU group.
fn by_group(location: &Location, options: &Options) -> io::Result<(OwnedFd, Way, &'static str)> {
    let number = location.group().ok_or_else(|| {
        io::Error::new(
            io::ErrorKind::Unsupported,
            "the device is in no IOMMU group: enable the IOMMU in the firmware and on the kernel's command line \
             (intel_iommu=on)",
        )
    })?;
    let (with, without) = (format!("/dev/vfio/{number}"), format!("/dev/vfio/noiommu-{number}"));
    let no_iommu = !Path::new(&with).exists() && Path::new(&without).exists();
    if no_iommu && !options.no_iommu {
        return Err(io::Error::new(
            io::ErrorKind::Unsupported,
            "there is no IOMMU, so the device could write to all of the machine's memory; if that is acceptable and the \
             driver supports it, set no-iommu",
        ));
    }
    let container = open(Path::new("/dev/vfio/vfio"))?;
    let version = sys::api_version(container.as_fd()).map_err(|e| said("VFIO_GET_API_VERSION", e))?;
    if version != 0 {
        return Err(io::Error::new(io::ErrorKind::Unsupported, format!("VFIO has API version {version}, not 0")));
    }
    let group = open(Path::new(if no_iommu { &without } else { &with }))?;
    let mut status = Packet::new(8);
    sys::exchange(group.as_fd(), Exchange::GROUP_STATUS, &mut status).map_err(|e| said("VFIO_GROUP_GET_STATUS", e))?;
    if status.read32(4).unwrap_or(0) & VFIO_GROUP_FLAGS_VIABLE == 0 {
        let text = format!(
            "IOMMU group {number} has devices bound to other drivers than vfio-pci: {}; unbind them",
            location.strangers().join(", ")
        );
        return Err(io::Error::new(io::ErrorKind::ResourceBusy, text));
    }
    sys::set_container(group.as_fd(), container.as_fd()).map_err(|e| said("VFIO_GROUP_SET_CONTAINER", e))?;
    let kind = if no_iommu { VFIO_NOIOMMU_IOMMU } else { VFIO_TYPE1v2_IOMMU };
    if !sys::has_extension(container.as_fd(), kind) {
        let text = format!("VFIO does not support IOMMU type {kind} here: modprobe vfio_iommu_type1");
        return Err(io::Error::new(io::ErrorKind::Unsupported, text));
    }
    sys::set_iommu(container.as_fd(), kind).map_err(|e| said("VFIO_SET_IOMMU", e))?;
    let name = CString::new(location.address.as_str()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let device = sys::device_of_group(group.as_fd(), &name).map_err(|e| said("VFIO_GROUP_GET_DEVICE_FD", e))?;
    Ok(if no_iommu {
        let translation = Arc::default();
        (device, Way::None { _container: container, _group: group, translation }, "group, without IOMMU")
    } else {
        (device, Way::Container { container, _group: group }, "group")
    })
}

fn open(path: &Path) -> io::Result<OwnedFd> {
    let file = OpenOptions::new().read(true).write(true).open(path).map_err(|e| {
        let remedy = match e.raw_os_error() {
            Some(libc::EBUSY) => ": another process uses the device, or a device of its IOMMU group",
            Some(libc::EACCES | libc::EPERM) => ": run as root, or change the owner of the file (chown)",
            // The device exists, so this is about the kernel.
            Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => {
                let text = format!("{}: {e}: load the module: modprobe vfio-pci", path.display());
                return Context::with_kind(io::ErrorKind::Unsupported, text, e);
            }
            _ => "",
        };
        Context::wrap(format!("{}: {e}{remedy}", path.display()), e)
    })?;
    Ok(file.into())
}

/// Location of a region in the device's file, and its mappable areas (first byte and length, within the region).
#[derive(Debug)]
struct Place {
    start: u64,
    len: u64,
    areas: Vec<(u64, u64)>,
}

/// `VFIO_REGION_INFO_FLAG_MMAP`.
const CAN_MAP: u32 = 1 << 2;

fn region(device: BorrowedFd<'_>, index: u32) -> io::Result<Place> {
    sys::ask(device, Exchange::REGION_INFO, 32, |packet| packet.put32(8, index))
        .map(|packet| Place::parse(&packet))
        .map_err(|e| said("VFIO_DEVICE_GET_REGION_INFO", e))
}

impl Place {
    /// Parses `struct vfio_region_info` with its capability chain.
    fn parse(packet: &Packet) -> Self {
        let flags = packet.read32(4).unwrap_or(0);
        let (len, start) = (packet.read64(16).unwrap_or(0), packet.read64(24).unwrap_or(0));
        let mut sparse = None;
        let mut whole = false;
        for (at, id) in capabilities(packet, packet.read32(12).unwrap_or(0)) {
            match id {
                VFIO_REGION_INFO_CAP_SPARSE_MMAP => {
                    let count = packet.read32(at + 8).unwrap_or(0) as usize;
                    let area = |n| Some((packet.read64(at + 16 + 16 * n)?, packet.read64(at + 24 + 16 * n)?));
                    sparse = Some((0..count).map_while(area).collect());
                }
                VFIO_REGION_INFO_CAP_MSIX_MAPPABLE => whole = true,
                _ => {}
            }
        }
        let areas = match sparse {
            _ if flags & CAN_MAP == 0 => Vec::new(),
            // The page with the MSI-X table can be mapped, too.
            _ if whole => vec![(0, len)],
            Some(areas) => areas,
            None => vec![(0, len)],
        };
        Self { start, len, areas }
    }
}

fn said(who: &str, error: io::Error) -> io::Error {
    Context::wrap(format!("{who}: {error}"), error)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Checks a region of 16 KiB with a capability chain: id, then words.
    fn check(flags: u32, capabilities: &[(u32, &[u64])], areas: &[(u64, u64)]) {
        let mut packet = Packet::new(32 + capabilities.iter().map(|(_, words)| 8 + 8 * words.len()).sum::<usize>());
        packet.put32(4, flags);
        packet.put64(16, 0x4000);
        packet.put64(24, 7 << 40);
        let mut at = 32;
        for (n, (id, words)) in capabilities.iter().enumerate() {
            if n == 0 {
                packet.put32(12, 32);
            }
            packet.put32(at, id | 1 << 16);
            let next = at + 8 + 8 * words.len();
            packet.put32(at + 4, if n + 1 < capabilities.len() { next as u32 } else { 0 });
            for (word, value) in words.iter().enumerate() {
                packet.put64(at + 8 + 8 * word, *value);
            }
            at = next;
        }
        let place = Place::parse(&packet);
        assert_eq!((place.start, place.len, place.areas.as_slice()), (7 << 40, 0x4000, areas));
    }

    #[test]
    fn what_can_be_mapped_is_mapped() {
        let sparse: (u32, &[u64]) = (1, &[2, 0, 0x2000, 0x3000, 0x1000]);
        check(0, &[], &[]);
        check(3, &[sparse], &[]);
        check(7, &[], &[(0, 0x4000)]);
        check(7, &[sparse], &[(0, 0x2000), (0x3000, 0x1000)]);
        check(7, &[(3, &[])], &[(0, 0x4000)]);
        check(7, &[(9, &[]), sparse, (3, &[])], &[(0, 0x4000)]);
        check(7, &[(1, &[u64::MAX >> 32, 0, 0x1000])], &[(0, 0x1000)]);
    }
}
