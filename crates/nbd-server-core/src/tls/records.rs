//! [`Records`]: a TLS connection of rustls, which does the handshake and the records.

use std::{fmt, io, mem, sync::Arc};

use rustls::{
    CipherSuite, ExtractedSecrets, ProtocolVersion, ServerConfig,
    kernel::KernelConnection,
    server::{ServerConnectionData, UnbufferedServerConnection},
    unbuffered::{ConnectionState, EncodeError, EncodeTlsData, UnbufferedStatus, WriteTraffic},
};

use super::{
    engine::{Engine, Opening, PLAIN_MAX, REST_MAX, SEALED_MAX, broken},
    names,
    suite::{Cipher, Suite, Version},
};
use crate::peer::Identity;

pub(super) struct Records {
    connection: UnbufferedServerConnection,
    /// Received bytes that the library has not used up. Each of its calls needs them: it remembers offsets in them.
    rest: Vec<u8>,
    /// The library must not be called any more.
    has_failed: bool,
}

impl Records {
    pub(super) fn new(config: &Arc<ServerConfig>) -> io::Result<Self> {
        let connection = UnbufferedServerConnection::new(Arc::clone(config)).map_err(io::Error::other)?;
        Ok(Self { connection, rest: Vec::new(), has_failed: false })
    }

    /// Appends what the library has ready to be sent to `out`, and calls `write` once it accepts plain text.
    fn writer<T>(
        &mut self,
        out: &mut Vec<u8>,
        write: impl FnOnce(WriteTraffic<'_, ServerConnectionData>) -> io::Result<T>,
    ) -> io::Result<T> {
        self.check()?;
        loop {
            match self.connection.process_tls_records(&mut self.rest).state.map_err(io::Error::other)? {
                ConnectionState::EncodeTlsData(data) => append(data, out)?,
                // The caller sends `out` before anything else.
                ConnectionState::TransmitTlsData(data) => data.done(),
                // Reported once; it ends the other direction only.
                ConnectionState::PeerClosed => {}
                ConnectionState::WriteTraffic(writer) => return write(writer),
                _ => return Err(broken("the connection is closed")),
            }
        }
    }

    fn check(&self) -> io::Result<()> {
        if self.has_failed { Err(broken("the connection has failed")) } else { Ok(()) }
    }

    /// Ends the connection after a failure, which it returns. Appends the alert with the reason.
    fn fail(&mut self, error: io::Error, out: &mut Vec<u8>) -> io::Error {
        // The alert is the only message that the library has ready. If it has none, it fails once more.
        if !mem::replace(&mut self.has_failed, true)
            && let Ok(ConnectionState::EncodeTlsData(data)) = self.connection.process_tls_records(&mut self.rest).state
        {
            let _ = append(data, out);
        }
        error
    }

    fn suite(&self) -> Option<Suite> {
        let version = match self.connection.protocol_version()? {
            ProtocolVersion::TLSv1_2 => Version::Tls12,
            ProtocolVersion::TLSv1_3 => Version::Tls13,
            _ => return None,
        };
        let cipher = match self.connection.negotiated_cipher_suite()?.suite() {
            CipherSuite::TLS13_AES_128_GCM_SHA256
            | CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256
            | CipherSuite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256 => Cipher::Aes128Gcm,
            CipherSuite::TLS13_AES_256_GCM_SHA384
            | CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384
            | CipherSuite::TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384 => Cipher::Aes256Gcm,
            CipherSuite::TLS13_CHACHA20_POLY1305_SHA256
            | CipherSuite::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256
            | CipherSuite::TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256 => Cipher::Chacha20Poly1305,
            _ => return None,
        };
        Some(Suite { version, cipher })
    }
}

/// Appends a message of the library to `out`.
fn append(mut data: EncodeTlsData<'_, ServerConnectionData>, out: &mut Vec<u8>) -> io::Result<()> {
    let at = out.len();
    if let Err(EncodeError::InsufficientSize(size)) = data.encode(&mut []) {
        out.resize(at + size.required_size, 0);
        data.encode(&mut out[at..]).map_err(io::Error::other)?;
    }
    Ok(())
}

impl Engine for Records {
    fn shake(&mut self, received: &[u8], early: &mut Vec<u8>, out: &mut Vec<u8>) -> io::Result<bool> {
        self.check()?;
        self.rest.extend_from_slice(received);
        loop {
            let UnbufferedStatus { discard, state } = self.connection.process_tls_records(&mut self.rest);
            let result = match state {
                Ok(ConnectionState::EncodeTlsData(data)) => append(data, out).map(|()| None),
                Ok(ConnectionState::TransmitTlsData(data)) => {
                    data.done();
                    Ok(None)
                }
                Ok(ConnectionState::BlockedHandshake) => Ok(Some(false)),
                Ok(ConnectionState::WriteTraffic(_)) => Ok(Some(true)),
                Ok(ConnectionState::ReadTraffic(mut data)) => {
                    while let Some(Ok(record)) = data.next_record() {
                        early.extend_from_slice(record.payload);
                    }
                    Ok(None)
                }
                Ok(_) => Err(broken("the client ended the handshake")),
                Err(e) => Err(io::Error::other(e)),
            };
            self.rest.drain(..discard);
            match result {
                Ok(None) => {}
                Ok(Some(true)) if self.rest.len() > REST_MAX => {
                    return Err(self.fail(broken("a handshake message is too long"), out));
                }
                Ok(Some(over)) => return Ok(over),
                Err(e) => return Err(self.fail(e, out)),
            }
        }
    }

    fn identity(&self) -> io::Result<Option<Identity>> {
        self.connection.peer_certificates().and_then(<[_]>::first).map(|der| names::read(der)).transpose()
    }

    fn rest(&self) -> usize {
        self.rest.len()
    }

    fn load(&self, staging: &mut [u8]) -> usize {
        staging[PLAIN_MAX..][..self.rest.len()].copy_from_slice(&self.rest);
        self.rest.len()
    }

    fn open(&mut self, staging: &mut [u8], end: usize, out: &mut Vec<u8>) -> io::Result<Opening> {
        self.check()?;
        let (mut plain, mut at, mut has_ended) = (0, PLAIN_MAX, false);
        let result = loop {
            let (front, back) = staging.split_at_mut(at);
            let UnbufferedStatus { mut discard, state } = self.connection.process_tls_records(&mut back[..end - at]);
            let mut is_over = false;
            let result = match state {
                Ok(ConnectionState::ReadTraffic(mut data)) => {
                    while let Some(Ok(record)) = data.next_record() {
                        front[plain..plain + record.payload.len()].copy_from_slice(record.payload);
                        plain += record.payload.len();
                        discard += record.discard;
                    }
                    Ok(())
                }
                Ok(ConnectionState::EncodeTlsData(data)) => append(data, out),
                Ok(ConnectionState::TransmitTlsData(data)) => {
                    data.done();
                    Ok(())
                }
                Ok(ConnectionState::PeerClosed) => {
                    has_ended = true;
                    Ok(())
                }
                // It needs more records, or will take none.
                Ok(_) => {
                    is_over = true;
                    Ok(())
                }
                Err(e) => Err(io::Error::other(e)),
            };
            at += discard;
            if is_over || has_ended || result.is_err() {
                break result;
            }
        };
        self.rest.clear();
        // What follows a closure alert does not count (RFC 8446, 6.1).
        self.rest.extend_from_slice(if has_ended { &[] } else { &staging[at..end] });
        match result {
            Ok(()) if self.rest.len() > REST_MAX => Err(self.fail(broken("a handshake message is too long"), out)),
            Ok(()) => Ok(Opening { plain, has_ended }),
            Err(e) => Err(self.fail(e, out)),
        }
    }

    fn seal<'a>(
        &'a mut self,
        staging: &'a mut [u8],
        fill: &mut dyn FnMut(&mut [u8]) -> usize,
        out: &mut Vec<u8>,
    ) -> io::Result<&'a [u8]> {
        let (text, room) = staging.split_at_mut(PLAIN_MAX);
        let mut done = 0;
        let sealed = self.writer(out, |mut writer| {
            while room.len() - done >= SEALED_MAX {
                let len = fill(text);
                if len == 0 {
                    break;
                }
                done += writer.encrypt(&text[..len], &mut room[done..]).map_err(io::Error::other)?;
            }
            Ok(())
        });
        match sealed {
            Ok(()) => Ok(&room[..done]),
            Err(e) => {
                // The client can open the alert only after the records before it.
                out.extend_from_slice(&room[..done]);
                Err(self.fail(e, out))
            }
        }
    }

    fn close(&mut self, out: &mut Vec<u8>) {
        let mut alert = [0; 64];
        let closed = self.writer(out, |mut writer| writer.queue_close_notify(&mut alert).map_err(io::Error::other));
        out.extend_from_slice(&alert[..closed.unwrap_or(0)]);
    }

    fn suite_for_kernel(&self) -> Option<Suite> {
        self.suite()
    }

    fn into_secrets(self: Box<Self>) -> io::Result<(ExtractedSecrets, KernelConnection<ServerConnectionData>)> {
        self.connection.dangerous_into_kernel_connection().map_err(io::Error::other)
    }
}

impl fmt::Debug for Records {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.suite() {
            Some(suite) => fmt::Display::fmt(&suite, f),
            None => f.write_str("TLS"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use rcgen::{CertifiedKey, generate_simple_self_signed};
    use rustls::{
        ClientConfig, ClientConnection, RootCertStore, SupportedCipherSuite, SupportedProtocolVersion,
        Tls12CipherSuite, Tls13CipherSuite,
        crypto::{CipherSuiteCommon, CryptoProvider, ring::default_provider},
        pki_types::PrivateKeyDer,
        version::{TLS12, TLS13},
    };

    use super::*;

    /// Records after which the keys of these tests are worn.
    const LIMIT: u64 = 20;

    /// The ciphers of rustls, with keys that are worn after [`LIMIT`] records.
    fn short_lived() -> CryptoProvider {
        let common = |of: &CipherSuiteCommon| CipherSuiteCommon {
            suite: of.suite,
            hash_provider: of.hash_provider,
            confidentiality_limit: LIMIT,
        };
        let suites = default_provider().cipher_suites.into_iter().map(|suite| match suite {
            SupportedCipherSuite::Tls12(suite) => SupportedCipherSuite::Tls12(Box::leak(Box::new(Tls12CipherSuite {
                common: common(&suite.common),
                ..*suite
            }))),
            SupportedCipherSuite::Tls13(suite) => SupportedCipherSuite::Tls13(Box::leak(Box::new(Tls13CipherSuite {
                common: common(&suite.common),
                ..*suite
            }))),
        });
        CryptoProvider { cipher_suites: suites.collect(), ..default_provider() }
    }

    /// Both sides after their handshake.
    fn pair(version: &'static SupportedProtocolVersion) -> (Records, ClientConnection) {
        let CertifiedKey { cert, signing_key } = generate_simple_self_signed(["localhost".into()]).unwrap();
        let key = PrivateKeyDer::Pkcs8(signing_key.serialize_der().into());
        let mut roots = RootCertStore::empty();
        roots.add(cert.der().clone()).unwrap();
        let builder = ServerConfig::builder_with_provider(short_lived().into()).with_protocol_versions(&[version]);
        let server = builder.unwrap().with_no_client_auth().with_single_cert(vec![cert.der().clone()], key).unwrap();
        let builder = ClientConfig::builder_with_provider(default_provider().into()).with_protocol_versions(&[version]);
        let client = builder.unwrap().with_root_certificates(roots).with_no_client_auth();
        let mut client = ClientConnection::new(client.into(), "localhost".try_into().unwrap()).unwrap();
        let mut server = Records::new(&server.into()).unwrap();
        let (mut early, mut over) = (Vec::new(), false);
        while !over || client.is_handshaking() {
            let (mut input, mut out) = (Vec::new(), Vec::new());
            while client.wants_write() {
                client.write_tls(&mut input).unwrap();
            }
            over = server.shake(&input, &mut early, &mut out).unwrap();
            let mut out = &out[..];
            while !out.is_empty() {
                client.read_tls(&mut out).unwrap();
                client.process_new_packets().unwrap();
            }
        }
        (server, client)
    }

    /// Sends bytes, each in a record of its own, with one call.
    fn send(server: &mut Records, client: &mut ClientConnection, bytes: &[u8]) -> io::Result<()> {
        let (mut staging, mut out, mut rest) = (vec![0; PLAIN_MAX + 8 * SEALED_MAX], Vec::new(), bytes);
        let fill = &mut |room: &mut [u8]| rest.read(&mut room[..1]).unwrap();
        let sealed = server.seal(&mut staging, fill, &mut out).map(<[_]>::to_vec);
        for mut bytes in [&out[..], sealed.as_deref().unwrap_or_default()] {
            while !bytes.is_empty() {
                client.read_tls(&mut bytes).unwrap();
                client.process_new_packets().unwrap();
            }
        }
        sealed.map(drop)
    }

    #[test]
    fn tls_13_changes_worn_keys() {
        let (mut server, mut client) = pair(&TLS13);
        for n in 0..5 * LIMIT as u8 {
            send(&mut server, &mut client, &[n]).unwrap();
            let mut got = [0];
            client.reader().read_exact(&mut got).unwrap();
            assert_eq!(got, [n]);
        }
    }

    #[test]
    fn tls_12_ends_with_a_worn_key() {
        let (mut server, mut client) = pair(&TLS12);
        // The key wears out within a call, after some records of it.
        let bytes: Vec<u8> = (0..5 * LIMIT as u8).collect();
        let sent = bytes.chunks(7).take_while(|bytes| send(&mut server, &mut client, bytes).is_ok()).count();
        assert!(7 * sent < LIMIT as usize, "{sent} calls");
        let mut got = Vec::new();
        client.reader().read_to_end(&mut got).expect("a closure alert tells the client that nothing more comes");
        assert!(got.len() > 7 * sent && bytes.starts_with(&got), "{got:?}");
    }
}
