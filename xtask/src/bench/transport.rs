//! [`Transport`]: how a client reaches a server.

/// How the client reaches the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Transport {
    Unix,
    Tcp,
    /// On TCP, with certificates.
    Tls,
}

impl Transport {
    pub(crate) const ALL: [Self; 3] = [Self::Unix, Self::Tcp, Self::Tls];
}
