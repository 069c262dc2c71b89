//! TLS: the server's configuration, the handshake, and the client's identity.
//!
//! A library does the handshake: rustls with certificates (feature `tls`), OpenSSL with pre-shared keys, which rustls does not
//! support (feature `tls-psk`). The handshake yields secrets; this module, or the kernel, then handles the records.

mod certificate;
mod files;
mod kernel;
#[cfg(feature = "tls-psk")]
mod psk;
mod records;
mod secure;
mod x509;

use std::{fmt, io, os::fd::BorrowedFd, path::Path, sync::Arc};

use blkdev::socket;

use crate::{peer::Identity, received::push};
pub use files::Certificates;
use records::Records;
pub(crate) use secure::Secure;

/// The TLS configuration of a server. Cheap to clone.
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

impl Tls {
    /// TLS 1.2 and 1.3 with certificates. The files are read once, now.
    ///
    /// # Errors
    /// A file cannot be used; the text names the file and the reason. Without the feature `tls`:
    /// [`Unsupported`](io::ErrorKind::Unsupported).
    pub fn with_certificates(files: &Certificates) -> io::Result<Self> {
        Ok(Self { credentials: Credentials::Certificates(x509::config(files)?), required: false })
    }

    /// TLS 1.2 and 1.3 with pre-shared keys. Each line of `file` has a user and its key, `USER:HEX`, as GnuTLS' psktool writes
    /// them. The file is read once, now.
    ///
    /// # Errors
    /// The file cannot be read, or a line is invalid; the text names the line. Without the feature `tls-psk`:
    /// [`Unsupported`](io::ErrorKind::Unsupported).
    pub fn with_keys(file: &Path) -> io::Result<Self> {
        #[cfg(feature = "tls-psk")]
        return Ok(Self { credentials: Credentials::Keys(psk::Offer::new(file)?), required: false });
        #[cfg(not(feature = "tls-psk"))]
        return Err(files::unsupported(file, "tls-psk"));
    }

    /// Whether TLS is required for all exports, or only for those with [`Export::tls_only`](crate::Export::tls_only).
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

/// A handshake in progress.
pub(crate) struct Shaking {
    engine: Engine,
    /// Received bytes that are not processed yet.
    input: Vec<u8>,
    /// Bytes to be sent.
    out: Vec<u8>,
}

enum Engine {
    Certificates(Box<x509::Engine>),
    #[cfg(feature = "tls-psk")]
    Keys(psk::Engine),
}

/// Longest unprocessed input of a handshake, in bytes: rustls accepts messages of up to 64 KiB.
const INPUT_MAX: usize = 128 << 10;

impl Shaking {
    /// Continues with the data that has arrived. `true`: the handshake is over; call [`agree`](Self::agree) next.
    ///
    /// # Errors
    /// The handshake has failed. The client got an alert if possible; close the connection.
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
                Ok(_) if self.input.len() > INPUT_MAX => return Err(records::broken("the handshake is too long")),
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

    /// Returns the results of the handshake.
    pub(crate) fn agree(self) -> io::Result<(Secure, Option<Identity>)> {
        let (agreed, identity) = match self.engine {
            Engine::Certificates(engine) => engine.agreed()?,
            #[cfg(feature = "tls-psk")]
            Engine::Keys(engine) => engine.agreed()?,
        };
        Ok((Secure::new(Records::new(agreed)?, self.input), identity))
    }
}
