//! Runs a fuzz target with libFuzzer, on the stable toolchain and without cargo-fuzz.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::shell;

/// What cargo-fuzz would ask of the compiler: counters on edges and comparisons, for libFuzzer to steer by.
const RUSTFLAGS: &str = "--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
     -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
     -Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1 -Cdebug-assertions -Coverflow-checks \
     -Zsanitizer=address";

/// Prints every target.
pub(crate) fn list() -> Result<()> {
    for (package, target) in targets()? {
        println!("{target:20} {}", package.display());
    }
    Ok(())
}

/// Runs `target` for `seconds`; a crash ends the run with an error and leaves its input behind.
pub(crate) fn run(target: &str, seconds: u32) -> Result<()> {
    let all = targets()?;
    let (package, _) = all
        .iter()
        .find(|(_, name)| name == target)
        .with_context(|| format!("no fuzz target {target}; `cargo xtask fuzz` lists them"))?;
    let triple = host()?;
    let dir = shell::target_dir()?.join("fuzz");
    let mut build = shell::cargo();
    build.args(["build", "--release", "--bin", target, "--target", &triple]);
    build.arg("--manifest-path").arg(package.join("Cargo.toml")).arg("--target-dir").arg(&dir);
    // The sanitizer is an unstable option of the compiler; this lets the stable one take it.
    shell::ok(build.env("RUSTC_BOOTSTRAP", "1").env("RUSTFLAGS", RUSTFLAGS))?;

    // What it finds goes below the target directory; the corpus in the tree, which tests replay, is only read.
    let (found, crashes) = (dir.join("corpus").join(target), dir.join("crashes"));
    std::fs::create_dir_all(&found)?;
    std::fs::create_dir_all(&crashes)?;
    let mut fuzz = std::process::Command::new(dir.join(triple).join("release").join(target));
    fuzz.arg(format!("-max_total_time={seconds}")).arg(format!("-artifact_prefix={}/", crashes.display())).arg(found);
    fuzz.args([package.join("corpus").join(target)].iter().filter(|seeds| seeds.is_dir()));
    println!("{}", shell::show(&fuzz));
    shell::ok(&mut fuzz)
}

/// Runs each target for `seconds`.
pub(crate) fn run_all(seconds: u32) -> Result<()> {
    targets()?.iter().try_for_each(|(_, target)| run(target, seconds))
}

/// Each package for fuzzing and each target in it.
fn targets() -> Result<Vec<(PathBuf, String)>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("crates")? {
        let package = entry?.path().join("fuzz");
        for target in files(&package.join("fuzz_targets")) {
            if let Some(name) = target.file_stem().filter(|_| target.extension().is_some_and(|ext| ext == "rs")) {
                found.push((package.clone(), name.to_string_lossy().into_owned()));
            }
        }
    }
    found.sort();
    Ok(found)
}

fn files(dir: &Path) -> Vec<PathBuf> {
    std::fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
}

fn host() -> Result<String> {
    let output = std::process::Command::new("rustc").arg("-vV").output()?;
    let text = String::from_utf8(output.stdout)?;
    let line = text.lines().find_map(|line| line.strip_prefix("host: ")).context("rustc -vV names no host")?;
    Ok(line.into())
}
