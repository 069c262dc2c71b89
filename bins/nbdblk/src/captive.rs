//! The command of `--run`: a shell that is told where the server is, and whose end is the server's end.

use std::{
    collections::BTreeMap,
    ffi::{CString, OsStr, OsString},
    os::unix::ffi::{OsStrExt, OsStringExt},
    thread,
};

use anyhow::Context;
use nix::{
    spawn::{PosixSpawnAttr, PosixSpawnFileActions, PosixSpawnFlags, posix_spawn},
    sys::{
        signal::{SigSet, Signal, kill},
        wait::{WaitStatus, waitpid},
    },
    unistd::Pid,
};

use crate::{activation, control::Control, events::Event, ready::NOTIFY_SOCKET, tls::Security, uri::Address};

/// A command that runs.
#[derive(Debug)]
pub(crate) struct Captive {
    pid: Pid,
}

impl Captive {
    /// Starts `sh -c command`. Its end arrives at `control`.
    pub(crate) fn start(
        command: &OsStr,
        addresses: &[Address],
        export: &str,
        security: &Security,
        control: &Control,
    ) -> anyhow::Result<Self> {
        let environment = environment(addresses, export, security).context("the environment of the command")?;
        // std's Command would hand the blocked signals and the ignored SIGPIPE on to the command. SIGXFSZ is blocked here, but
        // may have been ignored by the parent as well.
        let mut attributes = PosixSpawnAttr::init()?;
        attributes.set_flags(PosixSpawnFlags::POSIX_SPAWN_SETSIGMASK | PosixSpawnFlags::POSIX_SPAWN_SETSIGDEF)?;
        attributes.set_sigmask(&SigSet::empty())?;
        attributes.set_sigdefault(&[Signal::SIGPIPE, Signal::SIGXFSZ].into_iter().collect())?;
        let command = CString::new(command.as_bytes()).context("the command of --run")?;
        let words = [c"sh".to_owned(), c"-c".to_owned(), command];
        let pid = posix_spawn("/bin/sh", &PosixSpawnFileActions::init()?, &attributes, &words, &environment)
            .context("starting /bin/sh")?;
        let events = control.sender();
        let wait = move || {
            let status = match waitpid(pid, None) {
                Ok(WaitStatus::Exited(_, status)) => status as u8,
                Ok(WaitStatus::Signaled(_, signal, _)) => {
                    log::warn!("the command was killed by {signal}");
                    128 + signal as u8
                }
                other => {
                    log::error!("waiting for the command: {other:?}");
                    1
                }
            };
            // Nobody waits any more when the server is stopping already.
            let _ = events.send(Event::Ended(status));
        };
        thread::Builder::new().name("command".into()).spawn(wait).context("starting a thread")?;
        Ok(Self { pid })
    }

    /// Asks the command to end.
    pub(crate) fn terminate(&self) {
        // It may have ended by itself just now.
        let _ = kill(self.pid, Signal::SIGTERM);
    }
}

/// Ours, and what nbdkit tells its commands.
fn environment(addresses: &[Address], export: &str, security: &Security) -> anyhow::Result<Vec<CString>> {
    let uri = addresses[0].uri(export, security.words().as_deref());
    let unix = addresses.iter().find_map(|address| match address {
        Address::Unix(path) => Some(path.clone().into_os_string()),
        Address::Tcp(..) | Address::Vsock(_) => None,
    });
    let port = addresses.iter().find_map(|address| match address {
        Address::Tcp(_, port) => Some(port.to_string()),
        Address::Vsock(port) => Some(port.to_string()),
        Address::Unix(_) => None,
    });
    let mut variables: BTreeMap<OsString, OsString> = std::env::vars_os().collect();
    // Those are for the server only.
    variables.retain(|name, _| name != NOTIFY_SOCKET && activation::VARIABLES.iter().all(|ours| name != ours));
    variables.insert("nbd".into(), uri.clone().into());
    variables.insert("uri".into(), uri.into());
    variables.insert("unixsocket".into(), unix.unwrap_or_default());
    variables.insert("port".into(), port.unwrap_or_default().into());
    variables.insert("exportname".into(), export.into());
    variables.extend(security.variables());
    let lines = variables.into_iter().map(|(name, value)| {
        let mut line = name.into_vec();
        line.push(b'=');
        line.extend(value.into_vec());
        Ok(CString::new(line)?)
    });
    lines.collect()
}
