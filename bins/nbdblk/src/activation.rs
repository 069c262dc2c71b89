//! Descriptors that the parent process left open for this one: by number, and listening sockets in systemd's form
//! (sd_listen_fds(3)).

use std::{
    env, io,
    os::fd::{OwnedFd, RawFd},
    process,
};

use anyhow::{Context, bail};

/// The variables of the protocol. Child processes do not inherit them.
pub(crate) const VARIABLES: [&str; 3] = ["LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"];

/// The first descriptor that is passed.
const FIRST: RawFd = 3;

/// More sockets than any service manager passes.
const COUNT_MAX: RawFd = 1024;

/// The sockets that were passed to this process, with their names, which may be empty. `None`: there are none, or they are for
/// another process, and this one has only inherited the variables.
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

/// Takes over a descriptor by its number.
///
/// # Errors
/// It is not open, or this process opened it.
pub(crate) fn take(fd: RawFd) -> io::Result<OwnedFd> {
    let taken = blkdev_drivers::inherited(fd)?;
    // It continues as `taken`, which no option can name and no child process inherits.
    nix::unistd::close(fd)?;
    Ok(taken)
}
