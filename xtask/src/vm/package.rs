//! `cargo xtask vm package`: the life of the Debian packages on a clean Debian, in which systemd runs. `xtask/vm/package.sh` has
//! the steps.

use anyhow::{Result, ensure};

use super::{
    image::{self, Kind},
    machine::{Job, Machine, System},
};
use crate::{
    dist::{self, Release},
    shell::TempDir,
};

/// How long it may take. It takes some minutes on an idle computer.
const SECONDS_MAX: u64 = 1500;

/// Installs, upgrades, removes and purges the packages, or says why that cannot be done here.
pub(crate) fn test(verbose: bool, seconds_max: Option<u64>) -> Result<()> {
    let images = image::prepare(false).and_then(|image| Ok((image, image::prepare_kind(Kind::Clean, false)?)));
    let (image, root) = match images {
        Ok(images) => images,
        Err(error) => {
            let line = "*".repeat(100);
            println!("{line}\nTEST OF THE PACKAGES SKIPPED: this machine cannot run it: {error:#}\n{line}");
            return Ok(());
        }
    };
    let files = files()?;
    let machine = Machine {
        image: &image,
        shares: Vec::new(),
        binaries: Vec::new(),
        disk_mib: 16,
        append: "",
        iommu: false,
        instructions: false,
        verbose,
        system: System::Systemd { root: &root, files: &files },
    };
    let status = machine.run(&Job::Command {
        words: vec!["bash".into(), "package.sh".into()],
        dir: "/".into(),
        seconds_max: seconds_max.unwrap_or(SECONDS_MAX),
    })?;
    ensure!(status == 0, "the test of the packages ended with status {status}");
    Ok(())
}

/// The packages of this source, and as the next revision has them; and the steps.
fn files() -> Result<Vec<(String, Vec<u8>)>> {
    let old = Release::current()?;
    let new = Release { revision: old.revision + 1, ..old.clone() };
    let dir = TempDir::new("packages")?;
    let [old_dir, new_dir] = ["old", "new"].map(|name| dir.path().join(name));
    let mut files = vec![("package.sh".to_owned(), include_bytes!("../../vm/package.sh").to_vec())];
    for package in dist::packages(&[(&old, &old_dir), (&new, &new_dir)])? {
        let name = package.strip_prefix(dir.path())?.to_string_lossy().into_owned();
        if name.ends_with(".deb") {
            files.push((name, std::fs::read(&package)?));
        }
    }
    ensure!(files.len() == 5, "Debian packages can be made on Debian only");
    Ok(files)
}
