//! `--exit-with-parent`: SIGTERM for this process when the one that started it ends.

use std::{os::fd::AsFd, thread};

use anyhow::{Context, ensure};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        prctl,
        signal::{Signal, kill},
    },
    unistd::{Pid, getppid, getsid},
};

use crate::sys::pidfd_open;

/// Watches over the parent from now on.
///
/// # Errors
/// It has gone already, or the kernel is older than 5.3.
pub(crate) fn watch() -> anyhow::Result<()> {
    const GONE: &str = "--exit-with-parent: the parent has gone already";
    let parent = getppid();
    if parent.as_raw() == 0 {
        // It is in another namespace. (Otherwise this signal is not to be trusted: it comes when the thread ends.)
        return prctl::set_pdeathsig(Signal::SIGTERM).context("--exit-with-parent");
    }
    let pidfd = pidfd_open(parent).context("--exit-with-parent: watching the parent")?;
    // The descriptor is that of the parent only if this still is its number.
    ensure!(getppid() == parent, GONE);
    // Before this point, only this tells an orphan and whoever takes care of it from a child and its parent: a session is
    // inherited, or the child leads one of its own.
    let session = getsid(None)?;
    ensure!(session == Pid::this() || getsid(Some(parent)) == Ok(session), GONE);
    let watch = move || {
        let mut polled = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
        while poll(&mut polled, PollTimeout::NONE).is_err() {}
        log::info!("the parent, process {parent}, has ended");
        let _ = kill(Pid::this(), Signal::SIGTERM);
    };
    thread::Builder::new().name("parent".into()).spawn(watch).context("starting a thread")?;
    Ok(())
}
