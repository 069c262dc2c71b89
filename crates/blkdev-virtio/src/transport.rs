//! [`Transport`]: what the virtio-blk driver requires of a transport to its device.

use std::{io, os::fd::BorrowedFd, sync::Arc};

use blkdev::{Iova, Mapping, Peer};

use crate::{config::TRANSFER_MAX, liveness::Liveness};

/// A transport to a virtio device: feature bits, configuration, memory, queues. Control plane only; the data path uses
/// [`Doorbell`].
///
/// Dropping it resets or disconnects the device. Afterwards the device does not access this process's memory, except for a
/// [`peer`](Self::peer) that may live.
pub trait Transport: Send + Sync + 'static {
    /// Notifies the device about one started queue.
    type Doorbell: Doorbell;

    /// Whether queues can be started and stopped while the device runs. If `false`, all queues in use are started once, before
    /// [`run`](Self::run).
    const RESTARTS: bool;

    /// Longest transfer that the transport supports, in bytes: a power of two, at least 64 KiB.
    const TRANSFER_MAX: u32 = TRANSFER_MAX as u32;

    /// The driver's short name, `"vhost-user"`.
    fn driver(&self) -> &'static str;

    /// Where the device is: a path or an address. For people.
    fn target(&self) -> &str;

    /// The system's name of the device, or empty.
    fn name(&self) -> &str {
        ""
    }

    /// The liveness of the device, shared with every queue.
    fn life(&self) -> &Arc<Liveness>;

    /// The feature bits that the device offers (virtio 1.2, 2.2).
    fn features(&self) -> u64;

    /// Acknowledges the feature bits; the transport adds its own. Called once, before memory is registered and queues are
    /// started.
    ///
    /// # Errors
    /// The device refused the features.
    fn accept(&self, features: u64) -> io::Result<()>;

    /// Reads the device's configuration space from its start, at most `bytes.len()` bytes. Returns the number of bytes read.
    /// The offered features cover the first `needed` bytes; a device may have fewer or more.
    ///
    /// # Errors
    /// The device has no configuration space, did not answer, or is broken (DEVICE_NEEDS_RESET, a bus that reads as all ones).
    fn read_config(&self, bytes: &mut [u8], needed: usize) -> io::Result<usize>;

    /// Writes `bytes` to the device's configuration space at byte offset `at`.
    ///
    /// # Errors
    /// The device or the transport does not support it.
    fn write_config(&self, at: usize, bytes: &[u8]) -> io::Result<()>;

    /// An eventfd that becomes readable when the configuration may have changed; `None`: the device never reports changes.
    fn config_changes(&self) -> Option<BorrowedFd<'_>>;

    /// Most queues that can be started, independent of the configuration space.
    fn queues_max(&self) -> u16;

    /// Largest ring of queue `index`, in descriptors; `u16::MAX` if the transport does not know it.
    fn ring_max(&self, index: u16) -> u16;

    /// Registers memory with the device, and keeps it alive while the device may use it.
    ///
    /// # Errors
    /// The kernel or the peer refused; the text names the reason.
    fn register(&self, mapping: &Arc<Mapping>) -> io::Result<()>;

    /// Undoes [`register`](Self::register). Called when no queue uses the memory any more. Ignores memory that is not
    /// registered.
    ///
    /// # Errors
    /// The kernel or the peer refused. The memory then stays registered.
    fn unregister(&self, mapping: &Arc<Mapping>) -> io::Result<()>;

    /// Whether the name by which the device was opened now names another device.
    fn is_replaced(&self) -> bool {
        false
    }

    /// Whether another process maps registered memory, and is not trusted with reserved huge pages.
    fn shares_memory(&self) -> bool {
        false
    }

    /// The process that maps registered memory, if there is one.
    fn peer(&self) -> Option<Arc<Peer>> {
        None
    }

    /// Starts queue `index`. The device may use the ring when this returns; if queues cannot be [restarted](Self::RESTARTS),
    /// from [`run`](Self::run) on.
    ///
    /// # Errors
    /// The kernel or the peer refused.
    fn start_queue(&self, index: u16, ring: &Ring<'_>) -> io::Result<Self::Doorbell>;

    /// Starts the device after all setup (DRIVER_OK). Called once, before the first request.
    ///
    /// # Errors
    /// The device did not start.
    fn run(&self) -> io::Result<()>;

    /// Stops queue `index`. Afterwards the device accesses neither its ring nor the memory of its requests. Called only if
    /// queues can be [restarted](Self::RESTARTS).
    ///
    /// # Errors
    /// The device did not confirm the stop in bounded time. The caller must treat it as dead.
    fn stop_queue(&self, index: u16) -> io::Result<()>;

    /// Disconnects the device, as far as possible without its help. May be called more than once.
    fn cut_off(&self);
}

/// Notifies the device about one started queue (an "available buffer notification", virtio 1.2, 2.3).
pub trait Doorbell: Clone + Send + Sync + 'static {
    /// Notifies the device of new requests in the ring. Never waits, never fails.
    fn ring(&self);
}

/// The format of a virtqueue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Split: three areas, each written by one side (virtio 1.2, 2.7). Every device supports it.
    Split,
    /// Packed: one ring that both sides write (virtio 1.2, 2.8). It needs fewer cache lines, and fewer transfers over a bus.
    Packed,
}

/// A virtqueue for the device. All of it lies in registered memory and is zero. The device begins at index 0; in a packed ring
/// with both wrap counters 1.
#[derive(Clone, Copy, Debug)]
pub struct Ring<'a> {
    /// Format of the areas.
    pub format: Format,
    /// Number of descriptors: a power of two.
    pub size: u16,
    /// The descriptor table, or the packed ring itself.
    pub descriptors: Iova,
    /// The driver area: the available ring, or the driver's event suppression structure.
    pub driver: Iova,
    /// The device area: the used ring, or the device's event suppression structure.
    pub device: Iova,
    /// The call eventfd: the device writes to it after it has used buffers.
    pub call: BorrowedFd<'a>,
}
