//! The replacement of the program: the running process executes another one, which continues the service (`nbdblk upgrade`).
//!
//! Everything that can fail happens before the execution: the new program judges the configuration, then the server pauses and
//! writes its state, and the program judges that. Until the execution the pause can end, and the server goes on. The process
//! keeps its number, so service managers, pid files and the command of `--run` notice nothing.

use std::{
    env,
    ffi::{CString, OsString},
    fs::File,
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::ffi::{OsStrExt, OsStringExt},
    },
    path::{PathBuf, absolute},
    sync::{Arc, Weak},
    time::Duration,
};

use anyhow::{Context, anyhow};
use nbd_server_core::{Handover, Paused, Server};
use nix::{
    fcntl::{FcntlArg, FdFlag, fcntl},
    unistd::execve,
};

use crate::{
    activation, clock, judge,
    state::{State, StateFile},
};

/// The variable that names the descriptor of the state. Child processes do not inherit it.
pub(crate) const VARIABLE: &str = "NBDBLK_UPGRADE_STATE";

/// Longest time for a new program to judge the configuration, while clients are served.
const JUDGING: Duration = Duration::from_secs(10);

/// The same for the state, while clients wait.
const JUDGING_PAUSED: Duration = Duration::from_secs(3);

/// Longest time for the devices to complete the requests that have begun.
const DRAINING: Duration = Duration::from_secs(5);

/// What the state says apart from the clients; the main thread knows it.
#[derive(Debug, Default)]
pub(crate) struct Facts {
    pub(crate) state: State,
    /// The descriptors that it names.
    pub(crate) own: Vec<Arc<OwnedFd>>,
    /// An export whose content would be lost with this process.
    pub(crate) volatile: Option<String>,
}

/// A paused server whose state is written. Dropping this lets the server go on.
#[derive(Debug)]
pub(crate) struct Prepared {
    program: PathBuf,
    state: Arc<OwnedFd>,
    /// All descriptors that the new program inherits.
    passed: Vec<Arc<OwnedFd>>,
    paused: Paused,
}

/// The program that the server was started with, as it is now: a link may lead to another file than before.
pub(crate) fn own_program() -> io::Result<PathBuf> {
    let name = PathBuf::from(env::args_os().next().unwrap_or_default());
    if name.as_os_str().as_bytes().contains(&b'/') {
        return absolute(name);
    }
    let path = env::var_os("PATH").unwrap_or_default();
    let found = env::split_paths(&path).map(|dir| dir.join(&name)).find(|path| path.is_file());
    found.map_or_else(env::current_exe, absolute)
}

/// Does everything that can fail and takes time. Not on the main thread.
pub(crate) fn prepare(program: PathBuf, facts: Facts, server: &Weak<Server>) -> anyhow::Result<Prepared> {
    let Facts { mut state, own, volatile } = facts;
    if let Some(export) = volatile {
        return Err(anyhow!("the export \"{export}\" is in the memory of this process, and would be lost"));
    }
    let args: Vec<OsString> = env::args_os().collect();
    judge::ask(&program, &args, None, JUDGING)?;
    let server = server.upgrade().context("the server is stopping")?;
    state.paused_at = clock::now()?;
    let paused = server.pause(DRAINING).context("the server cannot pause")?;
    drop(server);
    state.program = env!("CARGO_PKG_VERSION").into();
    state.leaving = paused.leaving();
    let file = state.write(paused.state()).context("writing the state of the server")?;
    judge::ask(&program, &args, Some(&file), JUDGING_PAUSED)?;
    let Handover { listeners, guests, connections } = paused.state();
    let clients = guests.iter().map(|guest| &guest.socket).chain(connections.iter().map(|one| &one.socket));
    let state = Arc::new(OwnedFd::from(file));
    let passed = own.iter().chain(listeners).chain(clients).chain([&state]).map(Arc::clone).collect();
    Ok(Prepared { program, state, passed, paused })
}

impl Prepared {
    /// Executes the new program. Returns only the reason why that failed.
    pub(crate) fn execute(self) -> anyhow::Error {
        self.try_execute().err().unwrap_or_else(|| anyhow!("the execution returned"))
    }

    fn try_execute(&self) -> anyhow::Result<()> {
        let program = CString::new(self.program.as_os_str().as_bytes())?;
        let mut args = vec![program.clone()];
        for word in env::args_os().skip(1) {
            args.push(CString::new(word.into_vec())?);
        }
        let mut environment = vec![CString::new(format!("{VARIABLE}={}", self.state.as_raw_fd()))?];
        for (name, value) in env::vars_os().filter(|(name, _)| name != VARIABLE) {
            if activation::VARIABLES.iter().all(|ours| name != *ours) {
                environment.push(CString::new([name.as_bytes(), b"=", value.as_bytes()].concat())?);
            }
        }
        self.paused.dismiss();
        let mark = |flag| self.passed.iter().try_for_each(|fd| fcntl(fd, FcntlArg::F_SETFD(flag)).map(drop));
        let executed = mark(FdFlag::empty()).and_then(|()| execve(&program, &args, &environment).map(drop));
        mark(FdFlag::FD_CLOEXEC)?;
        executed.with_context(|| format!("executing {}", self.program.display()))
    }
}

/// The state that this process has got from the program that it was before.
pub(crate) fn inherited() -> anyhow::Result<Option<(StateFile, State)>> {
    let Ok(fd) = env::var(VARIABLE) else { return Ok(None) };
    let file = activation::take(fd.parse().with_context(|| format!("{VARIABLE}={fd}"))?);
    let file = File::from(file.with_context(|| format!("{VARIABLE}={fd}"))?);
    StateFile::open(file).map(Some)
}
