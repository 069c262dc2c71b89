//! [`Vduse`]: a device that a process makes with the kernel's VDUSE.
//!
//! The kernel keeps the device when the process ends. The next process with that name continues with the same rings, and carries
//! out the requests in them. But changes that the first process had completed and not flushed may be lost, and the kernel reports
//! nothing.

use std::{fs, os::fd::OwnedFd};

use crate::{
    place::{Place, number},
    sys::pidfd_open,
};

/// A VDUSE device behind a vhost-vdpa device.
#[derive(Debug)]
pub(crate) struct Vduse {
    name: String,
    /// The number of its character device.
    number: String,
}

impl Vduse {
    /// `None`: it is no VDUSE device.
    pub(crate) fn at(place: &Place) -> Option<Self> {
        place.vduse().map(|(name, number)| Self { name, number })
    }

    /// Whether a visible process has the device open.
    pub(crate) fn has_process(&self) -> bool {
        self.ids().next().is_some()
    }

    /// The visible processes that have the device open, as descriptors that are readable when they have ended.
    pub(crate) fn processes(&self) -> Vec<OwnedFd> {
        let processes = self.ids().filter_map(|id| Some((id, pidfd_open(id).ok()?)));
        // A process may have ended meanwhile, and another one may have its id.
        processes.filter(|(id, _)| self.is_held_by(*id)).map(|(_, process)| process).collect()
    }

    fn ids(&self) -> impl Iterator<Item = u32> {
        let all = fs::read_dir("/proc").into_iter().flatten().flatten();
        let ids = all.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        ids.filter(|id| self.is_held_by(*id))
    }

    /// Compares the name first: examining an unrelated file may hang.
    fn is_held_by(&self, id: u32) -> bool {
        let files = fs::read_dir(format!("/proc/{id}/fd")).into_iter().flatten().flatten();
        let mut named = files.filter(|file| fs::read_link(file.path()).is_ok_and(|path| path.ends_with(&self.name)));
        named.any(|file| fs::metadata(file.path()).is_ok_and(|file| number(&file) == self.number))
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs::File,
        os::fd::AsFd,
        process::{Command, Stdio},
    };

    use super::*;

    #[test]
    fn the_process_that_has_a_device_open_is_found_by_its_number() {
        let mut child = Command::new("sleep").arg("600").stdin(Stdio::null()).spawn().unwrap();
        let vduse = |name: &str, number: &str| Vduse { name: name.into(), number: number.into() };
        let null = vduse("null", "1:3");
        assert!(null.is_held_by(child.id()) && null.has_process());
        assert!(!vduse("null", "1:7").has_process() && !vduse("nul", "1:3").is_held_by(child.id()));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!null.is_held_by(child.id()));
        let place = Place::of(File::open("/dev/null").unwrap().as_fd());
        assert!(place.is_none_or(|place| Vduse::at(&place).is_none() && !place.is_removed()));
    }
}
