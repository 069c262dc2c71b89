//! A TLS client of rustls that can send any record, sealed as it should be.
//!
//! rustls has no call for that, but it asks a cipher suite for the cipher. The suites here wrap rustls' own: a record whose plain
//! text begins with [`MARK`] is sent with the type and the text that follow.

use std::sync::LazyLock;

use rustls::crypto::CryptoProvider;
use rustls::crypto::cipher::{
    AeadKey, Iv, KeyBlockShape, MessageDecrypter, MessageEncrypter, OutboundChunks, OutboundOpaqueMessage,
    OutboundPlainMessage, Tls12AeadAlgorithm, Tls13AeadAlgorithm, UnsupportedOperationError,
};
use rustls::crypto::ring::default_provider;
use rustls::{ConnectionTrafficSecrets, ContentType, Error, SupportedCipherSuite, Tls12CipherSuite, Tls13CipherSuite};

/// The start of a forged record. No data of NBD begins with it.
const MARK: &[u8] = b"\xf0forged\xf0";

/// The plain text that makes a record with the type `kind` and the content `text`.
pub(crate) fn forged(kind: u8, text: &[u8]) -> Vec<u8> {
    [MARK, &[kind], text].concat()
}

/// The provider of such a client.
pub(crate) fn provider() -> CryptoProvider {
    static SUITES: LazyLock<Vec<SupportedCipherSuite>> =
        LazyLock::new(|| default_provider().cipher_suites.into_iter().map(wrapped).collect());
    CryptoProvider { cipher_suites: SUITES.clone(), ..default_provider() }
}

fn wrapped(suite: SupportedCipherSuite) -> SupportedCipherSuite {
    match suite {
        SupportedCipherSuite::Tls12(suite) => {
            let aead_alg = Box::leak(Box::new(Forger12(suite.aead_alg)));
            SupportedCipherSuite::Tls12(Box::leak(Box::new(Tls12CipherSuite {
                common: common(&suite.common),
                aead_alg,
                ..*suite
            })))
        }
        SupportedCipherSuite::Tls13(suite) => {
            let aead_alg = Box::leak(Box::new(Forger13(suite.aead_alg)));
            SupportedCipherSuite::Tls13(Box::leak(Box::new(Tls13CipherSuite {
                common: common(&suite.common),
                aead_alg,
                ..*suite
            })))
        }
    }
}

fn common(of: &rustls::crypto::CipherSuiteCommon) -> rustls::crypto::CipherSuiteCommon {
    rustls::crypto::CipherSuiteCommon {
        suite: of.suite,
        hash_provider: of.hash_provider,
        confidentiality_limit: of.confidentiality_limit,
    }
}

struct Forger12(&'static dyn Tls12AeadAlgorithm);

impl Tls12AeadAlgorithm for Forger12 {
    fn encrypter(&self, key: AeadKey, iv: &[u8], extra: &[u8]) -> Box<dyn MessageEncrypter> {
        Box::new(Encrypter(self.0.encrypter(key, iv, extra)))
    }

    fn decrypter(&self, key: AeadKey, iv: &[u8]) -> Box<dyn MessageDecrypter> {
        self.0.decrypter(key, iv)
    }

    fn key_block_shape(&self) -> KeyBlockShape {
        self.0.key_block_shape()
    }

    fn extract_keys(
        &self,
        key: AeadKey,
        iv: &[u8],
        explicit: &[u8],
    ) -> Result<ConnectionTrafficSecrets, UnsupportedOperationError> {
        self.0.extract_keys(key, iv, explicit)
    }
}

struct Forger13(&'static dyn Tls13AeadAlgorithm);

impl Tls13AeadAlgorithm for Forger13 {
    fn encrypter(&self, key: AeadKey, iv: Iv) -> Box<dyn MessageEncrypter> {
        Box::new(Encrypter(self.0.encrypter(key, iv)))
    }

    fn decrypter(&self, key: AeadKey, iv: Iv) -> Box<dyn MessageDecrypter> {
        self.0.decrypter(key, iv)
    }

    fn key_len(&self) -> usize {
        self.0.key_len()
    }

    fn extract_keys(&self, key: AeadKey, iv: Iv) -> Result<ConnectionTrafficSecrets, UnsupportedOperationError> {
        self.0.extract_keys(key, iv)
    }
}

struct Encrypter(Box<dyn MessageEncrypter>);

impl MessageEncrypter for Encrypter {
    fn encrypt(&mut self, message: OutboundPlainMessage<'_>, seq: u64) -> Result<OutboundOpaqueMessage, Error> {
        let text = message.payload.to_vec();
        match text.strip_prefix(MARK) {
            Some([kind, text @ ..]) => {
                let typ = ContentType::from(*kind);
                let payload = OutboundChunks::Single(text);
                self.0.encrypt(OutboundPlainMessage { typ, version: message.version, payload }, seq)
            }
            _ => self.0.encrypt(message, seq),
        }
    }

    fn encrypted_payload_len(&self, len: usize) -> usize {
        self.0.encrypted_payload_len(len)
    }
}
