//! TLS with certificates. rustls does the handshake and yields the secrets.

use std::{fmt, io, path::Path, sync::Arc};

use rustls::{
    CipherSuite, ConnectionTrafficSecrets, ExtractedSecrets, ProtocolVersion, RootCertStore, ServerConfig,
    crypto::ring::default_provider,
    pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer, pem::PemObject},
    server::{NoServerSessionStorage, UnbufferedServerConnection, WebPkiClientVerifier},
    unbuffered::{ConnectionState, EncodeError, UnbufferedStatus},
};

use super::{
    Certificates, Identity, certificate,
    records::{Agreed, Cipher, Secret, Version, Way, broken, record_len},
};

const AES_128: [CipherSuite; 3] = [
    CipherSuite::TLS13_AES_128_GCM_SHA256,
    CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
    CipherSuite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
];

/// Reads the files, and checks that they match.
pub(super) fn config(files: &Certificates) -> io::Result<Arc<ServerConfig>> {
    let chain = CertificateDer::pem_file_iter(&files.certificate)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|e| unusable(&files.certificate, &e))?;
    let key = repaired(PrivateKeyDer::from_pem_file(&files.key).map_err(|e| unusable(&files.key, &e))?);
    let mut provider = default_provider();
    // Of the client's ciphers, the fastest. Most clients name AES-256 first, whose four additional rounds have no benefit here.
    provider.cipher_suites.sort_by_key(|suite| !AES_128.contains(&suite.suite()));
    let provider = Arc::new(provider);
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(io::Error::other)?;
    let builder = match &files.client_ca {
        None => builder.with_no_client_auth(),
        Some(path) => {
            let mut roots = RootCertStore::empty();
            for ca in CertificateDer::pem_file_iter(path).map_err(|e| unusable(path, &e))? {
                ca.map_err(|e| unusable(path, &e)).and_then(|ca| roots.add(ca).map_err(|e| unusable(path, &e)))?;
            }
            let mut verifier = WebPkiClientVerifier::builder_with_provider(roots.into(), provider);
            if let Some(path) = &files.client_crl {
                let revoked = CertificateRevocationListDer::pem_file_iter(path)
                    .and_then(Iterator::collect::<Result<Vec<_>, _>>)
                    .map_err(|e| unusable(path, &e))?;
                // A revocation list covers only the certificates of its own issuer.
                verifier = verifier.with_crls(revoked).allow_unknown_revocation_status();
            }
            builder.with_client_cert_verifier(verifier.build().map_err(|e| unusable(path, &e))?)
        }
    };
    let mut config = builder.with_single_cert(chain, key).map_err(|e| unusable(&files.certificate, &e))?;
    config.ignore_client_order = true;
    config.enable_secret_extraction = true;
    // NBD connections live long, so clients do not resume sessions. A ticket would be one more record to account for.
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    Ok(config.into())
}

/// Repairs keys that GnuTLS 3.7's certtool wrote. It writes keys on curves as signed numbers: half of them have a leading zero,
/// and one in 512 is too short. The length is fixed (RFC 5915, 3), so other libraries cannot read such keys.
fn repaired(key: PrivateKeyDer<'static>) -> PrivateKeyDer<'static> {
    let PrivateKeyDer::Sec1(sec1) = &key else { return key };
    match certificate::of_whole_length(sec1.secret_sec1_der()) {
        Some(der) => PrivateKeyDer::Sec1(der.into()),
        None => key,
    }
}

fn unusable(path: &Path, error: &dyn fmt::Display) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, format!("{}: {error}", path.display()))
}

/// One connection's handshake.
pub(super) struct Engine {
    connection: UnbufferedServerConnection,
    /// How much of the input rustls has got: whole records, one more at a time, so that it never gets one that follows the
    /// handshake.
    shown: usize,
}

impl Engine {
    pub(super) fn new(config: &Arc<ServerConfig>) -> io::Result<Self> {
        let connection = UnbufferedServerConnection::new(Arc::clone(config)).map_err(io::Error::other)?;
        Ok(Self { connection, shown: 0 })
    }

    /// Takes records from `input` and appends others to `out`, which must be sent whatever the outcome. `true`: the handshake is
    /// over, and the rest of `input` follows it.
    pub(super) fn go(&mut self, input: &mut Vec<u8>, out: &mut Vec<u8>) -> io::Result<bool> {
        loop {
            let UnbufferedStatus { discard, state } = self.connection.process_tls_records(&mut input[..self.shown]);
            let (mut more, mut done) = (false, false);
            match state {
                Ok(ConnectionState::EncodeTlsData(mut data)) => {
                    let at = out.len();
                    if let Err(EncodeError::InsufficientSize(size)) = data.encode(&mut []) {
                        out.resize(at + size.required_size, 0);
                        data.encode(&mut out[at..]).map_err(io::Error::other)?;
                    }
                }
                // Everything in `out` is sent before more is received.
                Ok(ConnectionState::TransmitTlsData(data)) => data.done(),
                Ok(ConnectionState::BlockedHandshake) => more = true,
                Ok(ConnectionState::WriteTraffic(_)) => done = true,
                Ok(_) => return Err(broken("the client ended the handshake")),
                Err(e) => {
                    input.drain(..discard);
                    self.explain(&mut input[..self.shown - discard], out);
                    return Err(io::Error::other(e));
                }
            }
            input.drain(..discard);
            self.shown -= discard;
            if done {
                return Ok(true);
            }
            if more {
                match record_len(&input[self.shown..])? {
                    Some(len) if self.shown + len <= input.len() => self.shown += len,
                    _ => return Ok(false),
                }
            }
        }
    }

    /// Appends the alert with the reason of the failure. rustls needs the same `input` as before.
    fn explain(&mut self, input: &mut [u8], out: &mut Vec<u8>) {
        let at = out.len();
        out.resize(at + 1024, 0);
        let len = match self.connection.process_tls_records(input).state {
            Ok(ConnectionState::EncodeTlsData(mut data)) => data.encode(&mut out[at..]).unwrap_or(0),
            _ => 0,
        };
        out.truncate(at + len);
    }

    pub(super) fn agreed(self) -> io::Result<(Agreed, Option<Identity>)> {
        let identity = self.connection.peer_certificates().and_then(<[_]>::first).map(|der| certificate::read(der));
        let (secrets, mut kernel) = self.connection.dangerous_into_kernel_connection().map_err(io::Error::other)?;
        let version = match kernel.protocol_version() {
            ProtocolVersion::TLSv1_3 => Version::Tls13,
            _ => Version::Tls12,
        };
        let ExtractedSecrets { tx, rx } = secrets;
        let next = move |way| {
            let next = match way {
                Way::In => kernel.update_rx_secret(),
                Way::Out => kernel.update_tx_secret(),
            };
            secret(next.map_err(io::Error::other)?)
        };
        let agreed = Agreed { version, receive: secret(rx)?, send: secret(tx)?, next: Box::new(next) };
        Ok((agreed, identity.transpose()?))
    }
}

fn secret((seq, secrets): (u64, ConnectionTrafficSecrets)) -> io::Result<Secret> {
    let (cipher, key, iv) = match secrets {
        ConnectionTrafficSecrets::Aes128Gcm { key, iv } => (Cipher::Aes128Gcm, key, iv),
        ConnectionTrafficSecrets::Aes256Gcm { key, iv } => (Cipher::Aes256Gcm, key, iv),
        ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => (Cipher::Chacha20Poly1305, key, iv),
        _ => return Err(broken("a cipher that was not offered")),
    };
    let iv = iv.as_ref().try_into().map_err(|_| broken("an initialization vector of the wrong length"))?;
    Ok(Secret { cipher, key: key.as_ref().to_vec(), iv, seq })
}
