//! The addresses of a server as NBD URIs (doc/uri.md of the protocol), in the same forms as nbdkit's.

use std::{
    net::{IpAddr, Ipv4Addr},
    os::unix::ffi::OsStrExt,
    path::PathBuf,
};

/// The default port of NBD, which URIs omit.
pub(crate) const PORT: u16 = 10809;

/// An address that clients can connect to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Address {
    /// A Unix domain socket: its absolute path, or an abstract name after `@`, which few clients support in a URI.
    Unix(PathBuf),
    /// A host name or an IP address, and the actual port.
    Tcp(String, u16),
    /// A port of vsock.
    Vsock(u32),
}

impl Address {
    /// The address of a TCP listener, as a client on the same machine would write it, or, if it is a definite address, any
    /// client.
    pub(crate) fn tcp(host: &str, port: u16) -> Self {
        let host = match host.parse::<IpAddr>() {
            // On some machines, localhost has no IPv6 address.
            Ok(ip) if ip.is_unspecified() || ip == Ipv4Addr::LOCALHOST => "localhost".into(),
            Ok(IpAddr::V6(ip)) => format!("[{ip}]"),
            // An address with a zone (RFC 6874).
            _ => match host.split_once('%') {
                Some((ip, zone)) => format!("[{ip}%25{}]", quote(zone.as_bytes())),
                None => host.into(),
            },
        };
        Self::Tcp(host, port)
    }

    /// The URI of an export at this address; `tls` has the credentials if TLS is used.
    pub(crate) fn uri(&self, export: &str, tls: Option<&str>) -> String {
        let slash = if export.is_empty() { "" } else { "/" };
        let (export, scheme) = (quote(export.as_bytes()), if tls.is_some() { "nbds" } else { "nbd" });
        let (place, mut words) = match self {
            Self::Unix(path) => {
                (format!("{scheme}+unix://"), vec![format!("socket={}", quote(path.as_os_str().as_bytes()))])
            }
            // 1 is this machine itself, like localhost. Other machines must use the number that this one has for them.
            Self::Vsock(port) if *port == u32::from(PORT) => (format!("{scheme}+vsock://1"), vec![]),
            Self::Vsock(port) => (format!("{scheme}+vsock://1:{port}"), vec![]),
            Self::Tcp(host, PORT) => (format!("{scheme}://{host}"), vec![]),
            Self::Tcp(host, port) => (format!("{scheme}://{host}:{port}"), vec![]),
        };
        words.extend(tls.map(String::from));
        let question = if words.is_empty() { "" } else { "?" };
        format!("{place}{slash}{export}{question}{}", words.join("&"))
    }
}

/// Percent-encodes all characters except those that are never special, and `/` and `@`.
pub(crate) fn quote(bytes: &[u8]) -> String {
    let plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"-._~/@".contains(byte);
    bytes.iter().map(|byte| if plain(byte) { char::from(*byte).to_string() } else { format!("%{byte:02X}") }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uris_are_nbdkit_s() {
        let check = |address: Address, export, uri| assert_eq!(address.uri(export, None), uri);
        let unix = |path: &str| Address::Unix(path.into());
        check(unix("/tmp/so c:k"), "", "nbd+unix://?socket=/tmp/so%20c%3Ak");
        check(unix("@abstract"), "foo", "nbd+unix:///foo?socket=@abstract");
        check(Address::Vsock(10809), "foo", "nbd+vsock://1/foo");
        check(Address::Vsock(1), "", "nbd+vsock://1:1");
        check(unix("/s"), "foo", "nbd+unix:///foo?socket=/s");
        check(unix("/s"), "a b/c:d?é", "nbd+unix:///a%20b/c%3Ad%3F%C3%A9?socket=/s");
        check(Address::tcp("localhost", PORT), "", "nbd://localhost");
        check(Address::tcp("localhost", 10899), "foo", "nbd://localhost:10899/foo");
        check(Address::tcp("localhost", PORT), "/disk", "nbd://localhost//disk");
        check(Address::tcp("127.0.0.1", 1), "", "nbd://localhost:1");
        check(Address::tcp("::", 1), "", "nbd://localhost:1");
        check(Address::tcp("::1", 1), "", "nbd://[::1]:1");
        check(Address::tcp("192.0.2.7", 1), "x", "nbd://192.0.2.7:1/x");
        check(Address::tcp("2001:db8::7", PORT), "x", "nbd://[2001:db8::7]/x");
        check(Address::tcp("fe80::1%lo", 1), "x", "nbd://[fe80::1%25lo]:1/x");
        check(Address::tcp("storage.example", PORT), "", "nbd://storage.example");
        let check = |address: Address, uri| assert_eq!(address.uri("x", Some("tls-certificates=/c")), uri);
        check(unix("/s"), "nbds+unix:///x?socket=/s&tls-certificates=/c");
        check(Address::tcp("localhost", 1), "nbds://localhost:1/x?tls-certificates=/c");
    }
}
