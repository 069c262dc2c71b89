//! The identity in a certificate that the library has verified: subject and alternative names.

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr},
};

use x509_cert::{
    Certificate,
    der::{Decode, Error},
    ext::pkix::{SubjectAltName, name::GeneralName},
};

use super::engine::broken;
use crate::peer::Identity;

/// Reads a certificate.
pub(super) fn read(der: &[u8]) -> io::Result<Identity> {
    parse(der).map_err(|e| broken(&format!("the client's certificate cannot be read: {e}")))
}

fn parse(der: &[u8]) -> Result<Identity, Error> {
    let certificate = Certificate::from_der(der)?;
    let certificate = certificate.tbs_certificate();
    let alternative = certificate.get_extension::<SubjectAltName>()?;
    let names = alternative.iter().flat_map(|(_, names)| &names.0).filter_map(alternative_name).collect();
    Ok(Identity { subject: Some(certificate.subject().to_string()), names, psk: None })
}

/// An alternative name (RFC 5280, 4.2.1.6) of the kinds that a rule can name.
fn alternative_name(name: &GeneralName) -> Option<String> {
    Some(match name {
        GeneralName::Rfc822Name(name) => format!("EMAIL:{name}"),
        GeneralName::DnsName(name) => format!("DNS:{name}"),
        GeneralName::UniformResourceIdentifier(name) => format!("URI:{name}"),
        GeneralName::IpAddress(address) => match *address.as_bytes() {
            [a, b, c, d] => format!("IP:{}", Ipv4Addr::new(a, b, c, d)),
            ref bytes => format!("IP:{}", Ipv6Addr::from(<[u8; 16]>::try_from(bytes).ok()?)),
        },
        _ => return None,
    })
}
