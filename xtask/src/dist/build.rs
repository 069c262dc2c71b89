//! The programs and their manual, built so that nothing in them depends on the directory of the build.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};

use super::release::Release;
use crate::shell;

/// What is built.
#[derive(Debug)]
pub(crate) struct Built {
    pub(crate) program: PathBuf,
    pub(crate) plugin: PathBuf,
    /// `man1/nbdblk.1` and so on.
    pub(crate) pages: PathBuf,
    pub(crate) completions: PathBuf,
}

/// Builds everything. The programs are stripped.
pub(crate) fn all(release: &Release) -> Result<Built> {
    let work = shell::target_dir()?.join("packages/build");
    let _ = std::fs::remove_dir_all(&work);
    std::fs::create_dir_all(&work).with_context(|| format!("creating {}", work.display()))?;
    let program = stripped(&shell::build_nbdblk()?, &work)?;
    let plugin = stripped(&build_plugin()?, &work)?;
    let (pages, completions) = (work.join("pages"), work.join("completions"));
    manual(&["pages", path(&pages)?, &release.date("+%F")?])?;
    manual(&["completions", path(&completions)?])?;
    Ok(Built { program, plugin, pages, completions })
}

/// Builds the release plugin and says where cargo put it.
pub(crate) fn build_plugin() -> Result<PathBuf> {
    shell::ok(shell::release_build()?.args(["-p", "nbdkit-nbdblk-plugin"]))?;
    Ok(shell::target_dir()?.join("release/libnbdkit_nbdblk_plugin.so"))
}

/// Runs the program that makes pages and completions.
pub(crate) fn manual(args: &[&str]) -> Result<()> {
    // With the features of the whole workspace, which has been built so for the tests.
    let mut build = shell::cargo();
    build.args(["build", "--quiet", "--workspace", "--all-features", "--bin", "nbdblk-manual"]);
    shell::ok(&mut build)?;
    let program = shell::target_dir()?.join("debug/nbdblk-manual");
    shell::ok(Command::new(program).args(args))
}

/// A copy without symbols and debug information.
fn stripped(binary: &Path, dir: &Path) -> Result<PathBuf> {
    let to = dir.join(binary.file_name().context("a program has a name")?);
    let mut strip = shell::command("strip");
    strip.args(["--strip-unneeded", "--remove-section=.comment", "-o"]);
    shell::ok(strip.arg(&to).arg(binary))?;
    Ok(to)
}

fn path(path: &Path) -> Result<&str> {
    path.to_str().with_context(|| format!("{} is not UTF-8", path.display()))
}
