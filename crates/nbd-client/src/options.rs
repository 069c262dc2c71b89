//! [`Options`]: what a client would like of a connection.

use std::time::Duration;

use nbd_proto::Mode;

use crate::tls::Tls;

/// What a client would like of a connection. The default: the newest protocol that both sides know, no contexts, no TLS,
/// 30 seconds to connect, 30 seconds for the handshake, no limit for calls.
///
/// ```
/// use nbd_client::{BASE_ALLOCATION, Options};
///
/// let options = Options::default().context(BASE_ALLOCATION).call_timeout(None);
/// ```
#[derive(Clone, Debug)]
pub struct Options {
    pub(crate) export: Option<String>,
    pub(crate) mode: Mode,
    pub(crate) contexts: Vec<String>,
    pub(crate) connect: Option<Duration>,
    pub(crate) handshake: Option<Duration>,
    pub(crate) call: Option<Duration>,
    pub(crate) tls: Option<Tls>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            export: None,
            mode: Mode::Extended,
            contexts: Vec::new(),
            connect: Some(Duration::from_secs(30)),
            handshake: Some(Duration::from_secs(30)),
            call: None,
            tls: None,
        }
    }
}

impl Options {
    /// The export, instead of that of the URI. At most 4096 bytes; empty for the default export.
    #[must_use]
    pub fn export(self, name: impl Into<String>) -> Self {
        Self { export: Some(name.into()), ..self }
    }

    /// The newest protocol to ask for. A server that does not know it grants an older one.
    #[must_use]
    pub fn mode(self, mode: Mode) -> Self {
        Self { mode, ..self }
    }

    /// One more metadata context for BLOCK_STATUS, such as [`BASE_ALLOCATION`](crate::BASE_ALLOCATION). A server may not
    /// have it: see [`Export::contexts`](crate::Export::contexts). There are none with [`Mode::Simple`].
    #[must_use]
    pub fn context(mut self, name: impl Into<String>) -> Self {
        self.contexts.push(name.into());
        self
    }

    /// How long connecting may take, for all addresses of a host together; `None` is no limit but the system's. The resolver
    /// of host names has its own.
    #[must_use]
    pub fn connect_timeout(self, limit: Option<Duration>) -> Self {
        Self { connect: limit, ..self }
    }

    /// How long the handshake may take, that of TLS included; `None` is no limit.
    #[must_use]
    pub fn handshake_timeout(self, limit: Option<Duration>) -> Self {
        Self { handshake: limit, ..self }
    }

    /// How long each blocking call of a [`Client`](crate::Client) may take; `None`, the default, is no limit.
    #[must_use]
    pub fn call_timeout(self, limit: Option<Duration>) -> Self {
        Self { call: limit, ..self }
    }

    /// Requires TLS, also where the URI does not. A URI with `nbds` and `tls-certificates` does not need it.
    #[must_use]
    pub fn tls(self, tls: Tls) -> Self {
        Self { tls: Some(tls), ..self }
    }
}
