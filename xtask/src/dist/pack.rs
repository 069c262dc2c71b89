//! All packages from the files that users get.

use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};

use super::{control, deb, files::File, release::Release, tarball};
use crate::shell;

/// Makes the tarball and, where dpkg is installed, the Debian packages in a directory. Returns their paths.
pub(crate) fn pack(files: &[File], release: &Release, dir: &Path) -> Result<Vec<PathBuf>> {
    std::fs::create_dir_all(dir)?;
    let mut made = vec![tarball::make(files, release, dir)?];
    if shell::find("dpkg-deb").is_none() {
        println!("dpkg-deb is not installed: no Debian packages");
        return Ok(made);
    }
    ensure!(shell::find("dpkg-shlibdeps").is_some(), "dpkg-shlibdeps is not installed: run `cargo xtask setup`");
    for package in &control::PACKAGES {
        made.push(deb::make(package, files, release, dir)?);
    }
    Ok(made)
}
