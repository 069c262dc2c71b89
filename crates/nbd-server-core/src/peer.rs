//! [`Peer`]: a client as the kernel and TLS describe it.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    os::fd::BorrowedFd,
};

use nix::sys::socket::{
    AddressFamily, SockaddrLike, SockaddrStorage, getpeername, getsockopt, sockopt::PeerCredentials,
};

/// A client, as the kernel and TLS describe it. The client itself cannot choose any of this.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Peer {
    /// Where it connects from.
    pub origin: Origin,
    /// Its TLS identity; `None` if it has not proven one (yet).
    pub identity: Option<Identity>,
}

/// Where a client connects from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Origin {
    /// Unknown, as for a pipe.
    #[default]
    Unknown,
    /// Address and port. An IPv4-mapped IPv6 address (`::ffff:a.b.c.d`) is stored as IPv4.
    Tcp(SocketAddr),
    /// A process on this machine, as it was when it connected.
    Unix {
        /// Effective user id.
        uid: u32,
        /// Effective group id.
        gid: u32,
        /// Process id. The process may have ended, and another one may have the id now.
        pid: i32,
    },
    /// A virtual machine, or the host of this machine.
    Vsock {
        /// Context id: 2 is the host, 1 is this machine itself.
        cid: u32,
        /// Port number.
        port: u32,
    },
}

/// The identity that a client has proven in its TLS handshake.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// The subject of its certificate as a string (RFC 4514), such as `CN=host,O=Example`.
    pub subject: Option<String>,
    /// The subject alternative names of its certificate, with their kinds: `DNS:host.example`, `IP:192.0.2.7`, `EMAIL:a@b`,
    /// `URI:…`.
    pub names: Vec<String>,
    /// The user name of its pre-shared key.
    pub psk: Option<String>,
}

/// Groups connections that probably belong to one owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Party {
    Unknown,
    Ip(IpAddr),
    User(u32),
    Machine(u32),
}

impl Peer {
    /// For IPv6, only the /64 network counts: a host may use any number of addresses in it.
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

    /// Returns the kernel's description of the peer of a connected socket; [`Origin::Unknown`] for anything else.
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
    fn the_kernel_identifies_the_peer() {
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
    fn connections_from_one_place_are_one_party() {
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
        // A machine without IPv6 cannot run this test.
        let Ok(listener) = TcpListener::bind("[::]:0") else { return };
        let client = TcpStream::connect(("127.0.0.1", listener.local_addr().unwrap().port())).unwrap();
        let (server, _) = listener.accept().unwrap();
        assert_eq!(Peer::of(server.as_fd()).origin, Origin::Tcp(client.local_addr().unwrap()));
    }
}
