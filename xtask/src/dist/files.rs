//! All files that users get: the package, the place and the content of each.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::{
    build::{self, Built},
    licenses,
    release::Release,
};
use crate::shell;

/// A file of a package.
#[derive(Clone, Debug)]
pub(crate) struct File {
    /// The name of the package.
    pub(crate) package: &'static str,
    /// Below the root, without a slash at the start.
    pub(crate) path: PathBuf,
    /// `None`: an empty directory.
    pub(crate) content: Option<Vec<u8>>,
    pub(crate) mode: u32,
}

/// The package with the program.
pub(crate) const PROGRAM: &str = "nbdblk";
/// The package with the plugin.
pub(crate) const PLUGIN: &str = "nbdkit-nbdblk-plugin";

/// The page that belongs to the plugin.
const PLUGIN_PAGE: &str = "nbdkit-nbdblk-plugin.1";

/// Files of the source that are installed as they are: source, place. A place that ends with a slash is a directory.
const PLAIN: &[(&str, &str)] = &[
    ("dist/systemd/nbdblk.service", "usr/lib/systemd/system/"),
    ("dist/systemd/nbdblk@.service", "usr/lib/systemd/system/"),
    ("dist/systemd/nbdblk@.socket", "usr/lib/systemd/system/"),
    ("dist/systemd/sysusers.conf", "usr/lib/sysusers.d/nbdblk.conf"),
    ("docs/nbdblk.toml", "usr/share/doc/nbdblk/examples/"),
    ("dist/systemd/examples/block-device.conf", "usr/share/doc/nbdblk/examples/"),
    ("dist/systemd/examples/nvme-passthrough.conf", "usr/share/doc/nbdblk/examples/"),
    ("dist/systemd/examples/vdpa.conf", "usr/share/doc/nbdblk/examples/"),
    ("dist/systemd/examples/vfio.conf", "usr/share/doc/nbdblk/examples/"),
    ("dist/systemd/examples/70-nbdblk.rules", "usr/share/doc/nbdblk/examples/"),
    ("dist/grafana/nbdblk.json", "usr/share/doc/nbdblk/examples/grafana/"),
    ("dist/prometheus/nbdblk-alerts.yml", "usr/share/doc/nbdblk/examples/prometheus/"),
    ("dist/prometheus/scrape.yml", "usr/share/doc/nbdblk/examples/prometheus/"),
    ("dist/kubernetes/nbdblk.yaml", "usr/share/doc/nbdblk/examples/kubernetes/"),
    ("docs/operations.md", "usr/share/doc/nbdblk/"),
    ("docs/restarts.md", "usr/share/doc/nbdblk/"),
    ("docs/security.md", "usr/share/doc/nbdblk/"),
    ("docs/status.md", "usr/share/doc/nbdblk/"),
    ("docs/upgrade.md", "usr/share/doc/nbdblk/"),
];

/// Completions: the name that clap gives them, and their place.
const COMPLETIONS: &[(&str, &str)] = &[
    ("nbdblk.bash", "usr/share/bash-completion/completions/nbdblk"),
    ("_nbdblk", "usr/share/zsh/vendor-completions/_nbdblk"),
    ("nbdblk.fish", "usr/share/fish/vendor_completions.d/nbdblk.fish"),
];

/// Builds the programs, and collects the files of all packages.
pub(crate) fn all(release: &Release) -> Result<Vec<File>> {
    let built = build::all(release)?;
    let mut files = programs(&built)?;
    files.extend(pages(&built.pages)?);
    for (name, to) in COMPLETIONS {
        files.push(file(PROGRAM, to, read(&built.completions.join(name))?));
    }
    for (from, to) in PLAIN {
        let name = from.rsplit('/').next().unwrap_or_default();
        let to = if to.ends_with('/') { format!("{to}{name}") } else { (*to).to_owned() };
        let mut content = read(&shell::root().join(from))?;
        if from.ends_with(".md") {
            content = with_installed_links(std::str::from_utf8(&content)?).into_bytes();
        }
        files.push(file(PROGRAM, to, content));
    }
    files.push(File { package: PROGRAM, path: "etc/nbdblk".into(), content: None, mode: 0o755 });
    for (package, features) in [(PROGRAM, &["--all-features"][..]), (PLUGIN, &[])] {
        let text = licenses::of(package, features)?;
        let to = format!("usr/share/doc/{package}/third-party-licenses.gz");
        files.push(file(package, to, shell::compressed(text.as_bytes())?));
    }
    files.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(files)
}

/// A page of docs/ whose links lead to installed files. A link to a file that is not installed becomes plain text.
fn with_installed_links(page: &str) -> String {
    let mut text = String::new();
    let mut rest = page;
    while let Some(middle) = rest.find("](") {
        let (before, after) = (&rest[..middle], &rest[middle + 2..]);
        let (Some(start), Some(end)) = (before.rfind('['), after.find(')')) else { break };
        let (label, link) = (&before[start + 1..], &after[..end]);
        text += &before[..start];
        text += &match installed(link) {
            Some(link) => format!("[{label}]({link})"),
            None => label.to_owned(),
        };
        rest = &after[end + 1..];
    }
    text + rest
}

/// A link of a page of docs/, as it is between installed files. `None`: its target is not installed.
fn installed(link: &str) -> Option<String> {
    if link.starts_with('#') || link.contains("://") {
        return Some(link.to_owned());
    }
    let (path, anchor) = link.split_at(link.find('#').unwrap_or(link.len()));
    let source = path.strip_prefix("../").map_or_else(|| format!("docs/{path}"), str::to_owned);
    let (_, to) = PLAIN.iter().find(|(from, _)| *from == source)?;
    let name = source.rsplit('/').next().unwrap_or_default();
    Some(format!("{}{name}{anchor}", to.strip_prefix("usr/share/doc/nbdblk/")?))
}

fn programs(built: &Built) -> Result<Vec<File>> {
    let program = File { mode: 0o755, ..file(PROGRAM, "usr/bin/nbdblk", read(&built.program)?) };
    let to = plugin_dir()?.join("nbdkit-nbdblk-plugin.so");
    Ok(vec![program, file(PLUGIN, to, read(&built.plugin)?)])
}

fn pages(dir: &Path) -> Result<Vec<File>> {
    let mut files = Vec::new();
    for section in std::fs::read_dir(dir)? {
        let section = section?;
        for page in std::fs::read_dir(section.path())? {
            let name = page?.file_name().into_string().ok().context("names of pages are UTF-8")?;
            let package = if name == PLUGIN_PAGE { PLUGIN } else { PROGRAM };
            let to = Path::new("usr/share/man").join(section.file_name()).join(format!("{name}.gz"));
            files.push(file(package, to, shell::compressed(&read(&section.path().join(&name))?)?));
        }
    }
    Ok(files)
}

/// A file that all may read.
pub(crate) fn file(package: &'static str, path: impl Into<PathBuf>, content: Vec<u8>) -> File {
    File { package, path: path.into(), content: Some(content), mode: 0o644 }
}

fn read(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).with_context(|| format!("reading {}", path.display()))
}

/// Where nbdkit looks for `nbdkit NAME`, below the root.
fn plugin_dir() -> Result<PathBuf> {
    let text = shell::output(shell::command("nbdkit").arg("--dump-config"));
    let text = text.context("nbdkit is not installed: run `cargo xtask setup`")?;
    let dir = text.lines().find_map(|line| line.strip_prefix("plugindir="));
    Ok(dir.context("nbdkit --dump-config names no plugindir")?.trim_start_matches('/').into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_lead_to_installed_files() {
        let page = "See [a](#b), [c](status.md#d), [the\nmanifest](../dist/kubernetes/nbdblk.yaml) and [map](../ARCHITECTURE.md).";
        let expected = "See [a](#b), [c](status.md#d), [the\nmanifest](examples/kubernetes/nbdblk.yaml) and map.";
        assert_eq!(with_installed_links(page), expected);
        assert_eq!(with_installed_links("[x](https://example.org/a) [y"), "[x](https://example.org/a) [y");
    }
}
