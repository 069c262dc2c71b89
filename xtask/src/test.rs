//! Every check there is, in the order in which they fail fastest.

use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::Result;

use crate::{bench, ceph, dist, fuzz, picture, setup, shell, trixie, vm};

/// What `--long` runs more of: a million seeds of the simulation, ten minutes of torture, and an hour of fuzzing. It also serves
/// an image of a Ceph cluster, and builds the packages in two directories.
const TIMES: &str = "100";
const TORTURE: &str = "600";
const FUZZING: u32 = 60;

/// Runs what takes too long for every change.
pub(crate) fn run_long() -> Result<()> {
    let mut simulation = shell::cargo();
    simulation.args(["test", "--release", "-p", "nbd-server-core", "--test", "simulation"]);
    step(simulation.env("SIMULATION_TIMES", TIMES).env("RUST_BACKTRACE", "0"))?;
    step(Command::new(std::env::current_exe()?).args(["torture", "--seconds", TORTURE]))?;
    announce("cargo xtask ceph");
    ceph::run()?;
    announce("the packages, built in another directory");
    dist::check_elsewhere()?;
    fuzz::run_all(FUZZING)
}

/// Runs all checks; the first that fails ends the run.
pub(crate) fn run() -> Result<()> {
    let start = Instant::now();
    setup::run(setup::Extent::Tests)?;
    step(shell::cargo().args(["fmt", "--all", "--check"]))?;
    step(shell::cargo().args(["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]))?;
    step(shell::cargo().args(["clippy", "--workspace", "--all-targets", "--all-features", "--", "-D", "warnings"]))?;
    picture::check()?;
    // Of the libraries only: the doc comments of the programs are the text of their help.
    let mut doc = shell::cargo();
    doc.args(["doc", "--workspace", "--lib", "--all-features", "--no-deps"]).env("RUSTDOCFLAGS", "-D warnings");
    step(&mut doc)?;
    announce("cargo build --release -p nbdblk");
    let nbdblk = shell::build_nbdblk()?;
    announce("cargo build --release -p nbdkit-nbdblk-plugin");
    let plugin = dist::build_plugin()?;
    announce("cargo xtask dist, twice");
    let packages = dist::check()?;

    // The tests of the binary run what users run: the release build. Unit tests keep their debug assertions.
    let mut tests = shell::cargo();
    if nextest() {
        tests.args(["nextest", "run", "--workspace", "--all-features", "--no-fail-fast"]);
        tests.args(["--config-file", "tests/nextest.toml"]);
    } else {
        tests.args(["test", "--workspace", "--all-features", "--no-fail-fast", "--all-targets"]);
    }
    tests.env("NBDBLK_BIN", &nbdblk).env("NBDBLK_PLUGIN", &plugin).env("NBDBLK_PACKAGES", &packages);
    step(tests.stdin(Stdio::null()))?;
    match trixie::with(&["libnbd-bin", "python3-libnbd"]) {
        Ok(root) => {
            println!("\n    and once more with the nbdkit and the clients in {}", root.display());
            let mut tests = shell::cargo();
            tests.args(["test", "-p", "nbdblk-tests", "--all-features", "--test", "plugin"]);
            step(tests.env("NBDBLK_PLUGIN", &plugin).env("NBDBLK_NBDKIT_ROOT", &root).stdin(Stdio::null()))?;
            let mut tests = shell::cargo();
            tests.args(["test", "-p", "nbdblk-tests", "--all-features", "--test", "e2e", "trixie"]);
            step(tests.env("NBDBLK_BIN", &nbdblk).env("NBDBLK_NBDKIT_ROOT", &root).stdin(Stdio::null()))?;
        }
        Err(error) => println!("\n!!! SKIPPED: Debian trixie's nbdkit and libnbd: {error:#}"),
    }
    step(shell::cargo().args(["test", "--workspace", "--all-features", "--doc"]))?;
    // A process of its own, because it handles signals.
    step(Command::new(std::env::current_exe()?).arg("torture"))?;
    announce("cargo xtask bench --check");
    bench::check()?;
    announce("cargo xtask vm package");
    vm::test_packages(false, None)?;
    announce("cargo xtask vm test");
    vm::test(&[])?;
    println!("\nall checks passed in {} s", start.elapsed().as_secs());
    Ok(())
}

fn nextest() -> bool {
    let mut probe = shell::cargo();
    probe.args(["nextest", "--version"]).stdout(Stdio::null()).stderr(Stdio::null());
    probe.status().is_ok_and(|status| status.success())
}

fn announce(what: &str) {
    println!("\n=== {what}");
}

fn step(command: &mut Command) -> Result<()> {
    announce(&shell::show(command));
    let start = Instant::now();
    shell::ok(command)?;
    println!("=== done in {:.1} s", start.elapsed().as_secs_f64());
    Ok(())
}
