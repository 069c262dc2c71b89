//! [`Packed`]: the driver's side of a packed virtqueue (virtio 1.2, 2.8), for requests of a header, data and a status byte.
//!
//! Driver and device take turns in one ring: the driver writes descriptors of requests, the device overwrites them with
//! what it has used, in an order of its own. So nothing is ever read from the ring but the used element at the next
//! position, and of that only an id and a length that are held against private memory. Where the device takes indirect
//! descriptors a request is one descriptor in the ring and one cache line in its slot.

use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring::{
    VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE, VRING_PACKED_DESC_F_AVAIL, VRING_PACKED_DESC_F_USED,
    VRING_PACKED_EVENT_FLAG_DESC, VRING_PACKED_EVENT_FLAG_DISABLE, VRING_PACKED_EVENT_FLAG_ENABLE,
};

use crate::{
    layout::{Chain, DESCRIPTOR, HEADER, Place, RingError, Used, reaches},
    ring::Virtqueue,
    slots::Slots,
};

const AVAIL: u16 = 1 << VRING_PACKED_DESC_F_AVAIL;
const USED: u16 = 1 << VRING_PACKED_DESC_F_USED;

/// The driver's side of a packed virtqueue. A slot is the place of one request, and its number the request's id; `T` is what
/// comes back with it.
#[derive(Debug)]
pub(crate) struct Packed<T> {
    slots: Slots<T>,
    event_idx: bool,
    /// Where the next request goes.
    next: Position,
    /// Where the device will write what it uses next.
    seen: Position,
    /// The second half of the first descriptor that the device does not know of yet, and where it goes. As long as it is not
    /// there the device sees none of those behind it.
    head: Option<(usize, u64)>,
    /// Descriptors that the device does not know of yet.
    staged: u16,
    /// Whether the device is asked for a notification.
    armed: bool,
}

/// A position in the ring and the wrap counter there (2.8.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Position {
    at: u16,
    wrap: bool,
}

impl Position {
    fn from_bits(bits: u16) -> Self {
        Self { at: bits & 0x7fff, wrap: bits >> 15 != 0 }
    }

    /// As the event suppression structures have it (2.8.14).
    fn bits(self) -> u16 {
        self.at | u16::from(self.wrap) << 15
    }

    #[inline]
    fn advance(&mut self, by: u16, size: u16) {
        self.at += by;
        if self.at >= size {
            self.at -= size;
            self.wrap = !self.wrap;
        }
    }

    /// The flags that make a descriptor here available.
    #[inline]
    fn available(self) -> u16 {
        if self.wrap { AVAIL } else { USED }
    }
}

impl<T: Send + 'static> Virtqueue<T> for Packed<T> {
    fn resume(slots: Slots<T>, event_idx: bool, place: Place) -> Self {
        let (next, seen) = (Position::from_bits(place.available), Position::from_bits(place.used));
        let mut queue = Self { slots, event_idx, next, seen, head: None, staged: 0, armed: true };
        queue.disarm();
        queue
    }

    fn place(&self) -> Place {
        Place { available: self.next.bits(), used: self.seen.bits() }
    }

    fn in_flight(&self) -> usize {
        self.slots.in_flight()
    }

    fn take_all(&mut self) -> impl Iterator<Item = T> {
        self.slots.take_all()
    }

    #[inline(always)]
    fn push(&mut self, chain: &Chain, owner: T) -> Result<(), T> {
        let Some(slot) = self.slots.claim() else { return Err(owner) };
        let payload = self.slots.payload(slot, chain.data);
        if self.slots.layout.indirect {
            if self.slots.changes_shape(slot, payload.segments) {
                self.reshape(slot, payload.segments);
            }
            let (table, iova, len) = self.slots.table(slot, payload.segments);
            self.slots.pieces(&payload, |n, at, len| {
                self.slots.descriptor(table + (usize::from(n) + 1) * DESCRIPTOR, at, len, 0, payload.flags);
            });
            self.write(slot, iova.get(), len, VRING_DESC_F_INDIRECT as u16);
        } else {
            let (header, status) = self.slots.ends(slot);
            self.write(slot, header.get(), HEADER as u32, VRING_DESC_F_NEXT as u16);
            if let Some(mut at) = payload.at {
                let mut left = payload.len;
                for _ in 0..payload.segments {
                    let piece = left.min(self.slots.segment_max);
                    self.write(slot, at.get(), piece, (payload.flags | VRING_DESC_F_NEXT) as u16);
                    at = at.plus(u64::from(piece));
                    left -= piece;
                }
            }
            self.write(slot, status.get(), 1, VRING_DESC_F_WRITE as u16);
        }
        self.slots.fill(slot, chain.header, &payload, owner);
        Ok(())
    }

    /// Virtio 1.2, 2.8.10 and 2.8.21.3.
    #[inline]
    fn publish(&mut self) -> bool {
        let Some((at, rest)) = self.head.take() else { return false };
        let (memory, layout) = (&self.slots.memory, &self.slots.layout);
        // Release: headers, tables and all other descriptors first.
        memory.store64(at, rest, Ordering::Release);
        // The device writes what it wants and then looks at the ring; we write the ring and then look at what it wants.
        // Without a full barrier both can miss the other.
        fence(Ordering::SeqCst);
        let staged = std::mem::take(&mut self.staged);
        let wants = memory.load32(layout.device, Ordering::Relaxed);
        let (event, flags) = (Position::from_bits(wants as u16), wants >> 16 & 3);
        if flags == VRING_PACKED_EVENT_FLAG_DESC && self.event_idx {
            // Both in the numbers of the round that `next` is in.
            let event = if event.wrap == self.next.wrap { event.at } else { event.at.wrapping_sub(layout.size) };
            reaches(event, self.next.at.wrapping_sub(staged), self.next.at)
        } else {
            flags != VRING_PACKED_EVENT_FLAG_DISABLE
        }
    }

    #[inline(always)]
    fn pop(&mut self) -> Result<Option<Used<T>>, RingError> {
        let at = usize::from(self.seen.at) * DESCRIPTOR + 8;
        // Length, id and flags in one: what belongs to the flags that were seen. Acquire: the data and the status after it.
        let rest = self.slots.memory.load64(at, Ordering::Acquire);
        let flags = (rest >> 48) as u16;
        let used = if self.seen.wrap { AVAIL | USED } else { 0 };
        if flags & (AVAIL | USED) != used {
            return Ok(None);
        }
        if self.armed {
            self.disarm();
        }
        let (id, mut len) = (u32::from((rest >> 32) as u16), rest as u32);
        // Without the flag there is no length (2.8.8), but qemu, whose lengths are right, leaves it out. So what is longer than
        // the request means nothing here, and is no fault.
        if u32::from(flags) & VRING_DESC_F_WRITE == 0 && len > self.slots.chain(id) {
            len = 0;
        }
        let segments = self.slots.check(id, id, len)?;
        let layout = &self.slots.layout;
        self.seen.advance(if layout.indirect { 1 } else { segments + 2 }, layout.size);
        Ok(Some(self.slots.empty(id, len)))
    }

    fn arm(&mut self) -> bool {
        self.armed = true;
        let flags = if self.event_idx { VRING_PACKED_EVENT_FLAG_DESC } else { VRING_PACKED_EVENT_FLAG_ENABLE };
        self.want(u32::from(self.seen.bits()) | flags << 16);
        // Re-check after asking: what was used between the last look and now raises no event (2.8.21.3.1).
        fence(Ordering::SeqCst);
        let at = usize::from(self.seen.at) * DESCRIPTOR + 8;
        let flags = (self.slots.memory.load64(at, Ordering::Relaxed) >> 48) as u16;
        let used = if self.seen.wrap { AVAIL | USED } else { 0 };
        if flags & (AVAIL | USED) != used {
            return true;
        }
        self.disarm();
        false
    }
}

impl<T> Packed<T> {
    /// Writes the next descriptor of the ring; the device does not know yet.
    #[inline]
    fn write(&mut self, id: u16, address: u64, len: u32, flags: u16) {
        let at = usize::from(self.next.at) * DESCRIPTOR;
        let flags = flags | self.next.available();
        let rest = u64::from(len) | u64::from(id) << 32 | u64::from(flags) << 48;
        self.slots.memory.store64(at, address, Ordering::Relaxed);
        if self.head.is_none() {
            self.head = Some((at + 8, rest));
        } else {
            self.slots.memory.store64(at + 8, rest, Ordering::Relaxed);
        }
        self.staged += 1;
        self.next.advance(1, self.slots.layout.size);
    }

    /// Writes the descriptors of an indirect table that stay the same while requests in `slot` have `segments` data
    /// descriptors. In a table only the flag WRITE means something (2.8.19).
    #[cold]
    fn reshape(&self, slot: u16, segments: u16) {
        let slots = &self.slots;
        let (header, status) = slots.ends(slot);
        let (table, _, _) = slots.table(slot, segments);
        slots.descriptor(table, header, HEADER as u32, 0, 0);
        let last = usize::from(segments) + 1;
        slots.descriptor(table + last * DESCRIPTOR, status, 1, 0, VRING_DESC_F_WRITE);
    }

    fn disarm(&mut self) {
        self.armed = false;
        self.want(VRING_PACKED_EVENT_FLAG_DISABLE << 16);
    }

    /// Writes the driver's event suppression structure (2.8.14), in one piece.
    fn want(&self, value: u32) {
        self.slots.memory.store32(self.slots.layout.driver, value, Ordering::Relaxed);
    }
}
