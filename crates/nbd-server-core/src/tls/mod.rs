//! TLS: the server's configuration, the handshake, and the client's identity.
//!
//! A library does all of it: rustls with certificates (feature `tls`), OpenSSL with pre-shared keys, which rustls does not support
//! (feature `tls-psk`). After rustls' handshake, the kernel continues if it can.

mod certificates;
#[cfg(all(any(test, fuzzing), feature = "tls-psk"))]
mod cheap;
mod engine;
mod files;
#[cfg(all(any(test, fuzzing), feature = "tls-psk"))]
pub mod fuzz;
mod handshake;
mod kernel;
mod names;
#[cfg(feature = "tls-psk")]
mod psk;
mod records;
mod secure;
mod suite;

use std::{fmt, io, path::Path, sync::Arc};

use engine::Engine;
pub use files::Certificates;
pub(crate) use handshake::Shaking;
pub(crate) use kernel::Kernel;
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
        let credentials = Credentials::Certificates(certificates::config(files)?);
        kernel::learn();
        Ok(Self { credentials, required: false })
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
        let engine: Box<dyn Engine> = match &self.credentials {
            Credentials::Certificates(config) => Box::new(Records::new(config)?),
            #[cfg(feature = "tls-psk")]
            Credentials::Keys(offer) => Box::new(psk::Connection::new(offer)?),
        };
        Ok(Shaking::new(engine))
    }
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tls").field("required", &self.required).finish_non_exhaustive()
    }
}
