//! qemu-storage-daemon as the vhost-user-blk device behind the server.

use std::path::{Path, PathBuf};

use nix::sys::signal::Signal;

use crate::{Daemon, Dir, tool};

/// The parameters of an export.
#[derive(Debug, Clone, Copy)]
pub struct Export {
    /// "raw" or "qcow2".
    pub format: &'static str,
    /// Request queues of the device.
    pub queues: u32,
    /// Whether the device takes writes.
    pub writable: bool,
}

impl Default for Export {
    fn default() -> Self {
        Self { format: "raw", queues: 1, writable: true }
    }
}

/// A running qemu-storage-daemon with one vhost-user-blk export; killed when dropped.
#[derive(Debug)]
pub struct Qsd {
    daemon: Daemon,
    socket: PathBuf,
}

impl Qsd {
    /// Exports an image on the socket `vhost.sock` in `dir`.
    pub fn start(dir: &Dir, image: &Path, export: Export) -> Self {
        // Without locks: tests let several servers use one image.
        let node = format!(
            "driver={},node-name=disk,discard=unmap,detect-zeroes=off,read-only={},file.driver=file,file.locking=off,file.discard=unmap,file.filename={}",
            export.format,
            on(!export.writable),
            image.display()
        );
        Self::start_node(dir, &node, export)
    }

    /// Exports the blockdev `node`, whose node-name is `disk`.
    pub fn start_node(dir: &Dir, node: &str, export: Export) -> Self {
        Self::start_node_with(dir, node, export, "")
    }

    /// As [`Qsd::start_node`], with more arguments before it.
    pub fn start_behind(dir: &Dir, args: &[&str], node: &str, export: Export) -> Self {
        Self::launch(dir, args, node, export, "")
    }

    /// As [`Qsd::start_node`], with more options of the export: each a comma, a name, `=` and a value.
    pub fn start_node_with(dir: &Dir, node: &str, export: Export, options: &str) -> Self {
        Self::launch(dir, &[], node, export, options)
    }

    fn launch(dir: &Dir, args: &[&str], node: &str, export: Export, options: &str) -> Self {
        let socket = dir.at("vhost.sock");
        let pid_file = dir.at("qsd.pid");
        let _ = std::fs::remove_file(&pid_file);
        let arg = format!(
            "type=vhost-user-blk,id=e,node-name=disk,addr.type=unix,addr.path={},writable={},num-queues={}{options}",
            socket.display(),
            on(export.writable),
            export.queues
        );
        let mut daemon = tool("qemu-storage-daemon")
            .args(args)
            .args(["--blockdev", node, "--export", &arg, "--pidfile"])
            .args([&pid_file])
            .spawn(dir.at("qsd.log"));
        // The pid file is written when the export listens.
        daemon.await_that("its pid file", |_| pid_file.exists());
        Self { daemon, socket }
    }

    /// The argument with which nbdblk reaches the device.
    pub fn spec(&self) -> String {
        format!("vhost-user={}", self.socket.display())
    }

    /// Kills it at once, as a crash would.
    pub fn kill(self) {
        self.daemon.signal(Signal::SIGKILL);
        self.daemon.await_end();
    }

    /// Stops it with SIGSTOP, so that it does not answer, like a hang.
    pub fn freeze(&self) {
        self.daemon.signal(Signal::SIGSTOP);
    }

    /// Undoes `freeze`.
    pub fn thaw(&self) {
        self.daemon.signal(Signal::SIGCONT);
    }
}

fn on(is: bool) -> &'static str {
    if is { "on" } else { "off" }
}
