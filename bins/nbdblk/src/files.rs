//! Files that are ours for as long as the server runs.

use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process,
    time::SystemTime,
};

use anyhow::Context;

/// A file that is removed when this is dropped, if it still is the one that was made.
#[derive(Debug)]
pub(crate) struct OwnFile {
    path: PathBuf,
    identity: Identity,
    /// Made for it, and removed with it.
    directory: Option<PathBuf>,
}

impl OwnFile {
    /// A file that was just made, and perhaps its directory.
    pub(crate) fn new(path: &Path, directory: Option<PathBuf>) -> anyhow::Result<Self> {
        let identity = identity(path).with_context(|| format!("looking at {}", path.display()))?;
        Ok(Self { path: path.into(), identity, directory })
    }

    /// The number of this process, in a file beside `path`, to which it is [moved](Self::move_to) when the server is ready:
    /// so nobody finds it empty or too early, and a directory that cannot be written to is found before anything listens.
    pub(crate) fn pid(path: &Path) -> anyhow::Result<Self> {
        let pid = process::id();
        let mut beside = path.as_os_str().to_owned();
        beside.push(format!(".{pid}"));
        let written = fs::write(&beside, format!("{pid}\n"));
        written.with_context(|| format!("writing the pid file {}", path.display()))?;
        Self::new(Path::new(&beside), None)
    }

    /// Puts it in the place of what is there.
    pub(crate) fn move_to(&mut self, path: &Path) -> anyhow::Result<()> {
        fs::rename(&self.path, path).with_context(|| format!("writing {}", path.display()))?;
        self.path = path.into();
        Ok(())
    }
}

impl Drop for OwnFile {
    fn drop(&mut self) {
        // Whatever fails here has been taken away by somebody else.
        if identity(&self.path).is_ok_and(|now| now == self.identity) {
            let _ = fs::remove_file(&self.path);
        }
        if let Some(directory) = &self.directory {
            let _ = fs::remove_dir(directory);
        }
    }
}

/// Device, number, and when it was made, where that is known: numbers are given away again.
type Identity = (u64, u64, Option<SystemTime>);

fn identity(path: &Path) -> io::Result<Identity> {
    fs::symlink_metadata(path).map(|found| (found.dev(), found.ino(), found.created().ok()))
}
