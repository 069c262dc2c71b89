//! Certificates and keys for TLS, made with the tools that the documentation of nbdkit and QEMU names.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::version::{TLS12, TLS13};
use rustls::{ClientConfig, ClientConnection, RootCertStore};

use crate::{Dir, forger, tool};

/// A version of TLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    /// 1.2
    Tls12,
    /// 1.3
    Tls13,
}

impl Version {
    /// Both versions.
    pub const BOTH: [Self; 2] = [Self::Tls12, Self::Tls13];
}

/// As the server's log names it.
impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tls12 => "TLS 1.2",
            Self::Tls13 => "TLS 1.3",
        })
    }
}

/// An authority, a certificate of a server on this machine and one of a client, in a directory with the usual file names.
#[derive(Debug)]
pub struct Pki {
    dir: String,
}

impl Pki {
    /// Makes them in the directory `name` in `dir`.
    pub fn new(dir: &Dir, name: &str) -> Self {
        let pki = Self { dir: dir.text(name) };
        std::fs::create_dir(&pki.dir).expect("the name is free");
        let expires = "expiration_days = 3650\n";
        pki.make("ca", &format!("cn = \"Authority {name}\"\nca\ncert_signing_key\ncrl_signing_key\n{expires}"));
        let names = "cn = \"localhost\"\ndns_name = \"localhost\"\nip_address = \"127.0.0.1\"\nip_address = \"::1\"";
        pki.make("server", &format!("{names}\ntls_www_server\n{expires}"));
        let names = "cn = \"client\"\norganization = \"Example\"\ndns_name = \"client.example\"";
        pki.make("client", &format!("{names}\ntls_www_client\nsigning_key\nencryption_key\n{expires}"));
        pki
    }

    /// Makes a key and a certificate, signed by the authority.
    fn make(&self, who: &str, template: &str) {
        let at = |name: &str| format!("{}/{name}", self.dir);
        let (key, template_path) = (at(&format!("{who}-key.pem")), at(&format!("{who}.template")));
        std::fs::write(&template_path, template).expect("the directory was just made");
        let certtool = |args: &[&str]| drop(tool("certtool").args(args).ok());
        // Not certtool's keys: half of those on curves are malformed (GnuTLS 3.7), and rustls refuses them.
        match who {
            // RSA, because QEMU needs a certificate for key encipherment.
            "client" => drop(tool("openssl").args(["genrsa", "-out", &key, "2048"]).ok()),
            _ => make_key_on_curve(&key),
        }
        let out = at(&format!("{who}-cert.pem"));
        let args = ["--load-privkey", &key, "--template", &template_path, "--outfile", &out];
        let (ca, ca_key) = (at("ca-cert.pem"), at("ca-key.pem"));
        let sign = match who {
            "ca" => vec!["--generate-self-signed"],
            _ => vec!["--generate-certificate", "--load-ca-certificate", &ca, "--load-ca-privkey", &ca_key],
        };
        certtool(&[&sign[..], &args].concat());
    }

    /// Revokes the client's certificate, in the list that servers read.
    pub fn revoke_client(&self) {
        let at = |name: &str| format!("{}/{name}", self.dir);
        std::fs::write(at("crl.template"), "expiration_days = 3650\ncrl_number = 1\n").expect("the directory is there");
        let (ca, key, template) = (at("ca-cert.pem"), at("ca-key.pem"), at("crl.template"));
        let sign = ["--generate-crl", "--load-ca-certificate", &ca, "--load-ca-privkey", &key, "--template", &template];
        tool("certtool")
            .args(sign)
            .args(["--load-certificate", &at("client-cert.pem"), "--outfile", &at("ca-crl.pem")])
            .ok();
    }

    /// The path of the directory, as text.
    pub fn dir(&self) -> &str {
        &self.dir
    }

    /// A client's side of a connection, with the client's certificate.
    pub fn connection(&self, version: Version) -> ClientConnection {
        let at = |name: &str| Path::new(&self.dir).join(name);
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_file(at("ca-cert.pem")).expect("a certificate")).expect("a good one");
        let versions = match version {
            Version::Tls12 => [&TLS12],
            Version::Tls13 => [&TLS13],
        };
        let config = ClientConfig::builder_with_provider(Arc::new(forger::provider()))
            .with_protocol_versions(&versions)
            .expect("rustls knows the version")
            .with_root_certificates(roots)
            .with_client_auth_cert(
                vec![CertificateDer::from_pem_file(at("client-cert.pem")).expect("a certificate")],
                PrivateKeyDer::from_pem_file(at("client-key.pem")).expect("a key"),
            )
            .expect("they go together");
        let name = "localhost".try_into().expect("that is a name");
        ClientConnection::new(config.into(), name).expect("the configuration is sound")
    }
}

fn make_key_on_curve(path: &str) {
    tool("openssl").args(["genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", path]).ok();
}
