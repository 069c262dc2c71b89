//! What whoever started this process left open for it: descriptors by their number, and listening sockets as systemd passes
//! them (sd_listen_fds(3)).

use std::{
    env, io,
    os::fd::{OwnedFd, RawFd},
    process,
};

use anyhow::{Context, bail};

/// The variables of the protocol; they are for this process only.
pub(crate) const VARIABLES: [&str; 3] = ["LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"];

/// The first descriptor that is passed.
const FIRST: RawFd = 3;

/// More than anybody passes.
const COUNT_MAX: RawFd = 1024;

/// The sockets that were passed to this process, with their names, which may be empty. None when nothing was passed, or to
/// another process: then the variables have only been inherited.
pub(crate) fn sockets() -> anyhow::Result<Vec<(OwnedFd, String)>> {
    let [pid, count, names] = VARIABLES.map(|name| env::var(name).ok());
    let Some(count) = count.filter(|_| pid.is_some_and(|pid| pid.parse() == Ok(process::id()))) else {
        return Ok(Vec::new());
    };
    let Ok(count @ 0..=COUNT_MAX) = count.parse() else { bail!("LISTEN_FDS={count} is not a number of sockets") };
    let names = names.unwrap_or_default();
    let mut names = names.split(':');
    let take = |fd| {
        let name = names.next().unwrap_or_default().to_owned();
        Ok((take(fd).context("socket activation (LISTEN_FDS)")?, name))
    };
    (FIRST..FIRST + count).map(take).collect()
}

/// Takes a descriptor over, by its number.
///
/// # Errors
/// It is not open, or was opened by this process.
pub(crate) fn take(fd: RawFd) -> io::Result<OwnedFd> {
    let taken = blkdev_drivers::inherited(fd)?;
    // It lives on as `taken`, which others cannot name, and which no other program inherits.
    nix::unistd::close(fd)?;
    Ok(taken)
}
