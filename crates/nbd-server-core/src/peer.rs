//! [`Peer`]: what is known of a client, before any rule looks at it.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    os::fd::BorrowedFd,
};

use nix::sys::socket::{
    AddressFamily, SockaddrLike, SockaddrStorage, getpeername, getsockopt, sockopt::PeerCredentials,
};

/// A client, as the kernel and TLS describe it. Nothing in here is the client's own word.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Peer {
    /// Where it connects from.
    pub origin: Origin,
    /// Who it is by TLS; `None` until it has proven that, which it may never do.
    pub identity: Option<Identity>,
}

/// Where a client connects from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Origin {
    /// Nothing is known, as of a pipe.
    #[default]
    Unknown,
    /// An address and port. An IPv4 address is one, whatever the listener calls it (`::ffff:a.b.c.d`).
    Tcp(SocketAddr),
    /// A process of this machine, as it was when it connected.
    Unix {
        /// Its effective user.
        uid: u32,
        /// Its effective group.
        gid: u32,
        /// Its number; somebody else's by now, perhaps.
        pid: i32,
    },
    /// A virtual machine, or the host of this one.
    Vsock {
        /// Its context id: 2 is the host, 1 this machine itself.
        cid: u32,
        /// Its port.
        port: u32,
    },
}

/// Who a client has proven to be in its TLS handshake.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// The subject of its certificate as a string (RFC 4514), such as `CN=host,O=Example`.
    pub subject: Option<String>,
    /// The subject's other names, each with its kind before it: `DNS:host.example`, `IP:192.0.2.7`, `EMAIL:a@b`, `URI:…`.
    pub names: Vec<String>,
    /// The user whose pre-shared key it has.
    pub psk: Option<String>,
}

/// The party behind all connections from one place, as far as can be known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Party {
    Unknown,
    Ip(IpAddr),
    User(u32),
    Machine(u32),
}

impl Peer {
    /// Of an IPv6 address only the network counts: a host may have as many addresses in there as it likes.
    pub(crate) fn party(&self) -> Party {
        match self.origin {
            Origin::Unknown => Party::Unknown,
            Origin::Tcp(address) => Party::Ip(match address.ip() {
                IpAddr::V6(ip) => IpAddr::V6((ip.to_bits() >> 64 << 64).into()),
                ip => ip,
            }),
            Origin::Unix { uid, .. } => Party::User(uid),
            Origin::Vsock { cid, .. } => Party::Machine(cid),
        }
    }

    /// What the kernel says of the other end of a connected socket; of anything else, nothing.
    pub fn of(socket: BorrowedFd<'_>) -> Self {
        use std::os::fd::AsRawFd;
        let origin = || -> nix::Result<Origin> {
            let address: SockaddrStorage = getpeername(socket.as_raw_fd())?;
            if let Some(v4) = address.as_sockaddr_in() {
                return Ok(Origin::Tcp((v4.ip(), v4.port()).into()));
            }
            if let Some(v6) = address.as_sockaddr_in6() {
                return Ok(Origin::Tcp((IpAddr::from(v6.ip()).to_canonical(), v6.port()).into()));
            }
            if let Some(vsock) = address.as_vsock_addr() {
                return Ok(Origin::Vsock { cid: vsock.cid(), port: vsock.port() });
            }
            if address.family() == Some(AddressFamily::Unix) {
                let who = getsockopt(&socket, PeerCredentials)?;
                return Ok(Origin::Unix { uid: who.uid(), gid: who.gid(), pid: who.pid() });
            }
            Ok(Origin::Unknown)
        };
        Self { origin: origin().unwrap_or_default(), identity: None }
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.origin {
            Origin::Unknown => f.write_str("a client")?,
            Origin::Tcp(address) => write!(f, "{address}")?,
            Origin::Unix { uid, pid, .. } => write!(f, "process {pid} of user {uid}")?,
            Origin::Vsock { cid, port } => write!(f, "vsock {cid}:{port}")?,
        }
        match &self.identity {
            Some(Identity { subject: Some(who), .. } | Identity { psk: Some(who), .. }) => write!(f, " ({who:?})"),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        net::{TcpListener, TcpStream},
        os::{fd::AsFd, unix::net::UnixStream},
    };

    use nix::unistd::{getegid, geteuid, getpid};

    use super::*;

    #[test]
    fn the_kernel_names_the_other_end() {
        let (a, _b) = UnixStream::pair().unwrap();
        let us = Origin::Unix { uid: geteuid().as_raw(), gid: getegid().as_raw(), pid: getpid().as_raw() };
        assert_eq!(Peer::of(a.as_fd()).origin, us);

        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (server, _) = listener.accept().unwrap();
        assert_eq!(Peer::of(server.as_fd()).origin, Origin::Tcp(client.local_addr().unwrap()));

        assert_eq!(Peer::of(listener.as_fd()), Peer::default());
        assert_eq!(Peer::of(std::io::pipe().unwrap().0.as_fd()), Peer::default());
    }

    #[test]
    fn a_party_is_all_that_comes_from_one_place() {
        let party = |text: &str| Peer { origin: Origin::Tcp(text.parse().unwrap()), identity: None }.party();
        assert_eq!(party("192.0.2.1:1"), party("192.0.2.1:2"));
        assert_ne!(party("192.0.2.1:1"), party("192.0.2.2:1"));
        assert_eq!(party("[2001:db8::1]:1"), party("[2001:db8::ffff:0:2]:1"));
        assert_ne!(party("[2001:db8::1]:1"), party("[2001:db8:0:1::1]:1"));
        let user = |uid, pid| Peer { origin: Origin::Unix { uid, gid: 0, pid }, identity: None }.party();
        assert_eq!(user(7, 1), user(7, 2));
        assert_ne!(user(7, 1), user(8, 1));
    }

    #[test]
    fn an_ipv4_client_of_an_ipv6_socket_is_an_ipv4_client() {
        // A machine without IPv6 has no such clients.
        let Ok(listener) = TcpListener::bind("[::]:0") else { return };
        let client = TcpStream::connect(("127.0.0.1", listener.local_addr().unwrap().port())).unwrap();
        let (server, _) = listener.accept().unwrap();
        assert_eq!(Peer::of(server.as_fd()).origin, Origin::Tcp(client.local_addr().unwrap()));
    }
}
