//! Where the server and its files are in the directory of a run.

use std::path::{Path, PathBuf};

/// The Unix domain socket of the server.
pub(crate) fn socket(dir: &Path) -> PathBuf {
    dir.join("nbd.sock")
}

/// The file with the TCP port of the server, which the kernel chooses at each start.
pub(crate) fn port(dir: &Path) -> PathBuf {
    dir.join("port")
}

/// The URI of an export.
pub(crate) fn uri(dir: &Path, export: &str, tcp: bool) -> String {
    if tcp {
        // Before the server has started, this port is as good as any.
        let port = std::fs::read_to_string(port(dir)).unwrap_or_else(|_| "1".into());
        format!("nbd://127.0.0.1:{port}/{export}")
    } else {
        format!("nbd+unix:///{export}?socket={}", socket(dir).display())
    }
}
