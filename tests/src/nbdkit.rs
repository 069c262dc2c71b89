//! nbdkit with our plugin, started for a test and killed after it.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::sync::OnceLock;

use nix::sys::signal::Signal;

use crate::{Cmd, Daemon, Dir, cargo, tool};

/// The plugin under test: `$NBDBLK_PLUGIN`, or the release build, which is made once.
pub fn plugin() -> &'static Path {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| match std::env::var_os("NBDBLK_PLUGIN") {
        Some(path) => path.into(),
        None => build(&["--release"]),
    })
}

/// The plugin with the parameter `panic-at=OFFSET`, in a separate directory so that it cannot be mistaken for the real one.
pub fn panicking_plugin() -> PathBuf {
    let dir = plugin_dir().join("panic-test");
    build(&["--features", "panic-test", "--target-dir", dir.to_str().expect("cargo's directory has a plain name")])
}

fn plugin_dir() -> PathBuf {
    let exe = std::env::current_exe().expect("a test knows where it is");
    // target/debug/deps/plugin-1234: next to `debug`.
    exe.ancestors().nth(3).expect("cargo puts tests three levels down").to_owned()
}

fn build(how: &[&str]) -> PathBuf {
    let output = cargo()
        .args(["build", "-p", "nbdkit-nbdblk-plugin", "--message-format=json-render-diagnostics"])
        .args(how)
        .output()
        .expect("cargo runs the tests, so it is there");
    assert!(output.status.success(), "building the plugin failed:\n{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .flat_map(|message| message["filenames"].as_array().cloned().unwrap_or_default())
        .filter_map(|name| name.as_str().map(PathBuf::from))
        .rfind(|name| name.ends_with("libnbdkit_nbdblk_plugin.so"))
        .expect("cargo names the plugin it built")
}

/// nbdkit with the plugin, in `dir`, with nbdkit's own `options`. Add the plugin's parameters to it.
pub fn nbdkit(dir: &Dir, options: &[&str]) -> Cmd {
    command(dir, &line(plugin(), options))
}

/// nbdkit in the background, as it forks itself; killed when dropped. It is ready when its pid file exists.
pub fn daemonised(dir: &Dir, options: &[&str], words: &[&str]) -> Daemon {
    let wait = ["sh", "-c", "\"$@\" && exec sleep 600", "sh"].map(OsString::from);
    let words = words.iter().map(OsString::from);
    let line: Vec<OsString> = wait.into_iter().chain(line(plugin(), options)).chain(words).collect();
    command(dir, &line).spawn(dir.at("daemonised.log"))
}

fn command(dir: &Dir, line: &[OsString]) -> Cmd {
    tool(line[0].to_str().expect("programs have plain names")).within(dir.path()).args(&line[1..])
}

/// The system's nbdkit and the path of the plugin. If `$NBDBLK_NBDKIT_ROOT` names a root directory of another distribution
/// (`cargo xtask trixie` makes one), the nbdkit in there and the plugin's name, as if installed.
fn line(plugin: &Path, options: &[&str]) -> Vec<OsString> {
    let options = options.iter().map(OsString::from);
    let Some(root) = std::env::var_os("NBDBLK_NBDKIT_ROOT") else {
        return std::iter::once("nbdkit".into()).chain(options).chain([plugin.into()]).collect();
    };
    // Only this process sees the mounts, and they end with it.
    let script = r#"set -e
        root=$1 plugin=$2 here=$PWD; shift 2
        for place in proc sys dev tmp; do mount --rbind "/$place" "$root/$place"; done
        name=$(chroot "$root" nbdkit --dump-config | sed -n 's/^plugindir=//p')/nbdkit-nbdblk-plugin.so
        : >> "$root$name"
        mount --bind "$plugin" "$root$name"
        exec chroot "$root" sh -c 'cd "$0" && exec nbdkit "$@"' "$here" "$@""#;
    let words = ["unshare", "--mount", "sh", "-c", script, "sh"].map(OsString::from);
    words.into_iter().chain([root, plugin.into()]).chain(options).chain(["nbdblk".into()]).collect()
}

/// A running nbdkit in the foreground; killed when dropped.
#[derive(Debug)]
pub struct Nbdkit {
    daemon: Daemon,
    socket: PathBuf,
}

impl Nbdkit {
    /// Serves on a unix socket in `dir`, which is also its current directory. `words` are the plugin's parameters.
    pub fn start(dir: &Dir, words: &[&str]) -> Self {
        Self::start_with(dir, &[], words)
    }

    /// As [`Nbdkit::start`], with options of nbdkit before the plugin.
    pub fn start_with(dir: &Dir, options: &[&str], words: &[&str]) -> Self {
        Self::start_plugin(dir, plugin(), options, words)
    }

    /// As [`Nbdkit::start_with`], with another build of the plugin.
    pub fn start_plugin(dir: &Dir, plugin: &Path, options: &[&str], words: &[&str]) -> Self {
        let number = (0..).find(|n| !dir.at(&format!("nbdkit{n}.pid")).exists()).expect("numbers go on");
        let at = |what: &str| dir.at(&format!("nbdkit{number}.{what}"));
        let (socket, pid_file) = (at("sock"), at("pid"));
        let command =
            tool("nbdkit").within(dir.path()).args(["-f", "-U"]).args([&socket]).args(["-P"]).args([&pid_file]);
        let mut daemon = command.args(options).args([plugin]).args(words).spawn(at("log"));
        daemon.await_that("that it has its pid file", |_| pid_file.exists());
        Self { daemon, socket }
    }

    /// The URI of the export.
    pub fn uri(&self) -> String {
        format!("nbd+unix:///?socket={}", self.socket.display())
    }

    /// The path of its socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Its output so far.
    pub fn log(&self) -> String {
        self.daemon.log()
    }

    /// Whether it is still running.
    pub fn is_alive(&mut self) -> bool {
        self.daemon.is_alive()
    }

    /// Sends SIGTERM and waits for its end.
    ///
    /// # Panics
    /// If it does not end within the deadline.
    pub fn terminate(self) -> ExitStatus {
        self.daemon.signal(Signal::SIGTERM);
        self.daemon.await_end().0
    }
}
