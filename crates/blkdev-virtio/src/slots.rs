//! [`Slots`]: the places of requests in a virtqueue, and the private half of what is known of them.
//!
//! Every slot owns its header, its status byte and, where the device takes them, its indirect descriptors for good, at
//! fixed addresses, so that a request with one data descriptor costs a single cache line; whatever else the device reads
//! there is written once.

use std::sync::atomic::Ordering;

use blkdev::Iova;
use virtio_bindings::virtio_ring::VRING_DESC_F_WRITE;

use crate::{
    layout::{DESCRIPTOR, Data, HEADER, Layout, RingError, Used},
    shared::Shared,
};

/// What a status byte is before the device has written it: no status of the specification.
pub(crate) const UNWRITTEN: u8 = 0xff;

/// The shape of a slot that no descriptors have been written for.
const SHAPELESS: u16 = u16::MAX;

/// What is private to a slot: who owns the request in it, and what its descriptors say.
#[derive(Debug)]
struct Slot<T> {
    owner: Option<T>,
    /// Bytes in all descriptors of the chain.
    chain: u32,
    /// Data descriptors of the request that it holds or held last.
    segments: u16,
    /// Data descriptors for which the others are laid out, or [`SHAPELESS`].
    shape: u16,
}

/// The data of a request, as descriptors have to say it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Payload {
    pub(crate) at: Option<Iova>,
    pub(crate) len: u32,
    /// `VRING_DESC_F_WRITE`, or 0.
    pub(crate) flags: u32,
    /// Data descriptors that it takes.
    pub(crate) segments: u16,
}

/// The slots of a queue, and the memory that they and the ring lie in.
#[derive(Debug)]
pub(crate) struct Slots<T> {
    pub(crate) memory: Shared,
    pub(crate) layout: Layout,
    pub(crate) segment_max: u32,
    slots: Box<[Slot<T>]>,
    /// Last in, first out: a light load stays in few, cache-warm slots.
    free: Vec<u16>,
}

impl<T> Slots<T> {
    /// `depth` slots, or as many as there are. `memory` is the queue's whole stretch.
    pub(crate) fn new(memory: Shared, layout: Layout, segment_max: u32, depth: u16) -> Self {
        let depth = depth.min(layout.slots());
        let slots = (0..depth).map(|_| Slot { owner: None, chain: 0, segments: 0, shape: SHAPELESS }).collect();
        let slots = Self { memory, layout, segment_max, slots, free: (0..depth).rev().collect() };
        for slot in 0..depth {
            slots.memory.store8(slots.status_at(slot), UNWRITTEN, Ordering::Relaxed);
        }
        slots
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Takes every request out, for when the device is dead.
    pub(crate) fn take_all(&mut self) -> impl Iterator<Item = T> + '_ {
        self.slots.iter_mut().filter_map(|slot| slot.owner.take())
    }

    pub(crate) fn status_at(&self, slot: u16) -> usize {
        self.layout.slot(slot) + self.layout.status
    }

    /// A free slot.
    #[inline(always)]
    pub(crate) fn claim(&mut self) -> Option<u16> {
        self.free.pop()
    }

    /// What the data descriptors of a request in `slot` have to say.
    #[inline(always)]
    pub(crate) fn payload(&self, slot: u16, data: Data) -> Payload {
        let (at, len, flags) = match data {
            Data::None => (None, 0, 0),
            Data::Out(at, len) => (Some(at), len, 0),
            Data::In(at, len) => (Some(at), len, VRING_DESC_F_WRITE),
            Data::Segment(bytes) => {
                let segment = self.status_at(slot) + 16;
                self.memory.store64(segment, bytes[0], Ordering::Relaxed);
                self.memory.store64(segment + 8, bytes[1], Ordering::Relaxed);
                (Some(self.memory.iova(segment)), 16, 0)
            }
        };
        let segments =
            if len <= self.segment_max { u16::from(at.is_some()) } else { len.div_ceil(self.segment_max) as u16 };
        assert!(segments <= self.layout.segments, "a transfer of {len} bytes fits {} segments", self.layout.segments);
        Payload { at, len, flags, segments }
    }

    /// Whether the fixed descriptors of `slot` have to be written for requests of so many data descriptors. Notes it as done.
    #[inline(always)]
    pub(crate) fn changes_shape(&mut self, slot: u16, segments: u16) -> bool {
        let private = &mut self.slots[usize::from(slot)];
        std::mem::replace(&mut private.shape, segments) != segments
    }

    /// Runs `write` for each piece of a payload: its number from 0 on, where it is, its length.
    #[inline(always)]
    pub(crate) fn pieces(&self, payload: &Payload, mut write: impl FnMut(u16, Iova, u32)) {
        let Some(mut at) = payload.at else { return };
        let mut left = payload.len;
        for n in 0..payload.segments {
            let piece = left.min(self.segment_max);
            write(n, at, piece);
            at = at.plus(u64::from(piece));
            left -= piece;
        }
    }

    /// Puts a request into a slot that was claimed: its header, and who owns it.
    #[inline(always)]
    pub(crate) fn fill(&mut self, slot: u16, header: [u64; 2], payload: &Payload, owner: T) {
        let at = self.layout.slot(slot) + self.layout.header;
        self.memory.store64(at, header[0], Ordering::Relaxed);
        self.memory.store64(at + 8, header[1], Ordering::Relaxed);
        let private = &mut self.slots[usize::from(slot)];
        private.chain = HEADER as u32 + payload.len + 1;
        private.segments = payload.segments;
        private.owner = Some(owner);
    }

    /// Bytes in all descriptors of the request that a slot holds or held last.
    #[inline]
    pub(crate) fn chain(&self, slot: u32) -> u32 {
        self.slots.get(slot as usize).map_or(0, |slot| slot.chain)
    }

    /// Holds what the device says to have used against what is in flight: the slot's number and the length are its words, and
    /// `id` is what it called the slot. Tells how many data descriptors the request has.
    #[inline(always)]
    pub(crate) fn check(&self, slot: u32, id: u32, len: u32) -> Result<u16, RingError> {
        let private = self.slots.get(slot as usize).ok_or(RingError::Id(id))?;
        // Back ends are sloppy here (qemu's vhost-user-blk example counts what it read as written), so this is nonsense only
        // past the whole chain; whoever needs to know how much was written asks for enough of it.
        if len > private.chain {
            return Err(RingError::Len { len, chain: private.chain });
        }
        if private.owner.is_none() {
            return Err(RingError::Idle(id));
        }
        Ok(private.segments)
    }

    /// Gives back what is in a slot that was [checked](Self::check).
    #[inline(always)]
    pub(crate) fn empty(&mut self, slot: u32, len: u32) -> Used<T> {
        let slot = slot as u16;
        let at = self.status_at(slot);
        let status = self.memory.load8(at, Ordering::Relaxed);
        // Now, while the line is here, not when the slot is used again.
        self.memory.store8(at, UNWRITTEN, Ordering::Relaxed);
        self.free.push(slot);
        let owner = self.slots[usize::from(slot)].owner.take().expect("a slot that is emptied is in flight");
        Used { owner, status, len }
    }

    /// Writes a descriptor. The last 32 bits are flags and next in a split ring, id and flags in a packed one.
    #[inline]
    pub(crate) fn descriptor(&self, at: usize, address: Iova, len: u32, low: u32, high: u32) {
        self.memory.store64(at, address.get(), Ordering::Relaxed);
        let rest = u64::from(len) | u64::from(low) << 32 | u64::from(high) << 48;
        self.memory.store64(at + 8, rest, Ordering::Relaxed);
    }

    /// Where a slot's header is for the device, and its status.
    pub(crate) fn ends(&self, slot: u16) -> (Iova, Iova) {
        let header = self.layout.slot(slot) + self.layout.header;
        (self.memory.iova(header), self.memory.iova(self.status_at(slot)))
    }

    /// The indirect table of a slot: where it is for us and for the device, and its length in bytes with so many data
    /// descriptors.
    #[inline]
    pub(crate) fn table(&self, slot: u16, segments: u16) -> (usize, Iova, u32) {
        let at = self.layout.slot(slot);
        (at, self.memory.iova(at), (u32::from(segments) + 2) * DESCRIPTOR as u32)
    }
}
