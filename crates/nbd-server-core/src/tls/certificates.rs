//! The configuration of rustls for a server with certificates, from its files.

use std::{fmt, io, path::Path, sync::Arc};

use rustls::{
    CipherSuite, RootCertStore, ServerConfig,
    crypto::{CryptoProvider, ring::default_provider},
    pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer, pem::PemObject},
    server::{NoServerSessionStorage, WebPkiClientVerifier, danger::ClientCertVerifier},
};

use super::files::Certificates;

const AES_128: [CipherSuite; 3] = [
    CipherSuite::TLS13_AES_128_GCM_SHA256,
    CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
    CipherSuite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
];

/// Reads the files, and checks that they match.
pub(super) fn config(files: &Certificates) -> io::Result<Arc<ServerConfig>> {
    let mut provider = default_provider();
    // Of the client's ciphers, the fastest. Most clients name AES-256 first, whose four additional rounds have no benefit here.
    provider.cipher_suites.sort_by_key(|suite| !AES_128.contains(&suite.suite()));
    let provider = Arc::new(provider);
    let chain = CertificateDer::pem_file_iter(&files.certificate)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|e| unusable(&files.certificate, &e))?;
    let key = key(&files.key, &provider)?;
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(io::Error::other)?;
    let builder = match &files.client_ca {
        None => builder.with_no_client_auth(),
        Some(ca) => builder.with_client_cert_verifier(verifier(ca, files.client_crl.as_deref(), provider)?),
    };
    let mut config = builder.with_single_cert(chain, key).map_err(|e| unusable(&files.certificate, &e))?;
    config.ignore_client_order = true;
    // For TLS in the kernel.
    config.enable_secret_extraction = true;
    // NBD connections live long, so clients do not resume sessions. A ticket would be one more record to account for.
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    Ok(config.into())
}

/// Reads the private key. GnuTLS' certtool (3.7, as in Debian 12) writes half of its keys on curves with a leading zero, and a few too
/// short, against RFC 5915, 3. Only OpenSSL and GnuTLS read such keys, so the error names a command that rewrites them.
fn key(path: &Path, provider: &CryptoProvider) -> io::Result<PrivateKeyDer<'static>> {
    let key = PrivateKeyDer::from_pem_file(path).map_err(|e| unusable(path, &e))?;
    match provider.key_provider.load_private_key(key.clone_key()) {
        Ok(_) => Ok(key),
        Err(e) => {
            let file = path.display();
            // OpenSSL empties its output before it reads, so that must be another file.
            let command = format!("openssl pkey -in {file} -out {file}.new && mv {file}.new {file}");
            let text = format!("{e}; if certtool wrote this key, run: {command}");
            Err(unusable(path, &text))
        }
    }
}

/// What checks clients' certificates.
fn verifier(ca: &Path, crl: Option<&Path>, provider: Arc<CryptoProvider>) -> io::Result<Arc<dyn ClientCertVerifier>> {
    let mut roots = RootCertStore::empty();
    for root in CertificateDer::pem_file_iter(ca).map_err(|e| unusable(ca, &e))? {
        root.map_err(|e| unusable(ca, &e)).and_then(|root| roots.add(root).map_err(|e| unusable(ca, &e)))?;
    }
    let mut verifier = WebPkiClientVerifier::builder_with_provider(roots.into(), provider);
    if let Some(path) = crl {
        let revoked = CertificateRevocationListDer::pem_file_iter(path)
            .and_then(Iterator::collect::<Result<Vec<_>, _>>)
            .map_err(|e| unusable(path, &e))?;
        // A revocation list covers only the certificates of its own issuer.
        verifier = verifier.with_crls(revoked).allow_unknown_revocation_status();
    }
    verifier.build().map_err(|e| unusable(ca, &e))
}

fn unusable(path: &Path, error: &dyn fmt::Display) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, format!("{}: {error}", path.display()))
}
