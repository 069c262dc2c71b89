//! [`Options`]: user settings of a virtio-blk device.

use std::time::Duration;

use crate::transport::Format;

/// User settings of a virtio-blk device. There may be more fields later.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Options {
    /// Number of queues to use; `None`: all queues of the device. More than the device has is an error.
    pub queues: Option<u16>,
    /// Most descriptors in a ring: a power of two, 4 to 32768. With indirect descriptors, which most devices accept, this is
    /// also the most requests in flight on a queue. Without them a request takes at least three descriptors, so about a third
    /// fit.
    pub queue_size: u16,
    /// Ring format; `None`: packed if the device offers it, else split.
    pub ring: Option<Format>,
    /// Switches the device's write cache; the setting stays after close. `None`: unchanged. `Some` is an error if the device
    /// does not offer VIRTIO_BLK_F_CONFIG_WCE.
    pub write_cache: Option<WriteCache>,
    /// Refuses writes, even if the device allows them.
    pub read_only: bool,
    /// Longest time for a request before the device is declared dead; `None`: forever.
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

/// Write cache mode of a device (virtio 1.2, 5.2.6.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WriteCache {
    /// A write completes when it is in the cache. It is durable after a flush.
    Writeback,
    /// A write is durable when it completes.
    Writethrough,
}
