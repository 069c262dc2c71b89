//! Telling others that the server is ready, and that it stops: a pid file, a descriptor, the service manager.

use std::{
    env,
    fs::File,
    io::Write,
    os::{
        linux::net::SocketAddrExt,
        unix::{
            ffi::OsStrExt,
            net::{SocketAddr, UnixDatagram},
        },
    },
    path::PathBuf,
};

use anyhow::Context;

use crate::{activation, cli, files::OwnFile};

/// The variable that names the service manager's socket (sd_notify(3)).
pub(crate) const NOTIFY_SOCKET: &str = "NOTIFY_SOCKET";

/// Whom to tell, and how. Dropped, it says that the server stops, and takes the pid file away.
#[derive(Debug)]
pub(crate) struct Ready {
    pid: Option<(OwnFile, PathBuf)>,
    pipe: Option<File>,
}

impl Ready {
    /// Finds everything that can be wrong before anything listens.
    pub(crate) fn prepare(args: &cli::Serve) -> anyhow::Result<Self> {
        let pipe = args.ready_fd.map(|fd| activation::take(fd).with_context(|| format!("--ready-fd {fd}")));
        let pid = args.pidfile.as_ref().map(|path| OwnFile::pid(path).map(|file| (file, path.clone())));
        Ok(Self { pid: pid.transpose()?, pipe: pipe.transpose()?.map(Into::into) })
    }

    /// The devices are open and the sockets listen.
    pub(crate) fn announce(&mut self) -> anyhow::Result<()> {
        if let Some((file, path)) = &mut self.pid {
            file.move_to(path)?;
        }
        if let Some(mut pipe) = self.pipe.take() {
            pipe.write_all(b"\n").context("writing to --ready-fd")?;
        }
        notify("READY=1");
        Ok(())
    }
}

impl Drop for Ready {
    fn drop(&mut self) {
        notify("STOPPING=1");
    }
}

/// Tells the service manager something, if there is one.
fn notify(state: &str) {
    let Some(name) = env::var_os(NOTIFY_SOCKET) else { return };
    let told = || {
        let address = match name.as_bytes().strip_prefix(b"@") {
            Some(name) => SocketAddr::from_abstract_name(name)?,
            None => SocketAddr::from_pathname(&name)?,
        };
        UnixDatagram::unbound()?.send_to_addr(state.as_bytes(), &address)
    };
    if let Err(error) = told() {
        log::warn!("telling the service manager {state} at {}: {error}", name.display());
    }
}
