//! [`Split`]: the driver's side of a split virtqueue (virtio 1.2, 2.7), for requests of a header, data and a status byte.
//!
//! Every slot owns its descriptors, header and status byte for good, at fixed addresses, so that a request is the header,
//! one data descriptor and one ring entry; all other descriptors are written once. Where the device takes indirect
//! descriptors (2.7.5.3) the descriptor in the ring is one of those, and the driver writes a single cache line for each
//! request; elsewhere the slot owns a run of the ring itself.
//!
//! What the device can write is never used before it was checked: the free list, the in-flight table and the lengths of
//! the chains are private memory.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{Ordering, fence},
    },
};

use blkdev::{Iova, Mapping};
use virtio_bindings::virtio_ring::{
    VRING_AVAIL_F_NO_INTERRUPT, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE, VRING_USED_F_NO_NOTIFY,
};

use crate::shared::Shared;

/// Length of one cache line in bytes, and the alignment of whatever the two sides write by turns.
const LINE: usize = 64;
/// Length of a descriptor in bytes (2.7.5).
const DESCRIPTOR: usize = 16;
/// Length of a request's header in bytes.
const HEADER: usize = 16;
/// What a status byte is before the device has written it: no status of the specification.
const UNWRITTEN: u8 = 0xff;

/// Where everything lies in a queue's stretch of memory, counted in bytes from its start: descriptors, available ring, used
/// ring, slots.
///
/// A slot is [indirect table, header] and, in a line of its own, [status, segment]. With one data descriptor the first part
/// is exactly a line. The status is the one byte in it that the device writes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Layout {
    /// Descriptors in the ring: a power of two.
    size: u16,
    /// Data descriptors that a request may have.
    segments: u16,
    indirect: bool,
    available: usize,
    used: usize,
    /// The first slot.
    slots: usize,
    /// From a slot to the next.
    stride: usize,
    /// The header in its slot.
    header: usize,
    /// The status in its slot.
    status: usize,
}

impl Layout {
    /// A ring of `size` descriptors for requests with up to `segments` data descriptors.
    pub(crate) fn new(size: u16, segments: u16, indirect: bool) -> Self {
        assert!(size.is_power_of_two() && segments >= 1 && size >= segments + 2, "the longest chain fits the ring");
        let entries = usize::from(size);
        let available = entries * DESCRIPTOR;
        let used = (available + 6 + 2 * entries).next_multiple_of(2 * LINE);
        let slots = (used + 6 + 8 * entries).next_multiple_of(2 * LINE);
        let header = if indirect { (usize::from(segments) + 2) * DESCRIPTOR } else { 0 };
        let status = (header + HEADER).next_multiple_of(LINE);
        Self { size, segments, indirect, available, used, slots, stride: status + LINE, header, status }
    }

    /// The smallest ring that holds `depth` requests, at most `size_max` (a power of two).
    pub(crate) fn fitting(depth: u16, segments: u16, indirect: bool, size_max: u16) -> Self {
        let chain = u32::from(segments) + 2;
        let want = if indirect { u32::from(depth).max(chain) } else { u32::from(depth) * chain };
        Self::new(want.next_power_of_two().min(u32::from(size_max)) as u16, segments, indirect)
    }

    /// Requests that fit.
    pub(crate) fn slots(&self) -> u16 {
        if self.indirect { self.size } else { self.size / self.chain() }
    }

    /// Descriptors of the longest chain.
    fn chain(&self) -> u16 {
        self.segments + 2
    }

    fn slot(&self, slot: u16) -> usize {
        self.slots + usize::from(slot) * self.stride
    }

    /// Length in bytes, a multiple of two lines.
    pub(crate) fn len(&self) -> usize {
        self.slot(self.slots()).next_multiple_of(2 * LINE)
    }
}

/// A request as the device sees it, but for the status byte at its end.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Chain {
    pub(crate) header: [u64; 2],
    pub(crate) data: Data,
}

/// What lies between header and status.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Data {
    None,
    /// The device reads this.
    Out(Iova, u32),
    /// The device writes this.
    In(Iova, u32),
    /// The device reads 16 bytes, which are copied into the slot.
    Segment([u64; 2]),
}

/// A request that the device has given back.
#[derive(Debug)]
pub(crate) struct Used<T> {
    pub(crate) owner: T,
    /// The status byte, as the device wrote it; [`UNWRITTEN`] where it did not.
    pub(crate) status: u8,
    /// How many bytes the device says to have written, status included.
    pub(crate) len: u32,
}

/// Something in the ring that cannot be true.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Nonsense {
    /// The used index ran ahead of what was made available.
    Index { seen: u16, now: u16, in_flight: u16 },
    /// A used id that is not the head of any request.
    Id(u32),
    /// A used id whose request is not in flight.
    Idle(u32),
    /// More bytes written than the request has.
    Len { len: u32, chain: u32 },
}

impl fmt::Display for Nonsense {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Index { seen, now, in_flight } => {
                write!(f, "used index went from {seen} to {now} with {in_flight} requests in flight")
            }
            Self::Id(id) => write!(f, "used id {id} is no request's"),
            Self::Idle(id) => write!(f, "used id {id} is of a request that is not in flight"),
            Self::Len { len, chain } => write!(f, "used length {len} of a request of {chain} bytes"),
        }
    }
}

/// What is private to a slot: who owns the request in it, and what its descriptors say.
#[derive(Debug)]
struct Slot<T> {
    owner: Option<T>,
    /// Bytes in all descriptors of the chain.
    chain: u32,
    /// Data descriptors for which the others are laid out; `u16::MAX`: none written yet.
    shape: u16,
}

/// The driver's side of a virtqueue. A slot is the place of one request; `T` is what comes back with it.
#[derive(Debug)]
pub(crate) struct Split<T> {
    memory: Shared,
    layout: Layout,
    segment_max: u32,
    event_idx: bool,
    slots: Box<[Slot<T>]>,
    /// Last in, first out: a light load stays in few, cache-warm slots.
    free: Vec<u16>,
    /// The available index, counting what the device has not heard of yet.
    staged: u16,
    /// The available index as the device knows it.
    published: u16,
    /// The used index up to which we have taken requests back.
    seen: u16,
    /// The used index when it was last read.
    used: u16,
    /// Whether the device is asked for a notification.
    armed: bool,
    /// With event index: where `used_event` was parked, behind what was seen, so that it is never reached.
    parked: u16,
}

impl<T> Split<T> {
    /// A queue in the bytes of `mapping` from `start` on, which are set to zero.
    pub(crate) fn new(
        mapping: &Arc<Mapping>,
        start: usize,
        layout: Layout,
        segment_max: u32,
        depth: u16,
        event_idx: bool,
    ) -> Self {
        let depth = depth.min(layout.slots());
        let slots = (0..depth).map(|_| Slot { owner: None, chain: 0, shape: u16::MAX }).collect();
        let mut queue = Self {
            memory: Shared::zeroed(mapping, start, layout.len()),
            layout,
            segment_max,
            event_idx,
            slots,
            free: (0..depth).rev().collect(),
            staged: 0,
            published: 0,
            seen: 0,
            used: 0,
            armed: true,
            parked: 0,
        };
        for slot in 0..depth {
            queue.memory.store8(queue.status_at(slot), UNWRITTEN, Ordering::Relaxed);
        }
        queue.disarm();
        queue
    }

    pub(crate) fn size(&self) -> u16 {
        self.layout.size
    }

    /// Descriptor table, available ring, used ring.
    pub(crate) fn addresses(&self) -> [Iova; 3] {
        [0, self.layout.available, self.layout.used].map(|at| self.memory.iova(at))
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Takes every request out, for when the device is dead.
    pub(crate) fn take_all(&mut self) -> impl Iterator<Item = T> + '_ {
        self.slots.iter_mut().filter_map(|slot| slot.owner.take())
    }

    fn status_at(&self, slot: u16) -> usize {
        self.layout.slot(slot) + self.layout.status
    }

    /// Lays a request out and enters it into the available ring; the device does not know yet. Full: `owner` comes back.
    #[inline]
    pub(crate) fn push(&mut self, chain: &Chain, owner: T) -> Result<(), T> {
        let Some(slot) = self.free.pop() else { return Err(owner) };
        let layout = self.layout;
        let at = layout.slot(slot);
        // Where the chain's descriptors lie, and what number the first one has among them.
        let (table, first) = if layout.indirect { (at, 0) } else { self.run(slot) };

        let (data, len, flags) = match chain.data {
            Data::None => (None, 0, 0),
            Data::Out(at, len) => (Some(at), len, VRING_DESC_F_NEXT),
            Data::In(at, len) => (Some(at), len, VRING_DESC_F_NEXT | VRING_DESC_F_WRITE),
            Data::Segment(bytes) => {
                let segment = self.status_at(slot) + 16;
                self.memory.store64(segment, bytes[0], Ordering::Relaxed);
                self.memory.store64(segment + 8, bytes[1], Ordering::Relaxed);
                (Some(self.memory.iova(segment)), 16, VRING_DESC_F_NEXT)
            }
        };
        let shape =
            if len <= self.segment_max { u16::from(data.is_some()) } else { len.div_ceil(self.segment_max) as u16 };
        assert!(shape <= layout.segments, "a transfer of {len} bytes fits {} segments", layout.segments);
        if self.slots[usize::from(slot)].shape != shape {
            self.reshape(slot, shape);
        }
        if let Some(mut data) = data {
            let mut left = len;
            for n in 1..=shape {
                let piece = left.min(self.segment_max);
                self.descriptor(table + usize::from(n) * DESCRIPTOR, data, piece, flags, first + n + 1);
                data = data.plus(u64::from(piece));
                left -= piece;
            }
        }
        let header = at + layout.header;
        self.memory.store64(header, chain.header[0], Ordering::Relaxed);
        self.memory.store64(header + 8, chain.header[1], Ordering::Relaxed);

        let head = if layout.indirect { slot } else { first };
        let entry = layout.available + 4 + 2 * usize::from(self.staged & (layout.size - 1));
        self.memory.store16(entry, head, Ordering::Relaxed);
        self.staged = self.staged.wrapping_add(1);
        let private = &mut self.slots[usize::from(slot)];
        private.chain = HEADER as u32 + len + 1;
        private.owner = Some(owner);
        Ok(())
    }

    /// The run of the ring that a slot owns where there are no indirect descriptors.
    fn run(&self, slot: u16) -> (usize, u16) {
        let first = slot * self.layout.chain();
        (usize::from(first) * DESCRIPTOR, first)
    }

    /// Writes the descriptors that stay the same while requests in `slot` have `segments` data descriptors.
    #[cold]
    fn reshape(&mut self, slot: u16, segments: u16) {
        let layout = self.layout;
        let at = layout.slot(slot);
        let (table, first) = if layout.indirect { (at, 0) } else { self.run(slot) };
        let (header, status) = (self.memory.iova(at + layout.header), self.memory.iova(self.status_at(slot)));
        self.descriptor(table, header, HEADER as u32, VRING_DESC_F_NEXT, first + 1);
        let last = usize::from(segments) + 1;
        self.descriptor(table + last * DESCRIPTOR, status, 1, VRING_DESC_F_WRITE, 0);
        if layout.indirect {
            let len = (u32::from(segments) + 2) * DESCRIPTOR as u32;
            self.descriptor(usize::from(slot) * DESCRIPTOR, self.memory.iova(table), len, VRING_DESC_F_INDIRECT, 0);
        }
        self.slots[usize::from(slot)].shape = segments;
    }

    #[inline]
    fn descriptor(&self, at: usize, address: Iova, len: u32, flags: u32, next: u16) {
        self.memory.store64(at, address.get(), Ordering::Relaxed);
        let rest = u64::from(len) | u64::from(flags) << 32 | u64::from(next) << 48;
        self.memory.store64(at + 8, rest, Ordering::Relaxed);
    }

    /// Shows the device what was pushed. Tells whether it wants to be notified (2.7.10 and 2.7.13.4).
    #[inline]
    pub(crate) fn publish(&mut self) -> bool {
        if self.staged == self.published {
            return false;
        }
        let before = self.published;
        self.published = self.staged;
        // Release: descriptors, headers and ring entries first.
        self.memory.store16(self.layout.available + 2, self.published, Ordering::Release);
        // The device writes what it wants and then looks at the index; we write the index and then look at what it wants.
        // Without a full barrier both can miss the other.
        fence(Ordering::SeqCst);
        if self.event_idx {
            let event = self.layout.used + 4 + 8 * usize::from(self.layout.size);
            reaches(self.memory.load16(event, Ordering::Relaxed), before, self.published)
        } else {
            u32::from(self.memory.load16(self.layout.used, Ordering::Relaxed)) & VRING_USED_F_NO_NOTIFY == 0
        }
    }

    /// The next request that the device has given back. After an error the queue must not be used any more.
    #[inline]
    pub(crate) fn pop(&mut self) -> Result<Option<Used<T>>, Nonsense> {
        if self.seen == self.used && !self.look()? {
            return Ok(None);
        }
        let entry = self.layout.used + 4 + 8 * usize::from(self.seen & (self.layout.size - 1));
        let id = self.memory.load32(entry, Ordering::Relaxed);
        let len = self.memory.load32(entry + 4, Ordering::Relaxed);
        let slot = if self.layout.indirect {
            id
        } else if id.is_multiple_of(u32::from(self.layout.chain())) {
            id / u32::from(self.layout.chain())
        } else {
            return Err(Nonsense::Id(id));
        };
        let private = self.slots.get_mut(slot as usize).ok_or(Nonsense::Id(id))?;
        // Back ends are sloppy here (qemu's vhost-user-blk example counts what it read as written), so this is nonsense only
        // past the whole chain; whoever needs to know how much was written asks for enough of it.
        if len > private.chain {
            return Err(Nonsense::Len { len, chain: private.chain });
        }
        let owner = private.owner.take().ok_or(Nonsense::Idle(id))?;
        let slot = slot as u16;
        let at = self.status_at(slot);
        let status = self.memory.load8(at, Ordering::Relaxed);
        // Now, while the line is here, not when the slot is used again.
        self.memory.store8(at, UNWRITTEN, Ordering::Relaxed);
        self.free.push(slot);
        self.seen = self.seen.wrapping_add(1);
        Ok(Some(Used { owner, status, len }))
    }

    /// Reads the used index. Tells whether it moved.
    #[inline]
    fn look(&mut self) -> Result<bool, Nonsense> {
        // Acquire: the used entries, the data and the status bytes after it.
        let now = self.memory.load16(self.layout.used + 2, Ordering::Acquire);
        if now == self.seen {
            return Ok(false);
        }
        let in_flight = self.published.wrapping_sub(self.seen);
        if now.wrapping_sub(self.seen) > in_flight {
            return Err(Nonsense::Index { seen: self.seen, now, in_flight });
        }
        self.used = now;
        if self.armed {
            self.disarm();
        } else if self.event_idx && now.wrapping_sub(self.parked) >= 1 << 15 {
            // 2^16 indices further on the device would come past it.
            self.park();
        }
        Ok(true)
    }

    /// Asks for a notification when the used index moves on from what was seen. `false`: it has, and none was asked for.
    pub(crate) fn arm(&mut self) -> bool {
        if self.seen != self.used {
            return false;
        }
        self.armed = true;
        let (at, value) = if self.event_idx { (self.used_event(), self.seen) } else { (self.layout.available, 0) };
        self.memory.store16(at, value, Ordering::Relaxed);
        // Re-check after asking: what was used between the last look and now raises no event (2.7.7, 2.7.10).
        fence(Ordering::SeqCst);
        if self.memory.load16(self.layout.used + 2, Ordering::Relaxed) == self.seen {
            return true;
        }
        self.disarm();
        false
    }

    fn disarm(&mut self) {
        self.armed = false;
        if self.event_idx {
            self.park();
        } else {
            self.memory.store16(self.layout.available, VRING_AVAIL_F_NO_INTERRUPT as u16, Ordering::Relaxed);
        }
    }

    /// Puts `used_event` just behind what was seen, the place that is the longest way off.
    fn park(&mut self) {
        self.parked = self.seen.wrapping_sub(1);
        self.memory.store16(self.used_event(), self.parked, Ordering::Relaxed);
    }

    fn used_event(&self) -> usize {
        self.layout.available + 4 + 2 * usize::from(self.layout.size)
    }
}

/// Whether an index that moved from `before` to `after` has come past `event` (2.7.10).
#[inline]
pub(crate) fn reaches(event: u16, before: u16, after: u16) -> bool {
    after.wrapping_sub(event).wrapping_sub(1) < after.wrapping_sub(before)
}
