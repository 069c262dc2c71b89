//! `--metrics`: a read-only HTTP server for Prometheus and for browsers. It has one thread and few connections, each with a deadline, so a
//! slow or hostile client harms only other clients of this HTTP server.

mod http;
mod page;
mod prometheus;

use std::{
    io::{self, ErrorKind, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs},
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::Path,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::{
    files::OwnFile,
    listen::{Access, bind_tcp, bind_unix, is_absent},
    observer::Observer,
    place::Place,
    sandbox,
};

/// Longest time of a connection.
const PATIENCE: Duration = Duration::from_secs(10);

/// Most connections. With one more, the oldest is closed.
const CONNECTIONS_MAX: usize = 32;

/// Listening sockets, and their files.
#[derive(Debug, Default)]
pub(crate) struct Sockets {
    listeners: Vec<Listener>,
    files: Vec<OwnFile>,
}

#[derive(Debug)]
enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

#[derive(Debug)]
enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

/// A connection and its progress.
#[derive(Debug)]
struct Connection {
    stream: Stream,
    request: Vec<u8>,
    /// `None`: the request is not complete.
    response: Option<Vec<u8>>,
    /// Bytes of the response that were sent.
    sent: usize,
    deadline: Instant,
}

impl Sockets {
    /// Listens at all these places.
    pub(crate) fn bind(places: &[Place]) -> anyhow::Result<Self> {
        let mut sockets = Self::default();
        for place in places {
            match place {
                Place::Unix(path) => sockets.bind_unix(path)?,
                Place::Tcp(hosts, port) => sockets.bind_tcp(hosts, *port)?,
                _ => unreachable!("the command line accepts no other place"),
            }
        }
        Ok(sockets)
    }

    fn bind_unix(&mut self, path: &Path) -> anyhow::Result<()> {
        let (listener, file) =
            bind_unix(path, &Access::default()).with_context(|| format!("metrics at {}", path.display()))?;
        listener.set_nonblocking(true)?;
        self.listeners.push(Listener::Unix(listener));
        self.files.push(file);
        Ok(())
    }

    fn bind_tcp(&mut self, hosts: &[String], port: u16) -> anyhow::Result<()> {
        let loopback = ["127.0.0.1".to_owned(), "::1".to_owned()];
        let hosts = if hosts.is_empty() { &loopback[..] } else { hosts };
        let before = self.listeners.len();
        let mut absent = None;
        for host in hosts {
            let place = || format!("metrics at {host}, port {port}");
            let addresses: Vec<SocketAddr> = (host.as_str(), port).to_socket_addrs().with_context(place)?.collect();
            for address in addresses {
                match bind_tcp(address, true) {
                    Ok(socket) => {
                        let listener = TcpListener::from(socket);
                        listener.set_nonblocking(true)?;
                        log::info!("metrics at http://{}/", listener.local_addr()?);
                        self.listeners.push(Listener::Tcp(listener));
                    }
                    Err(error) if is_absent(&error) => absent = Some(error),
                    Err(error) => return Err(error).with_context(place),
                }
            }
        }
        if let Some(error) = absent.filter(|_| self.listeners.len() == before) {
            return Err(error).context("metrics");
        }
        ensure!(self.listeners.len() > before, "metrics: {hosts:?} have no address");
        Ok(())
    }

    /// Serves in a thread until the process ends. Returns the files to remove then.
    pub(crate) fn serve(self, observer: &Observer) -> anyhow::Result<Vec<OwnFile>> {
        let Self { listeners, files } = self;
        if !listeners.is_empty() {
            let observer = observer.clone();
            let serve = move || {
                let mut connections = Vec::new();
                loop {
                    if let Err(error) = turn(&listeners, &mut connections, &observer) {
                        log::warn!("metrics: {error}");
                        // Descriptors may be short.
                        connections.clear();
                        thread::sleep(Duration::from_millis(200));
                    }
                }
            };
            sandbox::spawn_service("metrics", serve).context("starting a thread")?;
        }
        Ok(files)
    }
}

/// Waits for an event of any socket, and takes the next step of all connections.
fn turn(listeners: &[Listener], connections: &mut Vec<Connection>, observer: &Observer) -> io::Result<()> {
    let deadline = connections.iter().map(|connection| connection.deadline).min();
    let timeout = deadline.map_or(PollTimeout::NONE, |deadline| {
        let rest = deadline.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
        rest.try_into().unwrap_or(PollTimeout::MAX)
    });
    let waiting = connections.iter().map(|connection| PollFd::new(connection.stream.as_fd(), connection.awaits()));
    let incoming = listeners.iter().map(|listener| PollFd::new(listener.as_fd(), PollFlags::POLLIN));
    poll(&mut waiting.chain(incoming).collect::<Vec<_>>(), timeout)?;
    let now = Instant::now();
    connections.retain_mut(|connection| connection.deadline > now && connection.step(observer));
    for listener in listeners {
        // Bounded, so that a flood of new connections does not delay the present ones.
        for _ in 0..CONNECTIONS_MAX {
            let Some(stream) = listener.accept()? else { break };
            if connections.len() >= CONNECTIONS_MAX {
                connections.remove(0);
            }
            let deadline = Instant::now() + PATIENCE;
            let mut connection = Connection { stream, request: Vec::new(), response: None, sent: 0, deadline };
            if connection.step(observer) {
                connections.push(connection);
            }
        }
    }
    Ok(())
}

impl Connection {
    fn awaits(&self) -> PollFlags {
        if self.response.is_some() { PollFlags::POLLOUT } else { PollFlags::POLLIN }
    }

    /// Receives and sends what is possible now. Returns whether the connection stays open.
    fn step(&mut self, observer: &Observer) -> bool {
        match self.receive(observer).and_then(|()| self.send()) {
            Ok(is_sent) => !is_sent,
            Err(error) => error.kind() == ErrorKind::WouldBlock,
        }
    }

    fn receive(&mut self, observer: &Observer) -> io::Result<()> {
        let mut part = [0; 4096];
        while self.response.is_none() {
            match self.stream.read(&mut part) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(len) => {
                    self.request.extend_from_slice(&part[..len]);
                    self.response = http::respond(&self.request, observer);
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Returns whether all is sent.
    fn send(&mut self) -> io::Result<bool> {
        let Some(response) = &self.response else { return Ok(false) };
        while self.sent < response.len() {
            match self.stream.write(&response[self.sent..]) {
                Ok(sent) => self.sent += sent,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }
}

impl Listener {
    /// The next connection, if there is one.
    fn accept(&self) -> io::Result<Option<Stream>> {
        loop {
            let accepted = match self {
                Self::Tcp(listener) => listener.accept().map(|(stream, _)| Stream::Tcp(stream)),
                Self::Unix(listener) => listener.accept().map(|(stream, _)| Stream::Unix(stream)),
            };
            match accepted {
                Ok(stream) => {
                    stream.set_nonblocking()?;
                    return Ok(Some(stream));
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
                Err(error) if matches!(error.kind(), ErrorKind::Interrupted | ErrorKind::ConnectionAborted) => {}
                Err(error) => return Err(error),
            }
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(listener) => listener.as_fd(),
            Self::Unix(listener) => listener.as_fd(),
        }
    }
}

impl Stream {
    fn set_nonblocking(&self) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => stream.set_nonblocking(true),
            Self::Unix(stream) => stream.set_nonblocking(true),
        }
    }

    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.read(into),
            Self::Unix(stream) => stream.read(into),
        }
    }

    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.write(from),
            Self::Unix(stream) => stream.write(from),
        }
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(stream) => stream.as_fd(),
            Self::Unix(stream) => stream.as_fd(),
        }
    }
}
