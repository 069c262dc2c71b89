//! [`Registers`]: the registers of a controller, and the state that they report.

use std::{io, sync::Arc, time::Duration};

use blkdev::wake::{now, sleep};
use blkdev_vfio::{Bar, PciDevice};

use crate::{limits::unusable, pair::Bells};

/// The controller's registers (base, 3.1.3).
#[derive(Debug)]
pub(crate) struct Registers {
    pub(crate) bar: Arc<dyn Bar>,
    pub(crate) cap: u64,
}

const CAP: usize = 0x00;
const VS: usize = 0x08;
const CC: usize = 0x14;
const CSTS: usize = 0x1c;
const AQA: usize = 0x24;
const ASQ: usize = 0x28;
const ACQ: usize = 0x30;

const CC_ENABLE: u32 = 1;
const CC_SHUTDOWN: u32 = 3 << 14;
const CC_SHUTDOWN_NORMAL: u32 = 1 << 14;

const CSTS_READY: u32 = 1;
const CSTS_FATAL: u32 = 2;
const CSTS_SHUTDOWN: u32 = 3 << 2;
const CSTS_SHUTDOWN_DONE: u32 = 2 << 2;

/// A failure that a reset cannot repair.
pub(crate) const TAKEN_AWAY: &str = "its registers read as all ones: it was removed";

/// Larger memory pages gain nothing, and a queue takes several pages.
const PAGE_SHIFT_MAX: u32 = 16;

/// Registers of a removed device read as this.
const NOTHING: u32 = u32::MAX;

impl Registers {
    pub(crate) fn new(bar: Arc<dyn Bar>) -> io::Result<Self> {
        if bar.len() < Bells::end(1, 4) {
            return Err(unusable("it has too few registers for NVMe"));
        }
        // In halves, because some controllers do not support 64-bit accesses.
        let cap = u64::from(bar.read32(CAP)) | u64::from(bar.read32(CAP + 4)) << 32;
        if cap == u64::MAX {
            return Err(io::Error::new(io::ErrorKind::NotConnected, "its registers read as all ones"));
        }
        let registers = Self { bar, cap };
        registers.check()?;
        Ok(registers)
    }

    /// Version of the NVMe specification (VS).
    pub(crate) fn version(&self) -> u32 {
        self.bar.read32(VS)
    }

    /// # Errors
    /// The driver does not support the controller's capabilities.
    pub(crate) fn check(&self) -> io::Result<()> {
        if self.cap >> 37 & 1 == 0 {
            return Err(unusable("it does not support the NVM command set (CAP.CSS)"));
        }
        if self.page_shift() > PAGE_SHIFT_MAX {
            let kib = 1u64 << (self.page_shift() - 10);
            return Err(unusable(format!(
                "its smallest memory page has {kib} KiB, at most 64 are supported (CAP.MPSMIN)"
            )));
        }
        if self.queue_size() < 2 {
            return Err(unusable("its queues have a single entry, but at least 2 are needed (CAP.MQES)"));
        }
        Ok(())
    }

    /// Number of I/O queue pairs that have doorbells.
    pub(crate) fn pairs(&self) -> u16 {
        let (len, stride) = (self.bar.len(), self.stride());
        let room = len.saturating_sub(Bells::end(1, stride)) / (2 * stride);
        u16::try_from(room).unwrap_or(u16::MAX)
    }

    /// Entries of the largest queue.
    pub(crate) fn queue_size(&self) -> u32 {
        (self.cap as u32 & 0xffff) + 1
    }

    /// Longest time to become ready, or not ready (CAP.TO).
    pub(crate) fn timeout(&self) -> Duration {
        Duration::from_millis(500) * (self.cap >> 24 & 0xff).max(2) as u32
    }

    /// Distance between doorbells in bytes, 4 to 128 Ki.
    pub(crate) fn stride(&self) -> usize {
        4 << (self.cap >> 32 & 0xf)
    }

    /// The smallest memory page, as a power of two: 12 to 27.
    pub(crate) fn page_shift(&self) -> u32 {
        12 + (self.cap >> 48 & 0xf) as u32
    }

    pub(crate) fn write64(&self, at: usize, value: u64) {
        self.bar.write32(at, value as u32);
        self.bar.write32(at + 4, (value >> 32) as u32);
    }

    /// Why the controller cannot work any more; `None`: it reports no failure.
    pub(crate) fn trouble(&self) -> Option<&'static str> {
        match self.bar.read32(CSTS) {
            NOTHING => Some(TAKEN_AWAY),
            status if status & CSTS_FATAL != 0 => Some("it reports a fatal error (CSTS.CFS)"),
            _ => None,
        }
    }

    /// Whether it was enabled, and has stopped on its own.
    pub(crate) fn has_stopped(&self) -> bool {
        self.bar.read32(CSTS) & CSTS_READY == 0
    }

    /// Waits until the status (CSTS) satisfies `good`.
    pub(crate) fn wait(&self, time: Duration, what: &str, good: impl Fn(u32) -> bool) -> io::Result<()> {
        let deadline = now() + time;
        loop {
            let status = self.bar.read32(CSTS);
            if status == NOTHING {
                return Err(io::Error::new(io::ErrorKind::NotConnected, "its registers read as all ones"));
            }
            if good(status) {
                return Ok(());
            }
            if now() >= deadline {
                let text = format!("it is not {what} within {time:?} (CSTS {status:#x})");
                return Err(io::Error::new(io::ErrorKind::TimedOut, text));
            }
            sleep(Duration::from_millis(1));
        }
    }

    /// Disables the controller: afterwards it does not access memory.
    pub(crate) fn disable(&self) -> io::Result<()> {
        let config = self.bar.read32(CC);
        if config != NOTHING && config & CC_ENABLE != 0 {
            self.bar.write32(CC, config & !(CC_ENABLE | CC_SHUTDOWN));
        }
        self.wait(self.timeout(), "disabled", |status| status & CSTS_READY == 0)
    }

    pub(crate) fn enable(&self, page_shift: u32, size: u16, submission: u64, completion: u64) -> io::Result<()> {
        self.bar.write32(AQA, u32::from(size - 1) << 16 | u32::from(size - 1));
        self.write64(ASQ, submission);
        self.write64(ACQ, completion);
        // Entries of 64 and 16 bytes, the NVM command set, round robin arbitration.
        self.bar.write32(CC, 4 << 20 | 6 << 16 | (page_shift - 12) << 7 | CC_ENABLE);
        self.wait(self.timeout(), "ready", |status| status & (CSTS_READY | CSTS_FATAL) != 0)?;
        self.trouble().map_or(Ok(()), |why| Err(io::Error::new(io::ErrorKind::NotConnected, why)))
    }

    pub(crate) fn shut_down(&self, time: Duration) -> io::Result<()> {
        let config = self.bar.read32(CC);
        self.bar.write32(CC, config & !CC_SHUTDOWN | CC_SHUTDOWN_NORMAL);
        self.wait(time, "shut down", |status| status & CSTS_SHUTDOWN == CSTS_SHUTDOWN_DONE)
    }
}

/// Stops a controller of unknown state, by a function reset if necessary.
pub(crate) fn stop(pci: &dyn PciDevice, registers: &Registers) -> io::Result<()> {
    if registers.disable().is_err() || registers.trouble().is_some() {
        pci.reset()?;
        registers.disable()?;
    }
    Ok(())
}
