//! TLS: what the client trusts and who it is, and one connection's session. Both are rustls'.

use std::{
    fmt,
    io::{self, IoSlice, Read, Write},
    os::fd::BorrowedFd,
    path::{Path, PathBuf},
    sync::Arc,
};

use rustls::{
    ClientConfig, ClientConnection, RootCertStore,
    crypto::ring::default_provider,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject},
};

use crate::{error::Error, socket::Nonblocking};

/// How to use TLS: which servers to trust, and how to prove who the client is. Cheap to clone.
#[derive(Clone)]
pub struct Tls {
    config: Arc<ClientConfig>,
    server_name: Option<String>,
}

/// The files of a client, in PEM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Certificates {
    /// The authorities that the server's certificate must come from.
    pub ca: PathBuf,
    /// The client's certificate, with those between it and the authority that the server knows, and its key. `None`: the
    /// client has none.
    pub client: Option<(PathBuf, PathBuf)>,
}

impl Certificates {
    /// The files that libnbd, libvirt and qemu look for in a directory: `ca-cert.pem` and, if they are there,
    /// `client-cert.pem` and `client-key.pem`.
    pub fn within(dir: &Path) -> Self {
        let client = (dir.join("client-cert.pem"), dir.join("client-key.pem"));
        Self { ca: dir.join("ca-cert.pem"), client: client.0.exists().then_some(client) }
    }
}

impl Tls {
    /// TLS 1.2 and 1.3 with certificates. The files are read now, and not again.
    ///
    /// # Errors
    /// [`Error::Io`] names the file that cannot be used.
    pub fn with_certificates(files: &Certificates) -> Result<Self, Error> {
        let mut roots = RootCertStore::empty();
        for ca in chain(&files.ca)? {
            roots.add(ca).map_err(|error| unusable(&files.ca, error))?;
        }
        let builder = ClientConfig::builder_with_provider(default_provider().into())
            .with_safe_default_protocol_versions()
            .map_err(|error| Error::io("configuring TLS", io::Error::other(error)))?
            .with_root_certificates(roots);
        let config = match &files.client {
            None => builder.with_no_client_auth(),
            Some((certificate, key)) => {
                let chain = chain(certificate)?;
                let der = PrivateKeyDer::from_pem_file(key).map_err(|error| unusable(key, error))?;
                builder.with_client_auth_cert(chain, der).map_err(|error| unusable(key, error))?
            }
        };
        Ok(Arc::new(config).into())
    }

    pub(crate) fn within(dir: &Path) -> Result<Self, Error> {
        Self::with_certificates(&Certificates::within(dir))
    }

    /// The name or address that the server's certificate must have, instead of that of the URI.
    #[must_use]
    pub fn server_name(self, name: impl Into<String>) -> Self {
        Self { server_name: Some(name.into()), ..self }
    }
}

impl From<Arc<ClientConfig>> for Tls {
    /// With a configuration of rustls: any roots, any way to verify.
    fn from(config: Arc<ClientConfig>) -> Self {
        Self { config, server_name: None }
    }
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tls").field("server_name", &self.server_name).finish_non_exhaustive()
    }
}

fn chain(path: &Path) -> Result<Vec<CertificateDer<'static>>, Error> {
    let certificates = CertificateDer::pem_file_iter(path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    match certificates.map_err(|error| unusable(path, error))? {
        chain if chain.is_empty() => Err(unusable(path, "there is no certificate in it")),
        chain => Ok(chain),
    }
}

fn unusable(path: &Path, error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
    Error::io(path.display().to_string(), io::Error::new(io::ErrorKind::InvalidInput, error))
}

/// One connection's TLS. No call blocks: they fail with `WouldBlock`.
#[derive(Debug)]
pub(crate) struct Session(ClientConnection);

impl Session {
    /// `host`: the name to expect, unless the configuration has one.
    pub(crate) fn new(tls: &Tls, host: &str) -> Result<Self, Error> {
        let name = tls.server_name.as_deref().unwrap_or(host);
        let what = || format!("TLS with {name:?}");
        let server_name =
            ServerName::try_from(name.to_owned()).map_err(|error| Error::io(what(), io::Error::other(error)))?;
        let connection = ClientConnection::new(Arc::clone(&tls.config), server_name);
        Ok(Self(connection.map_err(|error| Error::io(what(), io::Error::other(error)))?))
    }

    /// Goes on with the handshake. `true`: it is over, and all of it is sent.
    ///
    /// # Errors
    /// `WouldBlock` when the server is to speak, or to receive: see [`is_flushed`](Self::is_flushed).
    pub(crate) fn shake(&mut self, socket: BorrowedFd<'_>) -> io::Result<bool> {
        loop {
            self.flush(socket)?;
            if !self.0.is_handshaking() {
                return Ok(self.is_flushed());
            }
            if !self.pull(socket)? {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }

    /// Receives plain text; 0 is the end of the connection.
    pub(crate) fn receive(&mut self, socket: BorrowedFd<'_>, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.0.reader().read(buf) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                // The server has gone without a word of TLS. A reply that is cut is noticed by its length.
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(0),
                other => return other,
            }
            if !self.pull(socket)? {
                return Ok(0);
            }
        }
    }

    /// Takes some plain text, and sends what the socket takes.
    pub(crate) fn send(&mut self, socket: BorrowedFd<'_>, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        self.flush(socket)?;
        let taken = self.0.writer().write_vectored(slices)?;
        match self.flush(socket) {
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => Err(error),
            _ => Ok(taken),
        }
    }

    /// Sends the records that are ready.
    pub(crate) fn flush(&mut self, socket: BorrowedFd<'_>) -> io::Result<()> {
        while self.0.wants_write() {
            self.0.write_tls(&mut Nonblocking(socket))?;
        }
        Ok(())
    }

    pub(crate) fn is_flushed(&self) -> bool {
        !self.0.wants_write()
    }

    /// Sends `close_notify`: no more will come.
    pub(crate) fn close(&mut self, socket: BorrowedFd<'_>) {
        self.0.send_close_notify();
        let _ = self.flush(socket);
    }

    /// Receives and decrypts records. `false`: the connection has ended.
    fn pull(&mut self, socket: BorrowedFd<'_>) -> io::Result<bool> {
        if self.0.read_tls(&mut Nonblocking(socket))? == 0 {
            return Ok(false);
        }
        if let Err(error) = self.0.process_new_packets() {
            // The alert that says why.
            let _ = self.flush(socket);
            return Err(io::Error::new(io::ErrorKind::InvalidData, error));
        }
        Ok(true)
    }
}
