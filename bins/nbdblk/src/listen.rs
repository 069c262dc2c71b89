//! The sockets to listen on: bound once the devices are open, removed at the end.

use std::{
    fs, io,
    net::{Ipv4Addr, Ipv6Addr, TcpListener, ToSocketAddrs},
    os::unix::{
        fs::{FileTypeExt, MetadataExt},
        net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf, absolute},
};

use anyhow::{Context, bail};
use nbd_server_core::Listener;
use nix::unistd::mkdtemp;

use crate::{
    cli::Serve,
    uri::{Address, PORT},
};

/// What is bound, and how it is reached.
#[derive(Debug, Default)]
pub(crate) struct Sockets {
    /// For the server.
    pub(crate) listeners: Vec<Listener>,
    /// For people; Unix domain sockets first. Fewer than listeners: `localhost` is two of them.
    pub(crate) addresses: Vec<Address>,
    /// To be removed.
    pub(crate) files: Vec<SocketFile>,
}

impl Sockets {
    /// Binds everything that the arguments ask for.
    pub(crate) fn bind(args: &Serve) -> anyhow::Result<Self> {
        let mut sockets = Self::default();
        let tcp = args.port.is_some() || !args.ip_addr.is_empty();
        for path in &args.unix {
            sockets.add_unix(path)?;
        }
        if args.unix.is_empty() && !tcp && args.run.is_some() {
            sockets.add_unix(Path::new("-"))?;
        } else if tcp || args.unix.is_empty() {
            sockets.add_tcp(&args.ip_addr, args.port.unwrap_or(PORT))?;
        }
        Ok(sockets)
    }

    fn add_unix(&mut self, path: &Path) -> anyhow::Result<()> {
        let private = match path.to_str() {
            Some("-") => {
                Some(mkdtemp(&std::env::temp_dir().join("nbdblkXXXXXX")).context("making a private directory")?)
            }
            _ => None,
        };
        let path = private.as_ref().map_or_else(|| path.to_owned(), |dir| dir.join("socket"));
        let bound = bind_unix(&path);
        if let (Err(_), Some(dir)) = (&bound, &private) {
            let _ = fs::remove_dir(dir);
        }
        self.listeners.push(bound.with_context(|| format!("listening on {}", path.display()))?.into());
        let path = absolute(path).context("where the current directory is")?;
        self.files.push(SocketFile::new(&path, private)?);
        self.addresses.push(Address::Unix(path));
        Ok(())
    }

    fn add_tcp(&mut self, hosts: &[String], mut port: u16) -> anyhow::Result<()> {
        if hosts.is_empty() {
            let (bound, port) = bind_loopback(port).with_context(|| format!("listening on localhost, port {port}"))?;
            self.listeners.extend(bound.into_iter().map(Listener::from));
            self.addresses.push(Address::tcp("localhost", port));
        }
        for host in hosts {
            let context = || format!("listening on {host}, port {port}");
            let addresses = (host.as_str(), port).to_socket_addrs().with_context(context)?;
            for mut address in addresses {
                // Port 0 is chosen once.
                address.set_port(port);
                let bound = TcpListener::bind(address).with_context(|| format!("listening on {address}"))?;
                port = bound.local_addr().with_context(|| format!("listening on {address}"))?.port();
                self.listeners.push(bound.into());
            }
            let address = Address::tcp(host, port);
            if !self.addresses.contains(&address) {
                self.addresses.push(address);
            }
        }
        Ok(())
    }
}

/// Replaces a socket that a dead server has left behind, and nothing else.
fn bind_unix(path: &Path) -> anyhow::Result<UnixListener> {
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

/// Both loopback addresses, because a client may take either for `localhost`. One of them is enough where the machine has
/// no other.
fn bind_loopback(port: u16) -> io::Result<(Vec<TcpListener>, u16)> {
    // A free port of the one family may be taken in the other.
    for _ in 0..16 {
        let first = match TcpListener::bind((Ipv4Addr::LOCALHOST, port)) {
            Err(error) if is_absent(&error) => None,
            bound => Some(bound?),
        };
        let chosen = match &first {
            Some(bound) => bound.local_addr()?.port(),
            None => port,
        };
        match (TcpListener::bind((Ipv6Addr::LOCALHOST, chosen)), first) {
            (Ok(second), first) => {
                let chosen = second.local_addr()?.port();
                return Ok((first.into_iter().chain([second]).collect(), chosen));
            }
            (Err(error), Some(first)) if is_absent(&error) => return Ok((vec![first], chosen)),
            (Err(error), Some(_)) if port == 0 && error.kind() == io::ErrorKind::AddrInUse => {}
            (Err(error), _) => return Err(error),
        }
    }
    Err(io::ErrorKind::AddrInUse.into())
}

/// The machine has no such address, or not even its family.
fn is_absent(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::AddrNotAvailable
        || error.raw_os_error() == Some(nix::errno::Errno::EAFNOSUPPORT as i32)
}

/// A socket in the file system, removed when this is dropped, if it still is the one that was bound.
#[derive(Debug)]
pub(crate) struct SocketFile {
    path: PathBuf,
    identity: (u64, u64),
    directory: Option<PathBuf>,
}

impl SocketFile {
    fn new(path: &Path, directory: Option<PathBuf>) -> anyhow::Result<Self> {
        let identity = identity(path).with_context(|| format!("looking at {}", path.display()))?;
        Ok(Self { path: path.into(), identity, directory })
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        // Whatever fails here has been taken away by somebody else.
        if identity(&self.path).is_ok_and(|now| now == self.identity) {
            let _ = fs::remove_file(&self.path);
        }
        if let Some(directory) = &self.directory {
            let _ = fs::remove_dir(directory);
        }
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    fs::symlink_metadata(path).map(|found| (found.dev(), found.ino()))
}
