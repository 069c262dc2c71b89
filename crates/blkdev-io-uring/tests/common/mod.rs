//! Files and loop devices that are removed after the test.

#![allow(dead_code, reason = "each test file uses a part of it")]

use std::{
    fs::{self, File, OpenOptions},
    path::{Path, PathBuf},
    process::{self, Command},
    sync::atomic::{AtomicU32, Ordering},
};

/// A sparse file, removed when dropped.
#[derive(Debug)]
pub(crate) struct Scratch(PathBuf);

impl Scratch {
    /// On a real file system, that of the build directory: the directory for temporary files may be in memory.
    pub(crate) fn on_disk(size: u64) -> Self {
        Self::at(Path::new(env!("CARGO_TARGET_TMPDIR")), size)
    }

    /// On a tmpfs.
    pub(crate) fn in_memory(size: u64) -> Self {
        Self::at(Path::new("/dev/shm"), size)
    }

    fn at(directory: &Path, size: u64) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let n = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = directory.join(format!("blkdev-io-uring-{}-{n}", process::id()));
        File::create_new(&path).and_then(|file| file.set_len(size)).unwrap();
        Self(path)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    pub(crate) fn open(&self) -> File {
        OpenOptions::new().read(true).write(true).open(&self.0).unwrap()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// A loop device on a scratch file, detached when dropped.
#[derive(Debug)]
pub(crate) struct Loop {
    path: PathBuf,
    pub(crate) file: Scratch,
}

impl Loop {
    /// `None`, with a SKIPPED message: this user cannot create loop devices.
    pub(crate) fn new(size: u64, block_size: u32) -> Option<Self> {
        Self::with(size, &["--sector-size", &block_size.to_string()])
    }

    /// As [`new`](Self::new), with other options for `losetup`.
    pub(crate) fn with(size: u64, options: &[&str]) -> Option<Self> {
        let file = Scratch::on_disk(size);
        let made = Command::new("losetup").args(["--find", "--show"]).args(options).arg(file.path()).output();
        match made {
            Ok(made) if made.status.success() => {
                Some(Self { path: String::from_utf8(made.stdout).unwrap().trim().into(), file })
            }
            refused => {
                eprintln!("SKIPPED: cannot create a loop device (this needs root and losetup): {refused:?}");
                None
            }
        }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.path).status();
    }
}

/// A tmpfs of a given size, unmounted when dropped.
#[derive(Debug)]
pub(crate) struct Tmpfs(PathBuf);

impl Tmpfs {
    /// `None`, with a SKIPPED message: this user cannot mount.
    pub(crate) fn new(size: u64) -> Option<Self> {
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("blkdev-io-uring-tmpfs-{}", process::id()));
        fs::create_dir(&path).unwrap();
        let mounted =
            Command::new("mount").args(["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"]).arg(&path).output();
        match mounted {
            Ok(mounted) if mounted.status.success() => Some(Self(path)),
            refused => {
                let _ = fs::remove_dir(&path);
                eprintln!("SKIPPED: cannot mount a tmpfs (this needs root): {refused:?}");
                None
            }
        }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        // Lazily: a device of the test may still have a file open.
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
        let _ = fs::remove_dir(&self.0);
    }
}
