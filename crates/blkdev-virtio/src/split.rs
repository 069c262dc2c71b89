//! [`Split`]: the driver side of a split virtqueue (virtio 1.2, 2.7), for requests of a header, data and a status byte.
//!
//! Every slot owns its descriptors permanently. So a request writes only the header, one data descriptor and one entry of the
//! available ring; all other descriptors are written once. With indirect descriptors (2.7.5.3) the descriptor in the ring
//! points to the slot's table, and the driver writes a single cache line for each request. Without them the slot owns a run of
//! the descriptor table.
//!
//! Nothing that the device can write is used unchecked. The free list, the in-flight table and the chain lengths are in private
//! memory.

use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring::{
    VRING_AVAIL_F_NO_INTERRUPT, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE, VRING_USED_F_NO_NOTIFY,
};

use crate::{
    layout::{Chain, DESCRIPTOR, HEADER, Place, RingError, Used, reaches},
    ring::{Virtqueue, on},
    slots::Slots,
};

/// The driver side of a split virtqueue. A slot holds one request; `T` comes back with it.
#[derive(Debug)]
pub(crate) struct Split<T> {
    slots: Slots<T>,
    event_idx: bool,
    /// The available index, unpublished requests included.
    staged: u16,
    /// The available index as published to the device.
    published: u16,
    /// The used index up to which requests were taken back.
    seen: u16,
    /// The used index at its last load.
    used: u16,
    /// Whether a notification is requested.
    armed: bool,
    /// With VIRTIO_F_EVENT_IDX: the value of `used_event` while disarmed, behind `seen`, so that the used index does not reach
    /// it.
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

    fn describe(&self) -> String {
        let Self { published, seen, used, armed, .. } = self;
        format!("available index {published}, used index {used}, taken back up to {seen}, notifications {}", on(*armed))
    }

    fn in_flight(&self) -> usize {
        self.slots.in_flight()
    }

    fn take_all(&mut self) -> impl Iterator<Item = T> {
        let next = self.staged;
        self.slots.take_all(move |at| next.wrapping_sub(at))
    }

    #[inline(always)]
    fn push(&mut self, chain: &Chain, owner: T) -> Result<(), T> {
        let Some(slot) = self.slots.claim() else { return Err(owner) };
        let layout = self.slots.layout;
        // The offset of the chain's descriptor table, and the index of the chain's first descriptor in it.
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
        self.slots.fill(slot, chain.header, &payload, owner, self.staged);

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
        // Release: orders descriptors, headers and ring entries before this store.
        memory.store16(layout.driver + 2, self.published, Ordering::Release);
        // The device writes its event index and then reads the available index; we write the available index and then read its
        // event index. Without a full barrier both can miss the other's store.
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
        // Re-check after the request: an element used before it raises no event (2.7.7, 2.7.10).
        fence(Ordering::SeqCst);
        if memory.load16(self.slots.layout.device + 2, Ordering::Relaxed) == self.seen {
            return true;
        }
        self.disarm();
        false
    }
}

impl<T> Split<T> {
    /// The run of the descriptor table that a slot owns without indirect descriptors.
    fn run(&self, slot: u16) -> (usize, u16) {
        let first = slot * self.slots.layout.chain();
        (usize::from(first) * DESCRIPTOR, first)
    }

    /// Writes the constant descriptors for requests in `slot` with `segments` data descriptors.
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

    /// Loads the used index. Returns whether it moved.
    #[inline]
    fn look(&mut self) -> Result<bool, RingError> {
        // Acquire: orders the loads of used entries, data and status bytes after it.
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
            // The used index would reach it when it wraps, after 2^16 steps.
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

    /// Sets `used_event` to a value that the used index does not reach: behind `seen`, and behind the elements that the device
    /// has used since its last notification check. Those are at most one ring, and `seen` may cover a part of them. For the
    /// largest rings the margin is only half, because indices wrap at 2^16: there the used index may reach it, which costs one
    /// extra wake-up.
    fn park(&mut self) {
        self.parked = self.seen.wrapping_sub(self.slots.layout.size.min(1 << 14) + 1);
        self.slots.memory.store16(self.used_event(), self.parked, Ordering::Relaxed);
    }

    fn used_event(&self) -> usize {
        self.slots.layout.driver + 4 + 2 * usize::from(self.slots.layout.size)
    }
}
