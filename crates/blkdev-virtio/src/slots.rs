//! [`Slots`]: the request slots of a virtqueue, and their private state.
//!
//! Every slot owns a header, a status byte and, if the device accepts them, indirect descriptors, at fixed addresses. So a
//! request with one data descriptor writes a single cache line. The constant parts are written once.

use std::sync::atomic::Ordering;

use blkdev::{Iova, window::Window};
use virtio_bindings::virtio_ring::VRING_DESC_F_WRITE;

use crate::layout::{DESCRIPTOR, Data, HEADER, Layout, RingError, Used};

/// Initial value of a status byte: no status of the specification. It marks a status that the device did not write.
pub(crate) const UNWRITTEN: u8 = 0xff;

/// The shape of a slot whose constant descriptors are not written yet.
const SHAPELESS: u16 = u16::MAX;

/// The private state of a slot: the owner of its request, and a summary of its descriptors.
#[derive(Debug)]
struct Slot<T> {
    owner: Option<T>,
    /// Total length of the chain's descriptors, in bytes.
    chain: u32,
    /// Number of data descriptors of the current or last request.
    segments: u16,
    /// Number of data descriptors that the constant descriptors are written for, or [`SHAPELESS`].
    shape: u16,
    /// Position in the ring of the current or last request.
    at: u16,
}

/// The data of a request, in the form of its descriptors.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Payload {
    pub(crate) at: Option<Iova>,
    pub(crate) len: u32,
    /// `VRING_DESC_F_WRITE`, or 0.
    pub(crate) flags: u32,
    /// Number of data descriptors.
    pub(crate) segments: u16,
}

/// The slots of a queue, and the memory of slots and ring.
#[derive(Debug)]
pub(crate) struct Slots<T> {
    pub(crate) memory: Window,
    pub(crate) layout: Layout,
    pub(crate) segment_max: u32,
    slots: Box<[Slot<T>]>,
    /// A stack: under light load, requests reuse a few cache-warm slots.
    free: Vec<u16>,
}

impl<T> Slots<T> {
    /// Creates `depth` slots, or as many as fit. `memory` covers the whole queue.
    pub(crate) fn new(memory: Window, layout: Layout, segment_max: u32, depth: u16) -> Self {
        let depth = depth.min(layout.slots());
        let slots = (0..depth).map(|_| Slot { owner: None, chain: 0, segments: 0, shape: SHAPELESS, at: 0 }).collect();
        let slots = Self { memory, layout, segment_max, slots, free: (0..depth).rev().collect() };
        for slot in 0..depth {
            slots.memory.store8(slots.status_at(slot), UNWRITTEN, Ordering::Relaxed);
        }
        slots
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Removes and returns all requests, in the order in which they were pushed. For a dead device. `age` is how far a position in
    /// the ring lies back.
    pub(crate) fn take_all<F: Fn(u16) -> u16>(&mut self, age: F) -> impl Iterator<Item = T> + use<T, F> {
        let taken = self.slots.iter_mut().filter_map(|slot| Some((age(slot.at), slot.owner.take()?)));
        let mut taken: Vec<_> = taken.collect();
        taken.sort_unstable_by_key(|(age, _)| std::cmp::Reverse(*age));
        taken.into_iter().map(|(_, owner)| owner)
    }

    pub(crate) fn status_at(&self, slot: u16) -> usize {
        self.layout.slot(slot) + self.layout.status
    }

    /// Claims a free slot.
    #[inline(always)]
    pub(crate) fn claim(&mut self) -> Option<u16> {
        self.free.pop()
    }

    /// Computes the data descriptors of a request in `slot`.
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
        assert!(
            segments <= self.layout.segments,
            "a transfer of {len} bytes fits in {} segments",
            self.layout.segments
        );
        Payload { at, len, flags, segments }
    }

    /// Returns whether the constant descriptors of `slot` must be rewritten for `segments` data descriptors, and records them
    /// as written.
    #[inline(always)]
    pub(crate) fn changes_shape(&mut self, slot: u16, segments: u16) -> bool {
        let private = &mut self.slots[usize::from(slot)];
        std::mem::replace(&mut private.shape, segments) != segments
    }

    /// Calls `write` for each piece of a payload, with its number from 0 on, its address and its length.
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

    /// Puts a request into a claimed slot: its header, its owner, and its position in the ring.
    #[inline(always)]
    pub(crate) fn fill(&mut self, slot: u16, header: [u64; 2], payload: &Payload, owner: T, position: u16) {
        let at = self.layout.slot(slot) + self.layout.header;
        self.memory.store64(at, header[0], Ordering::Relaxed);
        self.memory.store64(at + 8, header[1], Ordering::Relaxed);
        let private = &mut self.slots[usize::from(slot)];
        private.chain = HEADER as u32 + payload.len + 1;
        private.segments = payload.segments;
        private.owner = Some(owner);
        private.at = position;
    }

    /// Total descriptor length, in bytes, of the current or last request of a slot.
    #[inline]
    pub(crate) fn chain(&self, slot: u32) -> u32 {
        self.slots.get(slot as usize).map_or(0, |slot| slot.chain)
    }

    /// Checks a used element against the requests in flight. `slot` and `len` are the device's claims; `id` is the device's id
    /// of the slot, for the error. Returns the number of data descriptors of the request.
    #[inline(always)]
    pub(crate) fn check(&self, slot: u32, id: u32, len: u32) -> Result<u16, RingError> {
        let private = self.slots.get(slot as usize).ok_or(RingError::Id(id))?;
        // Some back ends report wrong lengths (qemu's vhost-user-blk example counts bytes read as written). So only a length
        // beyond the whole chain is an error. Callers that need the written length compare it with their minimum.
        if len > private.chain {
            return Err(RingError::Len { len, chain: private.chain });
        }
        if private.owner.is_none() {
            return Err(RingError::Idle(id));
        }
        Ok(private.segments)
    }

    /// Removes the request from a slot that was [checked](Self::check).
    #[inline(always)]
    pub(crate) fn empty(&mut self, slot: u32, len: u32) -> Used<T> {
        let slot = slot as u16;
        let at = self.status_at(slot);
        let status = self.memory.load8(at, Ordering::Relaxed);
        // Reset it while the cache line is loaded, not when the slot is reused.
        self.memory.store8(at, UNWRITTEN, Ordering::Relaxed);
        self.free.push(slot);
        let owner = self.slots[usize::from(slot)].owner.take().expect("an emptied slot was in flight");
        Used { owner, status, len }
    }

    /// Writes a descriptor. The last 32 bits are flags and next in a split ring, id and flags in a packed ring.
    #[inline]
    pub(crate) fn descriptor(&self, at: usize, address: Iova, len: u32, low: u32, high: u32) {
        self.memory.store64(at, address.get(), Ordering::Relaxed);
        let rest = u64::from(len) | u64::from(low) << 32 | u64::from(high) << 48;
        self.memory.store64(at + 8, rest, Ordering::Relaxed);
    }

    /// Device addresses of a slot's header and status.
    pub(crate) fn ends(&self, slot: u16) -> (Iova, Iova) {
        let header = self.layout.slot(slot) + self.layout.header;
        (self.memory.iova(header), self.memory.iova(self.status_at(slot)))
    }

    /// The indirect table of a slot for `segments` data descriptors: its offset, its device address, and its length in bytes.
    #[inline]
    pub(crate) fn table(&self, slot: u16, segments: u16) -> (usize, Iova, u32) {
        let at = self.layout.slot(slot);
        (at, self.memory.iova(at), (u32::from(segments) + 2) * DESCRIPTOR as u32)
    }
}
