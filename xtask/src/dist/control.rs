//! What the Debian packages say of themselves.

use std::process::Stdio;

use anyhow::{Context, Result};

use super::{
    files::{PLUGIN, PROGRAM},
    release::Release,
};
use crate::shell::{self, TempDir};

/// Who makes the packages.
pub(crate) const MAINTAINER: &str = "The nbdblk project <nbdblk@users.noreply.github.com>";

/// A Debian package.
#[derive(Debug)]
pub(crate) struct Package {
    pub(crate) name: &'static str,
    section: &'static str,
    /// Relations to other packages, line by line.
    relations: &'static [(&'static str, &'static str)],
    /// In addition to the libraries.
    depends: &'static str,
    /// The file whose libraries the package needs.
    binary: &'static str,
    description: &'static str,
    /// Name and text.
    pub(crate) scripts: &'static [(&'static str, &'static str)],
    /// Why lintian is wrong.
    pub(crate) overrides: &'static str,
}

/// All Debian packages.
pub(crate) const PACKAGES: [Package; 2] = [
    Package {
        name: PROGRAM,
        section: "admin",
        relations: &[
            ("Pre-Depends", "init-system-helpers (>= 1.54~)"),
            ("Suggests", "libnbd-bin, nbdkit-nbdblk-plugin, qemu-utils"),
        ],
        depends: "systemd | systemd-standalone-sysusers | systemd-sysusers",
        binary: "nbdblk",
        description: "Network Block Device server over accelerated protocols\n \
            nbdblk serves block devices to clients of the Network Block Device\n \
            protocol: virtual machines, the Linux kernel, nbdcopy, qemu-img. It\n \
            reaches files, kernel block devices, vhost-user back ends, NVMe, virtio\n \
            and vDPA devices over io_uring, vhost-user and VFIO.\n \
            .\n \
            A device may die and come back, and the program may be replaced, without\n \
            a client noticing more than a pause.\n",
        scripts: &[
            ("postinst", include_str!("../../../dist/debian/postinst")),
            ("prerm", include_str!("../../../dist/debian/prerm")),
            ("postrm", include_str!("../../../dist/debian/postrm")),
        ],
        overrides: include_str!("../../../dist/debian/nbdblk.lintian-overrides"),
    },
    Package {
        name: PLUGIN,
        section: "net",
        relations: &[("Enhances", "nbdkit"), ("Suggests", "nbdblk")],
        depends: "nbdkit (>= 1.32)",
        binary: "libnbdkit_nbdblk_plugin.so",
        description: "nbdkit plugin for block devices over accelerated protocols\n \
            The plugin has the drivers of nbdblk: io_uring, vhost-user, NVMe,\n \
            virtio-pci and vDPA. It takes the command lines of nbdkit's blkio\n \
            plugin. Each client can have many requests in flight.\n",
        scripts: &[],
        overrides: include_str!("../../../dist/debian/nbdkit-nbdblk-plugin.lintian-overrides"),
    },
];

impl Package {
    /// The file `control`.
    pub(crate) fn control(&self, release: &Release, size_kib: u64) -> Result<String> {
        let relations: String =
            self.relations.iter().map(|(field, packages)| format!("{field}: {packages}\n")).collect();
        Ok(format!(
            "Package: {}\nVersion: {}\nArchitecture: {}\nMaintainer: {MAINTAINER}\nInstalled-Size: {size_kib}\n\
             Depends: {}, {}\n{relations}Section: {}\nPriority: optional\nHomepage: https://github.com/nbdblk/nbdblk\n\
             Description: {}",
            self.name,
            release.debian_version(),
            architecture()?,
            self.libraries()?,
            self.depends,
            self.section,
            self.description,
        ))
    }

    /// The packages of the libraries that the binary loads.
    fn libraries(&self) -> Result<String> {
        let binary = shell::target_dir()?.join("packages/build").join(self.binary);
        let dir = TempDir::new(&format!("shlibs-{}", self.name))?;
        // dpkg-shlibdeps works in a source package only. It warns of binaries that are not laid out as in a package.
        std::fs::create_dir(dir.path().join("debian"))?;
        let source = format!("Source: nbdblk\n\nPackage: {}\nArchitecture: any\n", self.name);
        std::fs::write(dir.path().join("debian/control"), source)?;
        let mut command = shell::command("dpkg-shlibdeps");
        command.current_dir(dir.path()).args(["-O", "-e"]).arg(&binary).stderr(Stdio::null());
        let text = shell::output(&mut command)?;
        let found = text.lines().find_map(|line| line.strip_prefix("shlibs:Depends="));
        Ok(found.with_context(|| format!("dpkg-shlibdeps finds no libraries of {}", binary.display()))?.to_owned())
    }
}

/// Debian's name of this computer's processor.
pub(crate) fn architecture() -> Result<String> {
    Ok(shell::output(shell::command("dpkg").arg("--print-architecture"))?.trim().to_owned())
}
