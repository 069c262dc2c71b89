//! [`Kind`]: what a ring can carry, which decides the size of its entries.

use std::time::Duration;

use io_uring::{cqueue, squeue};

use crate::memory::Memory;

/// What a ring can carry: [`Files`](crate::Files) or [`Passthrough`](crate::Passthrough). It cannot be implemented elsewhere.
pub trait Kind: Sealed + 'static {
    /// What an operation can ask of the kernel.
    type Command<'a>;
    #[doc(hidden)]
    type Sqe: squeue::EntryMarker;
    #[doc(hidden)]
    type Cqe: cqueue::EntryMarker + Into<cqueue::Entry>;
    /// The operation codes that the kernel must have.
    #[doc(hidden)]
    const NEEDED: &'static [u8];
    /// Operation codes that are used if the kernel has them.
    #[doc(hidden)]
    const OPTIONAL: &'static [u8];
    /// Why a kernel without the needed ones will not do.
    #[doc(hidden)]
    const TOO_OLD: &'static str;
    /// How long a ring that is dropped waits for the kernel. An operation that takes longer belongs to a device or file system that
    /// hangs.
    #[doc(hidden)]
    const DRAIN_MAX: Duration;
    /// The submission queue entry of a command. It points only at memory that the command borrows; `memory` keeps that of
    /// buffers.
    #[doc(hidden)]
    fn entry(command: Self::Command<'_>, memory: &mut Memory, user_data: u64) -> Self::Sqe;
}

/// Only this crate's types point the kernel at memory that stays valid.
pub trait Sealed {}
