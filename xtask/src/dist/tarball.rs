//! A tarball with the files of all packages, for systems without dpkg.

use std::path::{Path, PathBuf};

use anyhow::Result;

use super::{
    files::{File, PROGRAM, file},
    release::Release,
    tree,
};
use crate::shell::{self, TempDir};

/// Documents in the root of the tarball.
const DOCUMENTS: [&str; 4] = ["README.md", "CHANGELOG.md", "LICENSE-APACHE", "LICENSE-MIT"];

/// Makes the tarball in `dir`, and returns its path. The same files give the same bytes.
pub(crate) fn make(files: &[File], release: &Release, dir: &Path) -> Result<PathBuf> {
    let name = format!("nbdblk-{}-{}-linux", release.version, std::env::consts::ARCH);
    let stage = TempDir::new("tarball")?;
    let root = stage.path().join(&name);
    std::fs::create_dir(&root)?;
    tree::write(&root, files.iter())?;
    let read = |name: &&'static str| Ok(file(PROGRAM, *name, std::fs::read(shell::root().join(name))?));
    let documents: Vec<File> = DOCUMENTS.iter().map(read).collect::<Result<_>>()?;
    tree::write(&root, documents.iter())?;
    let mut tar = shell::command("tar");
    tar.arg("-C").arg(stage.path()).args(["--sort=name", "--owner=0", "--group=0", "--numeric-owner", "--format=gnu"]);
    tar.args([&format!("--mtime=@{}", release.epoch), "-c", &name]);
    let archive = shell::output_bytes(&mut tar)?;
    let to = dir.join(format!("{name}.tar.gz"));
    std::fs::write(&to, shell::compressed(&archive)?)?;
    Ok(to)
}
