//! `nbdblk reload` and the server's side of it: a unix socket with a single request, which makes the server read its file again.

use std::{
    io::{self, ErrorKind, Read, Write},
    os::{
        fd::AsFd,
        unix::net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    process::ExitCode,
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, anyhow, bail};
use blkdev_drivers::Value;
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{getsockopt, sockopt::PeerCredentials},
    unistd::geteuid,
};

use crate::{
    asker::Asker,
    cli,
    config::File,
    events::Event,
    files::OwnFile,
    listen::{Access, bind_unix, connect_unix},
};

/// The request of a client.
pub(crate) const REQUEST: &[u8] = b"reload\n";

/// Time that a client has to send it.
const PATIENCE: Duration = Duration::from_secs(5);

/// Most clients that have not sent their request yet. With one more, the oldest is disconnected.
const SILENT_MAX: usize = 64;

/// Time that `nbdblk reload` waits by default.
const TIMEOUT: Duration = Duration::from_secs(60);

/// Makes a server read its file again.
pub(crate) fn run(args: &cli::Reload) -> anyhow::Result<ExitCode> {
    let path = match (&args.control, &args.file) {
        (Some(path), _) => path.clone(),
        (None, Some(file)) => named_in(file)?,
        (None, None) => bail!("neither a file nor --control was given"),
    };
    let limit = args.timeout.unwrap_or(TIMEOUT);
    let answer = ask(&path, limit).map_err(|error| match error.kind() {
        ErrorKind::WouldBlock | ErrorKind::TimedOut => {
            let (path, limit) = (path.display(), Value::Time(limit));
            anyhow!("the server at {path} has not answered within {limit}; it may still reload: see its log")
        }
        ErrorKind::NotFound | ErrorKind::ConnectionRefused => {
            anyhow!("cannot reach the server at {}: {error}; is it running?", path.display())
        }
        _ => anyhow!(error).context(format!("cannot reach the server at {}", path.display())),
    })?;
    match answer.trim_end().split_once(' ') {
        Some(("ok", changes)) => crate::print(&format!("{changes}\n")),
        Some(("error", error)) => Err(anyhow!("{error}")),
        _ => bail!("the server at {} has ended without an answer", path.display()),
    }
}

fn ask(path: &Path, limit: Duration) -> io::Result<String> {
    let deadline = Instant::now() + limit;
    let rest = || match deadline.saturating_duration_since(Instant::now()) {
        Duration::ZERO => Err(io::Error::from(ErrorKind::TimedOut)),
        rest => Ok(rest),
    };
    let mut socket = loop {
        match connect_unix(path) {
            // The server's backlog is full.
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                thread::sleep(rest()?.min(Duration::from_millis(50)));
            }
            connected => break connected?,
        }
    };
    socket.set_nonblocking(false)?;
    socket.set_write_timeout(Some(rest()?))?;
    socket.write_all(REQUEST)?;
    let (mut answer, mut part) = (Vec::new(), [0; 4096]);
    loop {
        socket.set_read_timeout(Some(rest()?))?;
        match socket.read(&mut part) {
            Ok(0) => return Ok(String::from_utf8_lossy(&answer).into_owned()),
            Ok(len) => answer.extend_from_slice(&part[..len]),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// The control socket of the server that uses this file.
fn named_in(file: &Path) -> anyhow::Result<PathBuf> {
    let found = File::read(file)?.settings.into_iter().find(|setting| setting.key == "control");
    let word =
        found.and_then(|setting| setting.words.first().and_then(|w| w.strip_prefix("--control=")).map(PathBuf::from));
    word.with_context(|| {
        format!("{} names no control socket (control = \"PATH\"); use --control, or send SIGHUP", file.display())
    })
}

/// Listens for [`run`], and passes requests on as events. Only the server's own user and root may send them.
pub(crate) fn listen(path: &Path, events: mpsc::Sender<Event>) -> anyhow::Result<OwnFile> {
    let access = Access { mode: Some(0o600), ..Access::default() };
    let (listener, file) = bind_unix(path, &access).with_context(|| format!("listening on {}", path.display()))?;
    listener.set_nonblocking(true)?;
    let serve = move || {
        let mut silent = Vec::new();
        loop {
            if let Err(error) = turn(&listener, &mut silent, &events) {
                log::warn!("the control socket: {error}");
                // Descriptors may be short.
                silent.clear();
                thread::sleep(Duration::from_millis(100));
            }
        }
    };
    thread::Builder::new().name("control".into()).spawn(serve).context("starting a thread")?;
    Ok(file)
}

/// A client that has not sent its whole request yet.
#[derive(Debug)]
pub(crate) struct Silent {
    pub(crate) socket: UnixStream,
    pub(crate) request: Vec<u8>,
    pub(crate) deadline: Instant,
}

/// Waits for an event of any socket. It never waits for one socket alone.
fn turn(listener: &UnixListener, silent: &mut Vec<Silent>, events: &mpsc::Sender<Event>) -> io::Result<()> {
    let deadline = silent.iter().map(|client| client.deadline).min();
    let timeout = deadline.map_or(PollTimeout::NONE, |deadline| {
        let rest = deadline.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
        rest.try_into().unwrap_or(PollTimeout::MAX)
    });
    let sockets = silent.iter().map(|client| client.socket.as_fd()).chain([listener.as_fd()]);
    poll(&mut sockets.map(|socket| PollFd::new(socket, PollFlags::POLLIN)).collect::<Vec<_>>(), timeout)?;
    let now = Instant::now();
    for mut client in std::mem::take(silent) {
        match client.hear() {
            Ok(true) => answer(client, events),
            Ok(false) if client.deadline > now => silent.push(client),
            Ok(false) => log::debug!("the control socket: a client was silent for too long"),
            Err(error) => log::debug!("the control socket: {error}"),
        }
    }
    loop {
        let socket = match listener.accept() {
            Ok((socket, _)) => socket,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
            Err(error) if matches!(error.kind(), ErrorKind::Interrupted | ErrorKind::ConnectionAborted) => continue,
            Err(error) => return Err(error),
        };
        socket.set_nonblocking(true)?;
        let uid = getsockopt(&socket, PeerCredentials)?.uid();
        if uid != 0 && uid != geteuid().as_raw() {
            Asker(socket).tell(&Err("only the server's user and root may request a reload".into()));
            continue;
        }
        let mut client = Silent { socket, request: Vec::new(), deadline: Instant::now() + PATIENCE };
        match client.hear() {
            Ok(true) => answer(client, events),
            Ok(false) => silent.push(client),
            Err(error) => log::debug!("the control socket: {error}"),
        }
        if silent.len() > SILENT_MAX {
            silent.remove(0);
        }
    }
}

impl Silent {
    /// `true`: the request is complete.
    pub(crate) fn hear(&mut self) -> io::Result<bool> {
        let mut part = [0; REQUEST.len()];
        let len = REQUEST.len() - self.request.len();
        match self.socket.read(&mut part[..len]) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(len) => self.request.extend_from_slice(&part[..len]),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(error) => return Err(error),
        }
        Ok(self.request.len() == REQUEST.len())
    }
}

/// Passes a request on as an event, or refuses it.
pub(crate) fn answer(client: Silent, events: &mpsc::Sender<Event>) {
    let asker = Asker(client.socket);
    if client.request != REQUEST {
        return asker.tell(&Err("unknown request: the control socket accepts \"reload\"".into()));
    }
    if let Err(mpsc::SendError(Event::Reload(Some(asker)))) = events.send(Event::Reload(Some(asker))) {
        asker.tell(&Err("the server is stopping".into()));
    }
}
