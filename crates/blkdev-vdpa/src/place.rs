//! [`Place`]: a vhost-vdpa device in sysfs, below its vDPA device.

use std::{
    fs::{self, File, Metadata},
    os::{fd::BorrowedFd, unix::fs::MetadataExt},
    path::{Path, PathBuf},
};

use nix::sys::stat::{major, minor};

/// The directory of a vhost-vdpa device.
#[derive(Clone, Debug)]
pub(crate) struct Place(PathBuf);

impl Place {
    /// The place of an open device. `None`: sysfs does not know it.
    pub(crate) fn of(vhost: BorrowedFd<'_>) -> Option<Self> {
        let file = File::from(vhost.try_clone_to_owned().ok()?);
        fs::canonicalize(format!("/sys/dev/char/{}", number(&file.metadata().ok()?))).ok().map(Self)
    }

    /// The name of the vDPA device.
    pub(crate) fn name(&self) -> Option<String> {
        self.0.parent()?.file_name()?.to_str().map(str::to_owned)
    }

    /// Whether the device was removed. `vdpa dev del` waits until it is closed.
    pub(crate) fn is_removed(&self) -> bool {
        !self.0.exists()
    }

    /// The name of the VDUSE device behind it, and the number of its character device. `None`: it is no VDUSE device.
    pub(crate) fn vduse(&self) -> Option<(String, String)> {
        let is_vduse = |dir: &&Path| fs::read_link(dir.join("subsystem")).is_ok_and(|link| link.ends_with("vduse"));
        let device = self.0.ancestors().find(is_vduse)?;
        let name = device.file_name()?.to_str()?.to_owned();
        Some((name, fs::read_to_string(device.join("dev")).ok()?.trim().to_owned()))
    }
}

/// The number of a character device, as sysfs writes it.
pub(crate) fn number(file: &Metadata) -> String {
    format!("{}:{}", major(file.rdev()), minor(file.rdev()))
}
