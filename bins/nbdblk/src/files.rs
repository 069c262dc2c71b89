//! Files that exist while the server runs. This module knows all of them, so that they can be removed even if another thread
//! hangs.

use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
    time::SystemTime,
};

use anyhow::{Context, ensure};

use crate::state::OldFile;

/// A file or an empty directory that is removed when this is dropped, unless it was replaced.
#[derive(Debug)]
pub(crate) struct OwnFile {
    number: u64,
}

static ALL: Mutex<(u64, Vec<Entry>)> = Mutex::new((0, Vec::new()));

#[derive(Debug)]
struct Entry {
    number: u64,
    path: PathBuf,
    identity: Identity,
}

fn all() -> MutexGuard<'static, (u64, Vec<Entry>)> {
    ALL.lock().unwrap_or_else(PoisonError::into_inner)
}

impl OwnFile {
    /// Takes a file that was just created. Keeps its absolute path.
    pub(crate) fn new(path: &Path) -> anyhow::Result<Self> {
        let identity = identity(path).with_context(|| format!("cannot examine {}", path.display()))?;
        let mut all = all();
        all.0 += 1;
        let number = all.0;
        all.1.push(Entry { number, path: path.into(), identity });
        Ok(Self { number })
    }

    /// Takes a file of the program that this process was before, unless it was replaced.
    pub(crate) fn adopt(file: &OldFile) -> Option<Self> {
        let path = PathBuf::from(&file.path);
        let (dev, ino, _) = identity(&path).ok()?;
        if (dev, ino) == (file.dev, file.ino) { Self::new(&path).ok() } else { None }
    }

    /// Writes the number of this process to a file next to `path`. It is [moved](Self::move_to) there when the server is ready.
    /// So no reader finds the file empty or too early, and an unwritable directory is found before the server listens.
    pub(crate) fn pid(path: &Path) -> anyhow::Result<Self> {
        let make = || -> anyhow::Result<Self> {
            // A rename would replace a device or a FIFO.
            let is_file = fs::metadata(path).map_or(true, |found| found.is_file());
            ensure!(is_file, "it exists and is not a regular file");
            let path = std::path::absolute(path)?;
            ensure!(path.file_name().is_some(), "it does not name a file");
            let pid = std::process::id();
            let beside = path.with_file_name(format!(".nbdblk.{pid}.pid"));
            // The file of a killed process that had the same number.
            let _ = fs::remove_file(&beside);
            let file = fs::File::create_new(&beside)?;
            let own = Self::new(&beside)?;
            io::Write::write_all(&mut &file, format!("{pid}\n").as_bytes())?;
            Ok(own)
        };
        make().with_context(|| format!("writing the pid file {}", path.display()))
    }

    /// Moves it to `path`, replacing an existing file.
    pub(crate) fn move_to(&self, path: &Path) -> anyhow::Result<()> {
        let to = std::path::absolute(path)?;
        // Without the lock: the file system may take any time.
        let from = all().1.iter().find(|entry| entry.number == self.number).map(|entry| entry.path.clone());
        let from = from.context("the server is stopping")?;
        fs::rename(&from, &to).with_context(|| format!("writing {}", path.display()))?;
        match all().1.iter_mut().find(|entry| entry.number == self.number) {
            Some(entry) => entry.path = to,
            // All other files were removed in the meantime.
            None => fs::remove_file(&to)?,
        }
        Ok(())
    }
}

impl Drop for OwnFile {
    fn drop(&mut self) {
        let mut all = all();
        let found = all.1.iter().position(|entry| entry.number == self.number);
        let entry = found.map(|n| all.1.remove(n));
        drop(all);
        if let Some(entry) = entry {
            entry.remove();
        }
    }
}

/// All files, for a program that replaces this one.
pub(crate) fn list() -> Vec<OldFile> {
    let old = |entry: &Entry| OldFile { path: entry.path.clone().into(), dev: entry.identity.0, ino: entry.identity.1 };
    all().1.iter().map(old).collect()
}

/// Removes all files, the newest first.
pub(crate) fn remove_all() {
    let entries = std::mem::take(&mut all().1);
    entries.into_iter().rev().for_each(Entry::remove);
}

impl Entry {
    fn remove(self) {
        // If the file was replaced or is gone, it is not ours any more.
        if identity(&self.path).is_ok_and(|now| now == self.identity) {
            let _ = fs::remove_file(&self.path).or_else(|_| fs::remove_dir(&self.path));
        }
    }
}

/// Device, inode, and creation time if known, because inode numbers are reused.
type Identity = (u64, u64, Option<SystemTime>);

fn identity(path: &Path) -> io::Result<Identity> {
    fs::symlink_metadata(path).map(|found| (found.dev(), found.ino(), found.created().ok()))
}

/// Opens a regular file for reading, and fails on any other file: a FIFO could block forever when opened or read.
pub(crate) fn open_regular(path: &Path) -> io::Result<fs::File> {
    let flags = nix::libc::O_NONBLOCK | nix::libc::O_NOCTTY;
    let file = std::os::unix::fs::OpenOptionsExt::custom_flags(fs::File::options().read(true), flags).open(path)?;
    match file.metadata()?.is_file() {
        true => Ok(file),
        false => Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file")),
    }
}
