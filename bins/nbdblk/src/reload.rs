//! `nbdblk reload`, and the control socket of the server: a unix socket for one request of each client, in one line. `reload` makes
//! the server read its file again, `upgrade` and `upgrade PATH` make it replace its program.

use std::{
    ffi::OsString,
    io::{self, ErrorKind, Read, Write},
    os::{
        fd::{AsFd, OwnedFd},
        unix::{
            ffi::OsStringExt,
            net::{UnixListener, UnixStream},
        },
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

/// The request to read the file again.
pub(crate) const REQUEST: &[u8] = b"reload\n";

/// Longest request, in bytes: the longest path, and a word.
pub(crate) const REQUEST_MAX: usize = 4096 + 16;

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
    let path = match (control, file) {
        (Some(path), _) => path.to_owned(),
        (None, Some(file)) => named_in(file)?,
        (None, None) => bail!("neither a file nor --control was given"),
    };
    let limit = limit.unwrap_or(TIMEOUT);
    let answer = ask(&path, request, limit).map_err(|error| match error.kind() {
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
        Some(("ok", changes)) => crate::print(&format!("{changes}\n")),
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

/// The control socket of the server that uses this file.
fn named_in(file: &Path) -> anyhow::Result<PathBuf> {
    let found = File::read(file)?.settings.into_iter().find(|setting| setting.key == "control");
    let word =
        found.and_then(|setting| setting.words.first().and_then(|w| w.strip_prefix("--control=")).map(PathBuf::from));
    word.with_context(|| {
        format!("{} names no control socket (control = \"PATH\"); use --control, or send SIGHUP", file.display())
    })
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
    thread::Builder::new().name("control".into()).spawn(serve).context("starting a thread")?;
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
    let event = match line {
        b"reload" => Event::Reload(Some(asker)),
        b"upgrade" => Event::Upgrade(Some(asker), None),
        _ => match line.strip_prefix(b"upgrade /") {
            Some(path) if client.request.len() > line.len() => {
                let path = [b"/", path].concat();
                Event::Upgrade(Some(asker), Some(OsString::from_vec(path).into()))
            }
            _ => {
                let text = "unknown request: the control socket accepts \"reload\", \"upgrade\" and \"upgrade PATH\"";
                return asker.tell(&Err(text.into()));
            }
        },
    };
    if let Err(mpsc::SendError(Event::Reload(Some(asker)) | Event::Upgrade(Some(asker), _))) = events.send(event) {
        asker.tell(&Err("the server is stopping".into()));
    }
}
