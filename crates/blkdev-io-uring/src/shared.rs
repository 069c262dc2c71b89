//! [`Shared`]: the state that a device and its queues share.

use std::{
    io,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering},
    },
};

use blkdev::{Context, Info, Mapping};

use crate::{
    failures::Failures,
    file::Target,
    handle::{Bounded, Handle, Identity},
    lock::Kin,
    status::Helper,
};

/// The state that a device and its queues share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) handle: Handle,
    pub(crate) info: Info,
    pub(crate) target: Target,
    /// Discards use `BLOCK_URING_CMD_DISCARD`.
    pub(crate) discard_command: bool,
    /// `FALLOC_FL_ZERO_RANGE` has failed as unsupported.
    pub(crate) zero_range_fails: AtomicBool,
    pub(crate) queues: AtomicU16,
    pub(crate) failures: Failures,
    pub(crate) helper: Helper,
    /// Identity of the file, if it was opened by path.
    pub(crate) identity: Option<Identity>,
    pub(crate) size_question: Bounded,
    pub(crate) identity_question: Bounded,
    pub(crate) capacity: AtomicU64,
    pub(crate) mappings: Mutex<Vec<Arc<Mapping>>>,
    pub(crate) _kin: Option<Kin>,
}

impl Shared {
    /// Reads and returns the size in bytes. Sets the capacity to its whole blocks.
    pub(crate) fn measure(&self) -> io::Result<u64> {
        let size = self
            .handle
            .size(self.target.is_disk)
            .map_err(|e| annotate(e, "cannot get the size of", &self.info.target))?;
        let block = u64::from(self.info.block_size);
        let whole = size / block * block;
        if size == 0 && self.target.is_disk && self.capacity.load(Ordering::Relaxed) > 0 {
            // A removed disk. Its requests must fail with EIO, not because of their range.
            return Ok(size);
        }
        let before = self.capacity.swap(whole, Ordering::Relaxed);
        if before != whole && before != 0 {
            let end = if size == whole {
                String::new()
            } else {
                format!(", of which {whole} are accessible with direct=true")
            };
            log::info!("{}: the size is now {size} bytes{end}", self.info.target);
        }
        Ok(size)
    }

    pub(crate) fn capacity(&self) -> u64 {
        self.capacity.load(Ordering::Relaxed)
    }

    /// Whether this is a disk that was removed.
    pub(crate) fn has_vanished(&self) -> bool {
        self.target.is_disk && self.handle.size(true).unwrap_or(0) == 0
    }

    pub(crate) fn mappings(&self) -> MutexGuard<'_, Vec<Arc<Mapping>>> {
        self.mappings.lock().unwrap_or_else(|e| e.into_inner())
    }
}

pub(crate) fn annotate(error: io::Error, doing: &str, name: &str) -> io::Error {
    Context::wrap(format!("{doing} {name}: {error}"), error)
}
