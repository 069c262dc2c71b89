//! [`Target`]: which export to ask for, and whether under TLS, from a URI and options.

use nbd_proto::limits::NAME_MAX;

use crate::{
    error::Error,
    options::Options,
    tls::Tls,
    uri::{Address, Uri},
};

/// The name to expect in the certificate of a server that has no host name, since it is on this machine.
const LOCAL: &str = "localhost";

/// What to ask the server for.
#[derive(Debug)]
pub(crate) struct Target {
    pub(crate) export: String,
    /// `None`: plain text.
    pub(crate) tls: Option<Tls>,
    /// The name to expect in the server's certificate.
    pub(crate) host: String,
}

impl Target {
    /// `uri`: `None` for a socket that is connected already.
    ///
    /// # Errors
    /// A name that cannot be sent, or TLS without certificates.
    pub(crate) fn new(uri: Option<&Uri>, options: &Options) -> Result<Self, Error> {
        let export = options.export.clone().or(uri.map(|uri| uri.export.clone())).unwrap_or_default();
        for (what, text) in std::iter::once(("export", &export)).chain(options.contexts.iter().map(|c| ("context", c)))
        {
            if text.len() > NAME_MAX || text.contains('\0') {
                let text = format!("{what} {text:.40?}: a name has at most {NAME_MAX} bytes and no NUL");
                return Err(Error::Invalid(text));
            }
        }
        let tls = match uri {
            Some(uri) if uri.tls && options.tls.is_none() => from_uri(uri).map(Some)?,
            _ => options.tls.clone(),
        };
        let host = uri.map_or(LOCAL, |uri| match (&uri.tls_hostname, &uri.address) {
            (Some(name), _) => name,
            (None, Address::Tcp { host, .. }) => host,
            _ => LOCAL,
        });
        Ok(Self { export, tls, host: host.into() })
    }
}

fn from_uri(uri: &Uri) -> Result<Tls, Error> {
    match &uri.tls_certificates {
        Some(dir) => Tls::within(dir),
        None => {
            let reason = "TLS needs certificates: add tls-certificates=DIR, or set Options::tls".into();
            Err(Error::Uri { uri: uri.to_string(), reason })
        }
    }
}
