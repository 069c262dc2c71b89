//! Files that are ours for as long as the server runs. All are known here, so that they can be removed whatever another
//! thread waits for.

use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
    time::SystemTime,
};

use anyhow::{Context, ensure};

/// A file or an empty directory that is removed when this is dropped, if it still is the one that was made.
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
    /// What was just made, by its absolute path.
    pub(crate) fn new(path: &Path) -> anyhow::Result<Self> {
        let identity = identity(path).with_context(|| format!("looking at {}", path.display()))?;
        let mut all = all();
        all.0 += 1;
        let number = all.0;
        all.1.push(Entry { number, path: path.into(), identity });
        Ok(Self { number })
    }

    /// The number of this process, in a file beside `path`, to which it is [moved](Self::move_to) when the server is ready:
    /// so no reader finds it empty or too early, and a directory that cannot be written to is found before anything listens.
    pub(crate) fn pid(path: &Path) -> anyhow::Result<Self> {
        let make = || -> anyhow::Result<Self> {
            // A rename would replace a device or a FIFO.
            let is_file = fs::metadata(path).map_or(true, |found| found.is_file());
            ensure!(is_file, "it exists and is no regular file");
            let path = std::path::absolute(path)?;
            ensure!(path.file_name().is_some(), "it names no file");
            let pid = std::process::id();
            let beside = path.with_file_name(format!(".nbdblk.{pid}.pid"));
            // Left behind by a process that had this number, and was killed.
            let _ = fs::remove_file(&beside);
            let file = fs::File::create_new(&beside)?;
            let own = Self::new(&beside)?;
            io::Write::write_all(&mut &file, format!("{pid}\n").as_bytes())?;
            Ok(own)
        };
        make().with_context(|| format!("writing the pid file {}", path.display()))
    }

    /// Puts it in the place of what is there.
    pub(crate) fn move_to(&self, path: &Path) -> anyhow::Result<()> {
        let to = std::path::absolute(path)?;
        // Without the lock: this may take as long as the file system likes.
        let from = all().1.iter().find(|entry| entry.number == self.number).map(|entry| entry.path.clone());
        let from = from.context("the server is stopping")?;
        fs::rename(&from, &to).with_context(|| format!("writing {}", path.display()))?;
        match all().1.iter_mut().find(|entry| entry.number == self.number) {
            Some(entry) => entry.path = to,
            // Everything was removed meanwhile, but for this.
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

/// Removes them all, the newest first.
pub(crate) fn remove_all() {
    let entries = std::mem::take(&mut all().1);
    entries.into_iter().rev().for_each(Entry::remove);
}

impl Entry {
    fn remove(self) {
        // If it is another one now, or there is none, it is not ours any more.
        if identity(&self.path).is_ok_and(|now| now == self.identity) {
            let _ = fs::remove_file(&self.path).or_else(|_| fs::remove_dir(&self.path));
        }
    }
}

/// Device, number, and when it was made, where that is known: numbers are given away again.
type Identity = (u64, u64, Option<SystemTime>);

fn identity(path: &Path) -> io::Result<Identity> {
    fs::symlink_metadata(path).map(|found| (found.dev(), found.ino(), found.created().ok()))
}

/// Opens a regular file for reading, and nothing else: opening a FIFO, or reading from it, could block forever.
pub(crate) fn open_regular(path: &Path) -> io::Result<fs::File> {
    let flags = nix::libc::O_NONBLOCK | nix::libc::O_NOCTTY;
    let file = std::os::unix::fs::OpenOptionsExt::custom_flags(fs::File::options().read(true), flags).open(path)?;
    match file.metadata()?.is_file() {
        true => Ok(file),
        false => Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no regular file")),
    }
}
