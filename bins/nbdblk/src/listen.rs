//! The sockets to listen on: bound once the devices are open, removed at the end.

use std::{
    fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs},
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        linux::net::SocketAddrExt,
        unix::{
            fs::FileTypeExt,
            net::{self as unix, UnixListener, UnixStream},
        },
    },
    path::{Path, PathBuf, absolute},
    str::FromStr,
};

use anyhow::{Context, bail, ensure};
use nbd_server_core::Listener;
use nix::{
    libc::{VMADDR_CID_ANY, VMADDR_PORT_ANY},
    sys::socket::{
        AddressFamily, Backlog, SockFlag, SockType, SockaddrLike, SockaddrStorage, VsockAddr, bind, getsockname,
        listen, setsockopt, socket, sockopt,
    },
    unistd::mkdtemp,
};

use crate::{
    activation,
    cli::Serve,
    files::OwnFile,
    uri::{Address, PORT},
};

/// A place to listen at, as `unix:PATH`, `unix:@NAME`, `tcp:PORT`, `tcp:HOST[:PORT]` or `vsock:PORT`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// A unix socket of a name that is not told beforehand, in a private directory: `unix:-`.
    Private,
    /// A unix socket in the file system.
    Unix(PathBuf),
    /// A unix socket in the abstract namespace.
    Abstract(String),
    /// A TCP port, 0 being any free one, on all of these hosts; without any on the loopback addresses.
    Tcp(Vec<String>, u16),
    /// A port for virtual machines and their hosts, 0 being any free one.
    Vsock(u32),
}

impl Place {
    /// What `--unix` takes.
    fn unix(path: &Path) -> Self {
        match path.to_str().map(|text| (text, text.strip_prefix('@'))) {
            Some(("-", _)) => Self::Private,
            Some((_, Some(name))) => Self::Abstract(name.into()),
            _ => Self::Unix(path.into()),
        }
    }
}

impl FromStr for Place {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let port = |text: &str| text.parse().map_err(|_| format!("\"{text}\" is not a port"));
        match text.split_once(':') {
            Some(("unix", path)) if !path.is_empty() => Ok(Self::unix(Path::new(path))),
            Some(("vsock", number)) => {
                number.parse().map(Self::Vsock).map_err(|_| format!("\"{number}\" is not a port"))
            }
            Some(("tcp", rest)) if !rest.is_empty() => {
                if rest.bytes().all(|byte| byte.is_ascii_digit()) {
                    return Ok(Self::Tcp(Vec::new(), port(rest)?));
                }
                // The brackets of an IPv6 address tell its colons from the one before the port.
                let (host, rest) = match rest.strip_prefix('[') {
                    Some(rest) => rest.split_once(']').ok_or("the bracket is not closed")?,
                    None => rest.split_at(rest.find(':').unwrap_or(rest.len())),
                };
                let port = match rest.strip_prefix(':') {
                    Some(number) => port(number)?,
                    None if rest.is_empty() => PORT,
                    None => return Err(format!("\"{rest}\" is not a port")),
                };
                Ok(Self::Tcp(vec![host.into()], port))
            }
            _ => Err("a place is unix:PATH, tcp:PORT, tcp:HOST:PORT or vsock:PORT".into()),
        }
    }
}

/// Which addresses a host's name may stand for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Family {
    Any,
    V4,
    V6,
}

impl Family {
    fn has(self, address: IpAddr) -> bool {
        match self {
            Self::Any => true,
            Self::V4 => address.is_ipv4(),
            Self::V6 => address.is_ipv6(),
        }
    }
}

/// What is bound, and how it is reached.
#[derive(Debug, Default)]
pub(crate) struct Sockets {
    /// For the server.
    pub(crate) listeners: Vec<Listener>,
    /// For people; Unix domain sockets first. Fewer than listeners: `localhost` is two of them.
    pub(crate) addresses: Vec<Address>,
    /// To be removed.
    pub(crate) files: Vec<OwnFile>,
}

impl Sockets {
    /// Binds everything that the arguments ask for.
    pub(crate) fn bind(args: &Serve) -> anyhow::Result<Self> {
        let family = match (args.ipv4_only, args.ipv6_only) {
            (true, _) => Family::V4,
            (_, true) => Family::V6,
            _ => Family::Any,
        };
        let places = places(args);
        // Alone, `::` stands for all addresses of the machine; beside `0.0.0.0` it leaves IPv4 to that.
        let is_v4 = |place: &Place| matches!(place, Place::Tcp(hosts, _) if hosts.iter().any(|host| host == "0.0.0.0"));
        let v6_only = family == Family::V6 || places.iter().any(is_v4);
        let mut sockets = Self::default();
        for place in &places {
            match place {
                Place::Private => {
                    let template = std::env::temp_dir().join("nbdblkXXXXXX");
                    let private = mkdtemp(&template).context("making a private directory")?;
                    sockets.add_unix(&private.join("socket"), Some(private.clone())).inspect_err(|_| {
                        let _ = fs::remove_dir(&private);
                    })?;
                }
                Place::Unix(path) => sockets.add_unix(path, None)?,
                Place::Abstract(name) => {
                    let bound = unix::SocketAddr::from_abstract_name(name).and_then(|a| UnixListener::bind_addr(&a));
                    sockets.listeners.push(bound.with_context(|| format!("listening on @{name}"))?.into());
                    sockets.addresses.push(Address::Unix(format!("@{name}").into()));
                }
                Place::Tcp(hosts, port) if hosts.is_empty() => sockets.add_loopback(*port, family)?,
                Place::Tcp(hosts, port) => sockets.add_tcp(hosts, *port, family, v6_only)?,
                Place::Vsock(port) => sockets.add_vsock(*port)?,
            }
        }
        Ok(sockets)
    }

    /// The sockets that were passed to this process; none, when there are none.
    ///
    /// # Errors
    /// One of them is not of use, or the arguments ask for others.
    pub(crate) fn passed(args: &Serve) -> anyhow::Result<Option<Self>> {
        let passed = activation::sockets()?;
        if passed.is_empty() {
            return Ok(None);
        }
        if let Some(option) = args.listening() {
            bail!("{option} cannot be used when sockets are passed (socket activation, LISTEN_FDS)");
        }
        let mut sockets = Self::default();
        for (socket, name) in passed {
            let number = sockets.listeners.len();
            let context = || format!("socket {number} of LISTEN_FDS, \"{name}\"");
            let address = address_of(&socket).with_context(context)?;
            log::info!("socket activation: {} is \"{name}\"", address.uri("", None));
            sockets.addresses.push(address);
            sockets.listeners.push(Listener::inherited(socket).with_context(context)?);
        }
        Ok(Some(sockets))
    }

    fn add_unix(&mut self, path: &Path, directory: Option<PathBuf>) -> anyhow::Result<()> {
        let bound = bind_unix(path).with_context(|| format!("listening on {}", path.display()))?;
        self.listeners.push(bound.into());
        let path = absolute(path).context("where the current directory is")?;
        self.files.push(OwnFile::new(&path, directory)?);
        self.addresses.push(Address::Unix(path));
        Ok(())
    }

    /// Both loopback addresses, because a client may take either for `localhost`. One of them is enough where the machine
    /// has no other.
    fn add_loopback(&mut self, port: u16, family: Family) -> anyhow::Result<()> {
        let hosts = [IpAddr::V4(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()];
        let hosts: Vec<IpAddr> = hosts.into_iter().filter(|host| family.has(*host)).collect();
        // A free port of the one family may be taken in the other.
        for attempt in 0.. {
            match bind_all(&hosts, port) {
                Err(error) if error.kind() == io::ErrorKind::AddrInUse && port == 0 && attempt < 16 => {}
                bound => {
                    let (bound, port) = bound.with_context(|| format!("listening on localhost, port {port}"))?;
                    self.listeners.extend(bound.into_iter().map(Listener::Listening));
                    self.addresses.push(Address::tcp("localhost", port));
                    break;
                }
            }
        }
        Ok(())
    }

    fn add_tcp(&mut self, hosts: &[String], mut port: u16, family: Family, v6_only: bool) -> anyhow::Result<()> {
        for host in hosts {
            let context = || format!("listening on {host}, port {port}");
            let mut found: Vec<SocketAddr> = (host.as_str(), port).to_socket_addrs().with_context(context)?.collect();
            found.retain(|address| family.has(address.ip()));
            ensure!(!found.is_empty(), "{host} has no address of the family asked for");
            for mut address in found {
                // Port 0 is chosen once.
                address.set_port(port);
                let bound = bind_tcp(address, v6_only).with_context(|| format!("listening on {address}"))?;
                port = port_of(&bound).with_context(|| format!("listening on {address}"))?;
                self.listeners.push(Listener::Listening(bound));
            }
            let address = Address::tcp(host, port);
            if !self.addresses.contains(&address) {
                self.addresses.push(address);
            }
        }
        Ok(())
    }

    fn add_vsock(&mut self, port: u32) -> anyhow::Result<()> {
        let listening = || -> nix::Result<OwnedFd> {
            let socket = socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
            let port = if port == 0 { VMADDR_PORT_ANY } else { port };
            bind(socket.as_raw_fd(), &VsockAddr::new(VMADDR_CID_ANY, port))?;
            listen(&socket, Backlog::MAXCONN)?;
            Ok(socket)
        };
        let context = || format!("listening on vsock, port {port}");
        let bound = listening().with_context(context)?;
        self.addresses.push(address_of(&bound).with_context(context)?);
        self.listeners.push(Listener::Listening(bound));
        Ok(())
    }
}

/// Where to listen, Unix domain sockets first.
fn places(args: &Serve) -> Vec<Place> {
    let mut places: Vec<Place> = args.unix.iter().map(|path| Place::unix(path)).chain(args.listen.clone()).collect();
    let port = args.port.unwrap_or(PORT);
    // nbdkit's --vsock takes its port from --port, and nothing else listens there then.
    let port_is_vsock_s = args.vsock == Some(None);
    if let Some(own) = args.vsock {
        places.push(Place::Vsock(own.unwrap_or(port.into())));
    }
    if !args.ip_addr.is_empty() || (args.port.is_some() && !port_is_vsock_s) {
        places.push(Place::Tcp(args.ip_addr.clone(), port));
    }
    if places.is_empty() {
        places.push(if args.run.is_some() { Place::Private } else { Place::Tcp(Vec::new(), port) });
    }
    places.sort_by_key(|place| matches!(place, Place::Tcp(..) | Place::Vsock(_)));
    places
}

/// Replaces a socket that a dead server has left behind, and nothing else.
pub(crate) fn bind_unix(path: &Path) -> anyhow::Result<UnixListener> {
    match fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => bail!("the file exists and is not a socket"),
        Ok(_) => match UnixStream::connect(path) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path)?,
            _ => bail!("another server listens there already"),
        },
        Err(_) => {} // bind() tells better what is wrong, if anything is.
    }
    Ok(UnixListener::bind(path)?)
}

/// Binds the same port of all hosts that the machine has. Port 0 is chosen once.
fn bind_all(hosts: &[IpAddr], mut port: u16) -> io::Result<(Vec<OwnedFd>, u16)> {
    let (mut all, mut absent) = (Vec::new(), None);
    for host in hosts {
        match bind_tcp((*host, port).into(), false) {
            Err(error) if is_absent(&error) => absent = Some(error),
            bound => {
                let bound = bound?;
                port = port_of(&bound)?;
                all.push(bound);
            }
        }
    }
    match absent {
        Some(error) if all.is_empty() => Err(error),
        _ => Ok((all, port)),
    }
}

fn bind_tcp(address: SocketAddr, v6_only: bool) -> io::Result<OwnedFd> {
    let family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let socket = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    setsockopt(&socket, sockopt::ReuseAddr, &true)?;
    if v6_only && address.is_ipv6() {
        setsockopt(&socket, sockopt::Ipv6V6Only, &true)?;
    }
    bind(socket.as_raw_fd(), &SockaddrStorage::from(address))?;
    listen(&socket, Backlog::MAXCONN)?;
    Ok(socket)
}

fn name_of(socket: &OwnedFd) -> io::Result<SockaddrStorage> {
    Ok(getsockname(socket.as_raw_fd())?)
}

fn port_of(socket: &OwnedFd) -> io::Result<u16> {
    let name = name_of(socket)?;
    let v6 = name.as_sockaddr_in6().map(|v6| v6.port());
    Ok(name.as_sockaddr_in().map(|v4| v4.port()).or(v6).unwrap_or_default())
}

/// Where a bound socket is reached.
fn address_of(socket: &OwnedFd) -> anyhow::Result<Address> {
    let name = name_of(socket)?;
    if let Some(vsock) = name.as_vsock_addr() {
        return Ok(Address::Vsock(vsock.port()));
    }
    if let Some(v4) = name.as_sockaddr_in() {
        return Ok(Address::tcp(&v4.ip().to_string(), v4.port()));
    }
    if let Some(v6) = name.as_sockaddr_in6() {
        return Ok(Address::tcp(&v6.ip().to_string(), v6.port()));
    }
    ensure!(name.family() == Some(AddressFamily::Unix), "it is not of a family that can be served");
    let name = UnixListener::from(socket.as_fd().try_clone_to_owned()?).local_addr()?;
    match (name.as_pathname(), name.as_abstract_name()) {
        (Some(path), _) => Ok(Address::Unix(path.into())),
        (None, Some(name)) => Ok(Address::Unix(format!("@{}", String::from_utf8_lossy(name)).into())),
        (None, None) => bail!("it has no name"),
    }
}

/// The machine has no such address, or not even its family.
fn is_absent(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::AddrNotAvailable
        || error.raw_os_error() == Some(nix::errno::Errno::EAFNOSUPPORT as i32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_told_apart() {
        let check = |text: &str, place| assert_eq!(text.parse(), Ok(place), "{text}");
        let tcp = |host: &str, port| Place::Tcp(vec![host.into()], port);
        check("unix:/run/nbd.sock", Place::Unix("/run/nbd.sock".into()));
        check("unix:@nbd:1", Place::Abstract("nbd:1".into()));
        check("unix:-", Place::Private);
        check("tcp:0", Place::Tcp(vec![], 0));
        check("tcp:10810", Place::Tcp(vec![], 10810));
        check("tcp:storage.example", tcp("storage.example", PORT));
        check("tcp:storage.example:1", tcp("storage.example", 1));
        check("tcp:192.0.2.7:65535", tcp("192.0.2.7", 65535));
        check("tcp:[2001:db8::7]:1", tcp("2001:db8::7", 1));
        check("tcp:[::]", tcp("::", PORT));
        check("vsock:4294967294", Place::Vsock(4294967294));
        for wrong in [
            "",
            "10809",
            "/run/nbd.sock",
            "unix:",
            "tcp:",
            "tcp:65536",
            "tcp:a:",
            "tcp:a:b",
            "tcp:[::1",
            "tcp:[::1]1",
            "vsock:",
            "vsock:a",
            "nbd:1",
        ] {
            assert!(wrong.parse::<Place>().is_err(), "{wrong}");
        }
    }
}
