//! [`Handle`]: the open file, held so that a hung file system cannot keep this process from exiting.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::{
        fd::{AsFd, AsRawFd},
        unix::fs::{MetadataExt, OpenOptionsExt},
    },
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    time::Duration,
};

use blkdev::thread::{Role, spawn};
use blkdev_ring::Ring;
use nix::{
    fcntl::OFlag,
    sys::statfs::{
        BTRFS_SUPER_MAGIC, EXT4_SUPER_MAGIC, F2FS_SUPER_MAGIC, FsType, OVERLAYFS_SUPER_MAGIC, TMPFS_MAGIC,
        XFS_SUPER_MAGIC, fstatfs,
    },
};

use crate::{flight::Flight, sys};

/// Longest wait for a query to a file system that may hang.
const PATIENCE: Duration = Duration::from_millis(100);

/// The open file.
#[derive(Debug)]
pub(crate) enum Handle {
    /// On a local disk or file system, which responds unless the machine is broken.
    Near(Arc<File>),
    /// On a file system with a server behind it (FUSE, NFS), which may hang. Closing a descriptor waits for that server, and
    /// nothing interrupts it, not even SIGKILL when the process ends. So there is none: the rings hold the file.
    Far {
        /// `O_PATH`: it identifies the file and gives access to its metadata; closing it does not involve the server.
        path: File,
        /// The flags to open the file with.
        flags: OFlag,
        /// Keeps the first open file description, with its locks.
        _keeper: Box<Mutex<Ring<Flight>>>,
    },
}

impl Handle {
    /// Takes a file that was just opened with `flags`, and a ring that holds it.
    pub(crate) fn new(file: File, flags: OFlag, keeper: Ring<Flight>) -> Self {
        if is_near(&file) {
            return Self::Near(Arc::new(file));
        }
        let path = OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(link(&file));
        match path.and_then(|path| reopen(&path, flags).map(|_| path)) {
            Ok(path) => Self::Far { path, flags, _keeper: Box::new(Mutex::new(keeper)) },
            Err(e) => {
                log::debug!("cannot reopen the file, so its descriptor stays open: {e}");
                Self::Near(Arc::new(file))
            }
        }
    }

    /// As [`new`](Self::new), for a descriptor that another process also holds.
    pub(crate) fn shared(file: File) -> Self {
        Self::Near(Arc::new(file))
    }

    /// A descriptor for short use.
    pub(crate) fn open(&self) -> io::Result<Arc<File>> {
        match self {
            Self::Near(file) => Ok(Arc::clone(file)),
            Self::Far { path, flags, .. } => reopen(path, *flags).map(Arc::new),
        }
    }

    /// As [`open`](Self::open), for queries only. Its close writes nothing back, so it does not wait on NFS and others.
    pub(crate) fn open_to_ask(&self) -> io::Result<Arc<File>> {
        match self {
            Self::Near(file) => Ok(Arc::clone(file)),
            Self::Far { path, .. } => reopen(path, OFlag::O_RDONLY).map(Arc::new),
        }
    }

    pub(crate) fn is_far(&self) -> bool {
        matches!(self, Self::Far { .. })
    }

    /// The file's size in bytes. This may query the file system.
    pub(crate) fn size(&self, is_disk: bool) -> io::Result<u64> {
        let size = match self {
            Self::Near(file) if is_disk => sys::disk_size(file)?,
            Self::Near(file) => file.metadata()?.len(),
            Self::Far { path, .. } => path.metadata()?.len(),
        };
        // Bytes beyond the largest offset are not accessible.
        Ok(size.min(i64::MAX as u64))
    }
}

/// The file that a path named at open.
#[derive(Clone, Debug)]
pub(crate) struct Identity {
    pub(crate) path: PathBuf,
    dev: u64,
    ino: u64,
}

impl Identity {
    pub(crate) fn new(path: PathBuf, file: &File) -> io::Result<Self> {
        let meta = file.metadata()?;
        Ok(Self { path, dev: meta.dev(), ino: meta.ino() })
    }

    /// Whether the path names another file now. A path that names none has no file to open instead.
    pub(crate) fn is_replaced(&self) -> bool {
        fs::metadata(&self.path).is_ok_and(|meta| (meta.dev(), meta.ino()) != (self.dev, self.ino))
    }
}

/// Runs queries that may hang, one at a time.
#[derive(Debug, Default)]
pub(crate) struct Bounded(Arc<AtomicBool>);

impl Bounded {
    /// Runs `work` on its own thread, which is left running if that takes long. `None`: there is no result yet, or an earlier
    /// query has not ended.
    pub(crate) fn ask<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
        if self.0.swap(true, Ordering::Acquire) {
            return None;
        }
        let busy = Arc::clone(&self.0);
        let (sender, answer) = mpsc::sync_channel(1);
        let work = move || {
            let result = work();
            busy.store(false, Ordering::Release);
            let _ = sender.send(result);
        };
        if let Err(e) = spawn(Role::Helper, "file", work) {
            log::debug!("cannot start a thread to query a file system: {e}");
            self.0.store(false, Ordering::Release);
            return None;
        }
        answer.recv_timeout(PATIENCE).ok()
    }
}

/// Magic numbers of linux/magic.h without a name in nix: ramfs, bcachefs, ZFS, exFAT, FAT, NTFS, EROFS, squashfs, ISO 9660.
const OTHERS_NEAR: [u32; 9] =
    [0x8584_58f6, 0xca45_1a4e, 0x2fc1_2fc1, 0x2011_bab0, 0x4d44, 0x7366_746e, 0xe0f5_e1e2, 0x7371_7368, 0x9660];

/// Whether the file is on a local disk or file system.
fn is_near(file: &File) -> bool {
    if !file.metadata().is_ok_and(|meta| meta.is_file()) {
        return true;
    }
    let Ok(kind) = fstatfs(file).map(|fs| fs.filesystem_type()) else { return false };
    let named =
        [BTRFS_SUPER_MAGIC, EXT4_SUPER_MAGIC, F2FS_SUPER_MAGIC, OVERLAYFS_SUPER_MAGIC, TMPFS_MAGIC, XFS_SUPER_MAGIC];
    let is = |magic: FsType| magic == kind;
    named.into_iter().any(is) || OTHERS_NEAR.into_iter().any(|magic| is(FsType(magic.into())))
}

fn link(file: &impl AsFd) -> PathBuf {
    format!("/proc/self/fd/{}", file.as_fd().as_raw_fd()).into()
}

fn reopen(path: &File, flags: OFlag) -> io::Result<File> {
    let write = flags.contains(OFlag::O_RDWR);
    let flags = (flags & OFlag::O_DIRECT).bits();
    OpenOptions::new().read(true).write(write).custom_flags(flags).open(link(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_question_that_is_not_answered_does_not_hold_up_who_asks() {
        let (bounded, (go, wait)) = (Bounded::default(), mpsc::channel::<()>());
        assert_eq!(bounded.ask(|| 1), Some(1));
        let (done, ended) = mpsc::channel();
        let hang = move || {
            let _ = wait.recv();
            drop(done);
        };
        assert_eq!(bounded.ask(hang), None);
        // The next query does not even start.
        assert_eq!(bounded.ask(|| 2), None);
        drop(go);
        let _: Result<(), _> = ended.recv();
        let started = std::time::Instant::now();
        while bounded.ask(|| 3) != Some(3) {
            assert!(started.elapsed() < Duration::from_secs(60), "the first query has ended");
        }
    }
}
