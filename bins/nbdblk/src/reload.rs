//! `nbdblk reload`, and the control socket of the server: a unix socket for one request of each client, in one line. `reload` makes
//! the server read its file again, `upgrade` and `upgrade PATH` make it replace its program, `status` returns a report, and
//! `disconnect` disconnects clients.

use std::{
    io::{self, ErrorKind, Read, Write},
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::Path,
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
    cli, control_place,
    events::Event,
    files::OwnFile,
    listen::{Access, bind_unix, connect_unix},
    requests::Request,
    sandbox,
};

/// The request to read the file again.
pub(crate) const REQUEST: &[u8] = b"reload\n";

/// Longest request, in bytes: the name of an export, each byte of which may be escaped, and some words.
pub(crate) const REQUEST_MAX: usize = 6 * 4096 + 64;

/// Time that a client has to send it.
const PATIENCE: Duration = Duration::from_secs(5);

/// Most clients that have not sent their request yet. With one more, the oldest is disconnected.
const SILENT_MAX: usize = 64;

/// Time that `nbdblk reload` waits by default.
const TIMEOUT: Duration = Duration::from_secs(60);

/// Makes a server read its file again.
pub(crate) fn run(args: &cli::Reload) -> anyhow::Result<ExitCode> {
    request(args.control.as_deref(), args.file.as_deref(), REQUEST, args.timeout)
}

/// Sends a request to the server with this control socket, or with this file. Prints the answer.
pub(crate) fn request(
    control: Option<&Path>,
    file: Option<&Path>,
    request: &[u8],
    limit: Option<Duration>,
) -> anyhow::Result<ExitCode> {
    let path = control_place::find(control, file)?;
    let changes = answer_of(&path, request, limit.unwrap_or(TIMEOUT))?;
    crate::print(&format!("{changes}\n"))
}

/// Sends a request to the server with this control socket. Returns the answer.
pub(crate) fn answer_of(path: &Path, request: &[u8], limit: Duration) -> anyhow::Result<String> {
    let answer = ask(path, request, limit).map_err(|error| match error.kind() {
        ErrorKind::WouldBlock | ErrorKind::TimedOut => {
            let (path, limit) = (path.display(), Value::Time(limit));
            anyhow!("the server at {path} has not answered within {limit}; it may still do it: see its log")
        }
        ErrorKind::NotFound | ErrorKind::ConnectionRefused => {
            anyhow!("cannot reach the server at {}: {error}; is it running?", path.display())
        }
        _ => anyhow!(error).context(format!("cannot reach the server at {}", path.display())),
    })?;
    match answer.trim_end().split_once(' ') {
        Some(("ok", changes)) => Ok(changes.into()),
        Some(("error", error)) => Err(anyhow!("{error}")),
        _ => bail!("the server at {} has ended without an answer", path.display()),
    }
}

fn ask(path: &Path, request: &[u8], limit: Duration) -> io::Result<String> {
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
    socket.write_all(request)?;
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

/// Listens for clients, and passes their requests on as events. Only the server's own user and root may send them. Returns another
/// descriptor of the socket, for a program that replaces this one.
pub(crate) fn listen(path: &Path, events: mpsc::Sender<Event>) -> anyhow::Result<(OwnedFd, OwnFile)> {
    let access = Access { mode: Some(0o600), ..Access::default() };
    let (listener, file) = bind_unix(path, &access).with_context(|| format!("listening on {}", path.display()))?;
    Ok((serve(listener, events)?, file))
}

/// As [`listen`], on a socket that listens already.
pub(crate) fn serve(listener: UnixListener, events: mpsc::Sender<Event>) -> anyhow::Result<OwnedFd> {
    listener.set_nonblocking(true)?;
    let copy = listener.as_fd().try_clone_to_owned()?;
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
    sandbox::spawn_service("control", serve).context("starting a thread")?;
    Ok(copy)
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
            Asker(socket).tell(&Err("only the server's user and root may send requests".into()));
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
        let mut part = [0; REQUEST_MAX];
        let len = REQUEST_MAX - self.request.len();
        match self.socket.read(&mut part[..len]) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(len) => self.request.extend_from_slice(&part[..len]),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(error) => return Err(error),
        }
        Ok(self.request.len() == REQUEST_MAX || self.request.contains(&b'\n'))
    }
}

/// Passes a request on as an event, or refuses it.
pub(crate) fn answer(client: Silent, events: &mpsc::Sender<Event>) {
    let asker = Asker(client.socket);
    let line = client.request.split(|byte| *byte == b'\n').next().unwrap_or_default();
    let event = match Request::parse(line, client.request.len() > line.len()) {
        Some(Request::Reload) => Event::Reload(Some(asker)),
        Some(Request::Upgrade(program)) => Event::Upgrade(Some(asker), program),
        Some(Request::Status) => Event::Status(asker),
        Some(Request::Disconnect(target)) => Event::Disconnect(asker, target),
        None => {
            let text = "unknown request: the control socket accepts \"status\", \"reload\", \"upgrade\", \"upgrade PATH\" and \
                        \"disconnect {...}\"";
            return asker.tell(&Err(text.into()));
        }
    };
    if let Err(mpsc::SendError(event)) = events.send(event)
        && let Some(asker) = event.into_asker()
    {
        asker.tell(&Err("the server is stopping".into()));
    }
}
