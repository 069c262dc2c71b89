//! `cargo xtask trixie`: a root directory of Debian trixie, so that its nbdkit and libnbd are tested with, too. Ceph gets another
//! one, because it is large.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::shell;

/// Makes the root if it is not there, and says where it is. It lies in the user's cache and is made once.
///
/// # Errors
/// Not root, no debootstrap, no mirror.
pub(crate) fn root() -> Result<PathBuf> {
    make("trixie", &["nbdkit"])
}

/// As [`root`], for a Ceph cluster and the qemu-storage-daemon that is its client.
///
/// # Errors
/// As [`root`].
pub(crate) fn ceph_root() -> Result<PathBuf> {
    make("ceph", &["ceph-mon", "ceph-osd", "ceph-common", "qemu-block-extra", "qemu-utils"])
}

/// A root with those packages.
fn make(name: &str, packages: &[&str]) -> Result<PathBuf> {
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let cache = cache.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache")));
    let dir = cache.context("there is neither HOME nor XDG_CACHE_HOME")?.join("nbdblk").join(name);
    // Made last: without it, the root directory is made again.
    let ready = dir.join("nbdblk-is-ready");
    if ready.exists() {
        return Ok(dir);
    }
    let id = Command::new("id").arg("-u").output()?;
    ensure!(id.stdout == b"0\n", "making one takes root");
    if shell::find("debootstrap").is_none() {
        shell::ok(shell::command("apt-get").args(["install", "-y", "-qq", "--no-install-recommends", "debootstrap"]))?;
    }
    println!("{name}: making {} (some minutes, once)", dir.display());
    std::fs::create_dir_all(&dir)?;
    shell::ok(shell::command("debootstrap").args(["--variant=minbase", "trixie"]).arg(&dir).arg(mirror()?))?;
    // The way to the mirror: name servers and proxies of this machine.
    let _ = std::fs::copy("/etc/resolv.conf", dir.join("etc/resolv.conf"));
    for file in std::fs::read_dir("/etc/apt/apt.conf.d").into_iter().flatten().flatten() {
        let _ = std::fs::copy(file.path(), dir.join("etc/apt/apt.conf.d").join(file.file_name()));
    }
    in_root(&dir, &["apt-get", "update", "-qq"])?;
    install(&dir, packages)?;
    std::fs::write(ready, "")?;
    Ok(dir)
}

/// The root with those packages in it.
///
/// # Errors
/// As [`root`], and what apt-get said.
pub(crate) fn with(packages: &[&str]) -> Result<PathBuf> {
    let dir = root()?;
    if packages.iter().any(|package| !dir.join(format!("usr/share/doc/{package}")).exists()) {
        println!("trixie: installing {}", packages.join(" "));
        install(&dir, packages)?;
    }
    Ok(dir)
}

fn install(dir: &Path, packages: &[&str]) -> Result<()> {
    in_root(dir, &[&["apt-get", "install", "-y", "-qq", "--no-install-recommends"], packages].concat())
}

fn in_root(dir: &Path, line: &[&str]) -> Result<()> {
    shell::ok(shell::command("chroot").arg(dir).args(line).env("DEBIAN_FRONTEND", "noninteractive"))
}

/// The mirror that this machine's own apt uses.
fn mirror() -> Result<String> {
    let indexes =
        shell::command("apt-get").args(["indextargets", "--format", "$(SITE)", "Created-By: Packages"]).output();
    let text = String::from_utf8(indexes.context("asking apt-get for its mirror")?.stdout)?;
    // Security updates come from elsewhere, and are not a whole distribution.
    let Some(site) = text.lines().find(|line| line.starts_with("http") && !line.contains("security")) else {
        bail!("apt-get names no mirror");
    };
    Ok(site.to_owned())
}
