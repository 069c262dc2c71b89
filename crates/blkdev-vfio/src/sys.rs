//! System calls of VFIO and iommufd, with structures as plain bytes.
#![allow(unsafe_code)]

use std::{
    ffi::CStr,
    io,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
};

/// A kernel structure whose first 32 bits hold its size, so that the kernel never accesses more.
#[derive(Debug)]
pub(crate) struct Packet(Vec<u64>);

impl Packet {
    /// Creates a structure of `len` bytes, all zero except for the size.
    pub(crate) fn new(len: usize) -> Self {
        let mut packet = Self(vec![0; len.div_ceil(8)]);
        packet.put32(0, len as u32);
        packet
    }

    pub(crate) fn put32(&mut self, at: usize, value: u32) {
        let (word, high) = (&mut self.0[at / 8], !at.is_multiple_of(8));
        let mut halves = word.to_ne_bytes();
        halves[if high { 4..8 } else { 0..4 }].copy_from_slice(&value.to_ne_bytes());
        *word = u64::from_ne_bytes(halves);
    }

    pub(crate) fn put64(&mut self, at: usize, value: u64) {
        assert!(at.is_multiple_of(8), "64-bit fields are aligned");
        self.0[at / 8] = value;
    }

    /// `None`: the field lies outside of the structure.
    pub(crate) fn read16(&self, at: usize) -> Option<u16> {
        let bytes = self.0.get(at / 8)?.to_ne_bytes();
        bytes.get(at % 8..at % 8 + 2).map(|b| u16::from_ne_bytes([b[0], b[1]]))
    }

    /// `None`: the field lies outside of the structure.
    pub(crate) fn read32(&self, at: usize) -> Option<u32> {
        let bytes = self.0.get(at / 8)?.to_ne_bytes();
        bytes.get(at % 8..at % 8 + 4).map(|b| u32::from_ne_bytes([b[0], b[1], b[2], b[3]]))
    }

    /// `None`: the field lies outside of the structure. The field may straddle words.
    pub(crate) fn read64(&self, at: usize) -> Option<u64> {
        let halves = [self.read32(at)?.to_ne_bytes(), self.read32(at + 4)?.to_ne_bytes()].concat();
        halves.try_into().ok().map(u64::from_ne_bytes)
    }
}

/// The longest plausible reply, in bytes: capabilities take a few hundred.
const ANSWER_MAX: usize = 1 << 20;

/// Requests a structure that may be longer than its fixed part of `len` bytes; then the first field of the reply has the
/// length. `fill` sets the fields of the request.
pub(crate) fn ask(fd: BorrowedFd<'_>, what: Exchange, len: usize, fill: impl Fn(&mut Packet)) -> io::Result<Packet> {
    let once = |len| {
        let mut packet = Packet::new(len);
        fill(&mut packet);
        exchange(fd, what, &mut packet).map(|_| packet)
    };
    let packet = once(len)?;
    match packet.read32(0).unwrap_or(0) as usize {
        told if told > ANSWER_MAX => {
            let text = format!("the kernel's reply of {told} bytes is too long");
            Err(io::Error::new(io::ErrorKind::InvalidData, text))
        }
        told if told > len => once(told),
        _ => Ok(packet),
    }
}

/// An ioctl whose argument is a [`Packet`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Exchange(u32);

/// `_IO(';', n)`; VFIO starts at 100, iommufd at 0x80.
const fn number(n: u32) -> u32 {
    (b';' as u32) << 8 | n
}

impl Exchange {
    pub(crate) const GROUP_STATUS: Self = Self(number(103));
    pub(crate) const DEVICE_INFO: Self = Self(number(107));
    pub(crate) const REGION_INFO: Self = Self(number(108));
    pub(crate) const IRQ_INFO: Self = Self(number(109));
    pub(crate) const SET_IRQS: Self = Self(number(110));
    pub(crate) const IOMMU_INFO: Self = Self(number(112));
    pub(crate) const MAP_DMA: Self = Self(number(113));
    pub(crate) const UNMAP_DMA: Self = Self(number(114));
    pub(crate) const BIND_IOMMUFD: Self = Self(number(118));
    pub(crate) const ATTACH_IOAS: Self = Self(number(119));
    pub(crate) const IOAS_ALLOC: Self = Self(number(0x81));
    pub(crate) const IOAS_MAP: Self = Self(number(0x85));
    pub(crate) const IOAS_UNMAP: Self = Self(number(0x86));
}

/// Passes `packet` to the kernel, which replies in it.
pub(crate) fn exchange(fd: BorrowedFd<'_>, what: Exchange, packet: &mut Packet) -> io::Result<i32> {
    // SAFETY: each of the ioctls above takes a structure whose first field holds its size, and the kernel reads and writes no
    // more than that (`argsz` of VFIO, `size` of iommufd). Memory addresses in the structure are those of a Mapping, which the
    // kernel pins and `Dma` keeps alive; it is only ever accessed raw.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::Ioctl::from(what.0), packet.0.as_mut_ptr()) })
}

/// `IOMMU_IOAS_IOVA_RANGES`: the usable I/O addresses, each with first and last byte.
pub(crate) fn ioas_ranges(iommu: BorrowedFd<'_>, ioas: u32) -> io::Result<Vec<(u64, u64)>> {
    let mut ranges = vec![[0u64; 2]; 64];
    let mut packet = Packet::new(32);
    packet.put32(4, ioas);
    packet.put32(8, ranges.len() as u32);
    packet.put64(16, ranges.as_mut_ptr() as u64);
    // SAFETY: the packet holds its size, and the address of an array with as many elements as it states.
    check(unsafe { libc::ioctl(iommu.as_raw_fd(), libc::Ioctl::from(number(0x84)), packet.0.as_mut_ptr()) })?;
    ranges.truncate(packet.read32(8).unwrap_or(0) as usize);
    Ok(ranges.into_iter().map(|[first, last]| (first, last)).collect())
}

/// `VFIO_GET_API_VERSION`.
pub(crate) fn api_version(container: BorrowedFd<'_>) -> io::Result<i32> {
    // SAFETY: the kernel reads no argument.
    check(unsafe { libc::ioctl(container.as_raw_fd(), libc::Ioctl::from(number(100)), 0) })
}

/// `VFIO_CHECK_EXTENSION`.
pub(crate) fn has_extension(container: BorrowedFd<'_>, extension: u32) -> bool {
    // SAFETY: the argument is a number.
    unsafe { libc::ioctl(container.as_raw_fd(), libc::Ioctl::from(number(101)), libc::c_ulong::from(extension)) > 0 }
}

/// `VFIO_SET_IOMMU`.
pub(crate) fn set_iommu(container: BorrowedFd<'_>, kind: u32) -> io::Result<()> {
    // SAFETY: the argument is a number.
    check(unsafe { libc::ioctl(container.as_raw_fd(), libc::Ioctl::from(number(102)), libc::c_ulong::from(kind)) })
        .map(drop)
}

/// `VFIO_GROUP_SET_CONTAINER`.
pub(crate) fn set_container(group: BorrowedFd<'_>, container: BorrowedFd<'_>) -> io::Result<()> {
    let fd = container.as_raw_fd();
    // SAFETY: the kernel reads one int.
    check(unsafe { libc::ioctl(group.as_raw_fd(), libc::Ioctl::from(number(104)), &raw const fd) }).map(drop)
}

/// `VFIO_GROUP_GET_DEVICE_FD`.
pub(crate) fn device_of_group(group: BorrowedFd<'_>, name: &CStr) -> io::Result<OwnedFd> {
    // SAFETY: the kernel reads a NUL-terminated string.
    let fd = check(unsafe { libc::ioctl(group.as_raw_fd(), libc::Ioctl::from(number(106)), name.as_ptr()) })?;
    // SAFETY: a new descriptor with no other owner.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// `VFIO_DEVICE_RESET`.
pub(crate) fn reset(device: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: the kernel reads no argument.
    check(unsafe { libc::ioctl(device.as_raw_fd(), libc::Ioctl::from(number(111)), 0) }).map(drop)
}

/// `RLIMIT_MEMLOCK`, in bytes; `None`: unlimited.
pub(crate) fn locked_memory_limit() -> Option<u64> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the kernel writes one rlimit.
    let failed = unsafe { libc::getrlimit(libc::RLIMIT_MEMLOCK, &raw mut limit) } < 0;
    (!failed && limit.rlim_cur != libc::RLIM_INFINITY).then_some(limit.rlim_cur)
}

/// Populates all pages of a mapping.
pub(crate) fn populate(mapping: &blkdev::Mapping) -> io::Result<()> {
    // SAFETY: the range is that of the mapping, and no content changes.
    check(unsafe { libc::madvise(mapping.as_ptr().cast(), mapping.len(), libc::MADV_POPULATE_WRITE) }).map(drop)
}

/// Whether a file lies on hugetlbfs.
pub(crate) fn is_huge(fd: BorrowedFd<'_>) -> bool {
    let mut stat = std::mem::MaybeUninit::<libc::statfs>::zeroed();
    // SAFETY: the kernel writes one statfs, and all zeroes is a valid value of it.
    let stat = unsafe {
        if libc::fstatfs(fd.as_raw_fd(), stat.as_mut_ptr()) < 0 {
            return false;
        }
        stat.assume_init()
    };
    stat.f_type == libc::HUGETLBFS_MAGIC
}

fn check(result: libc::c_int) -> io::Result<i32> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_lie_where_they_are_put() {
        let mut packet = Packet::new(20);
        packet.put32(4, 0x0403_0201);
        packet.put64(8, u64::from_ne_bytes([1, 2, 3, 4, 5, 6, 7, 8]));
        assert_eq!((packet.read32(0), packet.read32(4)), (Some(20), Some(0x0403_0201)));
        assert_eq!(packet.read64(8).unwrap().to_ne_bytes(), [1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(packet.read16(10).unwrap().to_ne_bytes(), [3, 4]);
        assert_eq!((packet.read32(24), packet.read64(20)), (None, None));
    }

    #[test]
    fn numbers_are_those_of_the_kernel_s_headers() {
        assert_eq!((Exchange::GROUP_STATUS.0, Exchange::MAP_DMA.0, Exchange::IOAS_MAP.0), (0x3b67, 0x3b71, 0x3b85));
    }
}
