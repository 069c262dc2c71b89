//! [`Options`]: user settings of an NVMe controller.

use std::time::Duration;

/// User settings of an NVMe controller. There may be more fields later.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Options {
    /// Namespace identifier; `None`: the first active namespace.
    pub nsid: Option<u32>,
    /// Refuses writes, even if the device allows them.
    pub read_only: bool,
    /// Number of I/O queue pairs; `None`: all of the controller, at most 64. More than the controller has is an error.
    pub queues: Option<u16>,
    /// Entries of each I/O queue, 2 to 1024; the controller may allow fewer. One entry less can be in use.
    pub queue_size: u16,
    /// Longest time without a completion, for a queue with commands in flight, before the device is declared dead; `None`:
    /// forever. Before that the driver aborts commands and then resets the controller; see the [crate](crate).
    pub timeout: Option<Duration>,
}

impl Default for Options {
    fn default() -> Self {
        Self { nsid: None, read_only: false, queues: None, queue_size: 256, timeout: Some(Duration::from_secs(30)) }
    }
}
