//! The machine's images: a small Debian with its kernel, and a clean Debian with systemd. They are made once, and kept in the
//! user's cache directory.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};

use crate::shell::{self, find};

/// The release of Debian in the machine.
const SUITE: &str = "trixie";

/// What an image is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The machine with devices. It has a kernel and QEMU.
    Devices,
    /// A Debian to install packages in.
    Clean,
}

impl Kind {
    /// Its directory in the cache.
    fn name(self) -> &'static str {
        match self {
            Self::Devices => "image",
            Self::Clean => "clean",
        }
    }

    /// What makes a root from a bare Debian; runs in it.
    fn script(self) -> &'static str {
        match self {
            Self::Devices => include_str!("../../vm/root.sh"),
            Self::Clean => include_str!("../../vm/clean-root.sh"),
        }
    }
}

/// An image that is ready.
#[derive(Debug)]
pub(crate) struct Image {
    dir: PathBuf,
}

impl Image {
    /// The root directory; QEMU itself is run from it.
    pub(crate) fn root(&self) -> PathBuf {
        self.dir.join("root")
    }

    /// The same as the image of a disk.
    pub(crate) fn disk(&self) -> PathBuf {
        self.dir.join("root.img")
    }

    /// The unpacked kernel.
    pub(crate) fn kernel(&self) -> PathBuf {
        self.dir.join("vmlinux")
    }

    /// The files of the modules that reach the root, in the order of loading.
    pub(crate) fn early_modules(&self) -> Result<Vec<PathBuf>> {
        let list = std::fs::read_to_string(self.root().join("boot/early"))?;
        Ok(list.lines().map(|line| self.root().join(line.trim_start_matches('/'))).collect())
    }
}

/// Makes the image with the devices unless it is there already and made by this recipe.
pub(crate) fn prepare(force: bool) -> Result<Image> {
    prepare_kind(Kind::Devices, force)
}

/// As [`prepare`], of any kind.
pub(crate) fn prepare_kind(kind: Kind, force: bool) -> Result<Image> {
    let cache = cache_dir()?;
    let image = Image { dir: cache.join(kind.name()) };
    let recipe = format!("{SUITE}\n{}", kind.script());
    let is_current = || std::fs::read_to_string(image.dir.join("recipe")).is_ok_and(|text| text == recipe);
    if !force && is_current() {
        return Ok(image);
    }
    obstacles()?;
    std::fs::create_dir_all(&cache).with_context(|| format!("creating {}", cache.display()))?;
    let lock = File::create(cache.join("lock")).with_context(|| format!("locking {}", cache.display()))?;
    lock.lock().with_context(|| format!("locking {}", cache.display()))?;
    // Another process may have been making it all the while.
    if force || !is_current() {
        let start = Instant::now();
        make(kind, &cache, &image.dir, &recipe)?;
        eprintln!("vm: the image is ready, after {} s", start.elapsed().as_secs());
    }
    Ok(image)
}

/// Fails where no image can be made.
fn obstacles() -> Result<()> {
    ensure!(cfg!(all(target_arch = "x86_64", target_os = "linux")), "the machine's image is for Linux on x86-64");
    let id = Command::new("id").arg("-u").output().context("starting id")?;
    ensure!(id.stdout == b"0\n", "not root, and debootstrap needs it");
    if find("debootstrap").is_none() || find("mke2fs").is_none() {
        ensure!(
            find("apt-get").is_some(),
            "debootstrap and mke2fs are needed, and there is no apt-get to install them"
        );
        eprintln!("vm: apt-get install debootstrap e2fsprogs");
        let mut install = shell::command("apt-get");
        install.args(["install", "-y", "-qq", "--no-install-recommends", "debootstrap", "e2fsprogs"]);
        shell::ok(install.env("DEBIAN_FRONTEND", "noninteractive").stdout(Stdio::null()))?;
    }
    Ok(())
}

fn cache_dir() -> Result<PathBuf> {
    if let Some(dir) = std::env::var_os("NBDBLK_VM_CACHE") {
        return Ok(std::path::absolute(dir)?);
    }
    let home = || std::env::var_os("HOME").map(|home| Path::new(&home).join(".cache"));
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).or_else(home);
    Ok(cache.context("neither HOME nor XDG_CACHE_HOME is set")?.join("nbdblk/vm"))
}

fn make(kind: Kind, cache: &Path, image: &Path, recipe: &str) -> Result<()> {
    let mirror = mirror()?;
    let work = cache.join("work");
    remove(&work)?;
    let root = work.join("root");
    std::fs::create_dir(&work)?;
    let log = cache.join("prepare.log");
    let log_file = File::create(&log)?;
    let logged = |what: &str, command: &mut Command| -> Result<()> {
        eprintln!("vm: {what}");
        command.stdin(Stdio::null()).stdout(log_file.try_clone()?).stderr(log_file.try_clone()?);
        shell::ok(command).with_context(|| format!("{what}: {} says why", log.display()))
    };

    logged(
        &format!("debootstrap {SUITE}"),
        shell::command("debootstrap").args(["--variant=minbase", SUITE]).arg(&root).arg(&mirror),
    )?;
    logged(
        "installing the machine's programs",
        shell::command("chroot").arg(&root).args(["/bin/sh", "-c", kind.script()]),
    )?;
    if kind == Kind::Devices {
        std::fs::rename(root.join("boot/vmlinux"), work.join("vmlinux"))?;
    }
    let size = Command::new("du").args(["-sxm"]).arg(&root).output().context("starting du")?;
    let size = String::from_utf8(size.stdout)?;
    let size: u64 = size.split_whitespace().next().context("du says nothing")?.parse()?;
    logged(
        "making the disk",
        shell::command("mke2fs")
            .args(["-q", "-t", "ext4", "-O", "^has_journal", "-L", "root", "-d"])
            .arg(&root)
            .arg(work.join("root.img"))
            .arg(format!("{}M", size + size / 8 + 400)),
    )?;
    std::fs::write(work.join("recipe"), recipe)?;
    // A machine that runs keeps the files that it has open.
    remove(image)?;
    std::fs::rename(&work, image).with_context(|| format!("moving {} into place", work.display()))
}

fn remove(dir: &Path) -> Result<()> {
    match std::fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("removing {}", dir.display()))
        }
        _ => Ok(()),
    }
}

/// The Debian archive that this computer's own apt uses.
fn mirror() -> Result<String> {
    if let Ok(mirror) = std::env::var("NBDBLK_VM_MIRROR") {
        return Ok(mirror);
    }
    let output = shell::command("apt-get")
        .args(["indextargets", "--format", "$(REPO_URI) $(RELEASE) $(COMPONENT) $(ORIGIN)", "Created-By: Packages"])
        .output()
        .context("asking apt-get for its archive")?;
    let text = String::from_utf8(output.stdout)?;
    // Updates and security fixes have archives, or releases, of their own.
    let main = text.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    let uri =
        main.filter(|words| words.len() > 2 && words[2] == "main" && !words[1].contains('-')).map(|words| words[0]);
    match uri.into_iter().find(|uri| !uri.contains("security")) {
        Some(uri) => Ok(uri.into()),
        None => bail!("apt-get names no Debian archive; NBDBLK_VM_MIRROR can"),
    }
}
