//! Device access to memory: through a type 1 container, iommufd, or without an IOMMU.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    sync::{Arc, Mutex, PoisonError},
};

use blkdev::{Context, Mapping};
use vfio_bindings::bindings::vfio::{VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE, VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL};

use crate::{
    sys::{self, Exchange, Packet},
    translation::Translation,
};

/// The memory that a device can access, and the kernel interface in use.
#[derive(Debug)]
pub(crate) struct Dma {
    way: Way,
    /// Usable I/O addresses, first and last byte; empty: the kernel does not report them.
    ranges: Vec<(u64, u64)>,
    mapped: Mutex<Vec<Arc<Mapping>>>,
}

#[derive(Debug)]
pub(crate) enum Way {
    /// A container with a type 1 IOMMU. The group must stay open while the device is in use.
    Container { container: OwnedFd, _group: OwnedFd },
    /// An I/O address space of an iommufd.
    Iommufd { iommu: OwnedFd, ioas: u32 },
    /// A container without an IOMMU.
    None { _container: OwnedFd, _group: OwnedFd, translation: Arc<Translation> },
}

/// `VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE`.
const READ_WRITE: u32 = 1 | 2;

/// `IOMMU_IOAS_MAP_FIXED_IOVA | IOMMU_IOAS_MAP_WRITEABLE | IOMMU_IOAS_MAP_READABLE`.
const FIXED_READ_WRITE: u32 = 1 | 2 | 4;

impl Dma {
    pub(crate) fn new(way: Way) -> io::Result<Self> {
        let ranges = match &way {
            Way::Container { container, .. } => Limits::ask(container)?.ranges,
            Way::Iommufd { iommu, ioas } => sys::ioas_ranges(iommu.as_fd(), *ioas)?,
            Way::None { .. } => Vec::new(),
        };
        Ok(Self { way, ranges, mapped: Mutex::default() })
    }

    pub(crate) fn translation(&self) -> Option<Arc<Translation>> {
        match &self.way {
            Way::None { translation, .. } => Some(Arc::clone(translation)),
            _ => None,
        }
    }

    pub(crate) fn map(&self, mapping: &Arc<Mapping>) -> io::Result<()> {
        let mut mapped = self.mapped.lock().unwrap_or_else(PoisonError::into_inner);
        if mapped.iter().any(|known| Arc::ptr_eq(known, mapping)) {
            return Ok(());
        }
        let (start, len) = (mapping.iova().get(), mapping.len() as u64);
        reachable(&self.ranges, start, len)?;
        let locked = mapped.iter().map(|known| known.len() as u64).sum::<u64>();
        // The memory gets pinned anyway. Larger pieces need fewer entries of the IOMMU and its TLB.
        mapping.consolidate();
        match &self.way {
            Way::Container { container, .. } => {
                let mut packet = Packet::new(32);
                packet.put32(4, READ_WRITE);
                packet.put64(8, start);
                packet.put64(16, start);
                packet.put64(24, len);
                sys::exchange(container.as_fd(), Exchange::MAP_DMA, &mut packet).map_err(|e| {
                    let entries = Limits::ask(container).ok().and_then(|limits| limits.entries);
                    explain(e, len, locked, entries)
                })?;
            }
            Way::Iommufd { iommu, ioas } => {
                let mut packet = Packet::new(40);
                packet.put32(4, FIXED_READ_WRITE);
                packet.put32(8, *ioas);
                packet.put64(16, start);
                packet.put64(24, len);
                packet.put64(32, start);
                sys::exchange(iommu.as_fd(), Exchange::IOAS_MAP, &mut packet)
                    .map_err(|e| explain(e, len, locked, None))?;
            }
            Way::None { translation, .. } => translation.add(mapping)?,
        }
        mapped.push(Arc::clone(mapping));
        Ok(())
    }

    pub(crate) fn unmap(&self, mapping: &Arc<Mapping>) -> io::Result<()> {
        let mut mapped = self.mapped.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(at) = mapped.iter().position(|known| Arc::ptr_eq(known, mapping)) else { return Ok(()) };
        let (start, len) = (mapping.iova().get(), mapping.len() as u64);
        match &self.way {
            Way::Container { container, .. } => {
                let mut packet = Packet::new(24);
                packet.put64(8, start);
                packet.put64(16, len);
                sys::exchange(container.as_fd(), Exchange::UNMAP_DMA, &mut packet)?;
            }
            Way::Iommufd { iommu, ioas } => {
                let mut packet = Packet::new(24);
                packet.put32(4, *ioas);
                packet.put64(8, start);
                packet.put64(16, len);
                sys::exchange(iommu.as_fd(), Exchange::IOAS_UNMAP, &mut packet)?;
            }
            Way::None { translation, .. } => translation.remove(mapping),
        }
        mapped.swap_remove(at);
        Ok(())
    }

    /// Leaks all mappings on purpose, because the device may still write to them.
    pub(crate) fn leak(&self) {
        self.mapped.lock().unwrap_or_else(PoisonError::into_inner).drain(..).for_each(std::mem::forget);
    }
}

/// Limits reported by a type 1 IOMMU.
#[derive(Debug, Default, PartialEq, Eq)]
struct Limits {
    ranges: Vec<(u64, u64)>,
    /// Number of mappings that can still be added.
    entries: Option<u32>,
}

impl Limits {
    fn ask(container: &OwnedFd) -> io::Result<Self> {
        sys::ask(container.as_fd(), Exchange::IOMMU_INFO, 24, |_| {}).map(|packet| Self::parse(&packet))
    }

    /// Parses `struct vfio_iommu_type1_info` with its capability chain.
    fn parse(packet: &Packet) -> Self {
        let mut limits = Self::default();
        for (at, id) in capabilities(packet, packet.read32(16).unwrap_or(0)) {
            match id {
                VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE => {
                    let count = packet.read32(at + 8).unwrap_or(0) as usize;
                    let range = |n| Some((packet.read64(at + 16 + 16 * n)?, packet.read64(at + 24 + 16 * n)?));
                    limits.ranges = (0..count).map_while(range).collect();
                }
                VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL => limits.entries = packet.read32(at + 8),
                _ => {}
            }
        }
        limits
    }
}

/// Offset and id of each capability in the chain (`struct vfio_info_cap_header`) that starts at `first`.
pub(crate) fn capabilities(packet: &Packet, first: u32) -> impl Iterator<Item = (usize, u32)> {
    let mut next = first as usize;
    // Forward links only, so that a chain cannot loop.
    std::iter::from_fn(move || {
        if next == 0 {
            return None;
        }
        let at = next;
        let id = packet.read16(at)?;
        next = packet.read32(at + 4).map_or(0, |next| next as usize);
        if next <= at {
            next = 0;
        }
        Some((at, id.into()))
    })
}

/// # Errors
/// The range does not lie in a usable range.
fn reachable(ranges: &[(u64, u64)], start: u64, len: u64) -> io::Result<()> {
    let last = start + (len - 1);
    if ranges.is_empty() || ranges.iter().any(|range| range.0 <= start && last <= range.1) {
        return Ok(());
    }
    let ranges: Vec<_> = ranges.iter().map(|(first, last)| format!("{first:#x}-{last:#x}")).collect();
    Err(io::Error::new(
        io::ErrorKind::Unsupported,
        format!(
            "the IOMMU can access only {}, but the memory lies at {start:#x}-{last:#x}; if the machine allows it, raise \
             the address width of its IOMMU (in a VM: intel-iommu,aw-bits=48)",
            ranges.join(", ")
        ),
    ))
}

/// Names the remedy for a failed mapping.
fn explain(error: io::Error, len: u64, locked: u64, entries: Option<u32>) -> io::Error {
    let what = format!("cannot map {} MiB of memory for DMA: {error}", len >> 20);
    let remedy = match (error.raw_os_error(), entries, sys::locked_memory_limit()) {
        (Some(libc::ENOSPC), ..) | (_, Some(0), _) => {
            ": no IOMMU entry is left; raise the module parameter vfio_iommu_type1.dma_entry_limit".to_owned()
        }
        (Some(libc::ENOMEM), _, Some(limit)) => format!(
            ": RLIMIT_MEMLOCK is {} MiB, this device alone needs {} MiB; raise it (ulimit -l, LimitMEMLOCK= in a systemd \
             unit), use less memory, or give the process CAP_IPC_LOCK",
            limit >> 20,
            (locked + len) >> 20
        ),
        (Some(libc::EEXIST), ..) => ": another mapping uses its address".to_owned(),
        _ => String::new(),
    };
    Context::wrap(what + &remedy, error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_are_found_and_no_chain_is_endless() {
        let mut packet = Packet::new(24 + 48 + 16);
        packet.put32(16, 24);
        packet.put32(24, 1 | 1 << 16);
        packet.put32(28, 72);
        packet.put32(32, 2);
        for (at, value) in [(40, 0), (48, 0xfedf_ffff), (56, 0xfef0_0000), (64, (1 << 39) - 1)] {
            packet.put64(at, value);
        }
        packet.put32(72, 3 | 1 << 16);
        packet.put32(76, 24);
        packet.put32(80, 65535);
        let ranges = vec![(0, 0xfedf_ffff), (0xfef0_0000, (1 << 39) - 1)];
        assert_eq!(Limits::parse(&packet), Limits { ranges, entries: Some(65535) });
        packet.put32(32, 1000);
        assert!(Limits::parse(&packet).ranges.len() < 5);
        packet.put32(16, 4000);
        assert_eq!(Limits::parse(&packet), Limits::default());
    }

    #[test]
    fn memory_lies_in_one_range() {
        let ranges = [(0, 0xfedf_ffff), (0xfef0_0000, (1 << 39) - 1)];
        reachable(&ranges, 1 << 32, 1 << 30).unwrap();
        reachable(&ranges, (1 << 39) - 4096, 4096).unwrap();
        reachable(&[], 1 << 60, 4096).unwrap();
        for (start, len) in [(0xfede_0000, 1 << 21), ((1 << 39) - 4096, 8192), (0x7fff_0000_0000, 1 << 21)] {
            let e = reachable(&ranges, start, len).unwrap_err().to_string();
            assert!(e.contains("0xfef00000-0x7fffffffff") && e.contains("aw-bits"), "{e}");
        }
    }

    #[test]
    fn what_cannot_be_mapped_is_explained() {
        let errno = io::Error::from_raw_os_error;
        let full = explain(errno(libc::ENOSPC), 2 << 20, 0, Some(0)).to_string();
        assert!(full.contains("dma_entry_limit"), "{full}");
        let limit = sys::locked_memory_limit();
        let locked = explain(errno(libc::ENOMEM), 64 << 20, 2 << 20, Some(9)).to_string();
        assert!(locked.contains("64 MiB") && (limit.is_none() || locked.contains("needs 66 MiB")), "{locked}");
    }
}
