//! [`PciDevice`] and [`Bar`]: the interface between a driver and a PCI device, real or a model.

use std::{fmt, io, os::fd::BorrowedFd, sync::Arc};

use blkdev::Mapping;

use crate::translation::Translation;

/// A PCI device in exclusive use by this process.
///
/// After drop it cannot access memory: bus mastering is switched off and the device is reset before anything is unmapped.
pub trait PciDevice: fmt::Debug + Send + Sync {
    /// PCI address, `0000:01:00.0`. For people.
    fn address(&self) -> &str;

    /// Reads `bytes.len()` bytes of configuration space at byte offset `at`.
    ///
    /// # Errors
    /// The kernel refused.
    fn read_config(&self, at: u16, bytes: &mut [u8]) -> io::Result<()>;

    /// Writes configuration space at byte offset `at`. The kernel may ignore or virtualise some registers.
    ///
    /// # Errors
    /// The kernel refused.
    fn write_config(&self, at: u16, bytes: &[u8]) -> io::Result<()>;

    /// Maps a memory region (BAR) of the device, 0 to 5. A 64-bit region has the index of its first half.
    ///
    /// # Errors
    /// The device has no such region, or it cannot be mapped.
    fn bar(&self, index: u8) -> io::Result<Arc<dyn Bar>>;

    /// Gives the device access to `mapping`, at its [`Mapping::iova`], and keeps it alive. No effect if it is mapped already.
    ///
    /// # Errors
    /// The address is outside of the IOMMU's range, no IOMMU entry is left, or the limit of locked memory would be exceeded.
    /// The text names the remedy.
    fn dma_map(&self, mapping: &Arc<Mapping>) -> io::Result<()>;

    /// Undoes [`dma_map`](Self::dma_map). No effect if it is not mapped.
    ///
    /// # Errors
    /// The kernel refused.
    fn dma_unmap(&self, mapping: &Arc<Mapping>) -> io::Result<()>;

    /// Translates virtual addresses to the addresses that the device uses. `None`: they are equal, as with every IOMMU.
    fn translation(&self) -> Option<Arc<Translation>> {
        None
    }

    /// Lets the device start transfers (bus mastering), or forbids it.
    ///
    /// # Errors
    /// The kernel refused.
    fn set_bus_master(&self, on: bool) -> io::Result<()> {
        let mut command = [0; 2];
        self.read_config(COMMAND, &mut command)?;
        let before = u16::from_le_bytes(command);
        let bit = |bit: u16, on: bool| if on { before | bit } else { before & !bit };
        self.write_config(COMMAND, &bit(COMMAND_BUS_MASTER, on).to_le_bytes())
    }

    /// Number of MSI-X vectors of the device; 0: it has no MSI-X.
    fn vectors(&self) -> u16;

    /// Makes vector `n` write to the eventfd `fds[n]`. Replaces the earlier setting; an empty `fds` disables all interrupts.
    /// The device keeps the eventfds open.
    ///
    /// # Errors
    /// There are more `fds` than [`vectors`](Self::vectors), or the kernel refused.
    fn enable_vectors(&self, fds: &[BorrowedFd<'_>]) -> io::Result<()>;

    /// Makes one enabled vector write to another eventfd, or to none.
    ///
    /// # Errors
    /// The kernel refused.
    fn set_vector(&self, index: u16, fd: Option<BorrowedFd<'_>>) -> io::Result<()>;

    /// Registers an eventfd, to be written when the device is about to be removed or has failed permanently. The process should
    /// then close the device soon.
    ///
    /// # Errors
    /// The kernel refused.
    fn watch_removal(&self, fd: BorrowedFd<'_>) -> io::Result<()>;

    /// Resets the function. Afterwards its registers are as after power-on; configuration space and vectors are kept.
    ///
    /// # Errors
    /// The device does not support a function reset (`Unsupported`), or the kernel refused.
    fn reset(&self) -> io::Result<()>;
}

/// A region of device registers. Each access is a single access of its size, in program order, little-endian. Reads of a
/// removed device return all ones.
///
/// # Panics
/// All methods panic if the access is misaligned or outside of the region.
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
    /// Writes 32 bits. The device sees all earlier stores of this thread to memory before this write.
    fn write32(&self, at: usize, value: u32);
    /// Writes 64 bits, as [`write32`](Self::write32).
    fn write64(&self, at: usize, value: u64);
}

/// The command register (PCI 3.0, 6.2.2).
pub(crate) const COMMAND: u16 = 4;
/// Enables access to memory regions.
pub(crate) const COMMAND_MEMORY: u16 = 1 << 1;
/// Enables bus mastering: the device may start transfers.
pub(crate) const COMMAND_BUS_MASTER: u16 = 1 << 2;
/// Disables legacy (INTx) interrupts.
pub(crate) const COMMAND_INTX_OFF: u16 = 1 << 10;
