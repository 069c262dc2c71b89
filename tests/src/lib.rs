//! Harness of the end-to-end tests: directories, processes and clients that cannot outlive or hang a test.
//!
//! ```no_run
//! use nbdblk_tests::{Dir, Nbdblk, tool};
//!
//! let dir = Dir::new();
//! let server = Nbdblk::unix(&dir, &["memory=1M"]);
//! assert_eq!(tool("nbdinfo").args(["--size", &server.uri()]).ok().out.trim(), "1048576");
//! assert!(server.terminate().success());
//! ```
//!
//! Every external program has a deadline and dies with the test. If a program is not installed, the test fails and names `cargo
//! xtask setup`. No test asserts on times: deadlines only distinguish a hang from slowness.

pub mod checker;
mod dir;
mod forger;
mod image;
mod load;
mod nbdkit;
mod pki;
mod process;
mod qsd;
pub mod raw;
mod server;
mod sources;
pub mod tls_clients;
pub mod tls_records;

pub use dir::Dir;
pub use image::{Rng, allocated, assert_equal, write_runs};
pub use load::{restarts, under_load};
pub use nbdkit::{Nbdkit, daemonised, nbdkit, panicking_plugin, plugin};
pub use pki::{Pki, Version};
pub use process::{Cmd, Daemon, Output, cargo, deadline, eventually, full_pipe, root, tool};
pub use qsd::{Export, Qsd};
pub use server::{Address, Nbdblk, nbdblk};
pub use sources::files;

/// Runs a script in nbdsh, connected to `uri` as `h`. Returns its output.
pub fn nbdsh(uri: &str, script: &str) -> String {
    tool("nbdsh").args(["-u", uri, "-c", script]).ok().out
}

/// Runs a script in nbdsh, with `h` not connected yet and `uri` as a variable. Returns its output.
pub fn nbdsh_unconnected(uri: &str, script: &str) -> String {
    tool("nbdsh").args(["-c", &format!("uri = {uri:?}"), "-c", script]).ok().out
}

/// Returns nbdinfo's description of the exports at `uri`, as JSON.
pub fn nbdinfo(uri: &str) -> serde_json::Value {
    serde_json::from_str(&tool("nbdinfo").args(["--json", uri]).ok().out).expect("nbdinfo prints JSON")
}
