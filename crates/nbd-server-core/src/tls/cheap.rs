//! Cryptography for fuzz targets: cheap, and the same in each run. The key exchange is an exclusive or, a signature is a sum, and
//! random bytes are not random. The ciphers and the key derivation are real.

use std::sync::{Arc, LazyLock};

use rustls::{
    CipherSuite, ClientConfig, DigitallySignedStruct, Error, NamedGroup, PeerMisbehaved, ServerConfig,
    SignatureAlgorithm, SignatureScheme, SupportedProtocolVersion,
    client::{
        Resumption,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{
        ActiveKeyExchange, CryptoProvider, GetRandomFailed, SecureRandom, SharedSecret, SupportedKxGroup,
        ring::default_provider,
    },
    ffdhe_groups::FfdheGroup,
    pki_types::{CertificateDer, ServerName, UnixTime},
    server::NoServerSessionStorage,
    sign::{CertifiedKey, Signer, SigningKey, SingleCertAndKey},
};

const SCHEME: SignatureScheme = SignatureScheme::ECDSA_NISTP256_SHA256;

static PROVIDER: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| {
    let mut provider = CryptoProvider { kx_groups: vec![&Cheap], secure_random: &Cheap, ..default_provider() };
    // The usual cipher first.
    provider.cipher_suites.sort_by_key(|suite| suite.suite() != CipherSuite::TLS13_AES_128_GCM_SHA256);
    Arc::new(provider)
});

/// The configuration of a server, as in `certificates.rs`.
pub(super) fn server() -> Arc<ServerConfig> {
    let builder = ServerConfig::builder_with_provider(Arc::clone(&PROVIDER));
    let builder = builder.with_safe_default_protocol_versions().expect("known versions").with_no_client_auth();
    // Neither side parses it.
    let certificate = CertificateDer::from(vec![7; 300]);
    let key = CertifiedKey::new(vec![certificate], Arc::new(Cheap));
    let mut config = builder.with_cert_resolver(Arc::new(SingleCertAndKey::from(key)));
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.into()
}

/// The configuration of a client.
pub(super) fn client(version: &'static SupportedProtocolVersion) -> Arc<ClientConfig> {
    let builder = ClientConfig::builder_with_provider(Arc::clone(&PROVIDER));
    let builder = builder.with_protocol_versions(&[version]).expect("a known version").dangerous();
    let mut config = builder.with_custom_certificate_verifier(Arc::new(Cheap)).with_no_client_auth();
    config.resumption = Resumption::disabled();
    config.into()
}

#[derive(Debug)]
struct Cheap;

impl SecureRandom for Cheap {
    fn fill(&self, bytes: &mut [u8]) -> Result<(), GetRandomFailed> {
        bytes.fill(0x5a);
        Ok(())
    }
}

/// The public keys of both sides. The secrets differ if the network has changed one.
const PUBLIC: [u8; 32] = [0xa5; 32];

impl SupportedKxGroup for Cheap {
    fn start(&self) -> Result<Box<dyn ActiveKeyExchange>, Error> {
        Ok(Box::new(Self))
    }

    fn ffdhe_group(&self) -> Option<FfdheGroup<'static>> {
        None
    }

    fn name(&self) -> NamedGroup {
        NamedGroup::X25519
    }
}

impl ActiveKeyExchange for Cheap {
    fn complete(self: Box<Self>, theirs: &[u8]) -> Result<SharedSecret, Error> {
        let theirs: [u8; 32] = theirs.try_into().map_err(|_| Error::from(PeerMisbehaved::InvalidKeyShare))?;
        let secret: Vec<u8> = PUBLIC.iter().zip(theirs).map(|(mine, theirs)| mine ^ theirs).collect();
        Ok(secret.into())
    }

    fn pub_key(&self) -> &[u8] {
        &PUBLIC
    }

    fn group(&self) -> NamedGroup {
        NamedGroup::X25519
    }
}

fn sum(message: &[u8]) -> Vec<u8> {
    let sum = message.iter().fold(0_u64, |sum, byte| sum.rotate_left(7) ^ u64::from(*byte));
    sum.to_le_bytes().repeat(8)
}

impl SigningKey for Cheap {
    fn choose_scheme(&self, offered: &[SignatureScheme]) -> Option<Box<dyn Signer>> {
        offered.contains(&SCHEME).then(|| Box::new(Self) as _)
    }

    fn algorithm(&self) -> SignatureAlgorithm {
        SignatureAlgorithm::ECDSA
    }
}

impl Signer for Cheap {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, Error> {
        Ok(sum(message))
    }

    fn scheme(&self) -> SignatureScheme {
        SCHEME
    }
}

fn verify(message: &[u8], signed: &DigitallySignedStruct) -> Result<HandshakeSignatureValid, Error> {
    if signed.signature() != sum(message) {
        return Err(Error::General("another signature".into()));
    }
    Ok(HandshakeSignatureValid::assertion())
}

impl ServerCertVerifier for Cheap {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        _: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify(message, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        _: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify(message, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SCHEME]
    }
}
