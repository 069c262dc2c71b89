//! The start of a program that replaces another one in the same process: it continues the service.

use std::{os::fd::OwnedFd, thread, time::Duration};

use anyhow::Context;
use nbd_server_core::{Limits, Server, tls::Tls};
use nix::unistd::Pid;

use crate::{
    asker::Asker,
    child::Child,
    clock,
    control::{Control, Phase},
    events::Event,
    files::OwnFile,
    plan::Plan,
    ready::{self, Ready},
    reload, sandbox,
    state::{self, State, StateFile},
    uri::Address,
};

/// A server, and what belongs to it.
#[derive(Debug)]
pub(crate) struct Service {
    pub(crate) server: Server,
    pub(crate) addresses: Vec<Address>,
    /// Files to remove at the end.
    pub(crate) files: Vec<OwnFile>,
    /// The listening control socket.
    pub(crate) socket: Option<OwnedFd>,
    /// The command of `--run`, once it has been started.
    pub(crate) child: Option<Child>,
    /// Names of the listening sockets that the service manager keeps.
    pub(crate) kept: Vec<String>,
}

/// The meaning of signals from the start: the server has been serving.
pub(crate) fn phase((_, state): &(StateFile, State)) -> Phase {
    if state.child.is_some() { Phase::Running } else { Phase::Serving }
}

/// Opens the devices again, and continues the service of the replaced program.
pub(crate) fn resume(
    plan: &mut Plan,
    tls: Option<Tls>,
    limits: Limits,
    control: &Control,
    (file, mut state): (StateFile, State),
) -> anyhow::Result<Service> {
    let files = state.files.iter().filter_map(OwnFile::adopt).collect();
    let askers: Vec<_> = state.askers.drain(..).map(state::take).collect::<anyhow::Result<_>>()?;
    let clients = state.clients();
    let handover = state.take_handover(&file)?;
    plan.open_again()?;
    let server = Server::resume(plan.exports(), handover, tls, limits).context("starting the server again")?;
    let listening = state.control.map(|fd| reload::serve(state::take(fd)?.into(), control.sender()));
    let socket = listening.transpose()?;
    let child = state.child.map(|pid| Child::watch(Pid::from_raw(pid), control)).transpose()?;
    let addresses = state.addresses.into_iter().map(Into::into).collect();
    sandbox::seal()?;

    let pause = Duration::from_nanos(clock::now()?.saturating_sub(state.paused_at)).as_millis();
    let (leaving, before) = (state.leaving, state.program);
    let disconnected = if leaving > 0 { format!(", {leaving} were disconnected") } else { String::new() };
    let text = format!(
        "nbdblk {before} was replaced by nbdblk {}: {clients} clients go on after {pause} ms{disconnected}",
        env!("CARGO_PKG_VERSION")
    );
    crate::report(&text);
    askers.into_iter().for_each(|asker| Asker(asker.into()).tell(&Ok(text.clone())));
    let events = control.sender();
    let announce = move || {
        ready::again();
        let _ = events.send(Event::Announced(Ok(Ready::default())));
    };
    thread::Builder::new().name("announce".into()).spawn(announce).context("starting a thread")?;
    Ok(Service { server, addresses, files, socket, child, kept: state.kept })
}
