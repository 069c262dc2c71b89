//! [`Limits`]: resource limits and time limits of a server.

use std::{thread, time::Duration};

/// Resource limits and time limits of a server.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Limits {
    /// Threads that move data, at least 1. If a device has fewer queues, so many of them serve it.
    pub workers: usize,
    /// Payload memory of each worker for each export, in bytes, at least 1 MiB. Requests that do not fit wait, first come, first
    /// served. An eighth more is a reserve for small requests (up to a 64th of this) of clients that hold little. A READ or WRITE
    /// is at most as long as this, and at most 32 MiB.
    pub memory: usize,
    /// Depth of each device queue, in requests.
    pub depth: u16,
    /// Connections, in their handshake or served. When the limit is reached, the server disconnects a client that has been silent
    /// in its handshake for a second, and accepts the new one. If there is none, it closes the new connection at once. If the
    /// limit is 1, NBD_FLAG_CAN_MULTI_CONN is not advertised.
    pub connections: usize,
    /// Connections in their handshake. When the limit is reached, the server disconnects one: of the peer (address, user, virtual
    /// machine) with the most handshakes, the one that has been silent for longest.
    pub handshakes: usize,
    /// Longest time of a handshake, TLS included.
    pub handshake_timeout: Duration,
    /// Refuse clients that do not request block sizes (NBD_INFO_BLOCK_SIZE), such as the Linux kernel, if the smallest block is
    /// larger than a byte. Otherwise they are served, but each write of a part of a block briefly stops the other writes to the
    /// device.
    pub block_size_required: bool,
    /// Longest time that a client may need for a WRITE payload while others wait for the memory. The server measures its pace
    /// over a twelfth of this, and disconnects a client that is too slow. For its replies, a client has a tenth of this, measured
    /// over a 200th. The replies of a slower client lose their memory, and the server reads them again when the client continues.
    pub stall_timeout: Duration,
    /// Grace period of clients whose export is removed [softly](crate::Removal::Soft).
    pub farewell: Duration,
    /// The log gets a warning about a request that takes longer than this, with the state of its device: at most one per export in
    /// that time. `None`: never.
    pub slow: Option<Duration>,
    /// Longest busy-poll before a worker sleeps (adaptive). A worker busy-polls if its devices answer soon, or if its clients
    /// send few requests at a time in quick succession. Then it serves them without the wake-up time, which is tens of
    /// microseconds for each request. It yields the CPU to other threads that are ready to run. Zero: never.
    pub poll: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            workers: thread::available_parallelism().map_or(1, Into::into),
            memory: 64 << 20,
            depth: 256,
            connections: 4096,
            handshakes: 1024,
            block_size_required: false,
            handshake_timeout: Duration::from_secs(10),
            stall_timeout: Duration::from_secs(10),
            farewell: Duration::from_secs(10),
            slow: Some(Duration::from_secs(10)),
            poll: Duration::from_micros(100),
        }
    }
}
