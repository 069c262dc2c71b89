//! [`Io`] and [`Done`]: what a consumer asks a [`Channel`](crate::Channel) for, and how that ended.

use crate::{arena::Buf, error::Error, extent::Extent};

/// What a consumer asks for. Offsets and lengths are bytes and need no alignment; `at` is the first byte.
#[derive(Debug)]
pub enum Io {
    /// Fills `buf`, which [`Channel::alloc`](crate::Channel::alloc) gave for the same `at`.
    Read {
        /// First byte on the device.
        at: u64,
        /// As long as the request.
        buf: Buf,
    },
    /// Writes `buf`, which [`Channel::alloc`](crate::Channel::alloc) gave for the same `at`.
    Write {
        /// First byte on the device.
        at: u64,
        /// As long as the request.
        buf: Buf,
        /// Durable before it is done.
        fua: bool,
    },
    /// Makes a range read as zeroes.
    Zero {
        /// First byte on the device.
        at: u64,
        /// Length in bytes.
        len: u64,
        /// Durable before it is done.
        fua: bool,
        /// The space may be given back.
        unmap: bool,
        /// Fail with [`Error::NotSupported`] rather than write zeroes one by one.
        fast: bool,
    },
    /// Hints that a range is not needed any more. Only whole blocks inside the range are touched.
    Discard {
        /// First byte on the device.
        at: u64,
        /// Length in bytes.
        len: u64,
        /// What it changed is durable before it is done.
        fua: bool,
    },
    /// Everything that was done before becomes durable.
    Flush,
    /// Asks what a range holds. The answer starts at `at`, has no gaps and ends within the range, perhaps before its end.
    Status {
        /// First byte on the device.
        at: u64,
        /// Length in bytes.
        len: u64,
        /// The answer, once done.
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
    /// That of [`Channel::submit`](crate::Channel::submit).
    pub tag: u64,
    /// The request, its buffer included; after an error the buffer may be empty ([`Buf::abandon`]).
    pub io: Io,
    /// How it ended.
    pub result: Result<(), Error>,
}
