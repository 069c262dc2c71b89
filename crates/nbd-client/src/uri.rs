//! [`Uri`]: where an export is, in one line of text (doc/uri.md of the protocol).

use std::{
    ffi::OsString,
    fmt,
    net::Ipv6Addr,
    os::unix::ffi::{OsStrExt, OsStringExt},
    path::PathBuf,
    str::FromStr,
};

use nbd_proto::limits::NAME_MAX;

use crate::error::Error;

/// The port of NBD over TCP and vsock.
pub const PORT: u16 = 10809;

/// The context id of the host, as a virtual machine sees it: the default of vsock URIs.
const HOST: u32 = 2;

/// An export and its address, parsed from a URI:
///
/// | URI | address |
/// |---|---|
/// | `nbd://HOST[:PORT]/EXPORT` | TCP; an IPv6 address stands in brackets |
/// | `nbd+unix:///EXPORT?socket=PATH` | Unix domain socket; `%00NAME` or `@NAME` is an abstract one |
/// | `nbd+vsock://[CID][:PORT]/EXPORT` | vsock; the default CID is 2, the host |
///
/// The default port is 10809. An empty `EXPORT` is the default export. `nbds` instead of `nbd` requires TLS. Names are
/// percent-encoded. Parameters after the `?`, joined by `&`: `socket`; with `nbds` also `tls-hostname=NAME`, the name to
/// expect in the server's certificate, and `tls-certificates=DIR`, the directory with `ca-cert.pem` and, for servers that
/// want them, `client-cert.pem` and `client-key.pem`.
///
/// ```
/// use nbd_client::{Address, Uri};
///
/// let uri: Uri = "nbd://[2001:db8::7]:10810/disk%201".parse()?;
/// assert_eq!(uri.address, Address::Tcp { host: "2001:db8::7".into(), port: 10810 });
/// assert_eq!(uri.export, "disk 1");
/// # Ok::<(), nbd_client::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Uri {
    /// Where the server listens.
    pub address: Address,
    /// The export's name, at most 4096 bytes; empty for the default export.
    pub export: String,
    /// TLS is required.
    pub tls: bool,
    /// The name to expect in the server's certificate, if it is not the host's.
    pub tls_hostname: Option<String>,
    /// The directory with the certificates.
    pub tls_certificates: Option<PathBuf>,
}

/// Where a server listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// TCP.
    Tcp {
        /// A name or an IP address, without brackets.
        host: String,
        /// The port.
        port: u16,
    },
    /// A Unix domain socket in the file system.
    Unix(PathBuf),
    /// A Unix domain socket in the abstract namespace of Linux.
    Abstract(Vec<u8>),
    /// A virtual machine, or the host of this one.
    Vsock {
        /// The context id: 2 is the host, 1 this machine itself.
        cid: u32,
        /// The port.
        port: u32,
    },
}

impl Uri {
    /// The default export at an address, without TLS. The fields change that.
    pub fn new(address: Address) -> Self {
        Self { address, export: String::new(), tls: false, tls_hostname: None, tls_certificates: None }
    }
}

impl FromStr for Uri {
    type Err = Error;

    /// # Errors
    /// [`Error::Uri`] names the part that cannot be used.
    fn from_str(text: &str) -> Result<Self, Error> {
        parse(text).map_err(|reason| Error::Uri { uri: text.into(), reason })
    }
}

fn parse(text: &str) -> Result<Uri, String> {
    let (scheme, rest) = text.split_once("://").ok_or("a URI begins with nbd://, nbd+unix:// or nbd+vsock://")?;
    let scheme = scheme.to_ascii_lowercase();
    let (base, transport) = scheme.split_once('+').unwrap_or((&scheme, "tcp"));
    let tls = match base {
        "nbd" => false,
        "nbds" => true,
        _ => return Err(format!("\"{scheme}\" is not a scheme of NBD: use nbd, nbds, nbd+unix, nbd+vsock")),
    };
    if rest.contains('#') {
        return Err("an NBD URI has no fragment: write %23 for a #".into());
    }
    let (rest, query) = rest.split_once('?').map_or((rest, None), |(rest, query)| (rest, Some(query)));
    let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
    if authority.contains('@') {
        return Err("a user name is for pre-shared keys, which are not supported".into());
    }
    let export = decode_text(path, "the export's name")?;
    if export.len() > NAME_MAX {
        return Err(format!("the export's name has {} bytes: at most {NAME_MAX} are allowed", export.len()));
    }
    let words = Words::parse(query.unwrap_or_default(), tls)?;
    let address = match (transport, words.socket) {
        ("unix", Some(socket)) if authority.is_empty() => unix(socket)?,
        ("unix", Some(_)) => return Err(format!("a Unix socket has no host: remove \"{authority}\"")),
        ("unix", None) => return Err("a Unix socket needs its path: ?socket=PATH".into()),
        ("tcp" | "vsock", Some(_)) => return Err("socket= is for nbd+unix and nbds+unix only".into()),
        ("tcp", None) => tcp(authority)?,
        ("vsock", None) => vsock(authority)?,
        _ => return Err(format!("\"{transport}\" is not a transport: use tcp, unix or vsock")),
    };
    Ok(Uri { address, export, tls, tls_hostname: words.hostname, tls_certificates: words.certificates })
}

fn unix(path: Vec<u8>) -> Result<Address, String> {
    match path.as_slice() {
        [] => Err("the path of the socket is empty".into()),
        [0 | b'@'] => Err("the name of the abstract socket is empty".into()),
        [0 | b'@', name @ ..] => Ok(Address::Abstract(name.into())),
        _ if path.contains(&0) => Err("the path of the socket has a NUL in it".into()),
        _ => Ok(Address::Unix(OsString::from_vec(path).into())),
    }
}

fn tcp(authority: &str) -> Result<Address, String> {
    // The brackets of an IPv6 address tell its colons from the one before the port.
    let (host, port) = match authority.strip_prefix('[') {
        Some(rest) => {
            let (host, rest) = rest.split_once(']').ok_or("the bracket of the IPv6 address is not closed")?;
            let host = decode_text(host, "the address")?;
            if host.split('%').next().is_none_or(|ip| ip.parse::<Ipv6Addr>().is_err()) {
                return Err(format!("\"{host}\" is not an IPv6 address"));
            }
            (host, rest)
        }
        None => {
            let (host, port) = authority.split_at(authority.find(':').unwrap_or(authority.len()));
            if port.matches(':').count() > 1 {
                return Err(format!("write an IPv6 address in brackets: [{authority}]"));
            }
            (decode_text(host, "the host's name")?, port)
        }
    };
    let port = match port.strip_prefix(':') {
        None if port.is_empty() => PORT,
        Some("") => PORT,
        Some(number) => digits(number).filter(|port| *port != 0).ok_or_else(|| not_a_port(number))?,
        None => return Err(format!("\"{port}\" stands behind the bracket of the IPv6 address")),
    };
    if host.is_empty() { Err("the name of the host is missing".into()) } else { Ok(Address::Tcp { host, port }) }
}

fn vsock(authority: &str) -> Result<Address, String> {
    let (cid, port) = authority.split_once(':').unwrap_or((authority, ""));
    let cid = match cid {
        "" => HOST,
        _ => digits(cid).ok_or_else(|| format!("\"{cid}\" is not a context id of vsock"))?,
    };
    let port = if port.is_empty() { PORT.into() } else { digits(port).ok_or_else(|| not_a_port(port))? };
    Ok(Address::Vsock { cid, port })
}

fn digits<T: FromStr>(text: &str) -> Option<T> {
    // Rust's numbers may have a sign.
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok())?
}

fn not_a_port(text: &str) -> String {
    format!("\"{text}\" is not a port")
}

/// The parameters after the `?`.
#[derive(Default)]
struct Words {
    socket: Option<Vec<u8>>,
    hostname: Option<String>,
    certificates: Option<PathBuf>,
}

impl Words {
    fn parse(query: &str, tls: bool) -> Result<Self, String> {
        let mut words = Self::default();
        for word in query.split('&').filter(|word| !word.is_empty()) {
            let (name, value) = word.split_once('=').ok_or_else(|| format!("the parameter \"{word}\" has no value"))?;
            if name.starts_with("tls-") && !tls {
                return Err(format!("{name} needs TLS: use nbds"));
            }
            let twice = match (name, value) {
                ("socket", _) => words.socket.replace(decode(value)?).is_some(),
                ("tls-hostname", _) => words.hostname.replace(decode_text(value, name)?).is_some(),
                ("tls-certificates", _) => {
                    words.certificates.replace(OsString::from_vec(decode(value)?).into()).is_some()
                }
                // What is done anyway.
                ("tls-type", "x509") | ("tls-verify-peer", "1") => false,
                ("tls-type" | "tls-verify-peer", _) => return Err(format!("{word} is not supported")),
                _ => return Err(format!("the parameter \"{name}\" is not known")),
            };
            if twice {
                return Err(format!("the parameter \"{name}\" is there twice"));
            }
        }
        Ok(words)
    }
}

fn decode(text: &str) -> Result<Vec<u8>, String> {
    let (mut bytes, mut rest) = (Vec::new(), text.as_bytes());
    while let [first, after @ ..] = rest {
        rest = after;
        if *first != b'%' {
            bytes.push(*first);
            continue;
        }
        let digit = |n: usize| rest.get(n).and_then(|&byte| char::from(byte).to_digit(16));
        match (digit(0), digit(1)) {
            (Some(high), Some(low)) => bytes.push((high << 4 | low) as u8),
            _ => return Err(format!("\"{text}\": two hexadecimal digits must follow a %; write %25 for a %")),
        }
        rest = &rest[2..];
    }
    Ok(bytes)
}

fn decode_text(text: &str, what: &str) -> Result<String, String> {
    let text = String::from_utf8(decode(text)?).map_err(|_| format!("{what} is not UTF-8"))?;
    if text.contains('\0') { Err(format!("{what} has a NUL in it")) } else { Ok(text) }
}

impl fmt::Display for Uri {
    /// A URI that parses to the same value.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.tls { "nbds" } else { "nbd" })?;
        let mut words = Vec::new();
        match &self.address {
            Address::Tcp { host, port } => {
                let host = quote_host(host);
                let port = if *port == PORT { String::new() } else { format!(":{port}") };
                write!(f, "://{host}{port}")?;
            }
            Address::Unix(path) => {
                // A relative path may begin as an abstract name does.
                let dot = if path.as_os_str().as_bytes().starts_with(b"@") { "./" } else { "" };
                words.push(format!("socket={dot}{}", quote(path.as_os_str().as_bytes())));
                f.write_str("+unix://")?;
            }
            Address::Abstract(name) => {
                words.push(format!("socket=%00{}", quote(name)));
                f.write_str("+unix://")?;
            }
            Address::Vsock { cid, port } => write!(f, "+vsock://{cid}:{port}")?,
        }
        if !self.export.is_empty() {
            write!(f, "/{}", quote(&self.export))?;
        }
        words.extend(self.tls_hostname.iter().map(|name| format!("tls-hostname={}", quote(name))));
        let certificates = self.tls_certificates.iter();
        words.extend(certificates.map(|dir| format!("tls-certificates={}", quote(dir.as_os_str().as_bytes()))));
        if words.is_empty() { Ok(()) } else { write!(f, "?{}", words.join("&")) }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { host, port } if host.contains(':') => write!(f, "[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "{host}:{port}"),
            Self::Unix(path) => write!(f, "{}", path.display()),
            Self::Abstract(name) => write!(f, "@{}", name.escape_ascii()),
            Self::Vsock { cid, port } => write!(f, "vsock {cid}:{port}"),
        }
    }
}

/// A host as it stands in a URI: an IPv6 address in brackets, with a percent-encoded zone; any other name percent-encoded.
fn quote_host(host: &str) -> String {
    // A slash would end the host.
    let quote = |text: &str| quote(text).replace('/', "%2F");
    let (address, zone) = host.split_once('%').map_or((host, None), |(address, zone)| (address, Some(zone)));
    match (address.parse::<Ipv6Addr>(), zone) {
        (Ok(_), None) => format!("[{address}]"),
        (Ok(_), Some(zone)) => format!("[{address}%25{}]", quote(zone)),
        (Err(_), _) => quote(host),
    }
}

/// Percent-encodes all but what is never special, and `/`.
fn quote(bytes: impl AsRef<[u8]>) -> String {
    let plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"-._~/".contains(byte);
    let quoted = |byte: &u8| if plain(byte) { char::from(*byte).to_string() } else { format!("%{byte:02X}") };
    bytes.as_ref().iter().map(quoted).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tcp(host: &str, port: u16) -> Address {
        Address::Tcp { host: host.into(), port }
    }

    #[test]
    fn addresses_and_exports() {
        let unix = |path: &str| Address::Unix(path.into());
        let vsock = |cid, port| Address::Vsock { cid, port };
        for (text, tls, address, export) in [
            ("nbd://localhost", false, tcp("localhost", PORT), ""),
            ("nbd://localhost/", false, tcp("localhost", PORT), ""),
            ("NBD://localhost:/x", false, tcp("localhost", PORT), "x"),
            ("nbds://storage.example:1/a/b", true, tcp("storage.example", 1), "a/b"),
            ("nbd+tcp://192.0.2.7", false, tcp("192.0.2.7", PORT), ""),
            ("nbd://h//disk", false, tcp("h", PORT), "/disk"),
            ("nbd://h/a%20b%2Fc+d", false, tcp("h", PORT), "a b/c+d"),
            ("nbd://h/%C3%A9", false, tcp("h", PORT), "é"),
            ("nbd://[::1]", false, tcp("::1", PORT), ""),
            ("nbd://[2001:db8::7]:65535/x", false, tcp("2001:db8::7", 65535), "x"),
            ("nbd://[fe80::1%25lo]:1", false, tcp("fe80::1%lo", 1), ""),
            ("nbd://a%2Fb/c", false, tcp("a/b", PORT), "c"),
            ("nbd://a%3Ab", false, tcp("a:b", PORT), ""),
            ("nbd://[fe80::1%25%5D%2F]/x", false, tcp("fe80::1%]/", PORT), "x"),
            ("nbd+unix:///?socket=/tmp/s", false, unix("/tmp/s"), ""),
            ("nbd+unix://?socket=s", false, unix("s"), ""),
            ("nbds+unix:///x?socket=/a%20b", true, unix("/a b"), "x"),
            ("nbd+unix:///?socket=%00a%00b", false, Address::Abstract(b"a\0b".into()), ""),
            ("nbd+unix:///?socket=@a", false, Address::Abstract(b"a".into()), ""),
            ("nbd+unix:///?socket=./@a", false, unix("./@a"), ""),
            ("nbd+vsock://", false, vsock(2, 10809), ""),
            ("nbd+vsock:///x", false, vsock(2, 10809), "x"),
            ("nbds+vsock://3:70000/x", true, vsock(3, 70000), "x"),
            ("nbd+vsock://:1", false, vsock(2, 1), ""),
        ] {
            let uri: Uri = text.parse().unwrap();
            assert_eq!((uri.tls, &uri.address, uri.export.as_str()), (tls, &address, export), "{text}");
            assert_eq!(uri.to_string().parse::<Uri>().unwrap(), uri, "{uri}");
        }
    }

    #[test]
    fn parameters_of_tls() {
        let uri: Uri = "nbds://h?tls-hostname=a.example&tls-certificates=/c%26&tls-type=x509".parse().unwrap();
        assert_eq!(uri.tls_hostname.as_deref(), Some("a.example"));
        assert_eq!(uri.tls_certificates, Some("/c&".into()));
        assert_eq!(uri.to_string(), "nbds://h?tls-hostname=a.example&tls-certificates=/c%26");
        let abstract_like = Uri::new(Address::Unix("@x".into()));
        assert_eq!(abstract_like.to_string(), "nbd+unix://?socket=./%40x");
    }

    #[test]
    fn errors_name_the_part_that_is_wrong() {
        for (text, reason) in [
            ("", "a URI begins with nbd://, nbd+unix:// or nbd+vsock://"),
            ("localhost:10809", "a URI begins with nbd://, nbd+unix:// or nbd+vsock://"),
            ("http://h", "\"http\" is not a scheme of NBD: use nbd, nbds, nbd+unix, nbd+vsock"),
            ("nbd+ssh://h", "\"ssh\" is not a transport: use tcp, unix or vsock"),
            ("nbd://", "the name of the host is missing"),
            ("nbd://:1", "the name of the host is missing"),
            ("nbd://h:0", "\"0\" is not a port"),
            ("nbd://h:65536", "\"65536\" is not a port"),
            ("nbd://h:+1", "\"+1\" is not a port"),
            ("nbd://::1", "write an IPv6 address in brackets: [::1]"),
            ("nbd://[::1", "the bracket of the IPv6 address is not closed"),
            ("nbd://[::1]1", "\"1\" stands behind the bracket of the IPv6 address"),
            ("nbd://[h]", "\"h\" is not an IPv6 address"),
            ("nbd://u@h", "a user name is for pre-shared keys, which are not supported"),
            ("nbd://h/x#y", "an NBD URI has no fragment: write %23 for a #"),
            ("nbd://h/%", "\"%\": two hexadecimal digits must follow a %; write %25 for a %"),
            ("nbd://h/%4", "\"%4\": two hexadecimal digits must follow a %; write %25 for a %"),
            ("nbd://h/%+1", "\"%+1\": two hexadecimal digits must follow a %; write %25 for a %"),
            ("nbd://h/%ff", "the export's name is not UTF-8"),
            ("nbd://h/a%00", "the export's name has a NUL in it"),
            ("nbd://h?socket=/s", "socket= is for nbd+unix and nbds+unix only"),
            ("nbd+unix:///x", "a Unix socket needs its path: ?socket=PATH"),
            ("nbd+unix:///?socket=", "the path of the socket is empty"),
            ("nbd+unix:///?socket=@", "the name of the abstract socket is empty"),
            ("nbd+unix:///?socket=a%00b", "the path of the socket has a NUL in it"),
            ("nbd+unix://h/?socket=/s", "a Unix socket has no host: remove \"h\""),
            ("nbd+unix:///?socket=/a&socket=/b", "the parameter \"socket\" is there twice"),
            ("nbd+vsock://a", "\"a\" is not a context id of vsock"),
            ("nbd+vsock://4294967296", "\"4294967296\" is not a context id of vsock"),
            ("nbd+vsock://1:x", "\"x\" is not a port"),
            ("nbd://h?x", "the parameter \"x\" has no value"),
            ("nbd://h?x=1", "the parameter \"x\" is not known"),
            ("nbd://h?tls-hostname=x", "tls-hostname needs TLS: use nbds"),
            ("nbds://h?tls-verify-peer=0", "tls-verify-peer=0 is not supported"),
            ("nbds://h?tls-type=psk", "tls-type=psk is not supported"),
        ] {
            let error = text.parse::<Uri>().unwrap_err();
            assert_eq!(error.to_string(), format!("{text:?}: {reason}"));
        }
        let long = format!("nbd://h/{}", "x".repeat(4097));
        assert!(matches!(long.parse::<Uri>(), Err(Error::Uri { reason, .. }) if reason.contains("4097 bytes")));
    }
}
