//! Installs the programs that the demo and the tests run, where the machine lacks them.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Result, bail, ensure};

use crate::shell::{self, find};

/// A program, and the packages it may be in: the first that exists and brings it wins.
struct Need {
    program: &'static str,
    packages: &'static [&'static str],
    purpose: &'static str,
}

const NEEDS: &[Need] = &[
    Need { program: "qemu-img", packages: &["qemu-utils"], purpose: "makes and compares disk images" },
    Need {
        program: "qemu-storage-daemon",
        // Debian 12 has it in qemu-system-common, later ones in qemu-utils.
        packages: &["qemu-utils", "qemu-system-common"],
        purpose: "exports an image over vhost-user",
    },
    Need { program: "nbdinfo", packages: &["libnbd-bin"], purpose: "an NBD client: nbdinfo, nbdcopy" },
    Need { program: "nbdsh", packages: &["python3-libnbd"], purpose: "an NBD client: Python" },
    Need { program: "nbdkit", packages: &["nbdkit"], purpose: "runs the plugin" },
    Need { program: "nbdkit", packages: &["nbdkit"], purpose: "loads the plugin" },
    Need {
        program: "nbdkit-plugin.h",
        packages: &["nbdkit-plugin-dev"],
        purpose: "what the plugin is checked against",
    },
    Need { program: "cc", packages: &["gcc"], purpose: "reads that header" },
    Need { program: "psktool", packages: &["gnutls-bin"], purpose: "makes keys for TLS" },
    Need { program: "certtool", packages: &["gnutls-bin"], purpose: "makes certificates for TLS" },
    Need { program: "openssl", packages: &["openssl"], purpose: "makes a key for TLS" },
    Need { program: "pkg-config", packages: &["pkgconf", "pkg-config"], purpose: "finds libssl" },
    Need { program: "openssl/ssl.h", packages: &["libssl-dev"], purpose: "TLS with pre-shared keys" },
    Need { program: "valgrind", packages: &["valgrind"], purpose: "counts instructions of the data path" },
    Need { program: "codespell", packages: &["codespell"], purpose: "finds misspelled words" },
    Need { program: "fio", packages: &["fio"], purpose: "an NBD client: load and verification" },
    Need { program: "prometheus", packages: &["prometheus"], purpose: "reads the metrics" },
    Need { program: "promtool", packages: &["prometheus"], purpose: "checks the metrics and the alert rules" },
    Need { program: "chromium", packages: &["chromium"], purpose: "shows the page of the metrics" },
    Need { program: "dpkg-shlibdeps", packages: &["dpkg-dev"], purpose: "finds what the packages depend on" },
    Need { program: "lintian", packages: &["lintian"], purpose: "checks the packages" },
    Need { program: "man", packages: &["man-db"], purpose: "shows the manual pages" },
    Need { program: "mandoc", packages: &["mandoc"], purpose: "checks the manual pages" },
    Need { program: "systemd-analyze", packages: &["systemd"], purpose: "checks the units" },
    Need { program: "zsh", packages: &["zsh"], purpose: "a shell with completions" },
    Need { program: "fish", packages: &["fish"], purpose: "a shell with completions" },
    Need { program: "mkfs.ext4", packages: &["e2fsprogs"], purpose: "makes a file system without mounting it" },
];

/// Programs that only `cargo xtask test` runs: the demo and benchmarks do without them.
const FOR_TESTS: &[&str] = &[
    "prometheus",
    "promtool",
    "chromium",
    "codespell",
    "dpkg-shlibdeps",
    "lintian",
    "man",
    "mandoc",
    "systemd-analyze",
    "zsh",
    "fish",
];

/// The programs to set up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Extent {
    /// The programs of the demo, benchmarks and torture.
    Basic,
    /// All programs, including those of tests.
    Tests,
}

/// Services that packages start and enable when they are installed. The tests need the programs only.
const UNWANTED: &[(&str, &str)] = &[("prometheus", "prometheus.service")];

/// Sets up, and fails when something is still missing.
pub(crate) fn run(extent: Extent) -> Result<()> {
    let missing = || missing(extent);
    if missing().next().is_none() {
        return Ok(());
    }
    println!("setup: these programs are missing:");
    for need in missing() {
        println!("  {:20} {}", need.program, need.purpose);
    }
    // Two rounds, because a package that was to bring a program may turn out not to.
    let mut tried: Vec<&str> = Vec::new();
    for round in 0.. {
        let packages: Vec<&str> = missing()
            .filter_map(|need| need.packages.iter().find(|package| !tried.contains(package)))
            .fold(Vec::new(), |mut all, package| {
                if !all.contains(package) {
                    all.push(package);
                }
                all
            });
        if packages.is_empty() {
            break;
        }
        let root = privilege(&packages)?;
        if round == 0 {
            println!("setup: apt-get update");
            apt(root, &["update", "-qq"])?;
        }
        println!("setup: apt-get install {}", packages.join(" "));
        apt(root, &[&["install", "-y", "-qq", "--no-install-recommends"], &packages[..]].concat())?;
        packages.iter().for_each(|package| stop_service(root, package));
        tried.extend(packages);
    }
    ensure!(missing().next().is_none(), "still missing after setup: {}", missing_programs(extent).join(", "));
    println!("setup: done");
    Ok(())
}

/// The programs that are not there.
pub(crate) fn missing_programs(extent: Extent) -> Vec<&'static str> {
    missing(extent).map(|need| need.program).collect()
}

fn missing(extent: Extent) -> impl Iterator<Item = &'static Need> {
    let is_needed = move |need: &&Need| extent == Extent::Tests || !FOR_TESTS.contains(&need.program);
    NEEDS.iter().filter(is_needed).filter(|need| match need.program {
        "nbdsh" => !nbdsh_works(),
        header if header.ends_with(".h") => !Path::new("/usr/include").join(header).exists(),
        program => find(program).is_none(),
    })
}

/// nbdsh is a script: it is there only when its Python module is there too.
fn nbdsh_works() -> bool {
    shell::command("nbdsh")
        .args(["-c", "pass"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

/// How to run apt-get as root: the words before it. An error says what the user is to type.
fn privilege(packages: &[&str]) -> Result<&'static [&'static str]> {
    if find("apt-get").is_none() {
        bail!(
            "this machine has no apt-get; install by its own means what Debian calls {}, then run this again",
            packages.join(" ")
        );
    }
    let output = Command::new("id").arg("-u").output()?;
    if output.stdout == b"0\n" {
        return Ok(&[]);
    }
    if find("sudo").is_some() {
        return Ok(&["sudo"]);
    }
    bail!("not root and no sudo here; as root type `apt-get install {}`, then run this again", packages.join(" "))
}

/// Stops and disables the service of a package. Where systemd does not run, it was not started.
fn stop_service(root: &[&str], package: &str) {
    for (_, service) in UNWANTED.iter().filter(|(of, _)| *of == package) {
        let is_booted = Path::new("/run/systemd/system").exists();
        let args: &[&str] = if is_booted { &["disable", "--now", service] } else { &["disable", service] };
        let words = [root, &["systemctl", "--quiet"], args].concat();
        // A machine without systemctl has no services.
        let _ = Command::new(words[0]).args(&words[1..]).env("PATH", shell::search_path()).status();
    }
}

fn apt(root: &[&str], args: &[&str]) -> Result<()> {
    let words = [root, &["env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-o", "Dpkg::Use-Pty=0"], args].concat();
    shell::ok(Command::new(words[0]).args(&words[1..]).env("PATH", shell::search_path()))
}
