//! [`Handle`]: the opened file, held so that a file system that hangs does not keep this process from ending.

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
    thread,
    time::Duration,
};

use blkdev_ring::Ring;
use nix::{
    fcntl::OFlag,
    sys::statfs::{
        BTRFS_SUPER_MAGIC, EXT4_SUPER_MAGIC, F2FS_SUPER_MAGIC, FsType, OVERLAYFS_SUPER_MAGIC, TMPFS_MAGIC,
        XFS_SUPER_MAGIC, fstatfs,
    },
};

use crate::{flight::Flight, sys};

/// How long a question to a file system may take that may hang.
const PATIENCE: Duration = Duration::from_millis(100);

/// The opened file.
#[derive(Debug)]
pub(crate) enum Handle {
    /// On a disk or file system of this machine. These answer, or the machine is beyond help.
    Near(Arc<File>),
    /// On a file system with a server behind it (FUSE, NFS), which may hang. To close a descriptor waits for that server,
    /// and nothing interrupts it, not even SIGKILL when the process ends. So there is none: rings hold the file.
    Far {
        /// `O_PATH`: it names the file and reaches its metadata, and closing it asks no server.
        path: File,
        /// The flags to open it with.
        flags: OFlag,
        /// Keeps the first opening, with its locks.
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
                log::debug!("a file that cannot be opened once more is held open: {e}");
                Self::Near(Arc::new(file))
            }
        }
    }

    /// As [`new`](Self::new), for a descriptor that another process holds as well.
    pub(crate) fn shared(file: File) -> Self {
        Self::Near(Arc::new(file))
    }

    /// A descriptor, to be held for a short time only.
    pub(crate) fn open(&self) -> io::Result<Arc<File>> {
        match self {
            Self::Near(file) => Ok(Arc::clone(file)),
            Self::Far { path, flags, .. } => reopen(path, *flags).map(Arc::new),
        }
    }

    /// As [`open`](Self::open), for asking only. To close it, NFS and others write nothing back, so they do not wait.
    pub(crate) fn open_to_ask(&self) -> io::Result<Arc<File>> {
        match self {
            Self::Near(file) => Ok(Arc::clone(file)),
            Self::Far { path, .. } => reopen(path, OFlag::O_RDONLY).map(Arc::new),
        }
    }

    pub(crate) fn is_far(&self) -> bool {
        matches!(self, Self::Far { .. })
    }

    /// The file's size in bytes. The file system may be asked.
    pub(crate) fn size(&self, is_disk: bool) -> io::Result<u64> {
        let size = match self {
            Self::Near(file) if is_disk => sys::disk_size(file)?,
            Self::Near(file) => file.metadata()?.len(),
            Self::Far { path, .. } => path.metadata()?.len(),
        };
        // What no offset can name does not exist.
        Ok(size.min(i64::MAX as u64))
    }
}

/// Which file a name stands for.
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

    /// Whether the name stands for another file now. A name that stands for none is not one that can be opened instead.
    pub(crate) fn is_replaced(&self) -> bool {
        fs::metadata(&self.path).is_ok_and(|meta| (meta.dev(), meta.ino()) != (self.dev, self.ino))
    }
}

/// Asks what may hang, one question at a time.
#[derive(Debug, Default)]
pub(crate) struct Bounded(Arc<AtomicBool>);

impl Bounded {
    /// Does `work` on a thread of its own, which is left to itself when that takes long. `None`: there is no answer yet, or
    /// no answer to an earlier question.
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
        if let Err(e) = thread::Builder::new().name("file".into()).spawn(work) {
            log::debug!("no thread to ask a file system: {e}");
            self.0.store(false, Ordering::Release);
            return None;
        }
        answer.recv_timeout(PATIENCE).ok()
    }
}

/// Magic numbers of linux/magic.h that nix has no name for: ramfs, bcachefs, ZFS, exFAT, FAT, NTFS, EROFS, squashfs, ISO 9660.
const OTHERS_NEAR: [u32; 9] =
    [0x8584_58f6, 0xca45_1a4e, 0x2fc1_2fc1, 0x2011_bab0, 0x4d44, 0x7366_746e, 0xe0f5_e1e2, 0x7371_7368, 0x9660];

/// Whether the file is on a disk or file system of this machine.
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
        // The next one is not even asked.
        assert_eq!(bounded.ask(|| 2), None);
        drop(go);
        let _: Result<(), _> = ended.recv();
        let started = std::time::Instant::now();
        while bounded.ask(|| 3) != Some(3) {
            assert!(started.elapsed() < Duration::from_secs(60), "the first question has ended");
        }
    }
}
