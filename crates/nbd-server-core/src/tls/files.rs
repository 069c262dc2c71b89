//! [`Certificates`]: the files of a server. The same whatever the features.

#[cfg(not(feature = "tls-psk"))]
use std::io;
use std::path::{Path, PathBuf};

/// The files of a server with certificates, in PEM format.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Certificates {
    /// The server's certificate, followed by intermediate certificates.
    pub certificate: PathBuf,
    /// The server's private key.
    pub key: PathBuf,
    /// Certificate authorities for client certificates. If present, clients without a certificate are refused.
    pub client_ca: Option<PathBuf>,
    /// Revocation list for client certificates.
    pub client_crl: Option<PathBuf>,
}

impl Certificates {
    /// The files of a directory, with the names that nbdkit, libvirt and QEMU use. `verify_peer`: clients need a certificate.
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

/// The error of a build without `feature`, for a configuration with `file`.
#[cfg(not(feature = "tls-psk"))]
pub(super) fn unsupported(file: &Path, feature: &str) -> io::Error {
    let text = format!("{}: nbd-server-core was built without its feature {feature}", file.display());
    io::Error::new(io::ErrorKind::Unsupported, text)
}
