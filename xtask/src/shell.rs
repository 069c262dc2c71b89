//! Running other programs: where they are, what they were called with, and how they ended.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

/// The root of the workspace.
pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask lies in the workspace")
}

/// The search path for clients and devices: Debian's own programs first, because nbdsh's Python module belongs to
/// Debian's python3 and not to any other one, and with the sbin directories, where mkfs.ext4 is.
pub(crate) fn search_path() -> String {
    format!("/usr/bin:/bin:/usr/sbin:/sbin:{}", std::env::var("PATH").unwrap_or_default())
}

/// Where a program is, if it is installed.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    search_path().split(':').map(|dir| Path::new(dir).join(program)).find(|path| path.is_file())
}

/// A command that finds Debian's programs first.
pub(crate) fn command(program: &str) -> Command {
    let mut command = Command::new(find(program).unwrap_or_else(|| program.into()));
    command.env("PATH", search_path());
    command
}

/// cargo, the one that runs this task.
pub(crate) fn cargo() -> Command {
    Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
}

/// Runs a command to its end; a status other than 0 is an error that shows the command.
pub(crate) fn ok(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("starting {}", show(command)))?;
    ensure!(status.success(), "{} ended with {status}", show(command));
    Ok(())
}

/// A command as one would type it.
pub(crate) fn show(command: &Command) -> String {
    let program = Path::new(command.get_program()).file_name().unwrap_or_default();
    let words = std::iter::once(program).chain(command.get_args());
    words.map(|word| quote(&word.to_string_lossy())).collect::<Vec<_>>().join(" ")
}

/// A word as a shell reads it back.
pub(crate) fn quote(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_=./:,+%@".contains(c);
    if !word.is_empty() && word.chars().all(plain) { word.into() } else { format!("'{}'", word.replace('\'', r"'\''")) }
}

/// The directory that cargo builds into.
pub(crate) fn target_dir() -> Result<PathBuf> {
    // Asked of cargo, because a variable or a configuration file may have moved it.
    let output = cargo().args(["metadata", "--no-deps", "--format-version=1"]).output()?;
    let text = String::from_utf8(output.stdout)?;
    let (_, rest) = text.split_once(r#""target_directory":""#).context("cargo metadata names no target_directory")?;
    let (dir, _) = rest.split_once('"').context("cargo metadata ends early")?;
    Ok(dir.into())
}

/// Builds the release binary of nbdblk, as the packages have it, and says where it is.
pub(crate) fn build_nbdblk() -> Result<PathBuf> {
    ok(release_build()?.args(["-p", "nbdblk", "--all-features"]))?;
    Ok(target_dir()?.join("release/nbdblk"))
}

/// `cargo build --release` of what is packed: no path of this computer gets into the programs.
pub(crate) fn release_build() -> Result<Command> {
    let registry = std::env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = || std::env::var_os("HOME").map(|home| Path::new(&home).join(".cargo"));
    let registry = registry.or_else(home).context("neither CARGO_HOME nor HOME is set")?.join("registry/src");
    // The user's own flags come last. They are separated by spaces in one variable, and by this character in the other.
    let own = std::env::var("CARGO_ENCODED_RUSTFLAGS")
        .or_else(|_| std::env::var("RUSTFLAGS").map(|flags| flags.split_whitespace().collect::<Vec<_>>().join("\x1f")));
    let remap = |from: &Path, to: &str| format!("--remap-path-prefix={}={to}", from.display());
    let mut flags = vec![remap(root(), "nbdblk"), remap(&target_dir()?, "nbdblk/target"), remap(&registry, "registry")];
    // The identifier of a build depends on debug information, which has paths of C code.
    flags.push("-Clink-arg=-Wl,--build-id=none".into());
    flags.extend(own.ok().filter(|own| !own.is_empty()));
    let mut command = cargo();
    command.args(["build", "--release"]).env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"));
    Ok(command)
}

/// Runs a command to its end, and returns its output.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    Ok(String::from_utf8(output_bytes(command)?)?)
}

/// As [`output`], of any bytes.
pub(crate) fn output_bytes(command: &mut Command) -> Result<Vec<u8>> {
    filtered(command, &[])
}

/// Runs a command that gets `input`, and returns its output.
pub(crate) fn filtered(command: &mut Command, input: &[u8]) -> Result<Vec<u8>> {
    let spawned = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
    let mut child = spawned.with_context(|| format!("starting {}", show(command)))?;
    let mut stdin = child.stdin.take().context("stdin is a pipe")?;
    let output = std::thread::scope(|scope| {
        // It may end without reading all of it, and its status then says why.
        scope.spawn(move || stdin.write_all(input));
        child.wait_with_output()
    })?;
    ensure!(output.status.success(), "{} ended with {}", show(command), output.status);
    Ok(output.stdout)
}

/// Bytes as gzip makes them, without name and time.
pub(crate) fn compressed(bytes: &[u8]) -> Result<Vec<u8>> {
    filtered(command("gzip").args(["-9", "-n"]), bytes)
}

/// A directory that is removed when this is dropped.
#[derive(Debug)]
pub(crate) struct TempDir(PathBuf);

impl TempDir {
    pub(crate) fn new(name: &str) -> Result<Self> {
        let path = std::env::temp_dir().join(format!("nbdblk-{name}-{}", std::process::id()));
        std::fs::create_dir(&path).with_context(|| format!("creating {}", path.display()))?;
        Ok(Self(path))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A process that serves until told to end; killed when this is dropped.
#[derive(Debug)]
pub(crate) struct Daemon {
    child: Child,
    name: String,
}

impl Daemon {
    /// Starts the process and waits until `ready` exists.
    pub(crate) fn start(command: &mut Command, ready: &Path) -> Result<Self> {
        Self::start_when(command, || ready.exists())
    }

    /// Starts the process and waits until it is `ready`.
    pub(crate) fn start_when(command: &mut Command, ready: impl Fn() -> bool) -> Result<Self> {
        let name = Path::new(command.get_program()).file_name().unwrap_or_default().to_string_lossy().into_owned();
        let child = command.spawn().with_context(|| format!("starting {}", show(command)))?;
        let mut daemon = Self { child, name };
        let start = Instant::now();
        while !ready() {
            if let Some(status) = daemon.child.try_wait()? {
                bail!("{} ended with {status} before it was ready", daemon.name);
            }
            ensure!(start.elapsed() < Duration::from_secs(30), "{} was not ready after 30 s", daemon.name);
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(daemon)
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Asks the process to end (SIGTERM) and waits until it has.
    pub(crate) fn stop(mut self) -> Result<()> {
        ok(Command::new("sh").args(["-c", "kill -TERM \"$0\"", &self.child.id().to_string()]))?;
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait()? {
                ensure!(status.success(), "{} ended with {status}", self.name);
                return Ok(());
            }
            ensure!(start.elapsed() < Duration::from_secs(30), "{} ignored SIGTERM for 30 s", self.name);
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
