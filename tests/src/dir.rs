//! [`Dir`]: a separate directory for each test, removed when the test ends.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

/// A temporary directory. Dropping it removes it with its content.
#[derive(Debug)]
pub struct Dir(PathBuf);

impl Dir {
    /// Creates a directory with a short name, because the path of a socket in it has room for 107 bytes only.
    #[expect(clippy::new_without_default, reason = "making one has an effect on the file system")]
    pub fn new() -> Self {
        Self::below(&std::env::temp_dir())
    }

    /// As [`new`](Self::new), in memory if there is such a file system: for files that would take long to write or to remove.
    pub fn in_memory() -> Self {
        let memory = Path::new("/dev/shm");
        if memory.is_dir() { Self::below(memory) } else { Self::new() }
    }

    fn below(parent: &Path) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        loop {
            let count = COUNT.fetch_add(1, Ordering::Relaxed);
            let path = parent.join(format!("nbdblk-{}-{count}", std::process::id()));
            match std::fs::create_dir(&path) {
                Ok(()) => return Self(path),
                // Left by a killed test whose process had the same number.
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
                Err(error) => panic!("creating {}: {error}", path.display()),
            }
        }
    }

    /// The path of the directory.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// The path of a file in it.
    pub fn at(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// The path of a file in it, as text.
    pub fn text(&self, name: &str) -> String {
        self.at(name).to_str().expect("temporary directories have plain names").into()
    }

    /// Creates an empty (sparse) file of `size` bytes and returns its path.
    pub fn sparse(&self, name: &str, size: u64) -> PathBuf {
        let path = self.at(name);
        std::fs::File::create(&path).and_then(|file| file.set_len(size)).expect("a file can be made in the directory");
        path
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
