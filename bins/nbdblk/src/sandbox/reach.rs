//! [`Reach`]: the files that a thread can open (landlock(7)).

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

/// Directories of devices that are bound to vfio-pci: the groups, and what the kernel says about the devices.
const VFIO: [&str; 3] = ["/dev/vfio", "/sys/bus/pci", "/sys/devices"];

/// Drivers that find their device by its address.
const BY_ADDRESS: [&str; 2] = ["nvme", "virtio-pci"];

/// The driver whose device can be a process, which is searched in /proc.
const BY_PROCESS: &str = "vdpa";

/// What can be opened, to open devices again.
#[derive(Clone, Debug, Default)]
pub(super) struct Reach {
    directories: Vec<PathBuf>,
    everything: bool,
}

impl Reach {
    /// What the devices need.
    pub(super) fn of(specs: &[ExportSpec]) -> Self {
        let mut reach = Self::default();
        reach.extend(specs);
        reach
    }

    /// Adds what other devices need.
    pub(super) fn extend(&mut self, specs: &[ExportSpec]) {
        for settings in specs.iter().map(|spec| &spec.settings) {
            let driver = settings.driver().name;
            self.everything |= driver == BY_PROCESS;
            if BY_ADDRESS.contains(&driver) {
                self.directories.extend(VFIO.map(PathBuf::from));
            } else if let Ok(path) = settings.get("path") {
                // Not the file: another one will have its name.
                self.directories.extend(absolute(path).ok().and_then(|path| directory(&path)));
            }
        }
        self.directories.sort_unstable();
        self.directories.dedup();
    }

    /// Whether a device is found through other processes. The kernel would hide them.
    pub(super) fn needs_everything(&self) -> bool {
        self.everything
    }

    /// Confines the calling thread to these files.
    pub(super) fn confine(&self) -> anyhow::Result<()> {
        ruleset(self.directories.iter().map(PathBuf::as_path))?.restrict_self()?;
        Ok(())
    }
}

/// What can be done with a device or an image that exists.
const USE: BitFlags<AccessFs> =
    landlock::make_bitflags!(AccessFs::{ReadFile | WriteFile | ReadDir | Truncate | IoctlDev});

/// The directory of a path, or the nearest one above that exists.
fn directory(path: &Path) -> Option<PathBuf> {
    path.ancestors().skip(1).find(|dir| dir.is_dir()).map(Into::into)
}

/// What confines threads to files that are open. It is made once, because threads must be confined even if no descriptor is left.
#[derive(Debug)]
pub(super) struct Nothing(OwnedFd);

impl Nothing {
    /// Fails if the kernel has no landlock.
    pub(super) fn new() -> anyhow::Result<Self> {
        let ruleset: Option<OwnedFd> = ruleset([])?.into();
        Ok(Self(ruleset.context("the kernel has no landlock, or it is not enabled")?))
    }

    /// Confines the calling thread.
    pub(super) fn confine(&self) -> anyhow::Result<()> {
        landlock_restrict_self(self.0.as_fd()).context("landlock")
    }
}

/// Confines the calling thread to files that exist: it creates, removes and executes none. It can use sockets, to report to the
/// service manager, to look up users, and to try what the kernel can do for TLS.
pub(super) fn confine_to_existing() -> anyhow::Result<()> {
    let ruleset = Ruleset::default().set_compatibility(CompatLevel::BestEffort);
    let ruleset = ruleset.handle_access(AccessFs::from_all(VERSION))?.create()?;
    ruleset.add_rule(PathBeneath::new(PathFd::new("/")?, USE))?.restrict_self()?;
    Ok(())
}

/// What confines a thread to the use of files in some directories. It makes no TCP connections, and uses no abstract sockets and no
/// signals of other processes.
fn ruleset<'a>(directories: impl IntoIterator<Item = &'a Path>) -> anyhow::Result<RulesetCreated> {
    let ruleset = Ruleset::default().set_compatibility(CompatLevel::BestEffort);
    let ruleset = ruleset.handle_access(AccessFs::from_all(VERSION))?.handle_access(AccessNet::from_all(VERSION))?;
    let mut ruleset = ruleset.scope(Scope::from_all(VERSION))?.create()?;
    for directory in directories {
        // It may be gone. If it comes back, it is another directory.
        let Ok(directory) = PathFd::new(directory) else { continue };
        ruleset = ruleset.add_rule(PathBeneath::new(directory, USE))?;
    }
    Ok(ruleset)
}
