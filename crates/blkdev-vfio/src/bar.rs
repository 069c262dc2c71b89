//! A device's registers, mapped; what the kernel does not let us map is read and written by system calls.
#![allow(unsafe_code)]

use std::{
    fs::File,
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::FileExt,
    },
    ptr,
    sync::Arc,
};

use crate::pci::Bar;

/// One region of a VFIO device.
#[derive(Debug)]
pub(crate) struct Region {
    /// Keeps the device open.
    device: Arc<OwnedFd>,
    /// The same file, for `pread` and `pwrite`.
    file: File,
    /// Where the region starts in the device's file.
    start: u64,
    len: usize,
    areas: Vec<Area>,
}

/// A part of a region that is mapped.
#[derive(Debug)]
struct Area {
    at: usize,
    len: usize,
    base: *mut u8,
}

// SAFETY: the pointer stands for registers that stay mapped until this is dropped; every access is volatile, and what two
// threads do to a device's registers at a time is between them and the device, not a matter of memory.
unsafe impl Send for Area {}
// SAFETY: as above.
unsafe impl Sync for Area {}

impl Region {
    /// Maps the areas (first byte and length, within the region) of the region at `start` of the device's file.
    pub(crate) fn new(device: &Arc<OwnedFd>, start: u64, len: u64, areas: &[(u64, u64)]) -> io::Result<Self> {
        let len = usize::try_from(len).map_err(io::Error::other)?;
        let mut region = Self {
            device: Arc::clone(device),
            file: File::from(device.try_clone()?),
            start,
            len,
            areas: Vec::with_capacity(areas.len()),
        };
        for &(at, size) in areas {
            // What cannot lie in the region is reached by system calls.
            let (Ok(at), Ok(size)) = (usize::try_from(at), usize::try_from(size)) else { continue };
            if size == 0 || at > len || size > len - at {
                continue;
            }
            // SAFETY: a new mapping at an address of the kernel's choice, of a file that maps registers there.
            let base = unsafe {
                let offset = start.wrapping_add(at as u64) as libc::off_t;
                let protection = libc::PROT_READ | libc::PROT_WRITE;
                libc::mmap(ptr::null_mut(), size, protection, libc::MAP_SHARED, region.device.as_raw_fd(), offset)
            };
            if base == libc::MAP_FAILED {
                return Err(io::Error::last_os_error());
            }
            region.areas.push(Area { at, len: size, base: base.cast() });
        }
        Ok(region)
    }

    /// The address of a register; `None`: it is not mapped.
    #[inline]
    fn find<T>(&self, at: usize) -> Option<*mut T> {
        let size = size_of::<T>();
        assert!(
            at.is_multiple_of(size) && at <= self.len && size <= self.len - at,
            "a register access at {at:#x} lies in a region of {:#x} bytes",
            self.len
        );
        let area = self.areas.iter().find(|area| at >= area.at && at + size <= area.at + area.len)?;
        Some(area.base.wrapping_add(at - area.at).cast())
    }

    /// All ones when it cannot be read, as from a device that is not there.
    #[cold]
    fn read_by_call<const N: usize>(&self, at: usize) -> [u8; N] {
        let mut bytes = [0xff; N];
        let read = self.file.read_exact_at(&mut bytes, self.start.saturating_add(at as u64));
        if read.is_ok() { bytes } else { [0xff; N] }
    }

    #[cold]
    fn write_by_call(&self, at: usize, bytes: &[u8]) {
        // A device that is not there takes no writes either; who cares reads something back.
        let _ = self.file.write_all_at(bytes, self.start.saturating_add(at as u64));
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        for area in &self.areas {
            // SAFETY: mapped in `new`, and all accesses borrow `self`.
            unsafe { libc::munmap(area.base.cast(), area.len) };
        }
    }
}

/// What was stored to memory before is seen by the device before what is written to a register after.
#[inline]
fn barrier() {
    // On x86 stores are seen in order, and registers are mapped uncached: only the compiler must be held back. Elsewhere a
    // fence between processors is not enough, since devices may lie outside of their domain.
    #[cfg(target_arch = "aarch64")]
    // SAFETY: a barrier touches nothing.
    unsafe {
        core::arch::asm!("dmb oshst", options(nostack, preserves_flags));
    }
    #[cfg(target_arch = "riscv64")]
    // SAFETY: a barrier touches nothing.
    unsafe {
        core::arch::asm!("fence w,o", options(nostack, preserves_flags));
    }
    std::sync::atomic::fence(std::sync::atomic::Ordering::Release);
}

macro_rules! access {
    ($($read:ident, $write:ident, $value:ty;)*) => {$(
        #[inline]
        fn $read(&self, at: usize) -> $value {
            match self.find::<$value>(at) {
                // SAFETY: `find` gives an aligned address within an area that is mapped as long as `self` lives.
                Some(from) => <$value>::from_le(unsafe { from.read_volatile() }),
                None => <$value>::from_le_bytes(self.read_by_call(at)),
            }
        }

        #[inline]
        fn $write(&self, at: usize, value: $value) {
            barrier();
            match self.find::<$value>(at) {
                // SAFETY: as for the read.
                Some(to) => unsafe { to.write_volatile(value.to_le()) },
                None => self.write_by_call(at, &value.to_le_bytes()),
            }
        }
    )*};
}

impl Bar for Region {
    fn len(&self) -> usize {
        self.len
    }

    access! { read8, write8, u8; read16, write16, u16; read32, write32, u32; read64, write64, u64; }
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;

    use super::*;

    /// A file in place of a device.
    fn region(areas: &[(u64, u64)]) -> Region {
        // SAFETY: a new descriptor, ours alone.
        let fd: OwnedFd = unsafe { std::os::fd::FromRawFd::from_raw_fd(libc::memfd_create(c"bar".as_ptr(), 0)) };
        File::from(fd.try_clone().unwrap()).set_len(0x10000).unwrap();
        Region::new(&Arc::new(fd), 0x4000, 0x4000, areas).unwrap()
    }

    #[test]
    fn mapped_or_not_registers_are_the_same() {
        let part = region(&[(0, 0x1000), (0x3000, 0x1000)]);
        for at in [0, 0xff8, 0x1000, 0x2ff8, 0x3000, 0x3ff8] {
            part.write64(at, 0x8877_6655_4433_2211);
            assert_eq!((part.read8(at + 1), part.read16(at + 2), part.read32(at + 4)), (0x22, 0x4433, 0x8877_6655));
            part.write32(at, 7);
            part.write16(at + 4, 8);
            part.write8(at + 6, 9);
            assert_eq!(part.read64(at), 0x8809_0008_0000_0007, "at {at:#x}");
        }
    }

    #[test]
    fn areas_that_lie_outside_are_not_mapped() {
        let none = region(&[(u64::MAX, 1), (0x4000, 0x1000), (0, 0x5000), (0x1000, u64::MAX), (0, 0)]);
        assert_eq!(none.areas.len(), 0);
        none.write32(0x3ffc, 7);
        assert_eq!(none.read32(0x3ffc), 7);
    }

    #[test]
    #[should_panic(expected = "lies in a region")]
    fn accesses_are_checked() {
        region(&[]).read32(0x4000);
    }
}
