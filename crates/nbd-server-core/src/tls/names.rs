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

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair, SanType};

    use super::*;

    fn certificate(subject: &[(DnType, &str)], names: Vec<SanType>) -> Vec<u8> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        subject.iter().for_each(|(kind, value)| params.distinguished_name.push(kind.clone(), *value));
        params.subject_alt_names = names;
        params.self_signed(&KeyPair::generate().unwrap()).unwrap().der().to_vec()
    }

    #[test]
    fn names_are_read_and_no_truncation_or_change_causes_a_panic() {
        let subject = [
            (DnType::CountryName, "DE"),
            (DnType::OrganizationName, "Käse, Wein & Co"),
            (DnType::CustomDnType(vec![1, 2, 840, 1]), "x"),
            (DnType::CommonName, " #client"),
        ];
        let names = vec![
            SanType::DnsName("client.example".try_into().unwrap()),
            SanType::IpAddress([192, 0, 2, 7].into()),
            SanType::IpAddress([0_u16; 8].into()),
            SanType::Rfc822Name("a@b".try_into().unwrap()),
            SanType::URI("urn:x".try_into().unwrap()),
        ];
        let good = certificate(&subject, names);
        let expected = Identity {
            // An unknown kind is written by its numbers, and its value as DER (RFC 4514, 2.4).
            subject: Some("CN=\\ #client,1.2.840.1=#0c0178,O=Käse\\, Wein & Co,C=DE".into()),
            psk: None,
            names: ["DNS:client.example", "IP:192.0.2.7", "IP:::", "EMAIL:a@b", "URI:urn:x"].map(String::from).into(),
        };
        assert_eq!(read(&good).unwrap(), expected);
        for at in 0..good.len() {
            assert!(read(&good[..at]).is_err(), "cut at {at}");
            for byte in [0, 1, 0x7f, 0x80, 0x84, 0xff] {
                let mut changed = good.clone();
                changed[at] = byte;
                let _ = read(&changed);
            }
        }
    }

    #[test]
    fn a_control_character_cannot_hide_what_follows() {
        let forged = certificate(&[(DnType::CommonName, "root\0.example")], vec![]);
        assert_eq!(read(&forged).unwrap().subject.unwrap(), "CN=root\\00.example");
    }

    #[test]
    fn a_certificate_without_alternative_names_has_none() {
        let plain = read(&certificate(&[(DnType::CommonName, "client")], vec![])).unwrap();
        assert_eq!((plain.subject.as_deref(), plain.names.len()), (Some("CN=client"), 0));
    }
}
