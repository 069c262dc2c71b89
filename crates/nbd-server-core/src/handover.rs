//! [`Handover`]: everything with which another process can continue a server, and [`Paused`], the server that it comes from.

use std::{
    io,
    os::fd::OwnedFd,
    sync::{Arc, mpsc},
    time::{Duration, Instant},
};

use crate::continuation::Continuation;

/// The sockets of a server, and what is known of its clients.
#[derive(Debug, Default)]
pub struct Handover {
    /// Listening sockets.
    pub listeners: Vec<Arc<OwnedFd>>,
    /// Clients in their handshake.
    pub guests: Vec<Greeted>,
    /// Clients in the transmission phase.
    pub connections: Vec<Connection>,
}

/// A client in its handshake, without TLS.
#[derive(Clone, Debug)]
pub struct Greeted {
    /// The connected socket.
    pub socket: Arc<OwnedFd>,
    /// The TLS policy that the server offered. With another one the handshake cannot continue.
    pub tls: nbd_proto::Tls,
    /// All bytes that the client has sent so far.
    pub heard: Vec<u8>,
    /// Unsent replies.
    pub unsent: Vec<u8>,
}

/// A client in the transmission phase.
#[derive(Clone, Debug)]
pub struct Connection {
    /// The connected socket.
    pub socket: Arc<OwnedFd>,
    /// TLS, which the kernel does on this socket. `None`: plain text.
    pub tls: Option<KernelTls>,
    /// The name of its export.
    pub export: String,
    /// Its transmission phase.
    pub state: Continuation,
}

/// TLS in the kernel. The socket has its keys. The secrets for further keys stay in the process of the handshake, so when a key must
/// change, the connection ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelTls {
    /// The version and the cipher, such as "TLS 1.3 with AES-256-GCM".
    pub suite: String,
    /// Most records that were sent with the present key.
    pub records: u64,
}

/// A server that does not serve at present. Dropping this lets it go on, as if nothing had happened.
#[derive(Debug)]
pub struct Paused {
    pub(crate) state: Handover,
    pub(crate) threads: Vec<mpsc::Sender<Dismiss>>,
    pub(crate) leaving: usize,
    /// Last: exports may change again.
    pub(crate) _hold: Hold,
}

impl Paused {
    /// Everything that another process needs.
    pub fn state(&self) -> &Handover {
        &self.state
    }

    /// Number of clients that cannot be handed over: those whose TLS is not in the kernel, and those of removed exports.
    pub fn leaving(&self) -> usize {
        self.leaving
    }

    /// Disconnects the clients that cannot be handed over. Requests that they have already sent get ESHUTDOWN.
    pub fn dismiss(&self) {
        let done = |thread: &mpsc::Sender<Dismiss>| {
            let (sender, done) = mpsc::channel();
            thread.send(sender).ok().map(|()| done)
        };
        let all: Vec<_> = self.threads.iter().filter_map(done).collect();
        // The sender is dropped when it is done.
        for done in all {
            let _ = done.recv();
        }
    }
}

/// Makes a paused thread disconnect its clients that cannot be handed over. Dropped when that is done.
pub(crate) type Dismiss = mpsc::Sender<()>;

/// The request to a thread that it pauses.
#[derive(Debug)]
pub(crate) struct Pause<T> {
    /// Requests at the devices must have ended by then.
    pub(crate) deadline: Instant,
    /// Gets the state of the thread, or the reason why it does not pause.
    pub(crate) report: mpsc::Sender<io::Result<T>>,
    /// The pause ends when the sender of this is dropped.
    pub(crate) orders: mpsc::Receiver<Dismiss>,
}

impl<T> Pause<T> {
    /// Returns a request, the sender whose end ends the pause, and the receiver of the report.
    pub(crate) fn new(deadline: Instant) -> (Self, mpsc::Sender<Dismiss>, mpsc::Receiver<io::Result<T>>) {
        let ((report, reported), (sender, orders)) = (mpsc::channel(), mpsc::channel());
        (Self { deadline, report, orders }, sender, reported)
    }

    /// The next order; `None`: the pause has ended, or `stops` returns so.
    pub(crate) fn order(&self, stops: impl Fn() -> bool) -> Option<Dismiss> {
        loop {
            match self.orders.recv_timeout(MOMENT) {
                Ok(order) => return Some(order),
                Err(mpsc::RecvTimeoutError::Disconnected) => return None,
                Err(mpsc::RecvTimeoutError::Timeout) if stops() => return None,
                Err(mpsc::RecvTimeoutError::Timeout) => {}
            }
        }
    }
}

/// How often a paused thread checks whether the server stops.
const MOMENT: Duration = Duration::from_millis(20);

/// While it exists, the exports of the server do not change.
#[derive(Debug)]
pub(crate) struct Hold(pub(crate) Arc<std::sync::atomic::AtomicBool>);

impl Drop for Hold {
    fn drop(&mut self) {
        self.0.store(false, std::sync::atomic::Ordering::Release);
    }
}
