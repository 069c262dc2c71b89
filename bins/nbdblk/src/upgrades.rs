//! [`Upgrades`]: the upgrade of a server, as its main thread sees it. Another thread prepares it.

use std::{
    os::fd::{AsRawFd, OwnedFd},
    path::PathBuf,
    sync::{Arc, Weak, mpsc},
    thread,
};

use anyhow::Context;
use nbd_server_core::Server;

use crate::{
    asker::Asker,
    events::Event,
    files, ready,
    replace::{self, Facts},
};

/// The answer to requests that come during an upgrade.
const BUSY: &str = "the server is being replaced: try again";

/// The present upgrade, if there is one.
pub(crate) struct Upgrades {
    /// The program of the next upgrade, unless the request names another one.
    program: PathBuf,
    server: Weak<Server>,
    events: mpsc::Sender<Event>,
    /// The listening control socket.
    socket: Option<Arc<OwnedFd>>,
    /// The client that waits for the result.
    running: Option<Option<Asker>>,
    /// Read the file again if the upgrade fails.
    reload: bool,
}

impl Upgrades {
    pub(crate) fn new(
        server: &Arc<Server>,
        events: mpsc::Sender<Event>,
        socket: Option<OwnedFd>,
    ) -> anyhow::Result<Self> {
        let program = replace::own_program().context("finding the path of this program")?;
        let (server, socket) = (Arc::downgrade(server), socket.map(Arc::new));
        Ok(Self { program, server, events, socket, running: None, reload: false })
    }

    pub(crate) fn is_running(&self) -> bool {
        self.running.is_some()
    }

    /// Begins an upgrade, unless there is an obstacle.
    pub(crate) fn ask(
        &mut self,
        asker: Option<Asker>,
        program: Option<PathBuf>,
        obstacle: Option<&str>,
        mut facts: Facts,
    ) {
        if self.is_running() {
            return asker.into_iter().for_each(|asker| self.refuse(asker));
        }
        self.running = Some(asker);
        if let Some(obstacle) = obstacle {
            self.fail(obstacle);
            return;
        }
        if let Err(error) = self.add_own(&mut facts) {
            self.fail(&format!("duplicating a descriptor: {error}"));
            return;
        }
        let program = program.unwrap_or_else(|| self.program.clone());
        let (server, events) = (self.server.clone(), self.events.clone());
        let prepare = move || {
            ready::reloading();
            let prepare = || replace::prepare(program, facts, &server).map_err(|error| crate::whole(&error));
            let prepared = std::panic::catch_unwind(std::panic::AssertUnwindSafe(prepare));
            let prepared = prepared.unwrap_or_else(|_| Err("a panic: see the log".into()));
            if prepared.is_err() {
                ready::again();
            }
            let _ = events.send(Event::Prepared(prepared.map(Box::new)));
        };
        if let Err(error) = thread::Builder::new().name("upgrade".into()).spawn(prepare) {
            self.fail(&format!("starting a thread: {error}"));
        }
    }

    /// Adds the files and descriptors of this program.
    fn add_own(&self, facts: &mut Facts) -> std::io::Result<()> {
        facts.state.files = files::list();
        if let Some(socket) = &self.socket {
            facts.state.control = Some(socket.as_raw_fd());
            facts.own.push(Arc::clone(socket));
        }
        if let Some(Some(asker)) = &self.running {
            let copy = OwnedFd::from(asker.0.try_clone()?);
            facts.state.askers.push(copy.as_raw_fd());
            facts.own.push(Arc::new(copy));
        }
        Ok(())
    }

    /// The upgrade has failed. Returns whether the file must be read again.
    pub(crate) fn fail(&mut self, error: &str) -> bool {
        log::error!("not upgraded, and nothing has changed: {error}");
        if let Some(asker) = self.running.take().flatten() {
            asker.tell(&Err(error.into()));
        }
        std::mem::take(&mut self.reload)
    }

    /// A request to read the file during an upgrade: the new program does that in any case.
    pub(crate) fn postpone(&mut self, asker: Option<Asker>) {
        match asker {
            Some(asker) => self.refuse(asker),
            None => self.reload = true,
        }
    }

    pub(crate) fn refuse(&self, asker: Asker) {
        asker.tell(&Err(BUSY.into()));
    }

    pub(crate) fn stop(self) {
        if let Some(asker) = self.running.flatten() {
            asker.tell(&Err("the server is stopping".into()));
        }
    }
}
