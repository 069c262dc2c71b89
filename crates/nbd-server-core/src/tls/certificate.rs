//! The identity in a certificate: subject and alternative names, read from DER that a verifier has accepted (RFC 5280, 4.1; names
//! as strings: RFC 4514).

use std::{
    fmt::Write,
    io,
    net::{Ipv4Addr, Ipv6Addr},
};

use super::records::broken;
use crate::peer::Identity;

const SEQUENCE: u8 = 0x30;
const SET: u8 = 0x31;
const OID: u8 = 6;
const OCTETS: u8 = 4;
const VERSION: u8 = 0xa0;
const EXTENSIONS: u8 = 0xa3;

/// 2.5.29.17, subjectAltName.
const ALTERNATIVE_NAMES: [u8; 3] = [0x55, 0x1d, 0x11];

/// Reads a certificate.
pub(super) fn read(der: &[u8]) -> io::Result<Identity> {
    parse(der).ok_or_else(|| broken("the client's certificate cannot be read"))
}

fn parse(der: &[u8]) -> Option<Identity> {
    let mut certificate = Der(der).within(SEQUENCE)?;
    let mut tbs = certificate.within(SEQUENCE)?;
    if tbs.tag() == Some(VERSION) {
        tbs.next()?;
    }
    // Skips the serial number, signature, issuer and validity.
    for _ in 0..4 {
        tbs.next()?;
    }
    let subject = distinguished_name(tbs.within(SEQUENCE)?)?;
    let mut names = Vec::new();
    while let Some(tag) = tbs.tag() {
        let (_, content) = tbs.next()?;
        if tag == EXTENSIONS {
            let mut extensions = Der(content).within(SEQUENCE)?;
            while !extensions.0.is_empty() {
                let mut extension = extensions.within(SEQUENCE)?;
                if extension.content(OID)? == ALTERNATIVE_NAMES {
                    // The optional field "critical" may come first.
                    let value = loop {
                        if let (OCTETS, value) = extension.next()? {
                            break value;
                        }
                    };
                    names = alternative_names(Der(value).within(SEQUENCE)?)?;
                }
            }
        }
    }
    Some(Identity { subject: Some(subject), names, psk: None })
}

/// Formats a name (RFC 4514): the last part first; parts of one set are joined by "+".
fn distinguished_name(mut name: Der<'_>) -> Option<String> {
    let mut parts = Vec::new();
    while !name.0.is_empty() {
        let (mut set, mut part) = (name.within(SET)?, String::new());
        while !set.0.is_empty() {
            let mut pair = set.within(SEQUENCE)?;
            let (kind, (tag, value)) = (pair.content(OID)?, pair.next()?);
            if !part.is_empty() {
                part.push('+');
            }
            part += &kind_of(kind)?;
            part.push('=');
            escape(&string(tag, value)?, &mut part);
        }
        parts.push(part);
    }
    parts.reverse();
    Some(parts.join(","))
}

/// The short names of RFC 4514, 3, and the common one for mail; for any other, the numbers of the OID.
fn kind_of(oid: &[u8]) -> Option<String> {
    let short = match oid {
        [0x55, 4, 3] => "CN",
        [0x55, 4, 6] => "C",
        [0x55, 4, 7] => "L",
        [0x55, 4, 8] => "ST",
        [0x55, 4, 9] => "STREET",
        [0x55, 4, 10] => "O",
        [0x55, 4, 11] => "OU",
        [0x09, 0x92, 0x26, 0x89, 0x93, 0xf2, 0x2c, 0x64, 1, 1] => "UID",
        [0x09, 0x92, 0x26, 0x89, 0x93, 0xf2, 0x2c, 0x64, 1, 25] => "DC",
        [0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 9, 1] => "EMAIL",
        _ => {
            let mut text = String::new();
            for (n, arc) in oid.split_inclusive(|byte| byte & 0x80 == 0).enumerate() {
                let arc =
                    arc.iter().try_fold(0_u64, |sum, byte| Some(sum.checked_mul(128)? | u64::from(byte & 0x7f)))?;
                if n == 0 {
                    let first = (arc / 40).min(2);
                    write!(text, "{first}.{}", arc - first * 40).ok()?;
                } else {
                    write!(text, ".{arc}").ok()?;
                }
            }
            return Some(text);
        }
    };
    Some(short.into())
}

/// A character string of any kind that names use. A NUL is refused: it occurs only in forged names.
fn string(tag: u8, value: &[u8]) -> Option<String> {
    let units = || value.chunks_exact(2).map(|pair| u16::from_be_bytes([pair[0], pair[1]]));
    let text = match tag {
        // UTF8String, NumericString, PrintableString, IA5String.
        12 | 18 | 19 | 22 => String::from_utf8(value.to_vec()).ok()?,
        // T61String, in practice Latin-1.
        20 => value.iter().map(|&byte| char::from(byte)).collect(),
        // BMPString.
        30 if value.len().is_multiple_of(2) => char::decode_utf16(units()).collect::<Result<_, _>>().ok()?,
        _ => return None,
    };
    (!text.contains('\0')).then_some(text)
}

/// Escapes a value (RFC 4514, 2.4).
fn escape(value: &str, into: &mut String) {
    let last = value.chars().count().wrapping_sub(1);
    for (n, char) in value.chars().enumerate() {
        let at_an_end = (n == 0 && matches!(char, ' ' | '#')) || (n == last && char == ' ');
        if at_an_end || matches!(char, '"' | '+' | ',' | ';' | '<' | '>' | '\\') {
            into.push('\\');
        }
        into.push(char);
    }
}

/// The alternative names (RFC 5280, 4.2.1.6) of the kinds that a rule can name. Others are ignored.
fn alternative_names(mut list: Der<'_>) -> Option<Vec<String>> {
    let mut names = Vec::new();
    while !list.0.is_empty() {
        let (tag, value) = list.next()?;
        let text = || string(22, value);
        names.push(match (tag, value.len()) {
            (0x81, _) => format!("EMAIL:{}", text()?),
            (0x82, _) => format!("DNS:{}", text()?),
            (0x86, _) => format!("URI:{}", text()?),
            (0x87, 4) => format!("IP:{}", Ipv4Addr::from(<[u8; 4]>::try_from(value).ok()?)),
            (0x87, 16) => format!("IP:{}", Ipv6Addr::from(<[u8; 16]>::try_from(value).ok()?)),
            _ => continue,
        });
    }
    Some(names)
}

/// Pads the key of an ECPrivateKey (RFC 5915, 3) to the length of its curve. `None`: it has that length, or is not such a key.
pub(super) fn of_whole_length(key: &[u8]) -> Option<Vec<u8>> {
    let mut whole = Der(key).within(SEQUENCE)?;
    let ((version_tag, version), octets) = (whole.next()?, whole.content(OCTETS)?);
    let number = &octets[octets.iter().take_while(|byte| **byte == 0).count()..];
    // P-256, P-384 and P-521. No key of a longer curve has so many leading zeroes.
    let len = [32, 48, 66].into_iter().find(|len| number.len() <= *len)?;
    let key = [&vec![0; len - number.len()][..], number].concat();
    let right = || element(SEQUENCE, &[&element(version_tag, version), &element(OCTETS, &key), whole.0].concat());
    (key != octets).then(right)
}

fn element(tag: u8, content: &[u8]) -> Vec<u8> {
    let len = u16::try_from(content.len()).expect("keys and names are short").to_be_bytes();
    // DER allows only the shortest form of a length.
    let len = match len {
        [0, len @ 0..0x80] => vec![len],
        [0, len] => vec![0x81, len],
        [high, low] => vec![0x82, high, low],
    };
    [&[tag], &len[..], content].concat()
}

/// A parser over the rest of some DER.
struct Der<'a>(&'a [u8]);

impl<'a> Der<'a> {
    fn tag(&self) -> Option<u8> {
        self.0.first().copied()
    }

    /// Returns the next element: its one-byte tag, and its content.
    fn next(&mut self) -> Option<(u8, &'a [u8])> {
        let (&[tag, short], mut rest) = self.0.split_first_chunk()?;
        let mut len = usize::from(short);
        if short & 0x80 != 0 {
            let (bytes, after) = rest.split_at_checked(usize::from(short & 0x7f))?;
            if bytes.is_empty() || bytes.len() > 4 {
                return None;
            }
            len = bytes.iter().fold(0, |len, &byte| len << 8 | usize::from(byte));
            rest = after;
        }
        let (content, rest) = rest.split_at_checked(len)?;
        self.0 = rest;
        Some((tag, content))
    }

    fn content(&mut self, expected: u8) -> Option<&'a [u8]> {
        self.next().and_then(|(tag, content)| (tag == expected).then_some(content))
    }

    fn within(&mut self, expected: u8) -> Option<Self> {
        self.content(expected).map(Self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(oid: &[u8], tag: u8, value: &[u8]) -> Vec<u8> {
        element(SEQUENCE, &[element(OID, oid), element(tag, value)].concat())
    }

    fn certificate(subject: &[u8], names: &[u8]) -> Vec<u8> {
        let alternative =
            [element(OID, &ALTERNATIVE_NAMES), element(1, &[255]), element(OCTETS, &element(SEQUENCE, names))].concat();
        let other = [element(OID, &[0x55, 0x1d, 0x0f]), element(OCTETS, &[3, 2, 7, 128])].concat();
        let extensions = element(SEQUENCE, &[element(SEQUENCE, &other), element(SEQUENCE, &alternative)].concat());
        let tbs = [
            element(VERSION, &element(2, &[2])),
            element(2, &[1; 20]),
            element(SEQUENCE, b""),
            element(SEQUENCE, &element(SET, &pair(&[0x55, 4, 3], 12, b"the issuer"))),
            element(SEQUENCE, &[0; 30]),
            element(SEQUENCE, subject),
            element(SEQUENCE, &[0; 300]),
            element(EXTENSIONS, &extensions),
        ];
        element(SEQUENCE, &[element(SEQUENCE, &tbs.concat()), element(SEQUENCE, b""), element(3, b"")].concat())
    }

    #[test]
    fn names_are_read_and_no_truncation_or_change_causes_a_panic() {
        let subject = [
            element(SET, &pair(&[0x55, 4, 6], 19, b"DE")),
            element(SET, &pair(&[0x55, 4, 10], 12, "Käse, Wein & Co".as_bytes())),
            element(SET, &[pair(&[0x55, 4, 3], 30, b"\0c\0l"), pair(&[0x2a, 0x86, 0x48, 1], 22, b" #x ")].concat()),
        ];
        let names = [
            element(0x82, b"client.example"),
            element(0x87, &[192, 0, 2, 7]),
            element(0x87, &[0; 16]),
            element(0x81, b"a@b"),
            element(0xa0, b"something else"),
        ];
        let good = certificate(&subject.concat(), &names.concat());
        let expected = Identity {
            subject: Some("CN=cl+1.2.840.1=\\ #x\\ ,O=Käse\\, Wein & Co,C=DE".into()),
            psk: None,
            names: ["DNS:client.example", "IP:192.0.2.7", "IP:::", "EMAIL:a@b"].map(String::from).into(),
        };
        assert_eq!(parse(&good), Some(expected));
        for at in 0..good.len() {
            assert_eq!(parse(&good[..at]), None, "cut at {at}");
            for byte in [0, 1, 0x7f, 0x80, 0x84, 0xff] {
                let mut changed = good.clone();
                changed[at] = byte;
                let _ = parse(&changed);
            }
        }
    }

    #[test]
    fn a_key_is_padded_to_the_length_of_its_curve() {
        for (len, rest) in [(32, 20), (48, 110), (66, 300)] {
            let key = |key: &[u8]| {
                element(SEQUENCE, &[element(2, &[1]), element(OCTETS, key), element(0xa1, &vec![9; rest])].concat())
            };
            for zeroes in 0..4 {
                let right = [&vec![0; zeroes][..], &vec![7; len - zeroes]].concat();
                assert_eq!(of_whole_length(&key(&right)), None);
                assert_eq!(of_whole_length(&key(&[&[0], &right[..]].concat())), Some(key(&right)));
                let short = of_whole_length(&key(&right[zeroes..]));
                assert_eq!(short, (zeroes > 0).then(|| key(&right)));
            }
            assert_eq!(of_whole_length(&key(&[1; 67])), None);
        }
        assert_eq!(of_whole_length(b"no key"), None);
    }

    #[test]
    fn a_name_with_a_nul_is_refused() {
        let bad = certificate(&element(SET, &pair(&[0x55, 4, 3], 12, b"root\0.example")), b"");
        assert_eq!(parse(&bad), None);
    }
}
