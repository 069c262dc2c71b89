//! [`Stream`]: a connection's bytes, as plain text or under TLS.

use std::{
    fmt, io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use blkdev::{Buf, socket};

use crate::{
    outbox::Outbox,
    peer::Identity,
    received::{Received, push},
    tls::{Secure, Shaking},
};

/// For so few bytes, setting a low-water mark is not worth the system call.
const FEW: usize = 32 << 10;
/// Highest low-water mark, in bytes. With the data that arrives until the receive, it should fit into the staging buffer.
const MANY: usize = 192 << 10;

/// A connected socket, with its TLS state.
pub(crate) struct Stream {
    socket: OwnedFd,
    /// `None`: plain text.
    tls: Option<Box<Secure>>,
    /// The low-water mark of the socket (SO_RCVLOWAT), in bytes.
    wakes_at: usize,
}

impl Stream {
    /// Switches to TLS when the handshake on this socket is over. Returns the client's identity.
    ///
    /// # Errors
    /// The result of the handshake is unusable: close the connection.
    pub(crate) fn protect(&mut self, shaking: Shaking) -> io::Result<Option<Identity>> {
        let (secure, identity) = shaking.agree()?;
        self.tls = Some(Box::new(secure));
        Ok(identity)
    }

    /// Moves TLS into the kernel as far as possible, when the NBD handshake is over.
    ///
    /// # Errors
    /// The kernel failed half-way: close the connection.
    pub(crate) fn offload(&mut self) -> io::Result<()> {
        self.tls.as_mut().map_or(Ok(()), |tls| tls.offload(self.socket.as_fd()))
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
        if let Some(tls) = self.tls.as_mut().filter(|tls| !tls.kernel().receives) {
            return tls.receive(socket, staging);
        }
        let room = landing.as_ref().map_or(0, |(buf, at)| buf.len() - at);
        let got = socket::receive(socket, landing, staging)?;
        let landed = got.min(room);
        // Less than the buffers hold: the socket is empty, and the next bytes cause a new event.
        let more = got == room + staging.len();
        Ok((got > 0).then_some(Received { landed, staged: got - landed, more }))
    }

    /// Call it when the socket is empty, and the client must still send `due` bytes of a payload. If `due` is large, the
    /// low-water mark is raised, so that not every packet wakes the worker.
    pub(crate) fn expect(&mut self, due: usize) {
        let due = match &self.tls {
            None => due,
            Some(tls) if tls.kernel().receives => 0,
            // Records are longer than their content. But the beginning of one may have arrived already.
            Some(tls) => due.saturating_sub(tls.part()),
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
        match self.tls.as_mut().filter(|tls| !tls.kernel().sends) {
            None => outbox.send(self.socket.as_fd()),
            Some(tls) => tls.send(self.socket.as_fd(), staging, |room| outbox.read(room)),
        }
    }

    /// As [`send`](Self::send), for bytes, which are removed from the front.
    pub(crate) fn send_bytes(&mut self, bytes: &mut Vec<u8>, staging: &mut [u8]) -> io::Result<bool> {
        match &mut self.tls {
            None => {
                let sent = push(self.socket.as_fd(), bytes)?;
                bytes.drain(..sent);
                Ok(bytes.is_empty())
            }
            Some(tls) => tls.send(self.socket.as_fd(), staging, |room| {
                let len = room.len().min(bytes.len());
                room[..len].copy_from_slice(&bytes[..len]);
                bytes.drain(..len);
                len
            }),
        }
    }

    /// Frees spare capacity after a burst.
    pub(crate) fn shrink(&mut self) {
        if let Some(tls) = &mut self.tls {
            tls.shrink();
        }
    }

    /// Sends the TLS closure alert, if there is TLS. `staging` may be overwritten.
    pub(crate) fn close(&mut self, staging: &mut [u8]) {
        if let Some(tls) = &mut self.tls {
            tls.close(self.socket.as_fd(), staging);
        }
    }
}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.tls {
            None => f.write_str("plain text"),
            Some(tls) => tls.fmt(f),
        }
    }
}

impl From<OwnedFd> for Stream {
    fn from(socket: OwnedFd) -> Self {
        Self { socket, tls: None, wakes_at: 1 }
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
