//! The same source gives the same packages.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};

use super::{files, pack::pack, release::Release};
use crate::shell::{self, TempDir};

/// Makes the packages twice from programs that were built once, and compares them. Returns their directory.
pub(crate) fn check() -> Result<PathBuf> {
    let release = Release::current()?;
    let dir = shell::target_dir()?.join("packages");
    let made = pack(&files::all(&release)?, &release, &dir)?;
    let other = TempDir::new("again")?;
    pack(&files::all(&release)?, &release, other.path())?;
    compare(&made, other.path())?;
    Ok(dir)
}

/// Builds everything in a copy of the last commit in another directory, and compares the packages with those made here. Changes
/// that are not in a commit make a difference.
pub(crate) fn check_elsewhere() -> Result<()> {
    let release = Release::current()?;
    let made = pack(&files::all(&release)?, &release, &shell::target_dir()?.join("packages"))?;
    let copy = TempDir::new("elsewhere")?;
    let source = copy.path().join("source");
    shell::ok(Command::new("git").args(["clone", "--quiet", "--depth=1"]).arg(file_url(shell::root())).arg(&source))?;
    let mut dist = shell::cargo();
    dist.current_dir(&source).args(["run", "--quiet", "-p", "xtask", "--", "dist"]).arg(copy.path().join("root"));
    dist.env("CARGO_TARGET_DIR", copy.path().join("target")).env("SOURCE_DATE_EPOCH", release.epoch.to_string());
    shell::ok(&mut dist)?;
    compare(&made, &copy.path().join("target/packages"))
}

fn file_url(path: &Path) -> String {
    format!("file://{}", path.display())
}

/// Fails if a file differs from the one of its name in the other directory.
fn compare(made: &[PathBuf], other: &Path) -> Result<()> {
    for path in made {
        let name = path.file_name().context("packages have names")?;
        let read = |path: &Path| std::fs::read(path).with_context(|| format!("reading {}", path.display()));
        ensure!(read(path)? == read(&other.join(name))?, "{} is another file when it is made again", path.display());
        println!("{}: the same twice, {}", name.to_string_lossy(), sum(path)?);
    }
    Ok(())
}

fn sum(path: &Path) -> Result<String> {
    let text = shell::output(shell::command("sha256sum").arg(path))?;
    Ok(text.split(' ').next().unwrap_or_default().to_owned())
}
