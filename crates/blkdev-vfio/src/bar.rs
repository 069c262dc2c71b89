//! A device's registers, mapped into memory. Parts that the kernel cannot map are accessed by system calls.
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

/// A region of a VFIO device.
#[derive(Debug)]
pub(crate) struct Region {
    /// Keeps the device open.
    device: Arc<OwnedFd>,
    /// A duplicate of `device`, for `pread` and `pwrite`.
    file: File,
    /// Offset of the region in the device's file.
    start: u64,
    len: usize,
    areas: Vec<Area>,
}

/// A mapped part of a region.
#[derive(Debug)]
struct Area {
    at: usize,
    len: usize,
    base: *mut u8,
}

// SAFETY: the pointer refers to registers that stay mapped until this is dropped. Every access is volatile. Concurrent accesses
// of two threads to a device's registers are a matter of the device, not of memory safety.
unsafe impl Send for Area {}
// SAFETY: as above.
unsafe impl Sync for Area {}

impl Region {
    /// Maps the `areas` (first byte and length, within the region) of the region at offset `start` of the device's file.
    pub(crate) fn new(device: &Arc<OwnedFd>, start: u64, len: u64, areas: &[(u64, u64)]) -> io::Result<Self> {
        let len = usize::try_from(len).map_err(|_| io::ErrorKind::InvalidData)?;
        let mut region = Self {
            device: Arc::clone(device),
            file: File::from(device.try_clone()?),
            start,
            len,
            areas: Vec::with_capacity(areas.len()),
        };
        for &(at, size) in areas {
            // An area that cannot be mapped in full is accessed by system calls.
            let (Ok(at), Ok(size)) = (usize::try_from(at), usize::try_from(size)) else { continue };
            if size == 0 || at > len || size > len - at {
                continue;
            }
            // SAFETY: a new mapping at an address chosen by the kernel, of a file that maps registers.
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
            "a register access at {at:#x} lies in the region of {:#x} bytes",
            self.len
        );
        let area = self.areas.iter().find(|area| at >= area.at && at + size <= area.at + area.len)?;
        Some(area.base.wrapping_add(at - area.at).cast())
    }

    /// Returns all ones if the read fails, as for a removed device.
    #[cold]
    fn read_by_call<const N: usize>(&self, at: usize) -> [u8; N] {
        let mut bytes = [0xff; N];
        let read = self.file.read_exact_at(&mut bytes, self.start.saturating_add(at as u64));
        if read.is_ok() { bytes } else { [0xff; N] }
    }

    #[cold]
    fn write_by_call(&self, at: usize, bytes: &[u8]) {
        // A removed device ignores writes. A caller that depends on a write reads it back.
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

/// Orders earlier stores to memory before later register writes, as seen by the device.
#[inline]
fn barrier() {
    // On x86 stores are ordered, and registers are mapped uncached, so a compiler fence is enough. Elsewhere a fence between
    // CPUs is not enough, because devices may lie outside of their shareability domain.
    #[cfg(target_arch = "aarch64")]
    // SAFETY: a barrier accesses no memory.
    unsafe {
        core::arch::asm!("dmb oshst", options(nostack, preserves_flags));
    }
    #[cfg(target_arch = "riscv64")]
    // SAFETY: a barrier accesses no memory.
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
                // SAFETY: `find` returns an aligned address within an area that stays mapped as long as `self` lives.
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

    /// A region backed by a file instead of a device.
    fn region(areas: &[(u64, u64)]) -> Region {
        // SAFETY: a new descriptor with no other owner.
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
    #[should_panic(expected = "lies in the region")]
    fn accesses_are_checked() {
        region(&[]).read32(0x4000);
    }
}
