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

    /// Ends the connection after a failure. Appends the alert with the reason.
    fn fail(&mut self, out: &mut Vec<u8>) {
        // The alert is the only message that the library has ready. If it has none, it fails once more.
        if !mem::replace(&mut self.has_failed, true)
            && let Ok(ConnectionState::EncodeTlsData(data)) = self.connection.process_tls_records(&mut self.rest).state
        {
            let _ = append(data, out);
        }
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
                Ok(Some(over)) => return Ok(over),
                Err(e) => {
                    self.fail(out);
                    return Err(e);
                }
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
        self.rest.extend_from_slice(&staging[at..end]);
        match result {
            Ok(()) if self.rest.len() > REST_MAX => Err(broken("a handshake message is too long")),
            Ok(()) => Ok(Opening { plain, has_ended }),
            Err(e) => {
                self.fail(out);
                Err(e)
            }
        }
    }

    fn seal<'a>(
        &'a mut self,
        staging: &'a mut [u8],
        fill: &mut dyn FnMut(&mut [u8]) -> usize,
        out: &mut Vec<u8>,
    ) -> io::Result<&'a [u8]> {
        let (text, room) = staging.split_at_mut(PLAIN_MAX);
        let sealed = self.writer(out, |mut writer| {
            let mut done = 0;
            while room.len() - done >= SEALED_MAX {
                let len = fill(text);
                if len == 0 {
                    break;
                }
                done += writer.encrypt(&text[..len], &mut room[done..]).map_err(io::Error::other)?;
            }
            Ok(done)
        });
        match sealed {
            Ok(len) => Ok(&room[..len]),
            Err(e) => {
                self.fail(out);
                Err(e)
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
