//! The sandbox: what threads give up for good, so that code that takes one of them over can do little.
//!
//! Each thread gives up its own rights at its start ([`confine`]), because the kernel keeps them for each thread. Threads that talk
//! to clients, devices and the control socket keep only what they need for files and sockets that are open. The main thread and
//! those that it starts for a reload or an upgrade keep more: they open devices, and execute the next program, which must be able to
//! open devices in turn.

mod filter;
mod identity;
mod reach;

use std::{
    fmt, io, process,
    sync::{Mutex, OnceLock, PoisonError},
    thread,
};

use anyhow::{Context, anyhow};
use blkdev::thread::{Role, confine_with, spawn};
use nix::sys::prctl;

use crate::{
    cli::{self, Sandbox as Mode},
    exports::ExportSpec,
    logger,
};
use filter::Filters;
use identity::{Identity, Keeps};
use reach::Reach;

/// What the threads of this process give up.
#[derive(Debug)]
struct Policy {
    mode: Mode,
    identity: Option<Identity>,
    /// A command of `--run` inherits everything from the main thread.
    has_command: bool,
    filters: Option<Filters>,
    has_landlock: bool,
    /// What can be opened again.
    reach: Mutex<Reach>,
}

static POLICY: OnceLock<Policy> = OnceLock::new();

/// Prepares the sandbox, before the first thread and the first device. From now on, threads confine themselves.
///
/// # Errors
/// The user cannot be changed, or the sandbox is required and the kernel cannot do all of it.
pub(crate) fn prepare(args: &cli::Serve, specs: &[ExportSpec]) -> anyhow::Result<()> {
    let mode = args.sandbox.unwrap_or_default();
    let identity = Identity::new(args.user, args.group)?;
    if identity.is_some() || mode != Mode::Off {
        identity::raise_locked_memory();
    }
    let mut policy = Policy {
        mode,
        identity,
        has_command: args.run.is_some(),
        filters: None,
        has_landlock: false,
        reach: Mutex::new(Reach::of(specs)),
    };
    if mode != Mode::Off {
        // On a thread, which takes the restrictions with it.
        let filters = thread::spawn(|| Filters::new().and_then(|filters| filters.probe().map(|()| filters)));
        let landlock = thread::spawn(reach::confine_to_nothing);
        let tried = (filters.join().map_err(|_| anyhow!("a panic")), landlock.join().map_err(|_| anyhow!("a panic")));
        policy.filters = policy.accept("seccomp", tried.0.flatten())?;
        policy.has_landlock = policy.accept("landlock", tried.1.flatten())?.is_some();
    }
    if mode != Mode::Off || policy.identity.is_some() {
        let _ = POLICY.set(policy);
        confine_with(confine);
    }
    Ok(())
}

/// Confines the main thread, once the devices are open and the sockets are bound.
///
/// # Errors
/// The user cannot be changed, or the sandbox is required and something failed.
pub(crate) fn seal() -> anyhow::Result<()> {
    let Some(policy) = POLICY.get() else { return Ok(()) };
    let sealed = policy.confine_main();
    match policy.mode {
        Mode::Require => sealed.context("--sandbox require"),
        _ if policy.identity.is_some() => sealed,
        _ => {
            sealed.unwrap_or_else(|error| log::warn!("the sandbox of the main thread: {}", crate::whole(&error)));
            Ok(())
        }
    }
}

/// Starts a thread of this program that serves or reports.
pub(crate) fn spawn_service(name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    spawn(Role::Service, name, work).map(drop)
}

/// Starts a thread that may do as much as the main thread once that is [sealed](seal), such as removing files.
pub(crate) fn spawn_trusted(name: &'static str, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let work = move || {
        if let Some(policy) = POLICY.get() {
            policy.check(name, policy.confine_main());
        }
        work();
    };
    thread::Builder::new().name(name.into()).spawn(work).map(drop)
}

/// Confines the calling thread to opening devices and reading files, for a reload: it creates and removes no file, and executes none.
pub(crate) fn enter_reload(specs: &[ExportSpec]) {
    let Some(policy) = POLICY.get().filter(|policy| policy.has_landlock) else { return };
    if !Reach::of(specs).needs_everything() {
        policy.check("reload", reach::confine_to_existing());
    }
}

/// Adds the devices of a new configuration to those that can be opened again.
pub(crate) fn extend(specs: &[ExportSpec]) {
    if let Some(policy) = POLICY.get() {
        policy.reach.lock().unwrap_or_else(PoisonError::into_inner).extend(specs);
    }
}

/// Confines the calling thread according to its role.
fn confine(role: Role) {
    let Some(policy) = POLICY.get() else { return };
    policy.check(role, policy.confine(role));
}

impl Policy {
    /// Part of the sandbox, as far as it works.
    fn accept<T>(&self, part: &str, tried: anyhow::Result<T>) -> anyhow::Result<Option<T>> {
        match tried {
            Ok(part) => Ok(Some(part)),
            Err(error) if self.mode == Mode::Require => {
                Err(error.context(format!("--sandbox require: {part} does not work here")))
            }
            Err(error) => {
                log::warn!("the sandbox works without {part}: {}", crate::whole(&error));
                Ok(None)
            }
        }
    }

    fn confine(&self, role: Role) -> anyhow::Result<()> {
        self.identity.iter().try_for_each(Identity::assume)?;
        if self.mode == Mode::Off {
            return Ok(());
        }
        let is_opener = role == Role::Opener;
        let reach = self.reach.lock().unwrap_or_else(PoisonError::into_inner).clone();
        identity::keep(if is_opener { Keeps::ToOpen(reach.needs_everything()) } else { Keeps::Nothing })?;
        prctl::set_no_new_privs()?;
        if self.has_landlock {
            match is_opener {
                true if reach.needs_everything() => {}
                true => reach.confine()?,
                false => reach::confine_to_nothing()?,
            }
        }
        self.filters.iter().try_for_each(|filters| filters.apply(role))
    }

    /// Confines a thread that opens devices for new configurations, and executes programs.
    fn confine_main(&self) -> anyhow::Result<()> {
        self.identity.iter().try_for_each(Identity::assume)?;
        if self.mode == Mode::Off || self.has_command {
            return Ok(());
        }
        identity::keep(Keeps::ToOpen(true))?;
        prctl::set_no_new_privs()?;
        self.filters.iter().try_for_each(Filters::apply_to_main)
    }

    /// What was tried before works, unless memory is short.
    fn check(&self, thread: impl fmt::Debug, confined: anyhow::Result<()>) {
        let Err(error) = confined else { return };
        let text = format!("the sandbox of {thread:?}: {}", crate::whole(&error));
        if self.mode == Mode::Require || self.identity.is_some() {
            crate::complain(&text);
            logger::flush(logger::PATIENCE);
            process::exit(1);
        }
        log::warn!("{text}");
    }
}
