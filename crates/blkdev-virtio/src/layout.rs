//! Memory layout of a virtqueue, its requests and its used elements. Common to both formats.

use std::{fmt, sync::Arc};

use blkdev::{Iova, Mapping};

use crate::transport::Format;

/// Length of a cache line in bytes, and the alignment of areas that both sides write.
const LINE: usize = 64;
/// Length of a descriptor in bytes, in a ring of either format (virtio 1.2, 2.7.5 and 2.8.13).
pub(crate) const DESCRIPTOR: usize = 16;
/// Length of a request's header in bytes.
pub(crate) const HEADER: usize = 16;

/// Position of a queue: the next element the device will look at, and the next it will use. In a split ring these are indices.
/// In a packed ring each has the position in bits 0 to 14 and the wrap counter in bit 15.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) available: u16,
    pub(crate) used: u16,
}

impl Place {
    pub(crate) fn start(format: Format) -> Self {
        let at = match format {
            Format::Split => 0,
            Format::Packed => 1 << 15,
        };
        Self { available: at, used: at }
    }
}

/// Layout of a queue's memory, in bytes from its start: descriptors, driver area, device area, slots.
///
/// A slot is [indirect table, header] and, in a cache line of its own, [status, segment]. With one data descriptor the first
/// part is exactly one line. The status is the only byte of a slot that the device writes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Layout {
    /// Number of descriptors in the ring: a power of two.
    pub(crate) size: u16,
    /// Maximum number of data descriptors in a request.
    pub(crate) segments: u16,
    pub(crate) indirect: bool,
    /// Offset of the driver area: the available ring, or the driver's event suppression.
    pub(crate) driver: usize,
    /// Offset of the device area: the used ring, or the device's event suppression.
    pub(crate) device: usize,
    /// Offset of the first slot.
    slots: usize,
    /// Distance between slots.
    stride: usize,
    /// Offset of the header in its slot.
    pub(crate) header: usize,
    /// Offset of the status in its slot.
    pub(crate) status: usize,
}

impl Layout {
    /// The layout of a ring of `size` descriptors, for requests with up to `segments` data descriptors.
    pub(crate) fn new(format: Format, size: u16, segments: u16, indirect: bool) -> Self {
        assert!(size.is_power_of_two() && segments >= 1 && size >= segments + 2, "the longest chain fits in the ring");
        let entries = usize::from(size);
        let (driver_len, device_len) = match format {
            Format::Split => (6 + 2 * entries, 6 + 8 * entries),
            Format::Packed => (4, 4),
        };
        let driver = (entries * DESCRIPTOR).next_multiple_of(2 * LINE);
        let device = (driver + driver_len).next_multiple_of(2 * LINE);
        // So that no 8-byte element of the used ring, which follow a 4-byte header, crosses a page boundary. Behind an emulated
        // IOMMU QEMU writes such an element in two parts, and some versions put the second part in a wrong place.
        let device = if format == Format::Split { device + 4 } else { device };
        let slots = (device + device_len).next_multiple_of(2 * LINE);
        let header = if indirect { (usize::from(segments) + 2) * DESCRIPTOR } else { 0 };
        let status = (header + HEADER).next_multiple_of(LINE);
        Self { size, segments, indirect, driver, device, slots, stride: status + LINE, header, status }
    }

    /// The layout of the smallest ring for `depth` requests, with at most `size_max` descriptors (a power of two).
    pub(crate) fn fitting(format: Format, depth: u16, segments: u16, indirect: bool, size_max: u16) -> Self {
        let chain = u32::from(segments) + 2;
        let want = if indirect { u32::from(depth).max(chain) } else { u32::from(depth) * chain };
        Self::new(format, want.next_power_of_two().min(u32::from(size_max)) as u16, segments, indirect)
    }

    /// Number of requests that fit.
    pub(crate) fn slots(&self) -> u16 {
        if self.indirect { self.size } else { self.size / self.chain() }
    }

    /// Number of descriptors of the longest chain.
    pub(crate) fn chain(&self) -> u16 {
        self.segments + 2
    }

    #[inline]
    pub(crate) fn slot(&self, slot: u16) -> usize {
        self.slots + usize::from(slot) * self.stride
    }

    /// Length in bytes, a multiple of two cache lines.
    pub(crate) fn len(&self) -> usize {
        self.slot(self.slots()).next_multiple_of(2 * LINE)
    }

    /// Device addresses of descriptors, driver area and device area, for a queue in `mapping` from byte `start` on.
    pub(crate) fn addresses(&self, mapping: &Arc<Mapping>, start: usize) -> [Iova; 3] {
        [0, self.driver, self.device].map(|at| mapping.iova().plus((start + at) as u64))
    }
}

/// A request as the device sees it, without the status byte at its end.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Chain {
    pub(crate) header: [u64; 2],
    pub(crate) data: Data,
}

/// The part of a request between header and status.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Data {
    None,
    /// The device reads this.
    Out(Iova, u32),
    /// The device writes this.
    In(Iova, u32),
    /// The device reads these 16 bytes, which are copied into the slot.
    Segment([u64; 2]),
}

/// A used request.
#[derive(Debug)]
pub(crate) struct Used<T> {
    pub(crate) owner: T,
    /// The status byte from the device, or [`UNWRITTEN`](crate::slots::UNWRITTEN) if it wrote none.
    pub(crate) status: u8,
    /// The number of bytes that the device claims to have written, status included.
    pub(crate) len: u32,
}

/// An invalid value in the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RingError {
    /// The used index moved past the available index.
    Index { seen: u16, now: u16, in_flight: u16 },
    /// The used id is not the head of a request.
    Id(u32),
    /// The request of the used id is not in flight.
    Idle(u32),
    /// The used length is more than the whole request.
    Len { len: u32, chain: u32 },
}

impl fmt::Display for RingError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Index { seen, now, in_flight } => {
                write!(f, "used index went from {seen} to {now} with {in_flight} requests in flight")
            }
            Self::Id(id) => write!(f, "used id {id} belongs to no request"),
            Self::Idle(id) => write!(f, "used id {id} belongs to a request that is not in flight"),
            Self::Len { len, chain } => write!(f, "used length {len} for a request of {chain} bytes"),
        }
    }
}

/// Whether an index that moved from `before` to `after` passed `event` (2.7.10, 2.8.10).
#[inline]
pub(crate) fn reaches(event: u16, before: u16, after: u16) -> bool {
    after.wrapping_sub(event).wrapping_sub(1) < after.wrapping_sub(before)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_used_element_crosses_a_page() {
        for size in [4, 64, 128, 256, 512, 1024, 32768] {
            let layout = Layout::new(Format::Split, size, 1, true);
            assert!(layout.len().is_multiple_of(2 * LINE), "the next queue is aligned to a cache line");
            for element in 0..usize::from(size) {
                let at = layout.device + 4 + 8 * element;
                assert_eq!(at / 4096, (at + 7) / 4096, "element {element} of {size}");
            }
        }
    }
}
