//! [`Packed`]: the driver side of a packed virtqueue (virtio 1.2, 2.8), for requests of a header, data and a status byte.
//!
//! Driver and device take turns in one ring. The driver writes the descriptors of requests; the device overwrites them with
//! used elements, in its own order. So the driver reads only the used element at the next position, and of that only an id and
//! a length, which it checks against private memory. With indirect descriptors a request takes one descriptor in the ring and
//! one cache line in its slot.

use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring::{
    VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE, VRING_PACKED_DESC_F_AVAIL, VRING_PACKED_DESC_F_USED,
    VRING_PACKED_EVENT_FLAG_DESC, VRING_PACKED_EVENT_FLAG_DISABLE, VRING_PACKED_EVENT_FLAG_ENABLE,
};

use crate::{
    layout::{Chain, DESCRIPTOR, HEADER, Place, RingError, Used, reaches},
    ring::{Virtqueue, on},
    slots::Slots,
};

const AVAIL: u16 = 1 << VRING_PACKED_DESC_F_AVAIL;
const USED: u16 = 1 << VRING_PACKED_DESC_F_USED;

/// The driver side of a packed virtqueue. A slot holds one request; its number is the request's buffer id. `T` comes back with
/// the request.
#[derive(Debug)]
pub(crate) struct Packed<T> {
    slots: Slots<T>,
    event_idx: bool,
    /// Position of the next request's first descriptor.
    next: Position,
    /// Position where the device will write its next used element.
    seen: Position,
    /// Second half of the first unpublished descriptor, and its offset. Until it is written, the device sees none of the
    /// descriptors behind it.
    head: Option<(usize, u64)>,
    /// Number of unpublished descriptors.
    staged: u16,
    /// Whether a notification is requested.
    armed: bool,
}

/// A position in the ring and its wrap counter (2.8.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Position {
    at: u16,
    wrap: bool,
}

impl Position {
    fn from_bits(bits: u16) -> Self {
        Self { at: bits & 0x7fff, wrap: bits >> 15 != 0 }
    }

    /// The encoding of the event suppression structures (2.8.14).
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

    /// Flags that make a descriptor at this position available.
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

    fn describe(&self) -> String {
        let Self { next, seen, armed, .. } = self;
        let position = |position: &Position| format!("{} (wrap counter {})", position.at, u8::from(position.wrap));
        format!("available up to {}, used up to {}, notifications {}", position(next), position(seen), on(*armed))
    }

    fn in_flight(&self) -> usize {
        self.slots.in_flight()
    }

    fn take_all(&mut self) -> impl Iterator<Item = T> {
        let (next, size) = (self.next.at, self.slots.layout.size);
        self.slots.take_all(move |at| if at <= next { next - at } else { next + (size - at) })
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
        self.slots.fill(slot, chain.header, &payload, owner, self.next.at);
        Ok(())
    }

    /// Virtio 1.2, 2.8.10 and 2.8.21.3.
    #[inline]
    fn publish(&mut self) -> bool {
        let Some((at, rest)) = self.head.take() else { return false };
        let (memory, layout) = (&self.slots.memory, &self.slots.layout);
        // Release: orders headers, tables and all other descriptors before this store.
        memory.store64(at, rest, Ordering::Release);
        // The device writes its event suppression and then reads the ring; we write the ring and then read its event
        // suppression. Without a full barrier both can miss the other's store.
        fence(Ordering::SeqCst);
        let staged = std::mem::take(&mut self.staged);
        let wants = memory.load32(layout.device, Ordering::Relaxed);
        let (event, flags) = (Position::from_bits(wants as u16), wants >> 16 & 3);
        if flags == VRING_PACKED_EVENT_FLAG_DESC && self.event_idx {
            // Both as positions in the current round of `next`.
            let event = if event.wrap == self.next.wrap { event.at } else { event.at.wrapping_sub(layout.size) };
            reaches(event, self.next.at.wrapping_sub(staged), self.next.at)
        } else {
            flags != VRING_PACKED_EVENT_FLAG_DISABLE
        }
    }

    #[inline(always)]
    fn pop(&mut self) -> Result<Option<Used<T>>, RingError> {
        let at = usize::from(self.seen.at) * DESCRIPTOR + 8;
        // One load for length, id and flags, so that all three are from the same write. Acquire: orders the loads of data and
        // status after it.
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
        // Without the flag the length is undefined (2.8.8). But QEMU leaves the flag out and still writes a correct length. So
        // only a length beyond the request is ignored; it is no error here.
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
        // Re-check after the request: an element used before it raises no event (2.8.21.3.1).
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
    /// Writes the next descriptor of the ring, not yet visible to the device.
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

    /// Writes the constant descriptors of an indirect table, for requests in `slot` with `segments` data descriptors. In a
    /// table only the WRITE flag is valid (2.8.19).
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

    /// Writes the driver's event suppression structure (2.8.14) with one store.
    fn want(&self, value: u32) {
        self.slots.memory.store32(self.slots.layout.driver, value, Ordering::Relaxed);
    }
}
