//! [`Io`] and [`Done`]: a consumer's requests to a [`Channel`](crate::Channel), and their results.

use crate::{arena::Buf, error::Error, extent::Extent};

/// A consumer's request. Offsets and lengths are bytes and need no alignment; `at` is the first byte.
#[derive(Debug)]
pub enum Io {
    /// Fills `buf`, which [`Channel::alloc`](crate::Channel::alloc) returned for the same `at`.
    Read {
        /// First byte on the device.
        at: u64,
        /// As long as the request.
        buf: Buf,
    },
    /// Writes `buf`, which [`Channel::alloc`](crate::Channel::alloc) returned for the same `at`.
    Write {
        /// First byte on the device.
        at: u64,
        /// As long as the request.
        buf: Buf,
        /// Durable before it completes.
        fua: bool,
    },
    /// Makes a range read as zeroes.
    Zero {
        /// First byte on the device.
        at: u64,
        /// Length in bytes.
        len: u64,
        /// Durable before it completes.
        fua: bool,
        /// The space may be deallocated.
        unmap: bool,
        /// Fail with [`Error::NotSupported`] instead of writing zeroes.
        fast: bool,
    },
    /// Hints that a range is not needed any more. Only whole blocks inside the range are touched.
    Discard {
        /// First byte on the device.
        at: u64,
        /// Length in bytes.
        len: u64,
        /// Its changes are durable before it completes.
        fua: bool,
    },
    /// Everything that has completed becomes durable.
    Flush,
    /// Requests the allocation status of a range. The answer starts at `at`, has no gaps and ends within the range, perhaps
    /// before its end.
    Status {
        /// First byte on the device.
        at: u64,
        /// Length in bytes.
        len: u64,
        /// The answer, when completed.
        extents: Vec<Extent>,
    },
    /// Hints that a range will be read soon.
    Prefetch {
        /// First byte on the device.
        at: u64,
        /// Length in bytes.
        len: u64,
    },
}

/// A request that has ended.
#[derive(Debug)]
pub struct Done {
    /// The tag from [`Channel::submit`](crate::Channel::submit).
    pub tag: u64,
    /// The request, its buffer included; after an error the buffer may be empty ([`Buf::abandon`]).
    pub io: Io,
    /// Its result.
    pub result: Result<(), Error>,
}
