//! Programs that tests run: each has a deadline, its own process group, and dies with the test.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{PipeReader, PipeWriter, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;

/// Time after which a test reports that a program hangs. Generous: the machine may be loaded, and the one of `cargo xtask vm` has
/// an emulated CPU.
pub fn deadline() -> Duration {
    Duration::from_secs(if std::env::var_os("NBDBLK_VM").is_some() { 600 } else { 120 })
}

/// The root of the workspace.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the package lies in the workspace")
}

/// Cargo, in the root of the workspace, with the environment that it has outside of tests. The variables that cargo sets for a
/// test, such as CARGO_PKG_NAME, would make it build some dependencies again (ring's build script depends on them).
pub fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    let of_test = |name: &str| name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_");
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_str().is_some_and(of_test)) {
        command.env_remove(name);
    }
    command.current_dir(root());
    command
}

/// A program that setup installs, without arguments yet.
///
/// # Panics
/// If it is not installed.
pub fn tool(name: &str) -> Cmd {
    let path = search_path()
        .split(':')
        .map(|dir| Path::new(dir).join(name))
        .find(|path| path.is_file())
        .unwrap_or_else(|| panic!("{name} is not installed: run `cargo xtask setup`"));
    Cmd::new(path)
}

// Debian's programs first: nbdsh's Python module belongs to Debian's python3 and not to any other one.
fn search_path() -> String {
    format!("/usr/bin:/bin:/usr/sbin:/sbin:{}", std::env::var("PATH").unwrap_or_default())
}

/// A wait with a deadline. Every half minute it prints what it waits for; not with `eprintln`, which test runners capture.
struct Wait<'a> {
    what: &'a str,
    start: Instant,
    said: u64,
}

impl<'a> Wait<'a> {
    fn new(what: &'a str) -> Self {
        Self { what, start: Instant::now(), said: 0 }
    }

    /// Sleeps for a moment. `false`: the deadline has passed.
    fn goes_on(&mut self) -> bool {
        let seconds = self.start.elapsed().as_secs();
        if seconds / 30 > self.said {
            self.said = seconds / 30;
            let test = std::thread::current().name().unwrap_or("a test").to_owned();
            let line = format!("{test}: waiting since {seconds} s: {}\n", self.what);
            let _ = std::io::stderr().write_all(line.as_bytes());
        }
        std::thread::sleep(Duration::from_millis(5));
        self.start.elapsed() < deadline()
    }
}

/// Waits until `test` returns true.
///
/// # Panics
/// If it does not within the deadline; `what` names the condition.
pub fn eventually(what: &str, mut test: impl FnMut() -> bool) {
    let mut wait = Wait::new(what);
    while !test() {
        assert!(wait.goes_on(), "not within {} s: {what}", deadline().as_secs());
    }
}

/// A command, to run to its end or in the background.
#[derive(Debug)]
pub struct Cmd {
    program: PathBuf,
    command: Command,
    input: Vec<u8>,
    out: Option<Stdio>,
    err: Option<Stdio>,
}

/// The results of a program.
#[derive(Debug)]
pub struct Output {
    /// Its exit status.
    pub status: ExitStatus,
    /// Its standard output.
    pub out: String,
    /// Its standard error.
    pub err: String,
}

impl Cmd {
    /// A program by its path.
    pub fn new(program: impl Into<PathBuf>) -> Self {
        let program = program.into();
        // A test that is killed cannot clean up; the kernel then kills what it started.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--"]).arg(&program);
        command.env("PATH", search_path()).process_group(0);
        Self { program, command, input: Vec::new(), out: None, err: None }
    }

    /// The path of the program.
    pub fn path(&self) -> &Path {
        &self.program
    }

    /// Adds arguments.
    pub fn args<A: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = A>) -> Self {
        self.command.args(args);
        self
    }

    /// Runs it in a directory.
    pub fn within(mut self, dir: &Path) -> Self {
        self.command.current_dir(dir);
        self
    }

    /// Sets a variable of its environment.
    pub fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.command.env(name, value);
        self
    }

    /// Sets its standard input.
    pub fn input(mut self, input: &[u8]) -> Self {
        self.input = input.into();
        self
    }

    /// For [`spawn`](Self::spawn): another standard output than the log.
    pub fn stdout(mut self, to: impl Into<Stdio>) -> Self {
        self.out = Some(to.into());
        self
    }

    /// For [`spawn`](Self::spawn): another standard error than the log.
    pub fn stderr(mut self, to: impl Into<Stdio>) -> Self {
        self.err = Some(to.into());
        self
    }

    /// Runs it to its end, whatever the status.
    ///
    /// # Panics
    /// If it does not end within the deadline.
    pub fn run(mut self) -> Output {
        let shown = self.shown();
        self.command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = ChildGuard(self.command.spawn().unwrap_or_else(|error| panic!("starting {shown}: {error}")));
        let mut stdin = child.0.stdin.take().expect("stdin is piped");
        let input = std::mem::take(&mut self.input);
        let writer = std::thread::spawn(move || drop(stdin.write_all(&input)));
        let out = collect(child.0.stdout.take().expect("stdout is piped"));
        let err = collect(child.0.stderr.take().expect("stderr is piped"));
        let status = wait(&mut child.0, &shown);
        drop(child);
        let text = |reader: JoinHandle<Vec<u8>>| {
            String::from_utf8_lossy(&reader.join().expect("a reader does not panic")).into_owned()
        };
        drop(writer);
        let (out, err) = (text(out), text(err));
        let status = status.unwrap_or_else(|| panic!("{shown} hangs; it said:\n{out}{err}"));
        Output { status, out, err }
    }

    /// Runs it to its end, which must be successful.
    ///
    /// # Panics
    /// If it fails or hangs.
    pub fn ok(self) -> Output {
        let shown = self.shown();
        let output = self.run();
        assert!(output.status.success(), "{shown}: {}\n{}{}", output.status, output.out, output.err);
        output
    }

    /// Starts it and leaves it running. Its output goes to the file `log`.
    pub fn spawn(mut self, log: PathBuf) -> Daemon {
        let shown = self.shown();
        let file = File::create(&log).expect("a log can be made in the directory of the test");
        self.command.stdin(Stdio::piped());
        let log_too = || Stdio::from(file.try_clone().expect("a file can be cloned"));
        self.command.stderr(self.err.take().unwrap_or_else(log_too)).stdout(self.out.take().unwrap_or_else(log_too));
        let child = self.command.spawn().unwrap_or_else(|error| panic!("starting {shown}: {error}"));
        Daemon { child: ChildGuard(child), log, shown }
    }

    fn shown(&self) -> String {
        let args = self.command.get_args().skip(4).map(|arg| format!("{:?}", arg.to_string_lossy()));
        std::iter::once(self.program.display().to_string()).chain(args).collect::<Vec<_>>().join(" ")
    }
}

/// Returns a full pipe: a writer blocks until the reader reads.
///
/// # Panics
/// If no pipe can be created.
pub fn full_pipe() -> (PipeReader, PipeWriter) {
    let (reader, mut writer) = std::io::pipe().expect("a pipe can be made");
    // pipe(7): 64 KiB, which one write fills without waiting.
    writer.write_all(&[b'\n'; 64 << 10]).expect("a pipe takes 64 KiB");
    (reader, writer)
}

fn collect(mut from: impl Read + Send + 'static) -> JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = from.read_to_end(&mut bytes);
        bytes
    })
}

/// Waits for the end of a child; `shown` is what it is called.
fn wait(child: &mut Child, shown: &str) -> Option<ExitStatus> {
    let what = format!("the end of {shown}");
    let mut wait = Wait::new(&what);
    loop {
        if let Some(status) = child.try_wait().expect("a child can be waited for") {
            return Some(status);
        }
        if !wait.goes_on() {
            return None;
        }
    }
}

/// A child that is killed, with its process group, when this is dropped.
#[derive(Debug)]
struct ChildGuard(Child);

impl Drop for ChildGuard {
    fn drop(&mut self) {
        let _ = killpg(Pid::from_raw(self.0.id().cast_signed()), Signal::SIGKILL);
        let _ = self.0.wait();
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Print the log before it is removed with the directory of the test.
        if std::thread::panicking() {
            eprintln!("{} said:\n{}", self.shown, self.log());
        }
    }
}

/// A program that runs during the test. Killed when dropped; its output is printed if the test fails.
#[derive(Debug)]
pub struct Daemon {
    child: ChildGuard,
    log: PathBuf,
    shown: String,
}

impl Daemon {
    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.0.id()
    }

    /// Its output so far.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// Whether it is still running.
    pub fn is_alive(&mut self) -> bool {
        self.child.0.try_wait().expect("a child can be waited for").is_none()
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.pid().cast_signed()), signal).expect("the process is ours");
    }

    /// Writes a line to its standard input.
    pub fn type_line(&mut self, line: &str) {
        // In one piece, for programs that take a command only if they read it whole.
        self.type_bytes(format!("{line}\n").as_bytes());
    }

    /// Writes bytes to its standard input.
    pub fn type_bytes(&mut self, bytes: &[u8]) {
        let stdin = self.child.0.stdin.as_mut().expect("stdin is piped");
        stdin.write_all(bytes).expect("the process reads what it is given");
    }

    /// Waits until its output contains `text`.
    ///
    /// # Panics
    /// If it ends before, or does not print it within the deadline.
    pub fn await_text(&mut self, text: &str) {
        self.await_that(&format!("that it says {text:?}"), |log| log.contains(text));
    }

    /// Waits until `test` returns true for its output.
    ///
    /// # Panics
    /// If it ends before, or `test` does not return true within the deadline.
    pub fn await_that(&mut self, what: &str, test: impl Fn(&str) -> bool) {
        let mut wait = Wait::new(what);
        loop {
            let alive = self.is_alive();
            if test(&self.log()) {
                return;
            }
            assert!(alive, "{} ended before {what}; it said:\n{}", self.shown, self.log());
            assert!(wait.goes_on(), "{} hangs before {what}; it said:\n{}", self.shown, self.log());
        }
    }

    /// Waits until it ends on its own.
    ///
    /// # Panics
    /// If it does not end within the deadline.
    pub fn await_end(mut self) -> (ExitStatus, String) {
        let status = wait(&mut self.child.0, &self.shown);
        (status.unwrap_or_else(|| panic!("{} hangs; it said:\n{}", self.shown, self.log())), self.log())
    }
}
