//! [`Split`]: the driver's side of a split virtqueue (virtio 1.2, 2.7), for requests of a header, data and a status byte.
//!
//! Every slot owns its descriptors for good, so that a request is the header, one data descriptor and one ring entry; all
//! other descriptors are written once. Where the device takes indirect descriptors (2.7.5.3) the descriptor in the ring is
//! one of those, and the driver writes a single cache line for each request; elsewhere the slot owns a run of the ring
//! itself.
//!
//! What the device can write is never used before it was checked: the free list, the in-flight table and the lengths of
//! the chains are private memory.

use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring::{
    VRING_AVAIL_F_NO_INTERRUPT, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE, VRING_USED_F_NO_NOTIFY,
};

use crate::{
    layout::{Chain, DESCRIPTOR, HEADER, Place, RingError, Used, reaches},
    ring::Virtqueue,
    slots::Slots,
};

/// The driver's side of a split virtqueue. A slot is the place of one request; `T` is what comes back with it.
#[derive(Debug)]
pub(crate) struct Split<T> {
    slots: Slots<T>,
    event_idx: bool,
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

impl<T: Send + 'static> Virtqueue<T> for Split<T> {
    fn resume(slots: Slots<T>, event_idx: bool, place: Place) -> Self {
        let Place { available, used } = place;
        let (staged, published, seen) = (available, available, used);
        let mut queue = Self { slots, event_idx, staged, published, seen, used, armed: true, parked: 0 };
        queue.disarm();
        queue
    }

    fn place(&self) -> Place {
        Place { available: self.published, used: self.seen }
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
        let layout = self.slots.layout;
        // Where the chain's descriptors lie, and what number the first one has among them.
        let (table, first) = if layout.indirect { (layout.slot(slot), 0) } else { self.run(slot) };
        let payload = self.slots.payload(slot, chain.data);
        if self.slots.changes_shape(slot, payload.segments) {
            self.reshape(slot, payload.segments);
        }
        let flags = payload.flags | VRING_DESC_F_NEXT;
        self.slots.pieces(&payload, |n, at, len| {
            let descriptor = table + (usize::from(n) + 1) * DESCRIPTOR;
            self.slots.descriptor(descriptor, at, len, flags, u32::from(first + n + 2));
        });
        self.slots.fill(slot, chain.header, &payload, owner);

        let head = if layout.indirect { slot } else { first };
        let entry = layout.driver + 4 + 2 * usize::from(self.staged & (layout.size - 1));
        self.slots.memory.store16(entry, head, Ordering::Relaxed);
        self.staged = self.staged.wrapping_add(1);
        Ok(())
    }

    /// Virtio 1.2, 2.7.10 and 2.7.13.4.
    #[inline]
    fn publish(&mut self) -> bool {
        if self.staged == self.published {
            return false;
        }
        let before = self.published;
        self.published = self.staged;
        let (memory, layout) = (&self.slots.memory, &self.slots.layout);
        // Release: descriptors, headers and ring entries first.
        memory.store16(layout.driver + 2, self.published, Ordering::Release);
        // The device writes what it wants and then looks at the index; we write the index and then look at what it wants.
        // Without a full barrier both can miss the other.
        fence(Ordering::SeqCst);
        if self.event_idx {
            let event = layout.device + 4 + 8 * usize::from(layout.size);
            reaches(memory.load16(event, Ordering::Relaxed), before, self.published)
        } else {
            u32::from(memory.load16(layout.device, Ordering::Relaxed)) & VRING_USED_F_NO_NOTIFY == 0
        }
    }

    #[inline(always)]
    fn pop(&mut self) -> Result<Option<Used<T>>, RingError> {
        if self.seen == self.used && !self.look()? {
            return Ok(None);
        }
        let (memory, layout) = (&self.slots.memory, &self.slots.layout);
        let entry = layout.device + 4 + 8 * usize::from(self.seen & (layout.size - 1));
        let id = memory.load32(entry, Ordering::Relaxed);
        let len = memory.load32(entry + 4, Ordering::Relaxed);
        let slot = if layout.indirect {
            id
        } else if id.is_multiple_of(u32::from(layout.chain())) {
            id / u32::from(layout.chain())
        } else {
            return Err(RingError::Id(id));
        };
        self.slots.check(slot, id, len)?;
        self.seen = self.seen.wrapping_add(1);
        Ok(Some(self.slots.empty(slot, len)))
    }

    fn arm(&mut self) -> bool {
        if self.seen != self.used {
            return false;
        }
        self.armed = true;
        let memory = &self.slots.memory;
        let (at, value) = if self.event_idx { (self.used_event(), self.seen) } else { (self.slots.layout.driver, 0) };
        memory.store16(at, value, Ordering::Relaxed);
        // Re-check after asking: what was used between the last look and now raises no event (2.7.7, 2.7.10).
        fence(Ordering::SeqCst);
        if memory.load16(self.slots.layout.device + 2, Ordering::Relaxed) == self.seen {
            return true;
        }
        self.disarm();
        false
    }
}

impl<T> Split<T> {
    /// The run of the ring that a slot owns where there are no indirect descriptors.
    fn run(&self, slot: u16) -> (usize, u16) {
        let first = slot * self.slots.layout.chain();
        (usize::from(first) * DESCRIPTOR, first)
    }

    /// Writes the descriptors that stay the same while requests in `slot` have `segments` data descriptors.
    #[cold]
    fn reshape(&self, slot: u16, segments: u16) {
        let slots = &self.slots;
        let indirect = slots.layout.indirect;
        let (table, first) = if indirect { (slots.layout.slot(slot), 0) } else { self.run(slot) };
        let (header, status) = slots.ends(slot);
        slots.descriptor(table, header, HEADER as u32, VRING_DESC_F_NEXT, u32::from(first) + 1);
        let last = usize::from(segments) + 1;
        slots.descriptor(table + last * DESCRIPTOR, status, 1, VRING_DESC_F_WRITE, 0);
        if indirect {
            let (_, at, len) = slots.table(slot, segments);
            slots.descriptor(usize::from(slot) * DESCRIPTOR, at, len, VRING_DESC_F_INDIRECT, 0);
        }
    }

    /// Reads the used index. Tells whether it moved.
    #[inline]
    fn look(&mut self) -> Result<bool, RingError> {
        // Acquire: the used entries, the data and the status bytes after it.
        let now = self.slots.memory.load16(self.slots.layout.device + 2, Ordering::Acquire);
        if now == self.seen {
            return Ok(false);
        }
        let in_flight = self.published.wrapping_sub(self.seen);
        if now.wrapping_sub(self.seen) > in_flight {
            return Err(RingError::Index { seen: self.seen, now, in_flight });
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

    fn disarm(&mut self) {
        self.armed = false;
        if self.event_idx {
            self.park();
        } else {
            let flags = VRING_AVAIL_F_NO_INTERRUPT as u16;
            self.slots.memory.store16(self.slots.layout.driver, flags, Ordering::Relaxed);
        }
    }

    /// Puts `used_event` where the device does not come past: behind what was seen, and behind what it has used since it last
    /// looked whether to notify, which is at most a ring; that we may have seen in part. Of the largest rings only half, as
    /// indices count to 2^16: there it may be reached, which costs one wake-up too many.
    fn park(&mut self) {
        self.parked = self.seen.wrapping_sub(self.slots.layout.size.min(1 << 14) + 1);
        self.slots.memory.store16(self.used_event(), self.parked, Ordering::Relaxed);
    }

    fn used_event(&self) -> usize {
        self.slots.layout.driver + 4 + 2 * usize::from(self.slots.layout.size)
    }
}
