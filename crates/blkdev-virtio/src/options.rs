//! [`Options`]: what the user of a virtio-blk device can choose.

use std::time::Duration;

use crate::transport::Format;

/// What the user can choose.
#[derive(Clone, Debug)]
pub struct Options {
    /// Queues to use; `None`: as many as the device has. More than it has is an error.
    pub queues: Option<u16>,
    /// Descriptors in a ring, at most: a power of two, 4 to 32768. With indirect descriptors, which most devices take, this
    /// is the number of requests in flight; without it is about three times that.
    pub queue_size: u16,
    /// The format of the rings; `None`: packed where the device offers it.
    pub ring: Option<Format>,
    /// Switches the device's write cache, which then stays so; `None`: left as it is. Asking for it is an error where the
    /// device cannot be switched.
    pub write_cache: Option<WriteCache>,
    /// Never write, even if the device would allow it.
    pub read_only: bool,
    /// How long a request may take before the device is given up; `None`: for ever.
    pub timeout: Option<Duration>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            queues: None,
            queue_size: 256,
            ring: None,
            write_cache: None,
            read_only: false,
            timeout: Some(Duration::from_secs(30)),
        }
    }
}

/// What a device does with writes (virtio 1.2, 5.2.6.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WriteCache {
    /// They are complete when they are in the cache, and durable after a flush.
    Writeback,
    /// They are durable when they are complete.
    Writethrough,
}
