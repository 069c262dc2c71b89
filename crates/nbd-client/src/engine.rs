//! [`Engine`]: one connection with many requests in flight, for any event loop.

use std::{
    fmt, io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
    sync::Arc,
    time::Duration,
};

use nbd_proto::{
    Cookie,
    client::{Agreement, Encoder},
};

use crate::{
    deadline::{Deadline, Interest, wait},
    dial::dial,
    error::Error,
    export::Export,
    handshake::negotiate,
    options::Options,
    outbox::Outbox,
    replies::Replies,
    request::{Completion, Rejection, Request},
    stream::Stream,
    target::Target,
    uri::Uri,
};

/// Bytes received at a time. Data of a READ that is longer goes straight into its buffer.
const STAGING: usize = 64 << 10;

/// Data that is worth a system call of its own, so that it needs no copy.
const DIRECT_MIN: usize = 16 << 10;

/// Why a system call on the connection was made, for errors.
const WHAT: &str = "connection";

/// One connection, with any number of requests in flight, that never blocks. Any event loop can drive it:
///
/// 1. [`submit`](Self::submit) requests;
/// 2. call [`progress`](Self::progress), which sends and receives as much as it can, and returns what completed;
/// 3. wait until the descriptor is ready as [`interest`](Self::interest) says, and go on with 2.
///
/// Level triggers (poll, epoll) and edge triggers (epoll with `EPOLLET`, tokio's `AsyncFd`) both do, since `progress` goes on
/// until the socket would block. With edge triggers, call it also after `submit`.
///
/// Each request that was submitted completes once, also when the connection ends. The engine does not split requests, does
/// not change their order, and does not limit their number: the caller owns their memory. A drop disconnects, in good order
/// if nothing is left to send.
///
/// ```no_run
/// use nbd_client::{Engine, Options, Request};
///
/// let mut engine = Engine::connect(&"nbd://localhost".parse()?, &Options::default())?;
/// for n in 0..32 {
///     engine.submit(Request::read(n << 16, 1 << 16))?;
/// }
/// let mut done = Vec::new();
/// loop {
///     engine.progress(&mut done)?;
///     for completion in done.drain(..) {
///         completion.result?;
///     }
///     if engine.in_flight() == 0 {
///         break;
///     }
///     engine.wait(None)?; // or an event loop
/// }
/// # Ok::<(), nbd_client::Error>(())
/// ```
pub struct Engine {
    stream: Stream,
    encoder: Encoder,
    export: Export,
    outbox: Outbox,
    replies: Replies,
    staging: Box<[u8]>,
    state: State,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Open,
    /// DISC is sent, or on its way.
    Leaving,
    /// The connection has ended.
    Over,
}

impl Engine {
    /// Connects and negotiates. Blocks up to the time limits of the options.
    ///
    /// # Errors
    /// [`Error::Io`] and [`Error::Timeout`] when the server cannot be reached, [`Error::Refused`] when it does not have the
    /// export or refuses the client, [`Error::Protocol`] when it breaks the protocol, [`Error::Closed`] when it closes the
    /// connection, as old servers do instead of a refusal.
    pub fn connect(uri: &Uri, options: &Options) -> Result<Self, Error> {
        let target = Target::new(Some(uri), options)?;
        Self::negotiate(dial(&uri.address, options.connect)?, &target, options)
    }

    /// Negotiates on a stream socket that is connected to a server already: a socketpair, or an inherited one. The export
    /// and TLS are those of the options; with TLS, the default name of the server is `localhost`.
    ///
    /// # Errors
    /// As [`connect`](Self::connect).
    pub fn over(socket: OwnedFd, options: &Options) -> Result<Self, Error> {
        Self::negotiate(socket, &Target::new(None, options)?, options)
    }

    fn negotiate(socket: OwnedFd, target: &Target, options: &Options) -> Result<Self, Error> {
        let mut stream = Stream::from(socket);
        let agreed = negotiate(&mut stream, target, options, Deadline::after(options.handshake))?;
        let Agreement { terms, contexts, name, description } = agreed;
        let contexts: Vec<(u32, Arc<str>)> = contexts.into_iter().map(|(id, name)| (id, name.into())).collect();
        let names = contexts.iter().map(|(_, name)| Arc::clone(name)).collect();
        Ok(Self {
            stream,
            encoder: Encoder::new(terms.mode),
            export: Export::new(terms, name, description, names)?,
            outbox: Outbox::default(),
            replies: Replies::new(terms.mode, contexts),
            staging: vec![0; STAGING].into(),
            state: State::Open,
        })
    }

    /// What the server reports about the export.
    pub fn export(&self) -> &Export {
        &self.export
    }

    /// Requests that have not completed.
    pub fn in_flight(&self) -> usize {
        self.replies.len()
    }

    /// Accepts a request; [`progress`](Self::progress) sends it.
    ///
    /// # Errors
    /// The request comes back with [`Error::Invalid`] if the export or the protocol does not allow it: it is past the end,
    /// not aligned, longer than the server's maximum, or of a kind that the export does not have. It comes back with
    /// [`Error::Closed`] if the connection has ended.
    pub fn submit(&mut self, mut request: Request) -> Result<Cookie, Rejection> {
        let checked = if self.state == State::Open { request.check(&self.export) } else { Err(Error::Closed) };
        if let Err(error) = checked {
            return Err(Rejection { error, request });
        }
        let ((kind, flags), (at, len)) = (request.command(self.export.mode()), request.range());
        let payload = match &mut request {
            Request::Write { data, .. } => Some(std::mem::take(data)),
            _ => None,
        };
        let cookie = self.replies.expect(request, payload.is_some());
        self.encoder.request(self.outbox.heads(), cookie, kind, flags, at, len);
        if let Some(payload) = payload {
            self.outbox.push(cookie, payload);
        }
        Ok(cookie)
    }

    /// What to wait for before the next [`progress`](Self::progress). It changes with each call of `submit` and `progress`.
    /// Nothing at all when the connection has ended.
    pub fn interest(&self) -> Interest {
        let is_open = self.state != State::Over;
        Interest { readable: is_open, writable: is_open && !(self.outbox.is_empty() && self.stream.is_flushed()) }
    }

    /// Sends and receives as much as is possible without waiting, and appends what completed to `done`.
    ///
    /// # Errors
    /// The connection has ended. All requests in flight complete with [`Error::Closed`] then, and each later call fails with
    /// [`Error::Closed`].
    pub fn progress(&mut self, done: &mut Vec<Completion>) -> Result<(), Error> {
        if self.state == State::Over {
            return Err(Error::Closed);
        }
        // What the server has sent is taken also when it takes no more: it may say why.
        let sent = self.send(done);
        let received = self.receive(done);
        if received.is_ok() && self.state == State::Over {
            return Ok(());
        }
        let outcome = match received.and(sent) {
            // TLS may have to answer what it received.
            Ok(()) if !self.stream.is_flushed() => self.send(done),
            other => other,
        };
        outcome.inspect_err(|_| self.end(done))
    }

    /// Waits until the connection is ready to go on (`true`), or until the time is over (`false`). `None` is no limit. For
    /// programs with one connection; all others wait with their event loop.
    ///
    /// # Errors
    /// [`Error::Closed`] when the connection has ended, [`Error::Io`] from the system.
    pub fn wait(&self, limit: Option<Duration>) -> Result<bool, Error> {
        if self.state == State::Over {
            return Err(Error::Closed);
        }
        wait(self.stream.as_fd(), self.interest(), Deadline::after(limit), WHAT)
    }

    /// Ends the connection in good order: no request can be submitted any more, and after those that were, DISC is sent.
    /// The server closes when it has executed all of them; then [`is_closed`](Self::is_closed) is true. Wait for the
    /// completions of all requests first if they matter: a server may close without a reply to them.
    pub fn disconnect(&mut self) {
        if self.state == State::Open {
            self.encoder.disconnect(self.outbox.heads(), Cookie(0));
            self.state = State::Leaving;
        }
    }

    /// Whether the connection has ended.
    pub fn is_closed(&self) -> bool {
        self.state == State::Over
    }

    fn send(&mut self, done: &mut Vec<Completion>) -> Result<(), Error> {
        loop {
            let sent = if self.outbox.is_empty() {
                match self.stream.flush() {
                    Ok(()) => return Ok(()),
                    Err(error) => Err(error),
                }
            } else {
                let Self { outbox, stream, .. } = self;
                outbox.send(|slices| stream.send(slices))
            };
            let mut sent = match sent {
                Ok(sent) => sent,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(Error::of_connection(WHAT, error)),
            };
            while let Some((cookie, payload)) = self.outbox.advance(std::mem::take(&mut sent)) {
                self.replies.sent(cookie, payload, done);
            }
        }
    }

    fn receive(&mut self, done: &mut Vec<Completion>) -> Result<(), Error> {
        loop {
            let landing = self.replies.landing().filter(|landing| landing.len() >= DIRECT_MIN);
            let is_direct = landing.is_some();
            let received = self.stream.receive(landing.unwrap_or(&mut self.staging));
            match received {
                Ok(0) if self.state == State::Leaving && self.replies.len() == 0 => {
                    self.end(done);
                    return Ok(());
                }
                Ok(0) => return Err(Error::Closed),
                Ok(n) if is_direct => self.replies.landed(n, done)?,
                Ok(n) => self.replies.feed(&self.staging[..n], done)?,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(Error::of_connection(WHAT, error)),
            }
        }
    }

    /// The connection has ended, one way or the other.
    fn end(&mut self, done: &mut Vec<Completion>) {
        self.state = State::Over;
        for (cookie, payload) in std::mem::take(&mut self.outbox).payloads() {
            self.replies.sent(cookie, payload, done);
        }
        self.replies.abandon(done);
        self.stream.close();
    }
}

impl fmt::Debug for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Engine")
            .field("state", &self.state)
            .field("export", &self.export)
            .field("in_flight", &self.in_flight())
            .finish_non_exhaustive()
    }
}

impl AsFd for Engine {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

impl AsRawFd for Engine {
    /// For event loops that take no [`BorrowedFd`].
    fn as_raw_fd(&self) -> RawFd {
        self.stream.as_fd().as_raw_fd()
    }
}

impl Drop for Engine {
    /// Sends DISC if the socket takes it at once. In the midst of a payload that cannot be done.
    fn drop(&mut self) {
        if self.state != State::Over {
            self.disconnect();
            let _ = self.send(&mut Vec::new());
            self.stream.close();
        }
    }
}
