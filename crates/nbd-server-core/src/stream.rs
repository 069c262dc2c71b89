//! [`Stream`]: a connection's bytes, in plain text or under TLS.

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

/// Bytes not worth a system call so that we are woken but once for them.
const FEW: usize = 32 << 10;
/// Bytes to be woken at, at most. Together with what comes until then they should fit into the staging buffer.
const MANY: usize = 192 << 10;

/// A connected socket, and what its bytes go through.
pub(crate) struct Stream {
    socket: OwnedFd,
    /// `None`: plain text.
    tls: Option<Box<Secure>>,
    /// Bytes that the socket wakes us at.
    wakes_at: usize,
}

impl Stream {
    /// Goes under TLS, whose handshake on this socket is over; tells who the client is.
    ///
    /// # Errors
    /// The handshake's result cannot be used: close the connection.
    pub(crate) fn protect(&mut self, shaking: Shaking) -> io::Result<Option<Identity>> {
        let (secure, identity) = shaking.agree()?;
        self.tls = Some(Box::new(secure));
        Ok(identity)
    }

    /// Lets the kernel do what it can of TLS, now that the handshake is over.
    ///
    /// # Errors
    /// Half of it was done: close the connection.
    pub(crate) fn offload(&mut self) -> io::Result<()> {
        self.tls.as_mut().map_or(Ok(()), |tls| tls.offload(self.socket.as_fd()))
    }

    /// Receives what is there now: into `landing` as far as that is possible without a copy, and the rest into `staging`,
    /// which may be overwritten as a whole. `None`: the peer has closed.
    ///
    /// # Errors
    /// `WouldBlock` when nothing is there; otherwise the connection is broken.
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
        // Less than there was room for: the socket is empty, and the next bytes will be an event of their own.
        let more = got == room + staging.len();
        Ok((got > 0).then_some(Received { landed, staged: got - landed, more }))
    }

    /// Tells that the socket is empty, and that the client is sure to send so many bytes more, since they are the rest of a
    /// payload: if they are many, nobody need be woken for each packet of them.
    pub(crate) fn expect(&mut self, due: usize) {
        let due = match &self.tls {
            None => due,
            Some(tls) if tls.kernel().receives => 0,
            // A record is longer than what is in it; but of one the beginning may be here.
            Some(tls) => due.saturating_sub(tls.part()),
        };
        let at = if due < FEW { 1 } else { due.min(MANY) };
        if at != self.wakes_at {
            self.wakes_at = at;
            socket::wake_at(self.socket.as_fd(), at);
        }
    }

    /// Sends until all is out (`true`) or the socket is full (`false`); then something may be on its way although `outbox`
    /// is empty. `staging` may be overwritten.
    ///
    /// # Errors
    /// The connection is broken.
    pub(crate) fn send(&mut self, outbox: &mut Outbox, staging: &mut [u8]) -> io::Result<bool> {
        match self.tls.as_mut().filter(|tls| !tls.kernel().sends) {
            None => outbox.send(self.socket.as_fd()),
            Some(tls) => tls.send(self.socket.as_fd(), staging, |room| outbox.read(room)),
        }
    }

    /// The same for bytes, which are taken off the front.
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

    /// Returns what a burst has left of capacity.
    pub(crate) fn shrink(&mut self) {
        if let Some(tls) = &mut self.tls {
            tls.shrink();
        }
    }

    /// Takes leave, where there is a form for that. `staging` may be overwritten.
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
    fn wakes_when_what_is_due_has_come_or_the_peer_has_gone() {
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
