//! [`Place`]: a place to listen, as an argument.

use std::{
    net::Ipv6Addr,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    str::FromStr,
};

use crate::uri::PORT;

/// A place to listen at, as `unix:PATH`, `unix:@NAME`, `tcp:PORT`, `tcp:HOST[:PORT]` or `vsock:PORT`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// A unix socket with a generated name, in a private directory: `unix:-`.
    Private,
    /// A unix socket in the file system.
    Unix(PathBuf),
    /// A unix socket in the abstract namespace.
    Abstract(Vec<u8>),
    /// A TCP port (0: any free one) on all of these hosts; without hosts, on the loopback addresses.
    Tcp(Vec<String>, u16),
    /// A vsock port (0: any free one), for virtual machines and their hosts.
    Vsock(u32),
}

impl Place {
    /// Parses the value of `--unix`.
    ///
    /// # Errors
    /// It is empty.
    pub(crate) fn unix(path: &Path) -> Result<Self, String> {
        match path.as_os_str().as_bytes() {
            b"" => Err("a Unix domain socket needs a path".into()),
            b"-" => Ok(Self::Private),
            b"@" => Err("an abstract socket needs a name: @NAME".into()),
            [b'@', name @ ..] => Ok(Self::Abstract(name.into())),
            _ => Ok(Self::Unix(path.into())),
        }
    }

    /// Whether it is a file that other users can find.
    pub(crate) fn is_file(&self) -> bool {
        matches!(self, Self::Unix(_))
    }
}

impl FromStr for Place {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let port = |text: &str| text.parse().map_err(|_| format!("\"{text}\" is not a port"));
        match text.split_once(':') {
            Some(("unix", path)) if !path.is_empty() => Self::unix(Path::new(path)),
            Some(("vsock", number)) => {
                number.parse().map(Self::Vsock).map_err(|_| format!("\"{number}\" is not a port"))
            }
            Some(("tcp", rest)) if !rest.is_empty() => {
                if rest.bytes().all(|byte| byte.is_ascii_digit()) {
                    return Ok(Self::Tcp(Vec::new(), port(rest)?));
                }
                if rest.split('%').next().is_some_and(|ip| ip.parse::<Ipv6Addr>().is_ok()) {
                    return Err(format!("write an IPv6 address in brackets: tcp:[{rest}]:{PORT}"));
                }
                // The brackets distinguish the colons of an IPv6 address from the one before the port.
                let (host, rest) = match rest.strip_prefix('[') {
                    Some(rest) => rest.split_once(']').ok_or("the bracket is not closed")?,
                    None => rest.split_at(rest.find(':').unwrap_or(rest.len())),
                };
                let port = match rest.strip_prefix(':') {
                    Some(number) => port(number)?,
                    None if rest.is_empty() => PORT,
                    None => return Err(format!("\"{rest}\" is not a port")),
                };
                Ok(Self::Tcp(vec![host.into()], port))
            }
            _ => Err("a place is unix:PATH, tcp:PORT, tcp:HOST:PORT or vsock:PORT".into()),
        }
    }
}

/// Parses the value of `--ip-addr`: an address or the name of a host, without a port.
///
/// # Errors
/// It has a port, or is empty.
pub(crate) fn host(text: &str) -> Result<String, String> {
    let bare = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(text);
    let is_v6 = |text: &str| text.split('%').next().is_some_and(|ip| ip.parse::<Ipv6Addr>().is_ok());
    let port = bare.rsplit_once(':').filter(|(_, port)| !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit()));
    match port {
        _ if bare.is_empty() => Err("it is empty".into()),
        _ if is_v6(bare) => Ok(bare.into()),
        Some((host, port)) if host.starts_with('[') || !host.contains(':') => {
            Err(format!("use -p for the port: -i '{host}' -p {port}"))
        }
        _ if bare.contains(['[', ']', ':', '/']) => Err("it is neither an address nor the name of a host".into()),
        _ => Ok(bare.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_distinguished() {
        let check = |text: &str, place| assert_eq!(text.parse(), Ok(place), "{text}");
        let tcp = |host: &str, port| Place::Tcp(vec![host.into()], port);
        check("unix:/run/nbd.sock", Place::Unix("/run/nbd.sock".into()));
        check("unix:@nbd:1", Place::Abstract(b"nbd:1".to_vec()));
        check("unix:-", Place::Private);
        check("tcp:0", Place::Tcp(vec![], 0));
        check("tcp:10810", Place::Tcp(vec![], 10810));
        check("tcp:storage.example", tcp("storage.example", PORT));
        check("tcp:storage.example:1", tcp("storage.example", 1));
        check("tcp:192.0.2.7:65535", tcp("192.0.2.7", 65535));
        check("tcp:[2001:db8::7]:1", tcp("2001:db8::7", 1));
        check("tcp:[::]", tcp("::", PORT));
        check("vsock:4294967294", Place::Vsock(4294967294));
        for wrong in [
            "",
            "10809",
            "/run/nbd.sock",
            "unix:",
            "unix:@",
            "tcp:",
            "tcp:::1",
            "tcp:65536",
            "tcp:a:",
            "tcp:a:b",
            "tcp:[::1",
            "tcp:[::1]1",
            "vsock:",
            "vsock:a",
            "nbd:1",
        ] {
            assert!(wrong.parse::<Place>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn hosts_have_no_port() {
        for (text, expected) in [
            ("127.0.0.1", Ok("127.0.0.1")),
            ("[::1]", Ok("::1")),
            ("::1", Ok("::1")),
            ("2001:db8::1080", Ok("2001:db8::1080")),
            ("2001:db8::10809", Err("it is neither an address nor the name of a host")),
            ("fe80::1%lo", Ok("fe80::1%lo")),
            ("[fe80::1%lo]", Ok("fe80::1%lo")),
            ("localhost", Ok("localhost")),
            ("127.0.0.1:10811", Err("use -p for the port: -i '127.0.0.1' -p 10811")),
            ("[::1]:10811", Err("use -p for the port: -i '[::1]' -p 10811")),
            ("localhost:1", Err("use -p for the port: -i 'localhost' -p 1")),
            ("nbd://localhost", Err("it is neither an address nor the name of a host")),
            ("", Err("it is empty")),
            ("[]", Err("it is empty")),
        ] {
            assert_eq!(host(text).as_deref().map_err(String::as_str), expected, "{text}");
        }
    }
}
