//! [`Ring`]: the device's side of a virtqueue, in a single thread. It reads what the driver wrote, and writes what it is told to.

use std::os::fd::OwnedFd;

use blkdev::fuzz::Dma;
use blkdev_virtio::{Format, Ring as Announced};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;

/// A request that the device has received.
#[derive(Clone, Debug)]
pub(super) struct Chain {
    /// Head index, or buffer id.
    pub(super) id: u16,
    /// Address, length, whether the device writes.
    pub(super) parts: Vec<(u64, u32, bool)>,
    /// Descriptors of the ring that it takes.
    pub(super) count: u16,
    /// The client's request.
    pub(super) tag: Option<u64>,
}

impl Chain {
    /// Length of the parts that the device writes, in bytes. After a lie, the ring may hold anything.
    pub(super) fn written(&self) -> u32 {
        self.parts.iter().filter(|part| part.2).fold(0, |sum, part| sum.wrapping_add(part.1))
    }
}

/// A started virtqueue.
#[derive(Debug)]
pub(super) struct Ring {
    format: Format,
    pub(super) size: u16,
    pub(super) descriptors: u64,
    driver: u64,
    pub(super) device: u64,
    call: OwnedFd,
    event_idx: bool,
    /// Indices; in a packed ring positions, with the wrap counter in bit 15.
    next: u16,
    used: u16,
    /// Distance that `used` moved since the last notification.
    unsignalled: u16,
    /// Requests received and not answered.
    pub(super) held: Vec<Chain>,
}

impl Ring {
    pub(super) fn new(ring: &Announced<'_>, event_idx: bool) -> Self {
        let start = if ring.format == Format::Packed { 1 << 15 } else { 0 };
        Self {
            format: ring.format,
            size: ring.size,
            descriptors: ring.descriptors.get(),
            driver: ring.driver.get(),
            device: ring.device.get(),
            call: ring.call.try_clone_to_owned().expect("a descriptor"),
            event_idx,
            next: start,
            used: start,
            unsignalled: 0,
            held: Vec::new(),
        }
    }

    fn is_packed(&self) -> bool {
        self.format == Format::Packed
    }

    /// The next available chain. `Err`: what lies there is no chain.
    pub(super) fn take(&mut self, dma: &Dma) -> Result<Option<Chain>, String> {
        if self.is_packed() { self.take_packed(dma) } else { self.take_split(dma) }
    }

    fn take_split(&mut self, dma: &Dma) -> Result<Option<Chain>, String> {
        let available = load16(dma, self.driver + 2)?;
        let waiting = available.wrapping_sub(self.next);
        if waiting > self.size {
            return Err(format!("the available index is {waiting} ahead in a ring of {}", self.size));
        }
        if waiting == 0 {
            return Ok(None);
        }
        let id = load16(dma, self.driver + 4 + 2 * u64::from(self.next % self.size))?;
        self.next = self.next.wrapping_add(1);
        let (mut table, mut size, mut at) = (self.descriptors, u32::from(self.size), id);
        let (mut parts, mut count, mut in_ring) = (Vec::new(), 0, true);
        loop {
            if u32::from(at) >= size || parts.len() > usize::from(self.size) {
                return Err(format!("descriptor {at} of {size} in a chain of {}", parts.len()));
            }
            count += u16::from(in_ring);
            let (address, len, flags, next) = descriptor(dma, table.wrapping_add(16 * u64::from(at)))?;
            if flags & INDIRECT != 0 {
                if !in_ring || !parts.is_empty() || flags & NEXT != 0 || len % 16 != 0 {
                    return Err(format!("an indirect table of {len} bytes with flags {flags:#x}"));
                }
                (table, size, at, in_ring) = (address, len / 16, 0, false);
                continue;
            }
            parts.push((address, len, flags & WRITE != 0));
            if flags & NEXT == 0 {
                return Ok(Some(Chain { id, parts, count, tag: None }));
            }
            at = next;
        }
    }

    fn take_packed(&mut self, dma: &Dma) -> Result<Option<Chain>, String> {
        let (mut parts, mut count) = (Vec::new(), 0);
        loop {
            let (address, len, id, flags) = descriptor(dma, self.packed_at(self.next))?;
            let wrap = self.next >> 15 != 0;
            let is_available = (flags & AVAIL != 0) == wrap && (flags & USED != 0) != wrap;
            if !is_available && count == 0 {
                return Ok(None);
            }
            if !is_available || count == self.size {
                return Err(format!("a chain of {count} descriptors is available in part"));
            }
            count += 1;
            self.next = self.further(self.next, 1);
            if flags & INDIRECT != 0 {
                if !parts.is_empty() || flags & NEXT != 0 || len % 16 != 0 || len / 16 > 4096 {
                    return Err(format!("an indirect table of {len} bytes with flags {flags:#x}"));
                }
                for n in 0..len / 16 {
                    let (address, len, _, flags) = descriptor(dma, address.wrapping_add(16 * u64::from(n)))?;
                    parts.push((address, len, flags & WRITE != 0));
                }
            } else {
                parts.push((address, len, flags & WRITE != 0));
            }
            if flags & NEXT == 0 {
                return Ok(Some(Chain { id, parts, count, tag: None }));
            }
        }
    }

    fn packed_at(&self, place: u16) -> u64 {
        self.descriptors + 16 * u64::from(place & 0x7fff)
    }

    /// The position `by` descriptors further on in a packed ring.
    fn further(&self, place: u16, by: u16) -> u16 {
        let at = u32::from(place & 0x7fff) + u32::from(by);
        if at < u32::from(self.size) {
            place + by
        } else {
            (place ^ 0x8000) & 0x8000 | (at - u32::from(self.size)) as u16 & 0x7fff
        }
    }

    /// Writes a used element for `count` descriptors.
    pub(super) fn give(&mut self, dma: &Dma, id: u32, len: u32, count: u16, has_len: bool) {
        if self.is_packed() {
            let flags = if self.used >> 15 != 0 { AVAIL | USED } else { 0 } | if has_len { WRITE } else { 0 };
            let rest = u64::from(len) | u64::from(id as u16) << 32 | u64::from(flags) << 48;
            self.store(dma, self.packed_at(self.used) + 8, &rest.to_le_bytes());
            self.used = self.further(self.used, count);
            self.unsignalled = self.unsignalled.wrapping_add(count);
        } else {
            let entry = self.device + 4 + 8 * u64::from(self.used % self.size);
            self.store(dma, entry, &(u64::from(id) | u64::from(len) << 32).to_le_bytes());
            self.jump(dma, 1);
        }
    }

    /// Moves the used index of a split ring.
    pub(super) fn jump(&mut self, dma: &Dma, by: u16) {
        if !self.is_packed() {
            self.used = self.used.wrapping_add(by);
            self.unsignalled = self.unsignalled.wrapping_add(by);
            self.store(dma, self.device + 2, &self.used.to_le_bytes());
        }
    }

    fn store(&self, dma: &Dma, at: u64, bytes: &[u8]) {
        assert!(dma.write(at, bytes), "ring memory is registered while the queue runs");
    }

    /// Notifies the driver if it wants that (virtio 1.2, 2.7.7.2, 2.7.10, 2.8.10), or in any case.
    pub(super) fn notify(&mut self, dma: &Dma, always: bool) {
        let moved = std::mem::take(&mut self.unsignalled);
        let passes = |event: u16, now: u16| now.wrapping_sub(event).wrapping_sub(1) < moved;
        let wanted = match (self.is_packed(), self.event_idx) {
            (false, true) => {
                let event = load16(dma, self.driver + 4 + 2 * u64::from(self.size)).unwrap_or(0);
                passes(event, self.used)
            }
            (false, false) => load16(dma, self.driver).unwrap_or(0) & 1 == 0,
            (true, _) => {
                let [event, flags] = [0, 2].map(|at| load16(dma, self.driver + at).unwrap_or(0));
                match flags & 3 {
                    2 => {
                        let same_round = event >> 15 == self.used >> 15;
                        let event = (event & 0x7fff).wrapping_sub(if same_round { 0 } else { self.size });
                        passes(event, self.used & 0x7fff)
                    }
                    flags => flags == 0,
                }
            }
        };
        if always || wanted && moved > 0 {
            let _ = nix::unistd::write(&self.call, &1_u64.to_ne_bytes());
        }
    }

    /// Asks for a notification of the next request, or suppresses notifications with event index `event`.
    pub(super) fn want(&mut self, dma: &Dma, suppress: Option<u16>) {
        let event = suppress.unwrap_or(self.next);
        if self.is_packed() {
            let flags = match (suppress, self.event_idx) {
                (None, true) => 2,
                (None, false) => 0,
                (Some(event), _) => u32::from(event % 4),
            };
            self.store(dma, self.device, &(u32::from(event) | flags << 16).to_le_bytes());
        } else if self.event_idx {
            self.store(dma, self.device + 4 + 8 * u64::from(self.size), &event.to_le_bytes());
        } else {
            self.store(dma, self.device, &u16::from(suppress.is_some()).to_le_bytes());
        }
    }
}

fn load16(dma: &Dma, at: u64) -> Result<u16, String> {
    let mut bytes = [0; 2];
    if dma.read(at, &mut bytes) { Ok(u16::from_le_bytes(bytes)) } else { Err(format!("no memory at {at:#x}")) }
}

/// Address, length, and the last two fields of a descriptor.
fn descriptor(dma: &Dma, at: u64) -> Result<(u64, u32, u16, u16), String> {
    let mut bytes = [0; 16];
    if !dma.read(at, &mut bytes) {
        return Err(format!("no descriptor at {at:#x}"));
    }
    let bits = u128::from_le_bytes(bytes);
    Ok((bits as u64, (bits >> 64) as u32, (bits >> 96) as u16, (bits >> 112) as u16))
}
