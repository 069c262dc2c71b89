//! The command of `--run`: a shell that gets the server's address in its environment. When it ends, the server ends.

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
        wait::{Id, WaitPidFlag, WaitStatus, waitid},
    },
    unistd::Pid,
};

use crate::{
    activation, control::Control, events::Event, ready::NOTIFY_SOCKET, replace::VARIABLE, tls::Security, uri::Address,
};

/// A running command.
#[derive(Debug)]
pub(crate) struct Child {
    pid: Pid,
}

impl Child {
    /// Starts `sh -c command`. Reports its end to `control`.
    pub(crate) fn start(
        command: &OsStr,
        addresses: &[Address],
        export: &str,
        security: &Security,
        control: &Control,
    ) -> anyhow::Result<Self> {
        let environment =
            environment(addresses, export, security).context("cannot make the environment of the command")?;
        // std's Command would pass the blocked signals and the ignored SIGPIPE on to the command. SIGXFSZ is blocked here, but
        // the parent may also have ignored it.
        let mut attributes = PosixSpawnAttr::init()?;
        attributes.set_flags(PosixSpawnFlags::POSIX_SPAWN_SETSIGMASK | PosixSpawnFlags::POSIX_SPAWN_SETSIGDEF)?;
        attributes.set_sigmask(&SigSet::empty())?;
        attributes.set_sigdefault(&[Signal::SIGPIPE, Signal::SIGXFSZ].into_iter().collect())?;
        let command = CString::new(command.as_bytes()).context("the command of --run")?;
        let words = [c"sh".to_owned(), c"-c".to_owned(), command];
        let pid = posix_spawn("/bin/sh", &PosixSpawnFileActions::init()?, &attributes, &words, &environment)
            .context("starting /bin/sh")?;
        Self::watch(pid, control)
    }

    /// Waits for the end of a command that was started before this program.
    pub(crate) fn watch(pid: Pid, control: &Control) -> anyhow::Result<Self> {
        let events = control.sender();
        let wait = move || {
            // The status stays there for a program that replaces this one before the event is handled.
            let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT;
            let status = match waitid(Id::Pid(pid), flags) {
                Ok(WaitStatus::Exited(_, status)) => status as u8,
                Ok(WaitStatus::Signaled(_, signal, _)) => {
                    log::warn!("the command was killed by {signal}");
                    128 + signal as u8
                }
                other => {
                    log::error!("cannot wait for the command: {other:?}");
                    1
                }
            };
            // If the server is already stopping, nothing receives this.
            let _ = events.send(Event::Ended(status));
        };
        thread::Builder::new().name("command".into()).spawn(wait).context("starting a thread")?;
        Ok(Self { pid })
    }

    pub(crate) fn pid(&self) -> i32 {
        self.pid.as_raw()
    }

    /// Sends SIGTERM to the command.
    pub(crate) fn terminate(&self) {
        // It may have just ended on its own.
        let _ = kill(self.pid, Signal::SIGTERM);
    }
}

/// Our variables, and those that nbdkit sets for its commands.
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
    // These are for the server only.
    variables.retain(|name, _| {
        name != NOTIFY_SOCKET && name != VARIABLE && activation::VARIABLES.iter().all(|ours| name != ours)
    });
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
