//! [`Transport`]: what a virtio-blk driver needs of the way to its device.

use std::{io, os::fd::BorrowedFd, sync::Arc};

use blkdev::{Iova, Mapping};

use crate::{config::TRANSFER_MAX, liveness::Liveness};

/// The way to a device: feature bits, configuration, memory, queues. Cold; doorbells are a type of their own.
///
/// Dropping it resets the device, or leaves it in whatever way there is: afterwards the device touches no memory of ours.
pub trait Transport: Send + Sync + 'static {
    /// Rings the device for one started queue.
    type Doorbell: Doorbell;

    /// Whether a queue can be started and stopped while the device works. `false`: all queues that are used are started,
    /// once, before [`run`](Self::run).
    const RESTARTS: bool;

    /// The longest transfer that the way to the device takes, in bytes: at least 64 KiB, a power of two.
    const TRANSFER_MAX: u32 = TRANSFER_MAX as u32;

    /// The driver's short name, `"vhost-user"`.
    fn driver(&self) -> &'static str;

    /// Where the device is: a path, an address. For people.
    fn target(&self) -> &str;

    /// Whether the device still lives. Shared with every queue.
    fn life(&self) -> &Arc<Liveness>;

    /// The feature bits that the device offers (virtio 1.2, 2.2).
    fn features(&self) -> u64;

    /// Settles the feature bits; the transport adds those that are its own business. Called once, before memory is
    /// registered and queues are started.
    ///
    /// # Errors
    /// The device refused them.
    fn accept(&self, features: u64) -> io::Result<()>;

    /// Reads the device's configuration space from its start, at most `bytes.len()` bytes of it, and tells how many there
    /// were. The first `needed` are those that the offered features speak of; a device may know of fewer, or of more.
    ///
    /// # Errors
    /// The device has no configuration to read, did not answer, or has broken down (DEVICE_NEEDS_RESET, a bus that reads as
    /// ones).
    fn read_config(&self, bytes: &mut [u8], needed: usize) -> io::Result<usize>;

    /// Writes to the device's configuration space, from byte `at` on.
    ///
    /// # Errors
    /// The device, or what is in between, does not take it.
    fn write_config(&self, at: usize, bytes: &[u8]) -> io::Result<()>;

    /// An eventfd that is readable when the configuration may have changed; `None`: this device never tells.
    fn config_changes(&self) -> Option<BorrowedFd<'_>>;

    /// How many queues can be started, whatever the configuration space says.
    fn queues_max(&self) -> u16;

    /// The largest ring that queue `index` can have, in descriptors; `u16::MAX` where the transport cannot tell.
    fn ring_max(&self, index: u16) -> u16;

    /// Makes memory known to the device, and keeps it alive for as long as the device may use it.
    ///
    /// # Errors
    /// What the kernel or the peer refused.
    fn register(&self, mapping: &Arc<Mapping>) -> io::Result<()>;

    /// Undoes [`register`](Self::register), when no queue uses the memory any more. Memory that is not registered is ignored.
    ///
    /// # Errors
    /// What the kernel or the peer refused. The memory then stays registered.
    fn unregister(&self, mapping: &Arc<Mapping>) -> io::Result<()>;

    /// Whether the name that the device was opened by now stands for another device.
    fn is_replaced(&self) -> bool {
        false
    }

    /// Whether another process maps registered memory, and is not trusted with reserved huge pages.
    fn shares_memory(&self) -> bool {
        false
    }

    /// Starts queue `index`: the device works on the ring from the return on, or from [`run`](Self::run) on where queues
    /// cannot be [restarted](Self::RESTARTS).
    ///
    /// # Errors
    /// What the kernel or the peer refused.
    fn start_queue(&self, index: u16, ring: &Ring<'_>) -> io::Result<Self::Doorbell>;

    /// Everything is set up: the device begins to work. Called once, before the first request.
    ///
    /// # Errors
    /// The device did not come up.
    fn run(&self) -> io::Result<()>;

    /// Stops queue `index`: from the return on, the device touches neither its ring nor the memory of its requests. Only
    /// where queues can be [restarted](Self::RESTARTS).
    ///
    /// # Errors
    /// The device did not confirm, in bounded time, that it has stopped. It has to be taken for dead then.
    fn stop_queue(&self, index: u16) -> io::Result<()>;

    /// Cuts the device off, as far as that can be done without its help. May be called more than once.
    fn cut_off(&self);
}

/// The device's end of a started queue, as far as the driver pulls at it.
pub trait Doorbell: Clone + Send + Sync + 'static {
    /// Tells the device to look at the ring. Neither waits nor fails.
    fn ring(&self);
}

/// The format of a virtqueue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Three areas, each written by one side (virtio 1.2, 2.7). Every device has it.
    Split,
    /// One ring that both sides write (2.8): fewer cache lines, and fewer transfers over a bus.
    Packed,
}

/// A virtqueue as the device has to know it. All of it lies in registered memory, and is zero; the device begins at
/// index 0, of a packed ring with both wrap counters 1.
#[derive(Clone, Copy, Debug)]
pub struct Ring<'a> {
    /// Which areas these are.
    pub format: Format,
    /// Descriptors: a power of two.
    pub size: u16,
    /// The descriptor table, or the packed ring itself.
    pub descriptors: Iova,
    /// The driver area: the available ring, or the driver's event suppression structure.
    pub driver: Iova,
    /// The device area: the used ring, or the device's event suppression structure.
    pub device: Iova,
    /// An eventfd for the device to write to when it has used something.
    pub call: BorrowedFd<'a>,
}
