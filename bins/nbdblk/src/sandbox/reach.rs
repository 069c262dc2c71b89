//! [`Reach`]: the files that a thread can open, and [`OpenFiles`] for threads that can open none (landlock(7)).

use std::{
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf, absolute},
};

use anyhow::Context;
use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreated, RulesetCreatedAttr, Scope,
};

use crate::{exports::ExportSpec, sys::landlock_restrict_self};

/// The newest version of the kernel's interface that this module uses.
const VERSION: ABI = ABI::V6;

/// Files for opening a device that is bound to vfio-pci: its group, its entries in sysfs, and /proc/self/pagemap, which gives addresses
/// without an IOMMU.
const VFIO: [&str; 5] = ["/dev/iommu", "/dev/vfio", "/proc/self", "/sys/bus/pci", "/sys/devices"];

/// Drivers that find their device by its address.
const BY_ADDRESS: [&str; 2] = ["nvme", "virtio-pci"];

/// The driver whose device can belong to a process. The driver searches /proc for that process.
const BY_PROCESS: &str = "vdpa";

/// Files for opening devices again.
#[derive(Clone, Debug, Default)]
pub(super) struct Reach {
    /// They are below these paths.
    paths: Vec<PathBuf>,
    is_unlimited: bool,
}

impl Reach {
    /// The files for these exports.
    pub(super) fn of(specs: &[ExportSpec]) -> Self {
        let mut reach = Self::default();
        for settings in specs.iter().map(|spec| &spec.settings) {
            let driver = settings.driver().name;
            reach.is_unlimited |= driver == BY_PROCESS;
            if BY_ADDRESS.contains(&driver) {
                reach.paths.extend(VFIO.map(PathBuf::from));
            } else if let Ok(path) = settings.get("path") {
                // Not the file itself: a socket or an image that comes back is another file.
                reach.paths.extend(absolute(path).ok().and_then(|path| directory(&path)));
            }
        }
        reach.paths.sort_unstable();
        reach.paths.dedup();
        reach
    }

    /// Whether a driver searches /proc for other processes. Landlock would hide them.
    pub(super) fn is_unlimited(&self) -> bool {
        self.is_unlimited
    }

    /// Confines the calling thread to these files.
    pub(super) fn confine(&self) -> anyhow::Result<()> {
        ruleset(&self.paths)?.restrict_self()?;
        Ok(())
    }
}

/// Rights to use a device or an image that exists.
const USE: BitFlags<AccessFs> =
    landlock::make_bitflags!(AccessFs::{ReadFile | WriteFile | ReadDir | Truncate | IoctlDev});

/// The directory of a path, or the nearest one above that exists.
fn directory(path: &Path) -> Option<PathBuf> {
    path.ancestors().skip(1).find(|dir| dir.is_dir()).map(Into::into)
}

/// A ruleset for threads that use only files which are open already. It is created once, because a thread must be confined even if no
/// descriptor is left.
#[derive(Debug)]
pub(super) struct OpenFiles(OwnedFd);

impl OpenFiles {
    /// Fails if the kernel has no landlock.
    pub(super) fn new() -> anyhow::Result<Self> {
        let ruleset: Option<OwnedFd> = ruleset(&[])?.into();
        Ok(Self(ruleset.context("the kernel has no landlock, or it is not enabled")?))
    }

    /// Confines the calling thread.
    pub(super) fn confine(&self) -> anyhow::Result<()> {
        landlock_restrict_self(self.0.as_fd()).context("landlock")
    }
}

/// Confines the calling thread to files that exist: it cannot create, remove or execute files. It can still use sockets, which a reload
/// needs to report to the service manager, to look up users, and to learn whether the kernel supports TLS.
pub(super) fn confine_to_existing() -> anyhow::Result<()> {
    let ruleset = Ruleset::default().set_compatibility(CompatLevel::BestEffort);
    let ruleset = ruleset.handle_access(AccessFs::from_all(VERSION))?.create()?;
    ruleset.add_rule(PathBeneath::new(PathFd::new("/")?, USE))?.restrict_self()?;
    Ok(())
}

/// A ruleset that permits the use of files below some paths. It forbids TCP connections, abstract sockets of other processes, and
/// signals to them.
fn ruleset(paths: &[PathBuf]) -> anyhow::Result<RulesetCreated> {
    let ruleset = Ruleset::default().set_compatibility(CompatLevel::BestEffort);
    let ruleset = ruleset.handle_access(AccessFs::from_all(VERSION))?.handle_access(AccessNet::from_all(VERSION))?;
    let mut ruleset = ruleset.scope(Scope::from_all(VERSION))?.create()?;
    for path in paths {
        // It may not exist. A rule is for an inode, so it would not be for a file that is created later.
        let Ok(path) = PathFd::new(path) else { continue };
        ruleset = ruleset.add_rule(PathBeneath::new(path, USE))?;
    }
    Ok(ruleset)
}
