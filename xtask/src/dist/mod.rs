//! `cargo xtask dist`: what users install. Builds it, lays it out as it is to lie under `/`, and packs it.

mod build;
mod changelog;
mod control;
mod deb;
mod files;
mod licenses;
mod pack;
mod release;
mod reproducible;
mod tarball;
mod tree;

use std::path::{Path, PathBuf};

use anyhow::Result;

pub(crate) use build::{build_plugin, manual};
pub(crate) use release::Release;
pub(crate) use reproducible::{check, check_elsewhere};

use crate::shell;
use pack::pack;

/// Builds everything, and lays it out in `dir` (`dist` in cargo's directory if not given). Makes the packages in `packages` in
/// cargo's directory.
pub(crate) fn run(dir: Option<&str>) -> Result<()> {
    let target = shell::target_dir()?;
    let dir = dir.map_or_else(|| target.join("dist"), PathBuf::from);
    let release = Release::current()?;
    let files = files::all(&release)?;
    tree::write(&dir, files.iter())?;
    println!("{} has {} files; install them with: cp -r {}/. /", dir.display(), files.len(), dir.display());
    for package in pack(&files, &release, &target.join("packages"))? {
        println!("{}", package.display());
    }
    Ok(())
}

/// Makes the packages of several releases of this source, each in a directory.
pub(crate) fn packages(releases: &[(&Release, &Path)]) -> Result<Vec<PathBuf>> {
    let Some((first, _)) = releases.first() else { return Ok(Vec::new()) };
    let files = files::all(first)?;
    let made = releases.iter().map(|(release, dir)| pack(&files, release, dir)).collect::<Result<Vec<_>>>()?;
    Ok(made.concat())
}
