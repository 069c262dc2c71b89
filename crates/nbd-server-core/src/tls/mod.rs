//! TLS: what a server offers, the handshake, and who the client proved to be.
//!
//! The handshake is left to a library: rustls, for certificates (feature `tls`); OpenSSL, for pre-shared keys, which rustls
//! does not have (feature `tls-psk`). What it agrees on is secrets; the records are then our own business, or the kernel's.

mod certificate;
mod kernel;
#[cfg(feature = "tls-psk")]
mod psk;
mod records;
mod secure;
mod x509;

use std::{
    fmt, io,
    os::fd::BorrowedFd,
    path::{Path, PathBuf},
    sync::Arc,
};

use blkdev::socket;

use crate::{peer::Identity, received::push};
use records::Records;
pub(crate) use secure::Secure;

/// What a server offers, and what it needs for that. Cheap to clone.
#[derive(Clone)]
pub struct Tls {
    credentials: Credentials,
    required: bool,
}

#[derive(Clone)]
enum Credentials {
    Certificates(Arc<rustls::ServerConfig>),
    #[cfg(feature = "tls-psk")]
    Keys(psk::Offer),
}

/// The files that a server with certificates reads, in PEM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Certificates {
    /// The server's certificate, and those between it and the authority that clients know.
    pub certificate: PathBuf,
    /// Its key.
    pub key: PathBuf,
    /// The authorities that clients' certificates come from; with it, a client without one is refused.
    pub client_ca: Option<PathBuf>,
    /// Which of those were revoked.
    pub client_crl: Option<PathBuf>,
}

impl Certificates {
    /// The files that nbdkit, libvirt and qemu look for in a directory. `verify_peer`: clients need a certificate.
    pub fn within(dir: &Path, verify_peer: bool) -> Self {
        let crl = dir.join("ca-crl.pem");
        Self {
            certificate: dir.join("server-cert.pem"),
            key: dir.join("server-key.pem"),
            client_ca: verify_peer.then(|| dir.join("ca-cert.pem")),
            client_crl: (verify_peer && crl.exists()).then_some(crl),
        }
    }
}

impl Tls {
    /// TLS 1.2 and 1.3 with certificates. The files are read now, and not again.
    ///
    /// # Errors
    /// Which file cannot be used, and why.
    pub fn with_certificates(files: &Certificates) -> io::Result<Self> {
        Ok(Self { credentials: Credentials::Certificates(x509::config(files)?), required: false })
    }

    /// TLS 1.2 and 1.3 with pre-shared keys: a user and its key, `USER:HEX`, in each line of `file`, as GnuTLS' psktool
    /// writes them. The file is read now, and not again.
    ///
    /// # Errors
    /// What is wrong with the file, and where.
    #[cfg(feature = "tls-psk")]
    pub fn with_keys(file: &Path) -> io::Result<Self> {
        Ok(Self { credentials: Credentials::Keys(psk::Offer::new(file)?), required: false })
    }

    /// Whether clients must use it for every export, and not only for those that ask for it.
    #[must_use]
    pub fn required(self, required: bool) -> Self {
        Self { required, ..self }
    }

    pub(crate) fn policy(&self) -> nbd_proto::Tls {
        if self.required { nbd_proto::Tls::Required } else { nbd_proto::Tls::Optional }
    }

    pub(crate) fn begin(&self) -> io::Result<Shaking> {
        let engine = match &self.credentials {
            Credentials::Certificates(config) => Engine::Certificates(x509::Engine::new(config)?.into()),
            #[cfg(feature = "tls-psk")]
            Credentials::Keys(offer) => Engine::Keys(psk::Engine::new(offer)?),
        };
        Ok(Shaking { engine, input: Vec::new(), out: Vec::new() })
    }
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tls").field("required", &self.required).finish_non_exhaustive()
    }
}

/// A handshake under way.
pub(crate) struct Shaking {
    engine: Engine,
    /// What came and is not used yet.
    input: Vec<u8>,
    /// What is still to be sent.
    out: Vec<u8>,
}

enum Engine {
    Certificates(Box<x509::Engine>),
    #[cfg(feature = "tls-psk")]
    Keys(psk::Engine),
}

/// More than any handshake has under way at a time: rustls takes messages of up to 64 KiB.
const INPUT_MAX: usize = 128 << 10;

impl Shaking {
    /// Goes on as far as the client has. `true`: it is over, and [`agree`](Self::agree) is next.
    ///
    /// # Errors
    /// It has failed: the client was told, as far as that is possible, and the connection must be closed.
    pub(crate) fn go(&mut self, socket: BorrowedFd<'_>, staging: &mut [u8]) -> io::Result<bool> {
        loop {
            let done = match &mut self.engine {
                Engine::Certificates(engine) => engine.go(&mut self.input, &mut self.out),
                #[cfg(feature = "tls-psk")]
                Engine::Keys(engine) => engine.go(&mut self.input, &mut self.out),
            };
            let sent = self.flush(socket)?;
            if done? {
                return Ok(sent);
            }
            if !sent {
                return Ok(false);
            }
            match socket::receive(socket, None, staging) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(_) if self.input.len() > INPUT_MAX => return Err(records::broken("a handshake without an end")),
                Ok(got) => self.input.extend_from_slice(&staging[..got]),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    }

    fn flush(&mut self, socket: BorrowedFd<'_>) -> io::Result<bool> {
        let sent = push(socket, &self.out)?;
        self.out.drain(..sent);
        Ok(self.out.is_empty())
    }

    /// What the handshake led to.
    pub(crate) fn agree(self) -> io::Result<(Secure, Option<Identity>)> {
        let (agreed, identity) = match self.engine {
            Engine::Certificates(engine) => engine.agreed()?,
            #[cfg(feature = "tls-psk")]
            Engine::Keys(engine) => engine.agreed()?,
        };
        Ok((Secure::new(Records::new(agreed)?, self.input), identity))
    }
}
