//! `--exit-with-parent`: sends SIGTERM to this process when its parent ends.

use std::os::fd::AsFd;

use anyhow::{Context, ensure};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        prctl,
        signal::{Signal, kill},
    },
    unistd::{Pid, getppid, getsid},
};

use crate::{sandbox, sys::pidfd_open};

/// Watches the parent from now on.
///
/// # Errors
/// The parent has already ended, or the kernel is older than 5.3.
pub(crate) fn watch() -> anyhow::Result<()> {
    const GONE: &str = "--exit-with-parent: the parent has already ended";
    let parent = getppid();
    if parent.as_raw() == 0 {
        // The parent is in another namespace. (Otherwise do not use this signal: it comes when the parent's thread ends.)
        return prctl::set_pdeathsig(Signal::SIGTERM).context("--exit-with-parent");
    }
    let pidfd = pidfd_open(parent).context("--exit-with-parent: watching the parent")?;
    // The descriptor belongs to the parent only if the parent still has this number.
    ensure!(getppid() == parent, GONE);
    // If the parent ended before this point, another process has adopted this one. The session shows it: a child inherits its
    // parent's session, or leads its own.
    let session = getsid(None)?;
    ensure!(session == Pid::this() || getsid(Some(parent)) == Ok(session), GONE);
    let watch = move || {
        let mut polled = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
        while poll(&mut polled, PollTimeout::NONE).is_err() {}
        log::info!("the parent, process {parent}, has ended");
        let _ = kill(Pid::this(), Signal::SIGTERM);
    };
    sandbox::spawn_trusted("parent", watch).context("starting a thread")?;
    Ok(())
}
