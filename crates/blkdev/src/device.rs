//! The two traits a driver implements, and the plain data that passes between it and [`Channel`](crate::Channel).

use std::{fmt, io, os::fd::BorrowedFd, sync::Arc, time::Duration};

use crate::{arena::Buf, error::Error, extent::Extent, mem::Mapping, peer::Peer, wake::Wake};

/// Control plane of a block device: shared between threads, cold.
pub trait Device: Send + Sync {
    /// Limits and capabilities, as they were at open. All that is claimed here works.
    fn info(&self) -> &Info;

    /// Size in bytes, a multiple of [`Info::block_size`]. May change while the device is open.
    fn capacity(&self) -> u64;

    /// Registers memory with the device: a DMA mapping, a memory slot, an IOTLB entry, or nothing at all. Every `Buf` that is
    /// pushed to a queue of this device lies in a registered mapping. The device keeps the mapping alive. A
    /// [`Registration`](crate::Registration) unregisters it when dropped.
    ///
    /// # Errors
    /// The kernel or the peer refused; the text names the reason and the remedy.
    fn register(&self, mapping: &Arc<Mapping>) -> io::Result<()>;

    /// Undoes [`register`](Self::register), and frees what that took. Called when every queue that used the memory is
    /// closed. Memory that was never registered is ignored.
    fn unregister(&self, mapping: &Arc<Mapping>) {
        let _ = mapping;
    }

    /// Whether the device, or the process behind it, may pin the physical pages of registered memory, as an IOMMU does. Then
    /// free pages must stay in place; otherwise idle pages can be returned to the system.
    fn pins_memory(&self) -> bool {
        true
    }

    /// Whether another process maps registered memory, and is not trusted with reserved huge pages: see [`Mapping::shared`].
    fn shares_memory(&self) -> bool {
        false
    }

    /// Updates the capacity of a device that does not report changes on its own. Returns within a fraction of a second,
    /// whatever the device does.
    fn refresh(&self) {}

    /// The process that shares registered memory, if there is one: see [`Peer`].
    fn peer(&self) -> Option<Arc<Peer>> {
        None
    }

    /// Whether it works.
    fn state(&self) -> State {
        State::Working
    }

    /// How often it was opened again after it had died.
    fn reconnects(&self) -> u64 {
        0
    }

    /// Driver-specific properties for display: names, and values with their units.
    fn details(&self) -> Vec<(&'static str, String)> {
        Vec::new()
    }

    /// Rings `bell` when the device dies, if it can tell without a request. A device that is [opened again](crate::reconnect) also
    /// rings it at each step until it is back. After a ring, reap queues without requests in flight: only then do they leave the
    /// device that has died, which some drivers must close before they can open it again.
    fn ring_at_death(&self, bell: &Arc<Wake>) {
        let _ = bell;
    }

    /// Whether the name by which the device was opened now names another device.
    fn is_replaced(&self) -> bool {
        false
    }

    /// Opens a queue for `depth` requests. The driver may offer fewer; see [`Info::depth_max`]. At most [`Info::queues_max`]
    /// queues can be open at a time.
    ///
    /// # Errors
    /// No queue is left ([`ResourceBusy`](io::ErrorKind::ResourceBusy)), or the kernel or the peer refused.
    fn open_queue(&self, depth: u16) -> io::Result<Box<dyn Queue>>;
}

/// Whether a device works. There may be more states later.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum State {
    /// It carries out requests.
    Working,
    /// The connection to it broke, and is being made again. Requests wait, or fail after a time.
    Reconnecting,
    /// Every request ends with [`Error::Gone`].
    Dead,
}

/// Data plane: one owner, hot. No method waits for the device, allocates, or calls back. A queue can move to another thread,
/// but only one thread uses it at a time.
///
/// Dropping a queue drains it first. If that takes too long, the memory that the device may still touch is leaked on purpose
/// ([`Buf::abandon`]).
pub trait Queue: Send {
    /// Takes a request. The driver may wait for [`kick`](Self::kick) before it notifies the device.
    ///
    /// The driver may rely on this ([`Channel`](crate::Channel) ensures it): the range lies within the capacity,
    /// offset and length are non-zero multiples of [`Info::block_size`] (`Status` and `Prefetch` included), `Buf`s are as
    /// long as the request and at most [`Info::transfer_max`], `Zero` and `Discard` are at most `zero_max` and
    /// `discard_max`, and no operation is asked for that [`Caps`] denies.
    ///
    /// # Errors
    /// The queue is full: the request comes back with its buffer.
    fn push(&mut self, request: Request) -> Result<(), Request>;

    /// Rings the doorbell for all requests since the last one, unless the device needs no notification. Failures show as
    /// completions.
    fn kick(&mut self);

    /// Appends the completions since the last call. A dead device completes everything with [`Error::Gone`].
    fn reap(&mut self, done: &mut Vec<Completion>);

    /// Readable when the queue was [armed](Self::arm) and something has completed. `None`: the queue can only be polled.
    ///
    /// The descriptor stays the same until the queue is dropped. It works level- and edge-triggered, in poll, epoll, or an
    /// async runtime such as tokio's `AsyncFd`. It may be readable without need. The owner never reads from it: `arm` and
    /// `reap` do that.
    fn wake_fd(&self) -> Option<BorrowedFd<'_>>;

    /// Requests a wake-up at the next completion. `false`: something may have completed already; call `reap` first.
    fn arm(&mut self) -> bool;

    /// Declares the device dead. The next `reap`s complete all requests in flight with [`Error::Gone`]; later requests end the
    /// same way. Memory that the device may still touch is [abandoned](Buf::abandon): memory that it may write to, and memory
    /// that it may read, because a late write must not put another request's data on the disk.
    fn give_up(&mut self);

    /// Whether the device is dead: every request ends with [`Error::Gone`].
    fn is_dead(&self) -> bool {
        false
    }

    /// As [`reap`](Self::reap), but appends the requests in flight of a dead device to `unfinished`, in the order in which they
    /// were pushed and with their memory. The device may still access that memory until it is closed, and a
    /// [peer](Device::peer) until it ends.
    fn reap_unfinished(&mut self, done: &mut Vec<Completion>, unfinished: &mut Vec<Request>) {
        let _ = unfinished;
        self.reap(done);
    }

    /// The device has completed nothing for its time-out. Returns whether the queue takes care of the requests in flight, so that
    /// their owner must go on waiting.
    fn recover(&mut self) -> bool {
        false
    }

    /// The owner is short of memory. Returns whether the queue holds memory of requests that have completed, and will return it
    /// soon: then the queue must be armed and reaped, even if nothing is in flight.
    fn relieve(&mut self) -> bool {
        false
    }

    /// Whether it still does what [`relieve`](Self::relieve) has promised.
    fn relieves(&self) -> bool {
        false
    }

    /// The state of its rings for log messages, in a few words.
    fn describe(&self) -> String {
        String::new()
    }

    /// How often the device has lost changes that had completed. A user from before the loss must not go on.
    fn losses(&self) -> u32 {
        0
    }
}

/// A request to a queue. The tag is its owner's, and comes back in the [`Completion`].
#[derive(Debug)]
pub struct Request {
    /// Chosen by the caller; the driver only returns it.
    pub tag: u64,
    /// The operation, with its memory.
    pub op: Op,
}

impl Request {
    /// Ends it with an error. The device does not know it, or no longer uses its memory.
    #[cold]
    pub fn refuse(self, error: Error) -> Completion {
        Completion { tag: self.tag, op: self.op, result: Err(error) }
    }

    /// Ends it for a device that has died with it. Its memory is [abandoned](Buf::abandon): for a read, because the device may still
    /// write to it; for a write, because the device may still carry it out, and would put the memory's next content on the disk.
    #[cold]
    pub fn lose(mut self) -> Completion {
        self.op.abandon();
        self.refuse(Error::Gone)
    }
}

/// A request that has ended.
#[derive(Debug)]
pub struct Completion {
    /// That of the request.
    pub tag: u64,
    /// That of the request, memory included. After [`Error::Gone`] the buffer may be [abandoned](Buf::abandon).
    pub op: Op,
    /// How it ended. A read that succeeded has filled its whole buffer.
    pub result: Result<(), Error>,
}

/// What a queue can be asked to do. Offsets and lengths are bytes; `at` is always the first byte.
#[derive(Debug)]
pub enum Op {
    /// Fills `buf` from the device.
    Read {
        /// First byte on the device.
        at: u64,
        /// As long as the request.
        buf: Buf,
    },
    /// Writes `buf` to the device.
    Write {
        /// First byte on the device.
        at: u64,
        /// As long as the request.
        buf: Buf,
        /// Durable before it completes. Only where [`Caps::fua`].
        fua: bool,
    },
    /// Makes a range read as zeroes. Only where [`Caps::zero`].
    Zero {
        /// First byte on the device.
        at: u64,
        /// Length in bytes.
        len: u64,
        /// The space may be deallocated.
        unmap: bool,
    },
    /// Hints that the range is not needed any more; what it reads as afterwards is not defined. Only where
    /// [`Caps::discard`].
    Discard {
        /// First byte on the device.
        at: u64,
        /// Length in bytes.
        len: u64,
    },
    /// Everything that has completed becomes durable. Only where [`Caps::flush`].
    Flush,
    /// Asks what the range holds. Only where [`Caps::status`]. The answer starts at `at`, has no gaps, covers at least one
    /// byte and at most the range; a driver may answer for a prefix of the range only.
    Status {
        /// First byte on the device.
        at: u64,
        /// Length in bytes.
        len: u64,
        /// Empty when pushed; the answer when completed.
        extents: Vec<Extent>,
    },
    /// Hints that the range will be read soon. Only where [`Caps::prefetch`].
    Prefetch {
        /// First byte on the device.
        at: u64,
        /// Length in bytes.
        len: u64,
    },
}

impl Op {
    /// [Abandons](Buf::abandon) its memory, if it has some.
    pub(crate) fn abandon(&mut self) {
        if let Self::Read { buf, .. } | Self::Write { buf, .. } = self {
            buf.abandon();
        }
    }

    /// Whether it came back without its memory.
    pub(crate) fn has_lost_memory(&self) -> bool {
        matches!(self, Self::Read { buf, .. } | Self::Write { buf, .. } if buf.is_empty())
    }
}

/// Limits and capabilities of a device. A driver starts with [`Info::new`]. There may be more fields later.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Info {
    /// The driver's short name, `"vhost-user"`.
    pub driver: &'static str,
    /// Where the device is: a path, an address. For people.
    pub target: String,
    /// The device's own identification (a serial number), or empty.
    pub serial: String,
    /// The system's name of the device, or empty. Later, `target` may refer to another device.
    pub name: String,
    /// How many queues can be open at a time, at least 1.
    pub queues_max: u16,
    /// The deepest queue that can be asked for, in requests, at least 1.
    pub depth_max: u16,
    /// Every offset and length is a multiple of this: a power of two, 1 to 65536 bytes. 1: no alignment at all.
    pub block_size: u32,
    /// Offsets and lengths that are multiples of this are fast: a power of two, at least 512 bytes.
    pub preferred_block_size: u32,
    /// The longest `Read` or `Write`, in bytes: at least [`PAGE`](crate::arena::PAGE) and a multiple of `block_size`.
    pub transfer_max: u32,
    /// The longest `Zero`, in bytes: a multiple of `block_size`, or `u64::MAX`.
    pub zero_max: u64,
    /// The longest `Discard`, in bytes: a multiple of `discard_alignment`, or `u64::MAX`.
    pub discard_max: u64,
    /// Discards that do not start and end on a multiple of this are lost on the device: a multiple of `block_size`.
    pub discard_alignment: u32,
    /// How long a device with requests in flight may go without a completion before it is stalled; `None`: forever.
    pub timeout: Option<Duration>,
    /// What the device can do.
    pub caps: Caps,
}

impl Info {
    /// A device of bytes that can be read and written, and no more. It has 16 queues of 256 requests, has no volatile cache,
    /// and may take as long as it likes. Change the fields that are different.
    pub fn new(driver: &'static str, target: impl Into<String>) -> Self {
        Self {
            driver,
            target: target.into(),
            serial: String::new(),
            name: String::new(),
            queues_max: 16,
            depth_max: 256,
            block_size: 1,
            preferred_block_size: 4096,
            transfer_max: 32 << 20,
            zero_max: u64::MAX,
            discard_max: u64::MAX,
            discard_alignment: 1,
            timeout: None,
            caps: Caps::default(),
        }
    }
}

/// Capabilities of a device. [`Channel`](crate::Channel) emulates the others where possible. There may be more
/// fields later.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Caps {
    /// Nothing can be written.
    pub read_only: bool,
    /// Seeks are slow.
    pub rotational: bool,
    /// There is a volatile cache, and [`Op::Flush`] empties it. Without it every write is durable when it completes.
    pub flush: bool,
    /// A single write can be made durable ([`Op::Write`]'s `fua`).
    pub fua: bool,
    /// [`Op::Zero`] works, and is faster than writing zeroes.
    pub zero: bool,
    /// [`Op::Discard`] works.
    pub discard: bool,
    /// [`Op::Status`] distinguishes holes from data.
    pub status: bool,
    /// [`Op::Prefetch`] works.
    pub prefetch: bool,
}

impl dyn Device + '_ {
    /// New memory for requests to it, of at least `len` bytes. It is not registered yet.
    pub(crate) fn new_memory(&self, len: usize) -> io::Result<Arc<Mapping>> {
        if self.shares_memory() { Mapping::shared(len) } else { Mapping::new(len) }
    }
}

impl fmt::Debug for dyn Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Device").field("info", self.info()).field("capacity", &self.capacity()).finish()
    }
}

impl fmt::Debug for dyn Queue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Queue").field("wake_fd", &self.wake_fd()).finish()
    }
}
