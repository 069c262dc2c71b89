//! [`Vduse`]: a device that a process makes with the kernel's VDUSE.
//!
//! The kernel keeps the device when the process ends. The next process of that name goes on with its rings, and carries out the
//! requests that are in them. But what the first one had completed and not flushed may be gone, and the kernel does not report it.

use std::{
    fs::{self, File},
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    path::{Path, PathBuf},
    sync::Arc,
};

use blkdev::wake::{Watcher, wait};
use blkdev_virtio::Liveness;
use nix::sys::stat::{major, minor};

use crate::sys::pidfd_open;

/// A VDUSE device behind a vhost-vdpa device.
#[derive(Debug)]
pub(crate) struct Vduse {
    /// The vhost-vdpa device in sysfs.
    place: PathBuf,
    /// The name of the VDUSE device, and the number of its character device.
    name: String,
    number: String,
}

impl Vduse {
    /// The device behind an open vhost-vdpa device. `None`: it is of another kind, or sysfs does not say.
    pub(crate) fn behind(vhost: BorrowedFd<'_>) -> Option<Self> {
        let place = place_of(vhost)?;
        let is_vduse = |dir: &&Path| fs::read_link(dir.join("subsystem")).is_ok_and(|link| link.ends_with("vduse"));
        let device = place.ancestors().find(is_vduse)?;
        let name = device.file_name()?.to_str()?.to_owned();
        let number = fs::read_to_string(device.join("dev")).ok()?.trim().to_owned();
        Some(Self { place, name, number })
    }

    /// Whether the vhost-vdpa device was removed. The one who removes it waits until it is closed.
    pub(crate) fn is_removed(&self) -> bool {
        !self.place.exists()
    }

    /// Whether a process has the device open, as far as this one can see.
    pub(crate) fn has_process(&self) -> bool {
        self.processes().next().is_some()
    }

    /// Ends `life` when all processes have ended that have the device open now. `None`: this process sees none.
    ///
    /// # Errors
    /// No thread or file descriptor is left.
    pub(crate) fn watch(&self, life: &Arc<Liveness>) -> io::Result<Option<Watcher>> {
        let mut processes = Vec::new();
        for id in self.processes() {
            let process = pidfd_open(id)?;
            // Meanwhile it may have ended, and another one may have its number.
            if self.is_held_by(id) {
                processes.push(process);
            }
        }
        if processes.is_empty() {
            return Ok(None);
        }
        let life = Arc::clone(life);
        let watch = Watcher::start("vduse", move |stop| {
            let is_over = |process: OwnedFd| {
                while !stop.is_requested() {
                    if wait([process.as_fd(), stop.wake().as_fd()], None)[0] {
                        return true;
                    }
                }
                false
            };
            if processes.into_iter().all(is_over) {
                life.end("the process behind it (VDUSE) has ended");
            }
        });
        watch.map(Some)
    }

    fn processes(&self) -> impl Iterator<Item = u32> {
        let all = fs::read_dir("/proc").into_iter().flatten().flatten();
        let ids = all.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        ids.filter(|id| self.is_held_by(*id))
    }

    /// Looks at the name first: a file of another kind may hang.
    fn is_held_by(&self, id: u32) -> bool {
        let files = fs::read_dir(format!("/proc/{id}/fd")).into_iter().flatten().flatten();
        let named = files.filter(|file| fs::read_link(file.path()).is_ok_and(|path| path.ends_with(&self.name)));
        named.into_iter().any(|file| fs::metadata(file.path()).is_ok_and(|file| number(&file) == self.number))
    }
}

/// Where an open vhost-vdpa device is in sysfs: below the vDPA device.
pub(crate) fn place_of(vhost: BorrowedFd<'_>) -> Option<PathBuf> {
    let file = File::from(vhost.try_clone_to_owned().ok()?);
    fs::canonicalize(format!("/sys/dev/char/{}", number(&file.metadata().ok()?))).ok()
}

/// The number of a character device, as sysfs writes it.
fn number(file: &fs::Metadata) -> String {
    format!("{}:{}", major(file.rdev()), minor(file.rdev()))
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn the_process_that_has_a_device_open_is_found_by_its_number() {
        let mut child = Command::new("sleep").arg("600").stdin(Stdio::null()).spawn().unwrap();
        let vduse = |name: &str, number: &str| Vduse { place: "/".into(), name: name.into(), number: number.into() };
        let null = vduse("null", "1:3");
        assert!(null.is_held_by(child.id()) && null.has_process());
        assert!(!vduse("null", "1:7").has_process() && !vduse("nul", "1:3").is_held_by(child.id()));
        assert!(Vduse::behind(File::open("/dev/null").unwrap().as_fd()).is_none());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!null.is_held_by(child.id()));
    }
}
