//! [`PciDevice`] and [`Bar`]: all that a driver needs of a PCI device, be it real or a model.

use std::{fmt, io, os::fd::BorrowedFd, sync::Arc};

use blkdev::Mapping;

use crate::translation::Translation;

/// A PCI device that this process has to itself.
///
/// Dropped, it can reach no memory any more: bus mastering is off and the device reset before anything is unmapped.
pub trait PciDevice: fmt::Debug + Send + Sync {
    /// Where it is: `0000:01:00.0`. For people.
    fn address(&self) -> &str;

    /// Reads configuration space.
    ///
    /// # Errors
    /// What the kernel said.
    fn read_config(&self, at: u16, bytes: &mut [u8]) -> io::Result<()>;

    /// Writes configuration space, as far as the kernel lets us.
    ///
    /// # Errors
    /// What the kernel said.
    fn write_config(&self, at: u16, bytes: &[u8]) -> io::Result<()>;

    /// Maps one of the device's memory regions, 0 to 5. A 64-bit region has the index of its first half.
    ///
    /// # Errors
    /// There is none, or it cannot be mapped.
    fn bar(&self, index: u8) -> io::Result<Arc<dyn Bar>>;

    /// Lets the device read and write `mapping`, at the addresses that [`Mapping::iova`] tells, and keeps it alive. Mapping
    /// again what is mapped has no effect.
    ///
    /// # Errors
    /// The IOMMU cannot reach so far, has no entry left, or more memory would be locked than is allowed; the text says
    /// what to do.
    fn dma_map(&self, mapping: &Arc<Mapping>) -> io::Result<()>;

    /// Takes it away again. Does nothing when it is not mapped.
    ///
    /// # Errors
    /// What the kernel said.
    fn dma_unmap(&self, mapping: &Arc<Mapping>) -> io::Result<()>;

    /// How a driver gets from virtual addresses to those that the device wants. `None`, which is all but always: they are
    /// the same.
    fn translation(&self) -> Option<Arc<Translation>> {
        None
    }

    /// Lets the device start transfers by itself, or stops it.
    ///
    /// # Errors
    /// What the kernel said.
    fn set_bus_master(&self, on: bool) -> io::Result<()> {
        let mut command = [0; 2];
        self.read_config(COMMAND, &mut command)?;
        let before = u16::from_le_bytes(command);
        let bit = |bit: u16, on: bool| if on { before | bit } else { before & !bit };
        self.write_config(COMMAND, &bit(COMMAND_BUS_MASTER, on).to_le_bytes())
    }

    /// How many MSI-X vectors the device has; 0: none at all.
    fn vectors(&self) -> u16;

    /// Makes vector `n` write to the eventfd `fds[n]`, from the first on. Replaces what was set before; with no `fds` the
    /// device has no interrupts. The eventfds are kept open by the device.
    ///
    /// # Errors
    /// More than [`vectors`](Self::vectors), or what the kernel said.
    fn enable_vectors(&self, fds: &[BorrowedFd<'_>]) -> io::Result<()>;

    /// Makes one vector, of those enabled, write to another eventfd, or to none.
    ///
    /// # Errors
    /// What the kernel said.
    fn set_vector(&self, index: u16, fd: Option<BorrowedFd<'_>>) -> io::Result<()>;

    /// Asks for a write to this eventfd when the device is to be taken away, or has failed for good: let go of it soon
    /// then.
    ///
    /// # Errors
    /// What the kernel said.
    fn watch_removal(&self, fd: BorrowedFd<'_>) -> io::Result<()>;

    /// Resets the function. Its registers are as after power-on then; configuration space and vectors are kept.
    ///
    /// # Errors
    /// The device cannot be reset by itself (`Unsupported`), or what the kernel said.
    fn reset(&self) -> io::Result<()>;
}

/// A region of a device's registers. Every access is exactly one of its size, in program order, little-endian.
///
/// # Panics
/// All methods panic for accesses that are misaligned or outside of the region. A device that was taken away reads as all
/// ones.
#[expect(clippy::len_without_is_empty, reason = "never empty")]
pub trait Bar: fmt::Debug + Send + Sync {
    /// Length in bytes.
    fn len(&self) -> usize;

    /// Reads one byte.
    fn read8(&self, at: usize) -> u8;
    /// Reads 16 bits.
    fn read16(&self, at: usize) -> u16;
    /// Reads 32 bits.
    fn read32(&self, at: usize) -> u32;
    /// Reads 64 bits.
    fn read64(&self, at: usize) -> u64;

    /// Writes one byte, as [`write32`](Self::write32).
    fn write8(&self, at: usize, value: u8);
    /// Writes 16 bits, as [`write32`](Self::write32).
    fn write16(&self, at: usize, value: u16);
    /// Writes 32 bits. The device sees everything that this thread has stored to memory before, when it sees this.
    fn write32(&self, at: usize, value: u32);
    /// Writes 64 bits, as [`write32`](Self::write32).
    fn write64(&self, at: usize, value: u64);
}

/// The command register (PCI 3.0, 6.2.2).
pub(crate) const COMMAND: u16 = 4;
/// Memory regions answer.
pub(crate) const COMMAND_MEMORY: u16 = 1 << 1;
/// The device may start transfers.
pub(crate) const COMMAND_BUS_MASTER: u16 = 1 << 2;
/// No interrupts by wire.
pub(crate) const COMMAND_INTX_OFF: u16 = 1 << 10;
