//! [`Registration`]: memory that a device knows, as a value to hold.

use std::{io, sync::Arc};

use crate::{device::Device, mem::Mapping};

/// Memory that is registered with a device until this is dropped. For direct users of a [`Device`]: a
/// [`Channel`](crate::Channel) registers its own memory.
///
/// Create it before the queues that use the memory, and drop it after them. Local variables are dropped in reverse order, so
/// the order of the declarations is enough:
///
/// ```
/// use std::sync::Arc;
///
/// use blkdev::{Device, Mapping, Registration, memory::Memory};
///
/// let device: Arc<dyn Device> = Arc::new(Memory::new(1 << 20));
/// let registration = Registration::new(&device, &Mapping::new(1 << 16)?)?;
/// let mut arena = registration.mapping().arenas(1).remove(0);
/// let mut queue = device.open_queue(1)?;
/// # drop((arena, queue));
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Debug)]
#[must_use = "the memory is unregistered when this is dropped"]
pub struct Registration {
    device: Arc<dyn Device>,
    mapping: Arc<Mapping>,
}

impl Registration {
    /// Registers memory with a device.
    ///
    /// # Errors
    /// Those of [`Device::register`].
    pub fn new(device: &Arc<dyn Device>, mapping: &Arc<Mapping>) -> io::Result<Self> {
        device.register(mapping)?;
        Ok(Self { device: Arc::clone(device), mapping: Arc::clone(mapping) })
    }

    /// The device has already registered `mapping` in place of this memory.
    pub(crate) fn follow(&mut self, mapping: &Arc<Mapping>) {
        self.mapping = Arc::clone(mapping);
    }

    /// The device.
    pub fn device(&self) -> &Arc<dyn Device> {
        &self.device
    }

    /// The memory.
    pub fn mapping(&self) -> &Arc<Mapping> {
        &self.mapping
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.device.unregister(&self.mapping);
    }
}
