//! The Debian packages and the systemd units, without installing them. `cargo xtask vm package` installs them.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use nbdblk_tests::{Dir, cargo, nbdblk, root, tool};

/// The highest exposure that a unit may have, as `systemd-analyze security` rates it: 0 to 10.
const EXPOSURE_MAX: f32 = 2.0;

/// The directory of the packages: `$NBDBLK_PACKAGES`, or made once.
fn packages() -> &'static Path {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| {
        if let Some(dir) = std::env::var_os("NBDBLK_PACKAGES") {
            return dir.into();
        }
        let output = cargo().args(["run", "--quiet", "-p", "xtask", "--", "dist"]).output().expect("cargo runs");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let text = String::from_utf8(output.stdout).expect("paths are UTF-8");
        Path::new(text.lines().next_back().expect("it prints the packages")).parent().expect("a directory").to_owned()
    })
}

/// The Debian packages.
fn debs() -> Vec<PathBuf> {
    let entries =
        fs::read_dir(packages()).expect("the directory is there").map(|entry| entry.expect("an entry").path());
    let found: Vec<PathBuf> = entries.filter(|path| path.extension().is_some_and(|end| end == "deb")).collect();
    assert_eq!(found.len(), 2, "{found:?}");
    found
}

#[test]
fn lintian_has_no_complaint() {
    let said = tool("lintian").args(["--allow-root", "--fail-on", "none"]).args(debs()).run();
    assert!(said.status.success(), "{}{}", said.out, said.err);
    assert_eq!(said.out.trim(), "", "{}", said.err);
}

#[test]
fn packages_have_what_they_promise() {
    let list = |deb: &PathBuf| tool("dpkg-deb").args(["--contents"]).args([deb]).ok().out;
    let all: String = debs().iter().map(list).collect();
    for path in [
        "usr/bin/nbdblk",
        "usr/lib/systemd/system/nbdblk.service",
        "usr/lib/systemd/system/nbdblk@.service",
        "usr/lib/systemd/system/nbdblk@.socket",
        "usr/lib/sysusers.d/nbdblk.conf",
        "usr/share/bash-completion/completions/nbdblk",
        "usr/share/zsh/vendor-completions/_nbdblk",
        "usr/share/fish/vendor_completions.d/nbdblk.fish",
        "usr/share/doc/nbdblk/examples/nbdblk.toml",
        "usr/share/doc/nbdblk/examples/vfio.conf",
        "usr/share/doc/nbdblk/examples/vdpa.conf",
        "usr/share/man/man1/nbdblk.1.gz",
        "usr/share/man/man1/nbdblk-serve.1.gz",
        "usr/share/man/man1/nbdblk-status.1.gz",
        "usr/share/man/man1/nbdkit-nbdblk-plugin.1.gz",
        "usr/share/man/man5/nbdblk.toml.5.gz",
        "usr/share/man/man7/nbdblk-drivers.7.gz",
        "nbdkit-nbdblk-plugin.so",
    ] {
        assert!(all.contains(path), "no {path} in\n{all}");
    }
    assert!(all.lines().all(|line| line.contains(" root/root ")), "{all}");
}

/// No path of the computer that built them.
#[test]
fn programs_do_not_say_where_they_were_built() {
    let dir = Dir::new();
    for deb in debs() {
        tool("dpkg-deb").args(["--extract"]).args([deb.as_path(), dir.path()]).ok();
    }
    let found = tool("grep").args(["-rlaF", root().to_str().expect("UTF-8")]).args([dir.at("usr")]).run();
    assert_eq!(found.out, "", "the files name {}", root().display());
}

/// The units, in a directory of their own, with the program under test, and with a drop-in if one is given.
fn units(drop_in: Option<&str>) -> Dir {
    let dir = Dir::new();
    for name in ["nbdblk.service", "nbdblk@.service", "nbdblk@.socket"] {
        let text = fs::read_to_string(root().join("dist/systemd").join(name)).expect("the units are in dist");
        let text = text.replace("/usr/bin/nbdblk", nbdblk().path().to_str().expect("UTF-8"));
        fs::write(dir.at(name), text).expect("a new file");
        if let Some(drop_in) = drop_in {
            fs::create_dir_all(dir.at(&format!("{name}.d"))).expect("a new directory");
            let example = root().join("dist/systemd/examples").join(drop_in);
            fs::copy(example, dir.at(&format!("{name}.d/{drop_in}"))).expect("the example is there");
        }
    }
    dir
}

#[test]
fn systemd_accepts_the_units() {
    let dir = units(None);
    let names = ["nbdblk.service", "nbdblk@x.service", "nbdblk@x.socket"].map(|name| dir.at(name));
    let said = tool("systemd-analyze").args(["verify", "--man=no"]).args(names).run();
    assert_eq!((said.status.success(), said.err.trim()), (true, ""));
}

#[test]
fn services_are_confined() {
    let drop_ins = ["block-device.conf", "nvme-passthrough.conf", "vdpa.conf", "vfio.conf"];
    for drop_in in [None].into_iter().chain(drop_ins.map(Some)) {
        let dir = units(drop_in);
        for unit in ["nbdblk.service", "nbdblk@.service"] {
            let said = tool("systemd-analyze")
                .args(["security", "--offline=true", "--no-pager"])
                .args([dir.at(unit)])
                .env("SYSTEMD_UNIT_PATH", format!("{}:", dir.path().display()))
                .ok();
            let last = said.out.lines().next_back().unwrap_or_default();
            let exposure = last.split_whitespace().find_map(|word| word.parse::<f32>().ok());
            let exposure = exposure.unwrap_or_else(|| panic!("no number in {last}"));
            println!("{unit} with {drop_in:?}: {exposure}");
            assert!(exposure <= EXPOSURE_MAX, "{unit} with {drop_in:?}: {}", said.out);
        }
    }
}

/// The service and its template differ only where they must.
#[test]
fn services_have_the_same_settings() {
    let settings = |name: &str| {
        let text = fs::read_to_string(root().join("dist/systemd").join(name)).expect("the units are in dist");
        let differs = ["#", "Description=", "ExecStart=", "RuntimeDirectory="];
        let lines = text.lines().filter(|line| !differs.iter().any(|start| line.starts_with(start)));
        lines.map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(settings("nbdblk.service"), settings("nbdblk@.service"));
}
