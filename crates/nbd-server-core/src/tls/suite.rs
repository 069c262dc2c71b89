//! [`Suite`]: the version and the cipher of a connection.

use std::fmt;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Version {
    Tls12,
    Tls13,
}

/// A cipher with authentication (AEAD). There are no others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Cipher {
    Aes128Gcm,
    Aes256Gcm,
    Chacha20Poly1305,
}

/// The version and the cipher of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Suite {
    pub(super) version: Version,
    pub(super) cipher: Cipher,
}

impl Suite {
    pub(super) fn all() -> impl Iterator<Item = Self> {
        let ciphers = [Cipher::Aes128Gcm, Cipher::Aes256Gcm, Cipher::Chacha20Poly1305];
        [Version::Tls12, Version::Tls13]
            .into_iter()
            .flat_map(move |version| ciphers.map(|cipher| Self { version, cipher }))
    }
}

/// As the log names it.
impl fmt::Display for Suite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.version {
            Version::Tls12 => "TLS 1.2 with ",
            Version::Tls13 => "TLS 1.3 with ",
        })?;
        f.write_str(match self.cipher {
            Cipher::Aes128Gcm => "AES-128-GCM",
            Cipher::Aes256Gcm => "AES-256-GCM",
            Cipher::Chacha20Poly1305 => "ChaCha20-Poly1305",
        })
    }
}
