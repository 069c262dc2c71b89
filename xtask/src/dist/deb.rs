//! Debian packages, by dpkg-deb from the files of a package.

use std::{
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
};

use anyhow::Result;

use super::{
    changelog,
    control::{Package, architecture},
    files::{File, file},
    release::Release,
    tree,
};
use crate::shell::{self, TempDir};

/// Makes a package in `dir`, and returns its path. The same files give the same bytes.
pub(crate) fn make(package: &Package, all: &[File], release: &Release, dir: &Path) -> Result<PathBuf> {
    let mut files: Vec<File> = all.iter().filter(|file| file.package == package.name).cloned().collect();
    files.extend(documents(package, release)?);
    files.sort_by(|a, b| a.path.cmp(&b.path));
    let size_kib = files.iter().map(|file| file.content.as_ref().map_or(1, |content| content.len().div_ceil(1024)));
    let mut control = vec![
        file(package.name, "DEBIAN/control", package.control(release, size_kib.sum::<usize>() as u64)?.into_bytes()),
        file(package.name, "DEBIAN/md5sums", md5sums(&files)?.into_bytes()),
    ];
    for (name, text) in package.scripts {
        let script = file(package.name, format!("DEBIAN/{name}"), text.as_bytes().into());
        control.push(File { mode: 0o755, ..script });
    }
    let stage = TempDir::new(&format!("deb-{}", package.name))?;
    tree::write(stage.path(), files.iter().chain(&control))?;
    let name = format!("{}_{}_{}.deb", package.name, release.debian_version(), architecture()?);
    let to = dir.join(name);
    let mut command = shell::command("dpkg-deb");
    // Threads change the result of xz. Times are not later than the epoch.
    command.env("SOURCE_DATE_EPOCH", release.epoch.to_string());
    command.args(["--root-owner-group", "-Zxz", "--threads-max=1", "--build"]).arg(stage.path()).arg(&to);
    shell::output(&mut command)?;
    Ok(to)
}

/// Files that only Debian's packages have.
fn documents(package: &Package, release: &Release) -> Result<Vec<File>> {
    let name = package.name;
    let at = |place: &str| format!("usr/share/doc/{name}/{place}");
    let upstream = fs::read(shell::root().join("CHANGELOG.md"))?;
    let debian = changelog::debian(&String::from_utf8(upstream.clone())?, release)?;
    let copyright = fs::read(shell::root().join("dist/debian/copyright"))?;
    Ok(vec![
        file(name, at("changelog.gz"), shell::compressed(&upstream)?),
        file(name, at("changelog.Debian.gz"), shell::compressed(debian.as_bytes())?),
        file(name, at("copyright"), copyright),
        file(name, format!("usr/share/lintian/overrides/{name}"), package.overrides.as_bytes().into()),
    ])
}

/// The checksums of all files.
fn md5sums(files: &[File]) -> Result<String> {
    let mut text = String::new();
    for file in files {
        let Some(content) = &file.content else { continue };
        let sum = shell::filtered(shell::command("md5sum").arg("-"), content)?;
        let sum = String::from_utf8(sum)?;
        let sum = sum.split(' ').next().unwrap_or_default();
        writeln!(text, "{sum}  {}", file.path.display())?;
    }
    Ok(text)
}
