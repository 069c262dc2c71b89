//! [`Stage`]: the directory of a run, with the images and the configuration, and which exports there are.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::shell::{self, TempDir};

use super::pattern::BLOCK;
use super::report::Job;

pub(crate) const MIB: u64 = 1 << 20;

/// Time after which the server declares a back end stalled.
pub(crate) const TIMEOUT: &str = "3s";

/// An export, and who verifies it.
#[derive(Debug)]
pub(crate) struct Export {
    pub(crate) name: &'static str,
    pub(crate) size: u64,
    pub(crate) kind: Kind,
    /// Regions of verifying clients: the first byte and the size.
    pub(crate) regions: &'static [(u64, u64)],
    /// Where clients write that verify nothing.
    pub(crate) wild: Option<(u64, u64)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// An image, served with io_uring.
    File,
    /// As `File`; its second half gets lost.
    Truncated,
    /// As `File`, on a small file system.
    Cramped,
    Memory,
    /// A raw image behind vhost-user: what completed is in the page cache, and survives the back end.
    Raw,
    /// A qcow2 image behind vhost-user: the back end has caches of its own.
    Qcow2,
    /// A raw image behind vhost-user, with few requests per second.
    Throttled,
}

impl Kind {
    pub(crate) fn has_back_end(self) -> bool {
        matches!(self, Self::Raw | Self::Qcow2 | Self::Throttled)
    }
}

/// All exports. The first is the default export.
pub(crate) const EXPORTS: &[Export] = &[
    Export {
        name: "file",
        size: 16 * MIB,
        kind: Kind::File,
        regions: &[(0, 4 * MIB), (4 * MIB, 4 * MIB)],
        wild: Some((8 * MIB, 8 * MIB)),
    },
    Export {
        name: "memory",
        size: 8 * MIB,
        kind: Kind::Memory,
        regions: &[(0, 4 * MIB)],
        wild: Some((4 * MIB, 4 * MIB)),
    },
    Export {
        name: "raw",
        size: 16 * MIB,
        kind: Kind::Raw,
        regions: &[(0, 4 * MIB), (4 * MIB, 4 * MIB)],
        wild: Some((8 * MIB, 8 * MIB)),
    },
    Export { name: "qcow2", size: 8 * MIB, kind: Kind::Qcow2, regions: &[(0, 4 * MIB)], wild: None },
    Export { name: "throttled", size: 2 * MIB, kind: Kind::Throttled, regions: &[(0, MIB)], wild: None },
    Export {
        name: "truncated",
        size: 8 * MIB,
        kind: Kind::Truncated,
        regions: &[(0, 4 * MIB), (4 * MIB, 4 * MIB)],
        wild: None,
    },
    Export { name: "cramped", size: 8 * MIB, kind: Kind::Cramped, regions: &[(0, 4 * MIB)], wild: None },
];

/// Size of the small file system.
const CRAMPED: &str = "size=10M";

/// The directory of a run. It is removed when this is dropped.
#[derive(Debug)]
pub(crate) struct Stage {
    /// Whether the small file system is there. Without it, there is no export on it, and no ENOSPC.
    pub(crate) is_mounted: bool,
    dir: TempDir,
}

impl Stage {
    pub(crate) fn build() -> Result<Self> {
        let mut stage = Self { is_mounted: false, dir: TempDir::new("torture")? };
        fs::create_dir(stage.at("mount"))?;
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", CRAMPED, "nbdblk-torture"]).arg(stage.at("mount"));
        let made = mount.output().context("starting mount")?;
        stage.is_mounted = made.status.success();
        if !stage.is_mounted {
            let error = String::from_utf8_lossy(&made.stderr);
            println!("!!! SKIPPED: ENOSPC, because no file system can be mounted: {}", error.trim());
        }
        for export in stage.exports() {
            match export.kind {
                Kind::Memory => {}
                Kind::Qcow2 => {
                    let mut create = shell::command("qemu-img");
                    create.args(["create", "-q", "-f", "qcow2"]).arg(stage.image(export)).arg(export.size.to_string());
                    shell::ok(&mut create)?;
                }
                _ => File::create(stage.image(export))?.set_len(export.size)?,
            }
        }
        stage.configure("")?;
        Ok(stage)
    }

    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) fn at(&self, name: &str) -> PathBuf {
        self.path().join(name)
    }

    pub(crate) fn exports(&self) -> impl Iterator<Item = &'static Export> + use<> {
        let all = self.is_mounted;
        EXPORTS.iter().filter(move |export| all || export.kind != Kind::Cramped)
    }

    pub(crate) fn image(&self, export: &Export) -> PathBuf {
        match export.kind {
            Kind::Cramped => self.at("mount").join("image"),
            _ => self.at(&format!("{}.image", export.name)),
        }
    }

    /// The socket of a back end.
    pub(crate) fn socket(&self, export: &Export) -> PathBuf {
        self.at(&format!("{}.sock", export.name))
    }

    /// Writes the file of the server, with more exports or with errors at its end.
    pub(crate) fn configure(&self, more: &str) -> Result<()> {
        let mut text = format!("control = \"{}\"\n", self.at("control.sock").display());
        for export in self.exports() {
            let device = match export.kind {
                Kind::Memory => format!("memory={}", export.size),
                kind if kind.has_back_end() => {
                    format!("vhost-user={},request-timeout={TIMEOUT}", self.socket(export).display())
                }
                _ => format!("io_uring={}", self.image(export).display()),
            };
            text += &format!("[[export]]\nname = \"{}\"\ndevice = \"{device}\"\n", export.name);
        }
        // In one step, so that the server never reads half of it.
        fs::write(self.at("new.toml"), text + more)?;
        fs::rename(self.at("new.toml"), self.at("nbdblk.toml")).context("writing the configuration")
    }

    /// The work of all verifying clients.
    pub(crate) fn jobs(&self, seed: u64) -> Vec<(&'static Export, Job)> {
        let mut jobs = Vec::new();
        for export in self.exports() {
            for (n, (at, size)) in export.regions.iter().enumerate() {
                let region = jobs.len() as u32 + 1;
                let job = Job {
                    dir: self.path().into(),
                    export: export.name.into(),
                    region,
                    at: *at,
                    blocks: (*size / BLOCK as u64) as u32,
                    depth: if export.kind == Kind::Throttled { 4 } else { 8 },
                    tcp: region.is_multiple_of(2),
                    cached: export.kind == Kind::Qcow2,
                    lossy: export.kind == Kind::Truncated && n > 0,
                    seed,
                };
                jobs.push((export, job));
            }
        }
        jobs
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        if self.is_mounted {
            let _ = Command::new("umount").args(["--lazy", "--quiet"]).arg(self.at("mount")).output();
        }
    }
}
