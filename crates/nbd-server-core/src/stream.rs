//! [`Stream`]: a connection's bytes, as plain text or under TLS.

use std::{
    fmt, io, mem,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::Arc,
};

use blkdev::{Buf, socket};

use crate::{
    handover::KernelTls,
    outbox::Outbox,
    peer::Identity,
    received::{Received, push},
    tls::{Kernel, Secure, Shaking},
};

/// For so few bytes, setting a low-water mark is not worth the system call.
const FEW: usize = 32 << 10;
/// Highest low-water mark, in bytes. With the data that arrives until the receive, it should fit into the staging buffer.
const MANY: usize = 192 << 10;

/// A connected socket, with its TLS state.
pub(crate) struct Stream {
    socket: Arc<OwnedFd>,
    layer: Layer,
    /// The low-water mark of the socket (SO_RCVLOWAT), in bytes.
    wakes_at: usize,
}

/// What stands between the socket and the data.
enum Layer {
    Plain,
    Secure(Box<Secure>),
    Kernel(Box<Kernel>),
}

impl Stream {
    /// Switches to TLS when the handshake on this socket is over. Returns the client's identity.
    ///
    /// # Errors
    /// The result of the handshake is unusable: close the connection.
    pub(crate) fn protect(&mut self, shaking: Shaking) -> io::Result<Option<Identity>> {
        let (secure, identity) = shaking.agree()?;
        self.layer = Layer::Secure(Box::new(secure));
        Ok(identity)
    }

    /// Moves TLS into the kernel if that is possible, when the NBD handshake is over.
    ///
    /// # Errors
    /// The kernel failed: close the connection.
    pub(crate) fn offload(&mut self) -> io::Result<()> {
        let socket = self.socket.as_fd();
        match mem::replace(&mut self.layer, Layer::Plain) {
            Layer::Secure(secure) if secure.suits_kernel(socket) => {
                self.layer = Layer::Kernel(Box::new(secure.into_kernel(socket)?));
            }
            layer => self.layer = layer,
        }
        Ok(())
    }

    /// Receives the available data: into `landing` as far as that works without a copy, the rest into `staging`, which may be
    /// overwritten as a whole. `None`: the peer has closed.
    ///
    /// # Errors
    /// `WouldBlock` if nothing is available; otherwise the connection is broken.
    pub(crate) fn receive(
        &mut self,
        landing: Option<(&mut Buf, usize)>,
        staging: &mut [u8],
    ) -> io::Result<Option<Received>> {
        let socket = self.socket.as_fd();
        match &mut self.layer {
            Layer::Plain => Received::from(socket, landing, staging),
            Layer::Secure(tls) => tls.receive(socket, staging),
            Layer::Kernel(tls) => tls.receive(socket, landing, staging),
        }
    }

    /// Call it when the socket is empty, and the client must still send `due` bytes of a payload. If `due` is large, the
    /// low-water mark is raised, so that not every packet wakes the worker.
    pub(crate) fn expect(&mut self, due: usize) {
        let due = match &self.layer {
            Layer::Plain => due,
            // Records are longer than their content. But the beginning of one may have arrived already.
            Layer::Secure(tls) => due.saturating_sub(tls.rest()),
            Layer::Kernel(_) => 0,
        };
        let at = if due < FEW { 1 } else { due.min(MANY) };
        if at != self.wakes_at {
            self.wakes_at = at;
            socket::wake_at(self.socket.as_fd(), at);
        }
    }

    /// Sends until all is sent (`true`) or the socket is full (`false`). In the second case, sealed data may be left even if
    /// `outbox` is empty. `staging` may be overwritten.
    ///
    /// # Errors
    /// The connection is broken.
    pub(crate) fn send(&mut self, outbox: &mut Outbox, staging: &mut [u8]) -> io::Result<bool> {
        let socket = self.socket.as_fd();
        match &mut self.layer {
            Layer::Plain => outbox.send(socket),
            Layer::Secure(tls) => tls.send(socket, staging, |room| outbox.read(room)),
            Layer::Kernel(tls) => tls.send(socket, outbox),
        }
    }

    /// As [`send`](Self::send), for bytes, which are removed from the front. Only before [`offload`](Self::offload).
    pub(crate) fn send_bytes(&mut self, bytes: &mut Vec<u8>, staging: &mut [u8]) -> io::Result<bool> {
        let socket = self.socket.as_fd();
        match &mut self.layer {
            Layer::Secure(tls) => tls.send(socket, staging, |room| {
                let len = room.len().min(bytes.len());
                room[..len].copy_from_slice(&bytes[..len]);
                bytes.drain(..len);
                len
            }),
            Layer::Plain | Layer::Kernel(_) => {
                let sent = push(socket, bytes)?;
                bytes.drain(..sent);
                Ok(bytes.is_empty())
            }
        }
    }

    /// The socket, and its TLS in the kernel, if another process can continue on it.
    pub(crate) fn suspend(&self) -> Option<(&Arc<OwnedFd>, Option<KernelTls>)> {
        let tls = match &self.layer {
            Layer::Plain => None,
            Layer::Secure(_) => return None,
            Layer::Kernel(tls) => Some(tls.suspend()?),
        };
        Some((&self.socket, tls))
    }

    /// Continues on a socket that another process has [left](Self::suspend).
    ///
    /// # Errors
    /// This program does not know the TLS suite.
    pub(crate) fn resume(socket: Arc<OwnedFd>, tls: Option<&KernelTls>) -> io::Result<Self> {
        let layer = match tls {
            None => Layer::Plain,
            Some(tls) => Layer::Kernel(Box::new(Kernel::resume(tls)?)),
        };
        Ok(Self { layer, ..Self::from(socket) })
    }

    /// The socket, if it carries plain text.
    pub(crate) fn plain(&self) -> Option<&Arc<OwnedFd>> {
        matches!(self.layer, Layer::Plain).then_some(&self.socket)
    }

    /// Sets a low-water mark again that another process may have left on the socket.
    pub(crate) fn forget_mark(&mut self) {
        self.wakes_at = 1;
        socket::wake_at(self.socket.as_fd(), 1);
    }

    /// Frees spare capacity after a burst.
    pub(crate) fn shrink(&mut self) {
        if let Layer::Secure(tls) = &mut self.layer {
            tls.shrink();
        }
    }

    /// Sends the TLS closure alert, if there is TLS.
    pub(crate) fn close(&mut self) {
        match &mut self.layer {
            Layer::Plain => {}
            Layer::Secure(tls) => tls.close(self.socket.as_fd()),
            Layer::Kernel(tls) => tls.close(self.socket.as_fd()),
        }
    }
}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.layer {
            Layer::Plain => f.write_str("plain text"),
            Layer::Secure(tls) => tls.fmt(f),
            Layer::Kernel(tls) => tls.fmt(f),
        }
    }
}

impl From<OwnedFd> for Stream {
    fn from(socket: OwnedFd) -> Self {
        Arc::new(socket).into()
    }
}

impl From<Arc<OwnedFd>> for Stream {
    fn from(socket: Arc<OwnedFd>) -> Self {
        Self { socket, layer: Layer::Plain, wakes_at: 1 }
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::Write,
        net::{TcpListener, TcpStream},
        time::Duration,
    };

    use super::*;
    use crate::poll::{Interest, Poll};

    #[test]
    fn wakes_when_the_due_bytes_have_arrived_or_the_peer_has_closed() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let mut stream = Stream::from(OwnedFd::from(listener.accept().unwrap().0));
        let mut poll = Poll::new().unwrap();
        poll.add_edge(&stream, 0, Interest::Read).unwrap();
        let mut wakes = |ms| poll.wait(Some(Duration::from_millis(ms))).unwrap().count() == 1;
        let mut staging = vec![0; 256 << 10];
        let mut receive = |stream: &mut Stream| stream.receive(None, &mut staging).unwrap().map(|got| got.staged);

        stream.expect(100_000);
        client.write_all(&[1; 99_999]).unwrap();
        assert!(!wakes(50), "one byte is missing");
        client.write_all(&[1]).unwrap();
        assert!(wakes(5000), "all is there");
        assert_eq!(receive(&mut stream), Some(100_000));

        stream.expect(0);
        client.write_all(&[1]).unwrap();
        assert!(wakes(5000), "nothing is due: every byte counts");
        assert_eq!(receive(&mut stream), Some(1));

        stream.expect(1 << 30);
        client.write_all(&[1]).unwrap();
        drop(client);
        assert!(wakes(5000), "no more will come");
        assert_eq!((receive(&mut stream), receive(&mut stream)), (Some(1), None));
    }
}
