//! [`Options`]: what the user of an NVMe controller can choose.

use std::time::Duration;

/// What the user can choose.
#[derive(Clone, Debug)]
pub struct Options {
    /// The namespace; `None`: the first that is active.
    pub nsid: Option<u32>,
    /// Never write, even if the device would allow it.
    pub read_only: bool,
    /// I/O queue pairs to use; `None`: as many as the controller has, up to 64. More than it has is an error.
    pub queues: Option<u16>,
    /// Places in each I/O queue, 2 to 1024; the controller may have fewer. One less can be in use.
    pub queue_size: u16,
    /// How long a queue with commands may go without completing any before the device is declared dead; `None`: forever. Before
    /// that commands are aborted, and then the controller is reset. See the [crate](crate) on when.
    pub timeout: Option<Duration>,
}

impl Default for Options {
    fn default() -> Self {
        Self { nsid: None, read_only: false, queues: None, queue_size: 256, timeout: Some(Duration::from_secs(30)) }
    }
}
