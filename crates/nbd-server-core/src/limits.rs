//! [`Limits`]: what bounds a server.

use std::{thread, time::Duration};

/// What bounds the server.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Limits {
    /// Threads that move data; a device with fewer queues is served by as many.
    pub workers: usize,
    /// Payload memory of each worker for each export, in bytes, at least 1 MiB. Requests that do not fit wait, first come,
    /// first served. An eighth more is a reserve for the small requests of clients that hold little: at most a 64th of this.
    /// A READ or WRITE is at most as long as this, or 32 MiB.
    pub memory: usize,
    /// Requests in a device's queue.
    pub depth: u16,
    /// Connections, in their handshake or served. For one more, a client that has been silent in the handshake for a second
    /// is cut off; if there is none, the new one is closed at once. If it is 1, multi-conn is not advertised.
    pub connections: usize,
    /// Connections in their handshake. For one more, the one of the most crowded peer (address, user, virtual machine) that
    /// has been silent for longest is cut off.
    pub handshakes: usize,
    /// How long a handshake may take.
    pub handshake_timeout: Duration,
    /// Refuse clients that do not ask for block sizes, such as the Linux kernel, where blocks are larger than a byte. They
    /// are served otherwise, but each write of a part of a block stops the other writes of the device for a moment.
    pub block_size_required: bool,
    /// The time that a client has, while others wait for the memory, to send a payload that it has announced. A client whose
    /// pace, measured over a fifth of this, is too slow for that is cut off. To take its replies it has a tenth of this; if
    /// it is slower, measured over a 200th of this, the replies lose their memory, and are read again when it takes them.
    pub stall_timeout: Duration,
    /// How long the clients of an export that is removed [softly](crate::Removal::Soft) have to say goodbye.
    pub farewell: Duration,
    /// For how long, at most, a worker without anything to do looks again before it sleeps. It does so for devices that
    /// answer soon, and for clients that have few requests at a time but the next one soon: these are served without the
    /// time that waking up takes, tens of microseconds for each request. The processor is left to whoever else wants it.
    /// Zero: never.
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
            poll: Duration::from_micros(100),
        }
    }
}
