//! `cargo xtask dist`: what is installed, built and laid out as it is to lie under `/`.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::shell;

/// Builds the release binaries and puts them, with the manual page, into `dir` (`dist` in cargo's directory if not given).
pub(crate) fn run(dir: Option<&str>) -> Result<()> {
    let target = shell::target_dir()?;
    let dir = dir.map_or_else(|| target.join("dist"), PathBuf::from);
    let nbdblk = build_nbdblk()?;
    let plugin = build_plugin()?;
    let plugins = plugin_dir()?;
    let put = |from: &Path, to: &Path| -> Result<()> {
        // Only the part below the root: `join` of an absolute path would forget `dir`.
        let to = dir.join(to.strip_prefix("/").unwrap_or(to));
        let parent = to.parent().context("a file lies in a directory")?;
        std::fs::create_dir_all(parent).with_context(|| format!("creating {}", parent.display()))?;
        // A new file, because nbdkit may have the old one mapped.
        let _ = std::fs::remove_file(&to);
        std::fs::copy(from, &to).with_context(|| format!("copying {} to {}", from.display(), to.display()))?;
        println!("{}", to.display());
        Ok(())
    };
    put(&nbdblk, Path::new("/usr/bin/nbdblk"))?;
    put(&plugin, &plugins.join("nbdkit-nbdblk-plugin.so"))?;
    let page = target.join("nbdkit-nbdblk-plugin.1");
    man_page(&shell::root().join("docs/nbdkit-nbdblk-plugin.pod"), &page)?;
    put(&page, Path::new("/usr/share/man/man1/nbdkit-nbdblk-plugin.1"))?;
    println!("\ninstall with: cp -r {}/. /\nthen:         nbdkit nbdblk io_uring path=disk.img", dir.display());
    Ok(())
}

/// Builds the release server with every cargo feature: a package lacks nothing that the manual describes.
fn build_nbdblk() -> Result<PathBuf> {
    shell::ok(shell::cargo().args(["build", "--release", "-p", "nbdblk", "--all-features"]))?;
    Ok(shell::target_dir()?.join("release/nbdblk"))
}

/// Builds the release plugin and says where cargo put it.
pub(crate) fn build_plugin() -> Result<PathBuf> {
    shell::ok(shell::cargo().args(["build", "--release", "-p", "nbdkit-nbdblk-plugin"]))?;
    Ok(shell::target_dir()?.join("release/libnbdkit_nbdblk_plugin.so"))
}

/// Where nbdkit looks for `nbdkit NAME`.
fn plugin_dir() -> Result<PathBuf> {
    let output = shell::command("nbdkit").arg("--dump-config").output();
    let output = output.context("nbdkit is not installed: run `cargo xtask setup`")?;
    let text = String::from_utf8(output.stdout)?;
    let dir = text.lines().find_map(|line| line.strip_prefix("plugindir="));
    Ok(dir.context("nbdkit --dump-config names no plugindir")?.into())
}

fn man_page(source: &Path, page: &Path) -> Result<()> {
    let mut command: Command = shell::command("pod2man");
    let version = env!("CARGO_PKG_VERSION");
    command.args(["--utf8", "--section=1", "--center=NBDKIT", "--name=nbdkit-nbdblk-plugin"]);
    command.arg(format!("--release=nbdblk-{version}")).args([source, page]);
    shell::ok(&mut command)?;
    // pod2man appends what it did not like, and ends well.
    let text = std::fs::read_to_string(page)?;
    ensure!(!text.contains("POD ERRORS"), "{}: see the end of {}", source.display(), page.display());
    Ok(())
}
