//! Listening sockets that the service manager keeps while a crashed server starts again (sd_notify(3), `FDSTORE=1`): clients wait in
//! their backlog instead of being refused.
//!
//! The name of a stored socket says where it listens, because the manager returns it to a server that may have other arguments.

use std::{
    fs, io,
    net::SocketAddr,
    os::{fd::OwnedFd, unix::fs::MetadataExt},
    path::Path,
    time::UNIX_EPOCH,
};

use crate::{activation, ready::NOTIFY_SOCKET};

/// The beginning of the names of our sockets.
const PREFIX: &str = "nbdblk.";

/// Longest name, in bytes (sd_notify(3), FDNAME).
const NAME_MAX: usize = 255;

/// The sockets of an earlier process that the manager has returned, and copies of those that it should keep.
#[derive(Debug, Default)]
pub(crate) struct Store {
    found: Vec<(OwnedFd, String)>,
    kept: Vec<(OwnedFd, String)>,
}

impl Store {
    /// Takes the stored sockets out of those that were passed to this process.
    pub(crate) fn split(passed: Vec<(OwnedFd, String)>) -> (Self, Vec<(OwnedFd, String)>) {
        let (found, others) = passed.into_iter().partition(|(_, name)| name.starts_with(PREFIX));
        (Self { found, kept: Vec::new() }, others)
    }

    /// Returns the socket with this name, if it was stored.
    pub(crate) fn take(&mut self, name: &str) -> Option<OwnedFd> {
        let position = self.found.iter().position(|(_, found)| found == name)?;
        log::info!("{name}: the service manager has kept the socket");
        Some(self.found.swap_remove(position).0)
    }

    /// Remembers a socket that the manager should keep.
    pub(crate) fn keep(&mut self, socket: &OwnedFd, name: String) -> io::Result<()> {
        if std::env::var_os(NOTIFY_SOCKET).is_some() && name.len() <= NAME_MAX {
            self.kept.push((socket.try_clone()?, name));
        }
        Ok(())
    }

    /// The sockets that the manager should keep, and the names of those that it should not keep any more.
    pub(crate) fn into_parts(self) -> (Vec<(OwnedFd, String)>, Vec<String>) {
        (self.kept, self.found.into_iter().map(|(_, name)| name).collect())
    }
}

/// The name of a TCP socket.
pub(crate) fn tcp(address: SocketAddr) -> String {
    safe(&format!("tcp.{address}"))
}

/// The name of a vsock port.
pub(crate) fn vsock(port: u32) -> String {
    format!("{PREFIX}vsock.{port}")
}

/// The name of a socket in the abstract namespace.
pub(crate) fn in_namespace(name: &[u8]) -> String {
    safe(&format!("abstract.{}", name.escape_ascii()))
}

/// The name of a socket in the file system, while its file exists: another file at the path has another name.
pub(crate) fn file(path: &Path) -> io::Result<String> {
    let found = fs::symlink_metadata(path)?;
    let created = found.created().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
    let created = created.map_or(0, |time| time.as_nanos());
    Ok(format!("{PREFIX}unix.{}.{}.{created}", found.dev(), found.ino()))
}

/// No colon may be in a name.
fn safe(name: &str) -> String {
    format!("{PREFIX}{}", name.replace(':', "_"))
}

/// All sockets that were passed to this process: those that an earlier process has stored, and others.
pub(crate) fn passed() -> anyhow::Result<(Store, Vec<(OwnedFd, String)>)> {
    Ok(Store::split(activation::sockets()?))
}
