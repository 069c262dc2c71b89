//! Reports that the server is ready, and that it stops: through a pid file, a descriptor, the service manager.

use std::{
    env,
    fs::File,
    io::{self, ErrorKind, IoSlice, Write},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::{ffi::OsStrExt, net::UnixDatagram},
    },
    path::PathBuf,
    time::Duration,
};

use anyhow::Context;
use nix::sys::socket::{ControlMessage, MsgFlags, UnixAddr, sendmsg};

use crate::{activation, cli, clock, files::OwnFile};

/// The variable that names the service manager's socket (sd_notify(3)).
pub(crate) const NOTIFY_SOCKET: &str = "NOTIFY_SOCKET";

/// Time that the service manager has to receive a message.
const PATIENCE: Duration = Duration::from_secs(5);

/// The receivers of the report that the server is ready.
#[derive(Debug, Default)]
pub(crate) struct Ready {
    pid: Option<(OwnFile, PathBuf)>,
    pipe: Option<File>,
    /// Sockets for the service manager to keep, with their names.
    pub(crate) kept: Vec<(OwnedFd, String)>,
    /// Names of sockets that it does not have to keep any more.
    pub(crate) forgotten: Vec<String>,
}

impl Ready {
    /// Finds all errors before the server listens.
    pub(crate) fn prepare(args: &cli::Serve) -> anyhow::Result<Self> {
        let pipe = args.ready_fd.map(|fd| activation::take(fd).with_context(|| format!("--ready-fd {fd}")));
        let pid = args.pidfile.as_ref().map(|path| OwnFile::pid(path).map(|file| (file, path.clone())));
        Ok(Self { pid: pid.transpose()?, pipe: pipe.transpose()?.map(Into::into), ..Self::default() })
    }

    /// Reports that the devices are open and the sockets listen. May wait for a file system, and for the reader of the
    /// descriptor.
    pub(crate) fn announce(&mut self) -> anyhow::Result<()> {
        if let Some((file, path)) = &mut self.pid {
            file.move_to(path)?;
        }
        self.forgotten.drain(..).for_each(|name| forget(&name));
        self.kept.drain(..).for_each(|(socket, name)| store(&socket, &name));
        notify("READY=1", PATIENCE);
        match self.pipe.take().map(|mut pipe| pipe.write_all(b"\n")) {
            Some(Err(error)) if matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::WouldBlock) => {
                log::warn!("--ready-fd: its reader has closed it, or does not read: {error}");
            }
            Some(written) => written.context("writing to --ready-fd")?,
            None => {}
        }
        Ok(())
    }
}

/// Reports that the server reads its configuration again or is being replaced (Type=notify-reload); READY=1 reports the end.
pub(crate) fn reloading() {
    match clock::now() {
        Ok(now) => notify(&format!("RELOADING=1\nMONOTONIC_USEC={}", now / 1000), PATIENCE),
        Err(error) => log::warn!("cannot report a reload to the service manager: {error:#}"),
    }
}

/// Reports that the server serves again.
pub(crate) fn again() {
    notify("READY=1", PATIENCE);
}

/// Gives a listening socket to the service manager, which keeps it if the server crashes.
pub(crate) fn store(socket: &OwnedFd, name: &str) {
    send(&format!("FDSTORE=1\nFDNAME={name}"), Some(socket), PATIENCE);
}

/// Makes the service manager close a socket that it keeps.
pub(crate) fn forget(name: &str) {
    notify(&format!("FDSTOREREMOVE=1\nFDNAME={name}"), PATIENCE);
}

/// Sends a state to the service manager, if there is one.
pub(crate) fn notify(state: &str, patience: Duration) {
    send(state, None, patience);
}

fn send(state: &str, passed: Option<&OwnedFd>, patience: Duration) {
    let Some(name) = env::var_os(NOTIFY_SOCKET) else { return };
    let send = || {
        let address = match name.as_bytes().strip_prefix(b"@") {
            Some(name) => UnixAddr::new_abstract(name)?,
            None => UnixAddr::new(name.as_os_str())?,
        };
        let socket = UnixDatagram::unbound()?;
        socket.set_write_timeout(Some(patience))?;
        let fds: Vec<_> = passed.iter().map(|fd| fd.as_raw_fd()).collect();
        let rights = [ControlMessage::ScmRights(&fds)];
        let rights = if fds.is_empty() { &[][..] } else { &rights[..] };
        let text = [IoSlice::new(state.as_bytes())];
        sendmsg(socket.as_raw_fd(), &text, rights, MsgFlags::MSG_NOSIGNAL, Some(&address))?;
        io::Result::Ok(())
    };
    if let Err(error) = send() {
        log::warn!("cannot send {state} to the service manager at {}: {error}", name.display());
    }
}
