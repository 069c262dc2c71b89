//! `cargo xtask vm`: runs one command or the hardware tests in a virtual machine that has the devices nbdblk drives.
//!
//! `xtask/vm/README.md` describes the machine. It needs no KVM: the CPU is emulated.

mod cpio;
mod image;
mod machine;
mod package;

use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, Result, bail, ensure};

use crate::{dist, shell};
use image::Image;
use machine::{Job, Machine, System};
pub(crate) use package::test as test_packages;

pub(crate) const HELP: &str = "\
usage: cargo xtask vm prepare [--force]
       cargo xtask vm run [OPTION...] [--] COMMAND [ARG...]
       cargo xtask vm test [OPTION...] [-- ARG...]
       cargo xtask vm package [-v] [-t SECONDS]
       cargo xtask vm shell [OPTION...]

  prepare   fetch and build the machine's image, once, in the user's cache directory (needs root, Debian, network)
  run       build nbdblk, start the machine, run a command in it as root, exit with its status
            (124: it exceeded the time of -t; 125: the machine failed)
  test      run the hardware tests in the machine; ARGs go to the test program: filters, --list, ...
  package   install, upgrade, remove and purge the packages in a clean Debian, in which systemd runs
  shell     start the machine with a shell on this terminal

  -t SECONDS        time limit of the command (run: 600, test: 3600)
  -v                show the machine's console, and the time of its start
  --no-build        run: do not build nbdblk first
  --share DIR       share one more directory with the machine, at the same path
  --all             test: run the slow tests, too
  --size MIB        size of each disk (40)
  --append ARGS     more arguments for the machine's kernel, such as module.option=value
  --instructions    one processor, and each instruction takes a nanosecond: processor time counts instructions
  --no-iommu        start without an IOMMU; VFIO then works without one (CAP_SYS_RAWIO)

The machine shares the workspace and its target directory, read and write, at the same paths. run, test and shell build
the image if necessary. NBDBLK_VM_CACHE is the directory of the image (1 GB), NBDBLK_VM_MIRROR a Debian archive other than
apt's, NBDBLK_BIN a program that test uses instead of building one. NBDBLK_RESTARTS is how often tests replace a back end or
a server.";

/// Runs the task that the arguments after `vm` name.
pub(crate) fn run(words: &[&str]) -> Result<()> {
    let Some((task, words)) = words.split_first() else { bail!("vm does what?\n\n{HELP}") };
    let options = Options::parse(words)?;
    match *task {
        "prepare" => {
            options.accepts_no_words()?;
            image::prepare(options.force).map(|_| ())
        }
        "run" => {
            ensure!(!options.words.is_empty(), "run which command?\n\n{HELP}");
            let image = image::prepare(false)?;
            if options.build {
                shell::build_nbdblk()?;
            }
            let status = machine(&image, &options)?.run(&Job::Command {
                words: options.words.iter().map(|&word| word.into()).collect(),
                dir: working_dir(),
                seconds_max: options.seconds_max.unwrap_or(600),
            })?;
            std::process::exit(status);
        }
        "test" => test(words),
        "package" => {
            options.accepts_no_words()?;
            package::test(options.verbose, options.seconds_max)
        }
        "shell" => {
            options.accepts_no_words()?;
            machine(&image::prepare(false)?, &options)?.run(&Job::Shell).map(|_| ())
        }
        "help" | "-h" | "--help" => {
            println!("{HELP}");
            Ok(())
        }
        task => bail!("vm does not know {task}\n\n{HELP}"),
    }
}

/// Runs the hardware tests, or says why they cannot run here.
pub(crate) fn test(words: &[&str]) -> Result<()> {
    let options = Options::parse(words)?;
    let image = match image::prepare(false) {
        Ok(image) => image,
        Err(error) => {
            let line = "*".repeat(100);
            println!("{line}\nHARDWARE TESTS SKIPPED: this machine cannot run them: {error:#}\n{line}");
            return Ok(());
        }
    };
    let built = |variable: &str, build: fn() -> Result<PathBuf>| {
        std::env::var_os(variable).map_or_else(build, |path| Ok(path.into()))
    };
    let path = |path: &Path| path.to_str().map(shell::quote).context("a path of the build is not UTF-8");
    let (nbdblk, plugin) = (built("NBDBLK_BIN", shell::build_nbdblk)?, built("NBDBLK_PLUGIN", dist::build_plugin)?);
    let mut script = format!("export NBDBLK_BIN={} NBDBLK_PLUGIN={}\n", path(&nbdblk)?, path(&plugin)?);
    if let Ok(count) = std::env::var("NBDBLK_RESTARTS") {
        script += &format!("export NBDBLK_RESTARTS={}\n", shell::quote(&count));
    }
    script += RUN;
    let words: Vec<String> = options.words.iter().map(|word| shell::quote(word)).collect();
    for round in build_tests()? {
        for program in round {
            let skipped = if options.all { &[][..] } else { program.slow };
            let skipped: String = skipped.iter().map(|name| format!(" --skip {name}")).collect();
            let Program { package, threads, only, .. } = program;
            // Filters add up, so what is asked for stands alone.
            let filters = if words.is_empty() { only.to_owned() } else { words.join(" ") };
            let line = format!("--test-threads={threads}{skipped} {filters}");
            script += &format!("run {package} {} {line} &\n", path(&program.binary)?);
        }
        script += "wait\n";
    }
    script += "[ ! -e /tmp/failed ]";
    let job = Job::Command {
        words: ["sh", "-c", &script].map(String::from).into(),
        dir: shell::root().join("tests"),
        seconds_max: options.seconds_max.unwrap_or(3600),
    };
    let status = machine(&image, &options)?.run(&job)?;
    ensure!(status == 0, "the hardware tests ended with status {status}");
    Ok(())
}

/// Runs a program of tests, whose lines are told apart from those of others by its name.
const RUN: &str = r#"
run() {
    name=$1; shift
    { "$@" 2>&1 || echo "$name" >> /tmp/failed; } | sed -u "s/^/$name: /"
}
"#;

/// A program of tests that run in the machine.
struct Program {
    package: &'static str,
    /// How many of its tests run at a time.
    threads: u32,
    /// Which of its tests need the machine.
    only: &'static str,
    /// Tests that are left out unless all are asked for.
    slow: &'static [&'static str],
    binary: PathBuf,
}

/// Builds the programs of the hardware tests: those of a round share no device.
fn build_tests() -> Result<Vec<Vec<Program>>> {
    // The way that all tests are built, so that nothing is built twice.
    let output = shell::cargo()
        .args(["test", "--no-run", "--workspace", "--all-features", "--test", "hardware", "--test", "parity"])
        .arg("--message-format=json-render-diagnostics")
        .stderr(Stdio::inherit())
        .output()
        .context("starting cargo")?;
    ensure!(output.status.success(), "building the hardware tests failed");
    let text = String::from_utf8(output.stdout)?;
    let program = |package: &'static str, threads, only, slow| -> Result<Program> {
        let crate_name = format!("/{package}#");
        let mut lines =
            text.lines().filter(|line| line.contains(&crate_name) || line.contains(&format!("#{package}@")));
        let binary = lines.find_map(|line| line.split_once(r#""executable":""#)?.1.split('"').next());
        let binary = binary.with_context(|| format!("cargo names no test program of {package}"))?;
        Ok(Program { package, threads, only, slow, binary: binary.into() })
    };
    Ok(vec![
        vec![program("nbdblk-tests", 3, "", &["more::"])?],
        vec![program("blkdev-libblkio", 3, "hardware::", &[])?],
        vec![
            program("blkdev-nvme", 1, "", &["conform"])?,
            program("blkdev-virtio-pci", 1, "", &["conform"])?,
            program("blkdev-vdpa", 1, "", &["conform"])?,
        ],
    ])
}

fn machine<'a>(image: &'a Image, options: &Options<'a>) -> Result<Machine<'a>> {
    let mut shares = vec![shell::root().to_owned()];
    // CARGO_TARGET_DIR may be anywhere.
    let target = shell::target_dir()?;
    for dir in std::iter::once(target.as_path()).chain(options.shares.iter().map(Path::new)) {
        let dir = std::path::absolute(dir)?;
        std::fs::create_dir_all(&dir).with_context(|| format!("creating {}", dir.display()))?;
        if !shares.iter().any(|share| dir.starts_with(share)) {
            shares.push(dir);
        }
    }
    Ok(Machine {
        image,
        shares,
        binaries: ["release", "debug"].map(|profile| target.join(profile)).into(),
        disk_mib: options.disk_mib,
        append: options.append,
        iommu: options.iommu,
        instructions: options.instructions,
        verbose: options.verbose,
        system: System::Devices,
    })
}

/// Where the user is, if that exists in the machine: main() has gone to the workspace's root.
fn working_dir() -> PathBuf {
    let dir = std::env::var_os("PWD").map(PathBuf::from);
    dir.filter(|dir| dir.starts_with(shell::root())).unwrap_or_else(|| shell::root().to_owned())
}

/// The arguments.
#[derive(Debug)]
struct Options<'a> {
    force: bool,
    build: bool,
    verbose: bool,
    iommu: bool,
    instructions: bool,
    all: bool,
    seconds_max: Option<u64>,
    disk_mib: u64,
    append: &'a str,
    shares: Vec<&'a str>,
    /// What is not an option.
    words: Vec<&'a str>,
}

impl<'a> Options<'a> {
    fn parse(words: &[&'a str]) -> Result<Self> {
        let mut options = Self {
            force: false,
            build: true,
            verbose: false,
            iommu: true,
            instructions: false,
            all: false,
            seconds_max: None,
            disk_mib: 40,
            append: "",
            shares: Vec::new(),
            words: Vec::new(),
        };
        let mut words = words.iter().copied();
        while let Some(word) = words.next() {
            let mut value = || words.next().with_context(|| format!("{word} needs a value"));
            match word {
                "--force" => options.force = true,
                "--no-build" => options.build = false,
                "-v" | "--verbose" => options.verbose = true,
                "--no-iommu" => options.iommu = false,
                "--instructions" => options.instructions = true,
                "--all" => options.all = true,
                "-t" | "--timeout" => options.seconds_max = Some(number(value()?)?),
                "--size" => options.disk_mib = number(value()?)?,
                "--append" => options.append = value()?,
                "--share" => options.shares.push(value()?),
                "--" => break,
                word if word.starts_with('-') => bail!("no such option: {word}\n\n{HELP}"),
                // The command begins; what follows is its own.
                word => {
                    options.words.push(word);
                    break;
                }
            }
        }
        options.words.extend(words);
        Ok(options)
    }

    fn accepts_no_words(&self) -> Result<()> {
        ensure!(self.words.is_empty(), "too many words: {}\n\n{HELP}", self.words.join(" "));
        Ok(())
    }
}

fn number(word: &str) -> Result<u64> {
    match word.parse() {
        Ok(number) if number > 0 => Ok(number),
        _ => bail!("not a number above 0: {word}"),
    }
}
