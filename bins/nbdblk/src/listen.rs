//! The listening sockets: bound once the devices are open, removed at the end.

use std::{
    fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs},
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        linux::net::SocketAddrExt,
        unix::{
            fs::{FileTypeExt, PermissionsExt, chown},
            net::{self as unix, UnixListener, UnixStream},
        },
    },
    path::{Path, absolute},
};

use anyhow::{Context, anyhow, bail, ensure};
use nbd_server_core::Listener;
use nix::{
    errno::Errno,
    libc::{VMADDR_CID_ANY, VMADDR_PORT_ANY},
    sys::{
        socket::{
            AddressFamily, Backlog, SockFlag, SockType, SockaddrLike, SockaddrStorage, UnixAddr, VsockAddr, bind,
            connect, getsockname, listen, setsockopt, socket, sockopt,
        },
        stat::{Mode, fchmod},
    },
    unistd::mkdtemp,
};

use crate::{
    cli::Serve,
    files::OwnFile,
    place::Place,
    stored::{self, Store},
    uri::{Address, PORT},
};

/// Access to a Unix domain socket.
#[derive(Clone, Debug, Default)]
pub(crate) struct Access {
    /// Permissions; by default the umask decides.
    pub(crate) mode: Option<u32>,
    /// Owner and group, if not the default.
    pub(crate) owner: Option<u32>,
    pub(crate) group: Option<u32>,
}

/// The address families that a host's name may resolve to.
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

/// Bound sockets and their addresses.
#[derive(Debug, Default)]
pub(crate) struct Sockets {
    /// For the server.
    pub(crate) listeners: Vec<Listener>,
    /// Addresses for people; Unix domain sockets first. Fewer than listeners: `localhost` has two.
    pub(crate) addresses: Vec<Address>,
    /// Files to remove, in this order.
    pub(crate) files: Vec<OwnFile>,
    /// The TCP addresses of the listeners.
    pub(crate) bound: Vec<SocketAddr>,
    /// Sockets that the service manager has kept, or should keep.
    pub(crate) store: Store,
}

impl Sockets {
    /// Checks the arguments before anything is opened.
    pub(crate) fn check(args: &Serve, are_passed: bool) -> anyhow::Result<()> {
        let places = places(args)?;
        match args.socket_access() {
            Some(option) if !are_passed && !places.iter().any(Place::is_file) => {
                bail!("{option} needs a Unix domain socket in the file system: -U PATH")
            }
            _ => Ok(()),
        }
    }

    /// Binds all sockets that the arguments name.
    pub(crate) fn bind(args: &Serve, store: Store) -> anyhow::Result<Self> {
        let family = match (args.ipv4_only, args.ipv6_only) {
            (true, _) => Family::V4,
            (_, true) => Family::V6,
            _ => Family::Any,
        };
        let places = places(args)?;
        let access = Access { mode: args.socket_mode, owner: args.socket_owner, group: args.socket_group };
        // Alone, `::` means all addresses of the machine. Together with `0.0.0.0`, it leaves IPv4 to that.
        let is_v4 = |place: &Place| matches!(place, Place::Tcp(hosts, _) if hosts.iter().any(|host| host == "0.0.0.0"));
        let v6_only = family == Family::V6 || places.iter().any(is_v4);
        let mut sockets = Self { store, ..Self::default() };
        for place in &places {
            match place {
                Place::Private => sockets.add_private()?,
                Place::Unix(path) => sockets.add_unix(path, &access)?,
                Place::Abstract(name) => sockets.add_abstract(name)?,
                Place::Tcp(hosts, port) if hosts.is_empty() => sockets.add_loopback(*port, family)?,
                Place::Tcp(hosts, port) => sockets.add_tcp(hosts, *port, family, v6_only)?,
                Place::Vsock(port) => sockets.add_vsock(*port)?,
            }
        }
        Ok(sockets)
    }

    /// The sockets that were passed to this process; `None`: there are none.
    ///
    /// # Errors
    /// One of them is unusable, or the arguments name others.
    pub(crate) fn passed(args: &Serve, passed: Vec<(OwnedFd, String)>) -> anyhow::Result<Option<Self>> {
        if passed.is_empty() {
            return Ok(None);
        }
        if let Some(option) = args.listening() {
            bail!("remove {option}: the service manager passes the sockets (socket activation, LISTEN_FDS)");
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

    /// Adds a socket in a directory that only this user can enter.
    fn add_private(&mut self) -> anyhow::Result<()> {
        let name = "nbdblkXXXXXX";
        let too_long =
            |dir: &Path| absolute(dir).is_ok_and(|dir| check_length(&dir.join(name).join("socket")).is_err());
        let mut dir = std::env::temp_dir();
        if too_long(&dir) {
            dir = "/tmp".into();
        }
        let private = mkdtemp(&dir.join(name)).with_context(|| format!("making a directory in {}", dir.display()))?;
        let private = absolute(private).context("cannot get the current directory")?;
        let directory = OwnFile::new(&private)?;
        self.add_unix(&private.join("socket"), &Access::default())?;
        self.files.push(directory);
        Ok(())
    }

    fn add_abstract(&mut self, name: &[u8]) -> anyhow::Result<()> {
        let shown = format!("@{}", String::from_utf8_lossy(name));
        let stored = stored::in_namespace(name);
        let bind = || unix::SocketAddr::from_abstract_name(name).and_then(|a| UnixListener::bind_addr(&a));
        let bound = self.store.take(&stored).map_or_else(|| bind().map(OwnedFd::from), Ok);
        let bound = bound.with_context(|| format!("listening on {shown}"))?;
        self.store.keep(&bound, stored)?;
        self.listeners.push(Listener::Listening(bound));
        self.addresses.push(Address::Unix(shown.into()));
        Ok(())
    }

    fn add_unix(&mut self, path: &Path, access: &Access) -> anyhow::Result<()> {
        let stored = stored::file(path).ok().and_then(|name| self.store.take(&name));
        let bound = match stored {
            Some(socket) => OwnFile::new(&absolute(path)?).map(|file| (socket, file)),
            None => bind_unix(path, access).map(|(socket, file)| (socket.into(), file)),
        };
        let (bound, file) = bound.with_context(|| format!("listening on {}", path.display()))?;
        self.store.keep(&bound, stored::file(path)?)?;
        self.listeners.push(Listener::Listening(bound));
        self.files.push(file);
        self.addresses.push(Address::Unix(absolute(path).context("cannot get the current directory")?));
        Ok(())
    }

    /// Adds both loopback addresses, because a client may use either for `localhost`. One is enough if the machine does not have
    /// the other.
    fn add_loopback(&mut self, port: u16, family: Family) -> anyhow::Result<()> {
        let hosts = [IpAddr::V4(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()];
        let found = hosts.into_iter().filter(|host| family.has(*host)).map(|host| (host, port).into()).collect();
        self.add_hosts(&[("localhost".into(), found)], port, false)
    }

    fn add_tcp(&mut self, hosts: &[String], port: u16, family: Family, v6_only: bool) -> anyhow::Result<()> {
        let resolve = |host: &String| {
            let found = (host.as_str(), port).to_socket_addrs();
            let found = found.with_context(|| format!("listening on {host}, port {port}"))?;
            let found: Vec<_> = found.filter(|address| family.has(address.ip())).collect();
            ensure!(!found.is_empty(), "{host} has no address of the requested family");
            Ok((host.clone(), found))
        };
        let hosts: Vec<_> = hosts.iter().map(resolve).collect::<anyhow::Result<_>>()?;
        self.add_hosts(&hosts, port, v6_only)
    }

    /// Adds the same port of all hosts, at the addresses that the machine has. Port 0 is chosen once for all.
    fn add_hosts(&mut self, hosts: &[(String, Vec<SocketAddr>)], port: u16, v6_only: bool) -> anyhow::Result<()> {
        // A port that is free at one address may be in use at another.
        for attempt in 0.. {
            match bind_all(hosts, port, v6_only, &self.bound, &mut self.store) {
                Err((_, error)) if error.kind() == io::ErrorKind::AddrInUse && port == 0 && attempt < 16 => {}
                Err((host, error)) => {
                    let remedy = match error.kind() {
                        io::ErrorKind::AddrInUse => ": another program listens there; choose another port",
                        io::ErrorKind::PermissionDenied => ": ports below 1024 need CAP_NET_BIND_SERVICE",
                        _ => "",
                    };
                    bail!("listening on {host}, port {port}: {error}{remedy}");
                }
                Ok((bound, port)) => {
                    for (address, socket) in bound {
                        self.store.keep(&socket, stored::tcp(address))?;
                        self.bound.push(address);
                        self.listeners.push(Listener::Listening(socket));
                    }
                    for address in hosts.iter().map(|(host, _)| Address::tcp(host, port)) {
                        if !self.addresses.contains(&address) {
                            self.addresses.push(address);
                        }
                    }
                    break;
                }
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
        let bound = self.store.take(&stored::vsock(port)).map_or_else(listening, Ok).with_context(context)?;
        let address = address_of(&bound).with_context(context)?;
        if let Address::Vsock(port) = address {
            self.store.keep(&bound, stored::vsock(port))?;
        }
        self.addresses.push(address);
        self.listeners.push(Listener::Listening(bound));
        Ok(())
    }
}

/// The places to listen, Unix domain sockets first.
fn places(args: &Serve) -> anyhow::Result<Vec<Place>> {
    let unix = args.unix.iter().map(|path| Place::unix(path).map_err(|error| anyhow!("--unix: {error}")));
    let mut places: Vec<Place> = unix.collect::<anyhow::Result<_>>()?;
    places.extend(args.listen.iter().cloned());
    let port = args.port.unwrap_or(PORT);
    // nbdkit's --vsock takes its port from --port, which then does not listen on TCP.
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
    Ok(places)
}

/// Longest path of a socket, in bytes (unix(7), `sun_path`, without the terminating NUL).
const PATH_MAX: usize = 107;

fn check_length(path: &Path) -> anyhow::Result<()> {
    let len = path.as_os_str().len();
    ensure!(len <= PATH_MAX, "the path {} has {len} bytes; a socket's path can have {PATH_MAX}", path.display());
    Ok(())
}

/// Connects without waiting. If the server does not accept and its backlog is full, the error is `WouldBlock`.
pub(crate) fn connect_unix(path: &Path) -> io::Result<UnixStream> {
    check_length(path).map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error.to_string()))?;
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    connect(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(socket.into())
}

/// Binds a socket and listens. It replaces only a socket that a dead server has left behind. Clients can connect only after
/// owner, group and mode are set.
pub(crate) fn bind_unix(path: &Path, access: &Access) -> anyhow::Result<(UnixListener, OwnFile)> {
    // Clients with another current directory need the absolute path.
    let full = absolute(path).context("cannot get the current directory")?;
    check_length(&full)?;
    match fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => bail!("the file exists and is not a socket"),
        Ok(_) => match connect_unix(path) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path)?,
            _ => bail!("another server listens there already"),
        },
        Err(_) => {} // bind() reports the reason, if there is one.
    }
    let socket = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    if let Some(mode) = access.mode {
        // The file gets these permissions without the bits of the umask.
        fchmod(&socket, Mode::from_bits_truncate(mode))?;
    }
    bind(socket.as_raw_fd(), &UnixAddr::new(path)?).map_err(|errno| {
        let dir = full.parent().unwrap_or(&full).display();
        match errno {
            Errno::ENOENT => anyhow!("the directory {dir} does not exist"),
            Errno::EACCES | Errno::EPERM => anyhow!("no permission to create a socket in {dir}"),
            Errno::EROFS => anyhow!("{dir} is on a read-only file system"),
            _ => anyhow!(io::Error::from(errno)),
        }
    })?;
    let file = OwnFile::new(&full)?;
    if access.owner.is_some() || access.group.is_some() {
        chown(&full, access.owner, access.group).context("changing its owner or group")?;
    }
    if let Some(mode) = access.mode {
        fs::set_permissions(&full, fs::Permissions::from_mode(mode)).context("changing its mode")?;
    }
    listen(&socket, Backlog::MAXCONN)?;
    Ok((socket.into(), file))
}

type Bound = Vec<(SocketAddr, OwnedFd)>;

/// Binds the same port of all hosts, each address once, except those that are bound already. The machine must have at least one
/// address of each host.
fn bind_all(
    hosts: &[(String, Vec<SocketAddr>)],
    mut port: u16,
    v6_only: bool,
    before: &[SocketAddr],
    store: &mut Store,
) -> Result<(Bound, u16), (String, io::Error)> {
    let mut all: Bound = Vec::new();
    let mut absent = vec![None; hosts.len()];
    let mut served = vec![false; hosts.len()];
    // A wildcard address goes first: it covers the others.
    let mut order: Vec<_> =
        hosts.iter().enumerate().flat_map(|(n, (_, found))| found.iter().map(move |a| (n, *a))).collect();
    order.sort_by_key(|(_, a)| if a.ip().is_unspecified() { 1 + u8::from(a.is_ipv4()) } else { 3 });
    for (n, mut address) in order {
        address.set_port(port);
        let covers = |bound: &SocketAddr| {
            let family = bound.is_ipv4() == address.is_ipv4() || (bound.is_ipv6() && !v6_only);
            *bound == address || (family && bound.ip().is_unspecified() && bound.port() == address.port())
        };
        if port != 0 && before.iter().chain(all.iter().map(|(bound, _)| bound)).any(covers) {
            served[n] = true;
            continue;
        }
        let stored = if port == 0 { None } else { store.take(&stored::tcp(address)) };
        match stored.map_or_else(|| bind_tcp(address, v6_only), Ok).and_then(|socket| Ok((port_of(&socket)?, socket))) {
            Err(error) if is_absent(&error) => absent[n] = error.raw_os_error(),
            Err(error) => {
                let (host, ip) = (&hosts[n].0, address.ip().to_string());
                return Err((if *host == ip { ip } else { format!("{host} ({ip})") }, error));
            }
            Ok((chosen, socket)) => {
                port = chosen;
                address.set_port(port);
                all.push((address, socket));
                served[n] = true;
            }
        }
    }
    match (0..hosts.len()).find(|n| !served[*n]) {
        Some(n) => Err((hosts[n].0.clone(), io::Error::from_raw_os_error(absent[n].unwrap_or_default()))),
        None => Ok((all, port)),
    }
}

pub(crate) fn bind_tcp(address: SocketAddr, v6_only: bool) -> io::Result<OwnedFd> {
    let family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let socket = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    setsockopt(&socket, sockopt::ReuseAddr, &true)?;
    if address.is_ipv6() {
        // Do not depend on the system's default.
        setsockopt(&socket, sockopt::Ipv6V6Only, &(v6_only || !address.ip().is_unspecified()))?;
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

/// The address of a bound socket.
fn address_of(socket: &OwnedFd) -> anyhow::Result<Address> {
    let name = name_of(socket)?;
    if let Some(vsock) = name.as_vsock_addr() {
        return Ok(Address::Vsock(vsock.port()));
    }
    if let Some(v4) = name.as_sockaddr_in() {
        return Ok(Address::tcp(&v4.ip().to_string(), v4.port()));
    }
    if let Some(v6) = name.as_sockaddr_in6() {
        let zone = if v6.scope_id() == 0 { String::new() } else { format!("%{}", v6.scope_id()) };
        return Ok(Address::tcp(&format!("{}{zone}", v6.ip()), v6.port()));
    }
    ensure!(name.family() == Some(AddressFamily::Unix), "its address family is not supported");
    let name = UnixListener::from(socket.as_fd().try_clone_to_owned()?).local_addr()?;
    match (name.as_pathname(), name.as_abstract_name()) {
        (Some(path), _) => Ok(Address::Unix(path.into())),
        (None, Some(name)) => Ok(Address::Unix(format!("@{}", String::from_utf8_lossy(name)).into())),
        (None, None) => bail!("it has no name"),
    }
}

/// Whether the machine lacks this address, or its whole family.
pub(crate) fn is_absent(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::AddrNotAvailable || error.raw_os_error() == Some(Errno::EAFNOSUPPORT as i32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_address_is_bound_once_and_absent_ones_are_skipped() {
        let row = |host: &str, ips: &[&str]| {
            (host.to_owned(), ips.iter().map(|ip| SocketAddr::new(ip.parse().expect("an address"), 0)).collect())
        };
        // 192.0.2.0/24 and 2001:db8::/32 are for documentation: no machine has them.
        let check = |hosts: &[(String, Vec<SocketAddr>)], count| {
            let (bound, port) =
                bind_all(hosts, 0, false, &[], &mut Store::default()).expect("the machine has one of them");
            assert_eq!(bound.len(), count, "{hosts:?}");
            assert!(bound.iter().all(|(address, _)| address.port() == port && port != 0));
            let addresses: Vec<_> = bound.iter().map(|(address, _)| *address).collect();
            let (again, _) =
                bind_all(hosts, port, false, &addresses, &mut Store::default()).expect("all are bound already");
            assert!(again.is_empty(), "{again:?}");
        };
        check(&[row("twice", &["127.0.0.1", "127.0.0.1"])], 1);
        check(&[row("a", &["127.0.0.1"]), row("b", &["127.0.0.1", "127.0.0.2"])], 2);
        check(&[row("mixed", &["2001:db8::1", "127.0.0.1", "192.0.2.1"])], 1);
        check(&[row("one", &["127.0.0.1"]), row("any", &["0.0.0.0"])], 1);
        let hosts = [row("a", &["127.0.0.1"]), row("b", &["192.0.2.1"])];
        let (host, error) = bind_all(&hosts, 0, false, &[], &mut Store::default()).unwrap_err();
        assert!(host == "b" && is_absent(&error), "{host}: {error}");
    }

    #[test]
    fn paths_of_sockets_are_bounded() {
        assert!(check_length(Path::new(&"x".repeat(107))).is_ok());
        let error = check_length(Path::new(&"x".repeat(108))).unwrap_err().to_string();
        assert!(error.contains("108") && error.contains("107"), "{error}");
    }
}
