//! [`Translation`]: physical addresses, for devices without an IOMMU.

use std::{
    fs::File,
    io,
    os::{fd::AsFd, unix::fs::FileExt},
    sync::{Arc, PoisonError, RwLock},
};

use blkdev::Mapping;

use crate::sys;

/// Physical addresses of mappings. Only for devices without an IOMMU, and only for huge pages: the kernel does not move them,
/// and each is contiguous for 2 MiB.
#[derive(Debug, Default)]
pub struct Translation {
    mappings: RwLock<Vec<Frames>>,
}

/// The physical addresses of a mapping.
#[derive(Debug)]
struct Frames {
    start: u64,
    /// The physical address of each huge page.
    pages: Vec<u64>,
}

/// Size of a huge page in bytes: the granularity of mappings, each contiguous in physical memory.
const HUGE: u64 = 2 << 20;

/// Size and fields of an entry of `/proc/self/pagemap`, one for each page of 4096 bytes.
const ENTRY: u64 = 8;
const PRESENT: u64 = 1 << 63;
const FRAME: u64 = (1 << 55) - 1;

impl Translation {
    /// Returns the physical address of the byte at virtual address `address`. Memory is contiguous up to the next multiple of 2
    /// MiB.
    ///
    /// # Panics
    /// If the address is not in memory that is mapped for DMA.
    pub fn physical(&self, address: u64) -> u64 {
        let mappings = self.mappings.read().unwrap_or_else(PoisonError::into_inner);
        let offset = |f: &Frames| address.checked_sub(f.start).filter(|at| *at < f.pages.len() as u64 * HUGE);
        let (pages, at) =
            mappings.iter().find_map(|f| offset(f).map(|at| (&f.pages, at))).expect("the memory is mapped for DMA");
        pages[(at / HUGE) as usize] + at % HUGE
    }

    pub(crate) fn add(&self, mapping: &Arc<Mapping>) -> io::Result<()> {
        if !sys::is_huge(mapping.as_fd()) {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                format!(
                    "a device without an IOMMU needs huge pages, but fewer than {} MiB of them are free: reserve \
                     more (sysctl vm.nr_hugepages)",
                    mapping.len() >> 20
                ),
            ));
        }
        sys::populate(mapping)?;
        let map = File::open("/proc/self/pagemap")?;
        let start = mapping.iova().get();
        let mut pages = Vec::with_capacity(mapping.len() >> 21);
        for page in (start..start + mapping.len() as u64).step_by(HUGE as usize) {
            let mut entry = [0; ENTRY as usize];
            map.read_exact_at(&mut entry, page / 4096 * ENTRY)?;
            let entry = u64::from_ne_bytes(entry);
            if entry & PRESENT == 0 || entry & FRAME == 0 {
                let why = "the kernel hides physical addresses: without an IOMMU this process needs CAP_SYS_ADMIN";
                return Err(io::Error::new(io::ErrorKind::PermissionDenied, why));
            }
            pages.push((entry & FRAME) * 4096);
        }
        self.mappings.write().unwrap_or_else(PoisonError::into_inner).push(Frames { start, pages });
        Ok(())
    }

    pub(crate) fn remove(&self, mapping: &Arc<Mapping>) {
        let start = mapping.iova().get();
        self.mappings.write().unwrap_or_else(PoisonError::into_inner).retain(|frames| frames.start != start);
    }
}
