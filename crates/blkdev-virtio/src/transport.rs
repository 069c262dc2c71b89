//! [`Transport`]: what a virtio-blk driver needs of the way to its device.

use std::{io, os::fd::BorrowedFd, sync::Arc};

use blkdev::{Iova, Mapping};

use crate::Life;

/// The way to a device: feature bits, configuration, memory, queues. Cold; doorbells are a type of their own.
pub trait Transport: Send + Sync + 'static {
    /// Rings the device for one started queue.
    type Doorbell: Doorbell;

    /// The driver's short name, `"vhost-user"`.
    fn driver(&self) -> &'static str;

    /// Where the device is: a path, an address. For people.
    fn target(&self) -> &str;

    /// Whether the device still lives. Shared with every queue.
    fn life(&self) -> &Arc<Life>;

    /// The feature bits that the device offers (virtio 1.2, 2.2).
    fn features(&self) -> u64;

    /// Settles the feature bits. Called once, before memory is registered and queues are started.
    ///
    /// # Errors
    /// The device refused them.
    fn accept(&self, features: u64) -> io::Result<()>;

    /// Reads the device's configuration space from its start, at most `bytes.len()` bytes of it, and tells how many there
    /// were. The first `needed` are those that the offered features speak of; a device may know of fewer, or of more.
    ///
    /// # Errors
    /// The device has no configuration to read, or did not answer.
    fn read_config(&self, bytes: &mut [u8], needed: usize) -> io::Result<usize>;

    /// How many queues can be started, whatever the configuration space says.
    fn queues_max(&self) -> u16;

    /// The largest ring that queue `index` can have, in descriptors; `u16::MAX` where the transport cannot tell.
    fn ring_max(&self, index: u16) -> u16;

    /// Makes memory known to the device, and keeps it alive for as long as the device may use it.
    ///
    /// # Errors
    /// What the kernel or the peer refused.
    fn register(&self, mapping: &Arc<Mapping>) -> io::Result<()>;

    /// Starts queue `index`: from the return on, the device works on the ring.
    ///
    /// # Errors
    /// What the kernel or the peer refused.
    fn start_queue(&self, index: u16, ring: &Ring<'_>) -> io::Result<Self::Doorbell>;

    /// Stops queue `index`: from the return on, the device touches neither its ring nor the memory of its requests.
    ///
    /// # Errors
    /// The device did not confirm, in bounded time, that it has stopped. It has to be taken for dead then.
    fn stop_queue(&self, index: u16) -> io::Result<()>;

    /// Cuts the device off, as far as that can be done without its help. May be called more than once.
    fn cut_off(&self);
}

/// The device's end of a started queue, as far as the driver pulls at it.
pub trait Doorbell: Send {
    /// Tells the device to look at the available ring. Neither waits nor fails.
    fn ring(&self);
}

/// A split virtqueue as the device has to know it (virtio 1.2, 2.7). All of it lies in registered memory, and is zero.
#[derive(Clone, Copy, Debug)]
pub struct Ring<'a> {
    /// Descriptors: a power of two.
    pub size: u16,
    /// The descriptor table.
    pub descriptors: Iova,
    /// The available ring.
    pub available: Iova,
    /// The used ring.
    pub used: Iova,
    /// An eventfd for the device to write to when it has used something.
    pub call: BorrowedFd<'a>,
}
