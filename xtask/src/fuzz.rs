//! Runs fuzz targets with libFuzzer, on the stable toolchain and without cargo-fuzz.

use std::fmt;
use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, ensure};

use crate::shell;

/// What cargo-fuzz would ask of the compiler: counters on edges, for libFuzzer to steer by.
const RUSTFLAGS: &str = "--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
     -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
     -Ccodegen-units=1 -Cdebug-assertions -Coverflow-checks";

/// Finds wrong accesses to memory.
const ADDRESSES: &str = "-Zsanitizer=address";

/// Targets whose code has no `unsafe`, neither ours nor rustls'. The sanitizer would find nothing, and takes two thirds of the time.
const SAFE: [&str; 1] = ["tls_session"];

/// Makes libFuzzer see the operands of comparisons.
const COMPARISONS: &str = "-Cllvm-args=-sanitizer-coverage-trace-compares";

/// Targets whose input is a sequence of decisions. Recording comparisons helps them little, and takes a third of the time. Inputs
/// longer than [`SHORT`] reach no more of the code.
const DECIDING: [&str; 5] = ["config_space", "nvme", "tls_session", "vhost_user", "virtio"];

/// The options for coverage counters. Only our code gets them: the coverage of other code says nothing of ours, and counting it
/// takes several times as long.
const COUNTERS: [&str; 2] = ["-Cpasses=sancov-module", "-Cllvm-args=-sanitizer-coverage"];

/// With this variable, this program [is the compiler](compile).
pub(crate) const IS_COMPILER: &str = "XTASK_IS_COMPILER";

/// Options of the sanitizer. No detection of stack use after return, which safe Rust cannot have; no call stacks of allocations;
/// and freed memory is quarantined for about one run only. Each costs much time, and the input of a crash shows more.
const SANITIZER: &str =
    "detect_stack_use_after_return=0:malloc_context_size=0:quarantine_size_mb=1:thread_local_quarantine_size_kb=64";

/// Longest input, in bytes. Longer ones reach nothing more, but take longer.
const LONGEST: u32 = 4096;

/// Longest input of the [`DECIDING`] targets, in bytes.
const SHORT: u32 = 256;

/// A target that runs longer than this for one input hangs, in seconds.
const HANG: u32 = 10;

/// A fuzz target: its package, and its name.
struct Target {
    package: PathBuf,
    name: String,
}

/// How a run of a target ended.
struct Outcome {
    name: String,
    executions: u64,
    seconds: f64,
    /// Where libFuzzer's output is, if the target crashed or hung.
    crash: Option<PathBuf>,
}

/// Prints every target.
pub(crate) fn list() -> Result<()> {
    for Target { package, name } in targets()? {
        println!("{name:20} {}", package.display());
    }
    Ok(())
}

/// Runs `target` for `seconds`; a crash ends the run with an error and leaves its input behind. `is_quick`: without the sanitizer.
pub(crate) fn run(target: &str, seconds: u32, is_quick: bool) -> Result<()> {
    let all = targets()?;
    let target = all
        .iter()
        .find(|known| known.name == target)
        .with_context(|| format!("no fuzz target {target}; `cargo xtask fuzz` lists them"))?;
    let mut fuzz = target.command(&target.build(is_quick)?, seconds)?;
    println!("{}", shell::show(&fuzz));
    shell::ok(&mut fuzz)
}

/// Runs all targets, one after the other, for `minutes` together. A crash ends the run of its target only.
pub(crate) fn run_all(minutes: u32) -> Result<()> {
    let all = targets()?;
    let binaries = all.iter().map(|target| target.build(false)).collect::<Result<Vec<_>>>()?;
    let seconds = (60 * minutes / all.len() as u32).max(1);
    let mut outcomes = Vec::new();
    for (target, binary) in all.iter().zip(&binaries) {
        println!("{}: {seconds} s", target.name);
        let outcome = target.outcome(target.command(binary, seconds)?)?;
        println!("{outcome}");
        outcomes.push(outcome);
    }
    println!("\n{:16} {:>12} {:>10}  result", "target", "executions", "per second");
    outcomes.iter().for_each(|outcome| println!("{outcome}"));
    let crashed = outcomes.iter().filter(|outcome| outcome.crash.is_some()).count();
    ensure!(crashed == 0, "{crashed} of {} targets crashed", outcomes.len());
    Ok(())
}

impl Target {
    fn is_deciding(&self) -> bool {
        DECIDING.contains(&self.name.as_str())
    }

    /// Builds it. Returns the program.
    fn build(&self, is_quick: bool) -> Result<PathBuf> {
        let (dir, triple) = (directory()?, host()?);
        let comparisons = if self.is_deciding() { "" } else { COMPARISONS };
        let addresses = if is_quick || SAFE.contains(&self.name.as_str()) { "" } else { ADDRESSES };
        let flags = format!("{RUSTFLAGS} {comparisons} {addresses}");
        let mut build = shell::cargo();
        build.args(["build", "--release", "--bin", &self.name, "--target", &triple]);
        build.arg("--manifest-path").arg(self.package.join("Cargo.toml")).arg("--target-dir").arg(&dir);
        build.env("RUSTC_WRAPPER", std::env::current_exe()?).env(IS_COMPILER, "1");
        // The sanitizer is an unstable option of the compiler; this lets the stable one take it.
        shell::ok(build.env("RUSTC_BOOTSTRAP", "1").env("RUSTFLAGS", flags))?;
        Ok(dir.join(triple).join("release").join(&self.name))
    }

    /// The command that runs it for `seconds`.
    fn command(&self, binary: &Path, seconds: u32) -> Result<Command> {
        let dir = directory()?;
        // What it finds goes below the target directory; the corpus in the tree, which tests replay, is only read.
        let (found, crashes) = (dir.join("corpus").join(&self.name), dir.join("crashes"));
        std::fs::create_dir_all(&found)?;
        std::fs::create_dir_all(&crashes)?;
        let mut fuzz = Command::new(binary);
        if std::env::var_os("ASAN_OPTIONS").is_none() {
            fuzz.env("ASAN_OPTIONS", SANITIZER);
        }
        fuzz.arg(format!("-max_total_time={seconds}")).arg(format!("-artifact_prefix={}/", crashes.display()));
        let longest = if self.is_deciding() { SHORT } else { LONGEST };
        // All inputs have equal weight: the weights take a fifth of the time, and have found no more. Inputs are not replaced by
        // shorter ones, since the comparison of their coverage takes a tenth.
        fuzz.args(["-entropic=0", "-reduce_inputs=0"])
            .arg(format!("-max_len={longest}"))
            .arg(format!("-timeout={HANG}"))
            .arg("-print_final_stats=1")
            .arg(found);
        fuzz.args([self.package.join("corpus").join(&self.name)].iter().filter(|seeds| seeds.is_dir()));
        Ok(fuzz)
    }

    /// Runs the command, and reads from its output how far it came.
    fn outcome(&self, mut fuzz: Command) -> Result<Outcome> {
        let log = directory()?.join(format!("{}.log", self.name));
        let start = Instant::now();
        let status = fuzz.stderr(File::create(&log)?).status()?;
        let seconds = start.elapsed().as_secs_f64();
        let text = String::from_utf8_lossy(&std::fs::read(&log)?).into_owned();
        let executions = text.lines().rev().find_map(|line| line.strip_prefix("stat::number_of_executed_units:"));
        let executions = executions.and_then(|count| count.trim().parse().ok()).unwrap_or(0);
        let crash = (!status.success()).then_some(log);
        Ok(Outcome { name: self.name.clone(), executions, seconds, crash })
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let per_second = self.executions as f64 / self.seconds.max(0.001);
        write!(f, "{:16} {:>12} {per_second:>10.0}  ", self.name, self.executions)?;
        match &self.crash {
            None => write!(f, "ok"),
            Some(log) => write!(f, "CRASHED, see {}", log.display()),
        }
    }
}

/// Compiles for cargo, which calls this with the compiler and its arguments.
pub(crate) fn compile() -> Result<()> {
    let mut args = std::env::args_os().skip(1);
    let mut compiler = Command::new(args.next().context("cargo names the compiler")?);
    let is_ours = std::env::var_os("CARGO_MANIFEST_DIR").is_some_and(|dir| Path::new(&dir).starts_with(shell::root()));
    let counts = |arg: &str| COUNTERS.iter().any(|counter| arg.starts_with(counter));
    compiler.args(args.filter(|arg| is_ours || !arg.to_str().is_some_and(counts)));
    Err(compiler.exec().into())
}

/// Where targets are built and run.
fn directory() -> Result<PathBuf> {
    Ok(shell::target_dir()?.join("fuzz"))
}

/// All targets, of all packages for fuzzing.
fn targets() -> Result<Vec<Target>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("crates")?.chain(std::fs::read_dir("bins")?) {
        let package = entry?.path().join("fuzz");
        for target in files(&package.join("fuzz_targets")) {
            if let Some(name) = target.file_stem().filter(|_| target.extension().is_some_and(|ext| ext == "rs")) {
                found.push(Target { package: package.clone(), name: name.to_string_lossy().into_owned() });
            }
        }
    }
    found.sort_by(|a, b| (&a.package, &a.name).cmp(&(&b.package, &b.name)));
    Ok(found)
}

fn files(dir: &Path) -> Vec<PathBuf> {
    std::fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
}

fn host() -> Result<String> {
    let output = Command::new("rustc").arg("-vV").output()?;
    let text = String::from_utf8(output.stdout)?;
    let line = text.lines().find_map(|line| line.strip_prefix("host: ")).context("rustc -vV names no host")?;
    Ok(line.into())
}
