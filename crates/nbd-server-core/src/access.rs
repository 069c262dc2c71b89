//! [`Access`]: the rules that decide which clients may open an export.

use std::{
    fmt, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    str::FromStr,
};

use crate::peer::{Identity, Origin, Peer};

/// The rules of one export. Without rules, every client may open it. With rules, a client must match at least one of them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Access(pub Vec<Rule>);

/// Matches clients by one property. As text, `KIND=VALUE`:
///
/// | text | matches |
/// |---|---|
/// | `ip=ADDRESS`, `ip=ADDRESS/BITS` | TCP clients with this IPv4 or IPv6 address, or in this network |
/// | `uid=N`, `gid=N` | processes on a unix socket with this effective user or group (supplementary groups do not count) |
/// | `cid=N` | this vsock context: a virtual machine, or 2, its host |
/// | `dn=NAME` | TLS clients with a certificate of exactly this subject (RFC 4514) |
/// | `san=KIND:NAME` | TLS clients with a certificate for exactly this name: `DNS:host.example`, `IP:192.0.2.7`, … |
/// | `psk=USER` | TLS clients with the pre-shared key of this user |
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Rule {
    /// A network: its address, with all host bits zero, and the length of its prefix in bits.
    Net(IpAddr, u8),
    /// The effective user id of a process on a unix socket.
    Uid(u32),
    /// The effective group id of a process on a unix socket.
    Gid(u32),
    /// A vsock context id.
    Cid(u32),
    /// The subject of a certificate (RFC 4514).
    Subject(String),
    /// A subject alternative name of a certificate, with its kind: `DNS:host.example`.
    Name(String),
    /// The user name of a pre-shared key.
    Psk(String),
}

impl Access {
    /// Whether a client may open the export.
    pub fn admits(&self, peer: &Peer) -> bool {
        self.0.is_empty() || self.0.iter().any(|rule| rule.admits(peer))
    }
}

impl Rule {
    fn admits(&self, peer: &Peer) -> bool {
        let identity = |test: &dyn Fn(&Identity) -> bool| peer.identity.as_ref().is_some_and(test);
        match (self, peer.origin) {
            (Self::Net(net, bits), Origin::Tcp(from)) => first_bits(from.ip(), *bits) == *net,
            (Self::Uid(allowed), Origin::Unix { uid, .. }) => uid == *allowed,
            (Self::Gid(allowed), Origin::Unix { gid, .. }) => gid == *allowed,
            (Self::Cid(allowed), Origin::Vsock { cid, .. }) => cid == *allowed,
            (Self::Subject(name), _) => identity(&|who| who.subject.as_ref() == Some(name)),
            (Self::Name(name), _) => identity(&|who| who.names.contains(name)),
            (Self::Psk(user), _) => identity(&|who| who.psk.as_ref() == Some(user)),
            (Self::Net(..) | Self::Uid(_) | Self::Gid(_) | Self::Cid(_), _) => false,
        }
    }
}

/// Clears all but the first `bits` of an address.
fn first_bits(address: IpAddr, bits: u8) -> IpAddr {
    match address {
        IpAddr::V4(v4) => Ipv4Addr::from_bits(v4.to_bits() & !u32::MAX.checked_shr(bits.into()).unwrap_or(0)).into(),
        IpAddr::V6(v6) => Ipv6Addr::from_bits(v6.to_bits() & !u128::MAX.checked_shr(bits.into()).unwrap_or(0)).into(),
    }
}

impl FromStr for Rule {
    type Err = io::Error;

    fn from_str(text: &str) -> io::Result<Self> {
        let wrong = |what: &str| io::Error::new(io::ErrorKind::InvalidInput, format!("\"{text}\": {what}"));
        let (kind, value) = text.split_once('=').ok_or_else(|| wrong("a rule is KIND=VALUE, such as uid=0"))?;
        let number = || value.parse().map_err(|_| wrong("the value must be a number"));
        let name = || match value {
            "" => Err(wrong("the value is empty")),
            _ => Ok(value.to_owned()),
        };
        Ok(match kind {
            "ip" => net(value).map_err(|what| wrong(&what))?,
            "uid" => Self::Uid(number()?),
            "gid" => Self::Gid(number()?),
            "cid" => Self::Cid(number()?),
            "dn" => Self::Subject(name()?),
            "san" if !value.contains(':') => return Err(wrong("the name needs its kind, such as DNS:host.example")),
            "san" => Self::Name(name()?),
            "psk" => Self::Psk(name()?),
            _ => return Err(wrong("a rule is one of ip=, uid=, gid=, cid=, dn=, san= and psk=")),
        })
    }
}

fn net(text: &str) -> Result<Rule, String> {
    let (address, bits) = text.split_once('/').map_or((text, None), |(address, bits)| (address, Some(bits)));
    let address: IpAddr = address.parse().map_err(|_| "not an IPv4 or IPv6 address, nor one with /BITS")?;
    let width = if address.is_ipv4() { 32 } else { 128 };
    let bits = match bits.map(str::parse) {
        None => width,
        Some(Ok(bits)) if bits <= width => bits,
        Some(_) => return Err(format!("a network has 0 to {width} bits")),
    };
    let net = first_bits(address, bits);
    if net != address {
        return Err(format!("the address has bits after the first {bits}; write the network as {net}/{bits}"));
    }
    if let (IpAddr::V6(v6), IpAddr::V4(v4)) = (address, net.to_canonical()) {
        return Err(format!("{v6} is an IPv4 address; write it as {v4}"));
    }
    Ok(Rule::Net(net, bits))
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Net(net, bits) => write!(f, "ip={net}/{bits}"),
            Self::Uid(uid) => write!(f, "uid={uid}"),
            Self::Gid(gid) => write!(f, "gid={gid}"),
            Self::Cid(cid) => write!(f, "cid={cid}"),
            Self::Subject(name) => write!(f, "dn={name}"),
            Self::Name(name) => write!(f, "san={name}"),
            Self::Psk(user) => write!(f, "psk={user}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tcp(address: &str) -> Peer {
        Peer { origin: Origin::Tcp((address.parse::<IpAddr>().unwrap(), 5).into()), identity: None }
    }

    fn check(rules: &[&str], peer: &Peer, admitted: bool) {
        let access = Access(rules.iter().map(|rule| rule.parse().unwrap()).collect());
        assert_eq!(access.admits(peer), admitted, "{rules:?} for {peer:?}");
    }

    #[test]
    fn networks() {
        check(&["ip=127.0.0.0/8"], &tcp("127.255.0.1"), true);
        check(&["ip=127.0.0.0/8"], &tcp("128.0.0.1"), false);
        check(&["ip=127.0.0.0/8"], &tcp("::1"), false);
        check(&["ip=192.0.2.128/25"], &tcp("192.0.2.127"), false);
        check(&["ip=192.0.2.128/25"], &tcp("192.0.2.200"), true);
        check(&["ip=192.0.2.7"], &tcp("192.0.2.7"), true);
        check(&["ip=192.0.2.7"], &tcp("192.0.2.6"), false);
        check(&["ip=0.0.0.0/0"], &tcp("203.0.113.1"), true);
        check(&["ip=0.0.0.0/0"], &tcp("2001:db8::1"), false);
        check(&["ip=::/0"], &tcp("2001:db8::1"), true);
        check(&["ip=::/0"], &tcp("203.0.113.1"), false);
        check(&["ip=2001:db8::/33"], &tcp("2001:db8:7fff::1"), true);
        check(&["ip=2001:db8::/33"], &tcp("2001:db8:8000::1"), false);
        check(&["ip=::1"], &tcp("::1"), true);
    }

    #[test]
    fn without_rules_every_client_is_admitted_and_with_rules_those_that_match_one() {
        let unix = Peer { origin: Origin::Unix { uid: 1000, gid: 100, pid: 1 }, identity: None };
        let vsock = Peer { origin: Origin::Vsock { cid: 3, port: 1000 }, identity: None };
        for peer in [&unix, &vsock, &Peer::default(), &tcp("::1")] {
            check(&[], peer, true);
            check(&["uid=1"], peer, false);
            check(&["psk=alice", "ip=10.0.0.0/8"], peer, false);
        }
        check(&["uid=1000"], &unix, true);
        check(&["gid=100"], &unix, true);
        check(&["gid=1000", "uid=100"], &unix, false);
        check(&["uid=1", "ip=::1", "gid=100"], &unix, true);
        check(&["cid=3"], &vsock, true);
        check(&["cid=1000", "uid=3"], &vsock, false);
    }

    #[test]
    fn identities_of_tls() {
        let identity = Identity {
            subject: Some("CN=a,O=b".into()),
            names: vec!["DNS:host.example".into(), "IP:192.0.2.7".into()],
            psk: None,
        };
        let host = Peer { identity: Some(identity), ..tcp("192.0.2.8") };
        check(&["dn=CN=a,O=b"], &host, true);
        check(&["dn=CN=a"], &host, false);
        check(&["san=IP:192.0.2.7"], &host, true);
        check(&["ip=192.0.2.7", "san=DNS:192.0.2.7", "psk=a"], &host, false);
        let alice =
            Peer { identity: Some(Identity { psk: Some("alice".into()), ..Identity::default() }), ..tcp("::1") };
        check(&["psk=alice"], &alice, true);
        check(&["psk=bob", "dn=alice", "san=DNS:alice"], &alice, false);
    }

    #[test]
    fn rules_as_text() {
        for same in ["ip=10.0.0.0/8", "ip=::1/128", "uid=0", "gid=7", "cid=3", "dn=CN=a,O=b", "san=DNS:a", "psk=alice"]
        {
            assert_eq!(same.parse::<Rule>().unwrap().to_string(), same);
        }
        for (text, word) in [
            ("", "KIND=VALUE"),
            ("uid", "KIND=VALUE"),
            ("user=1", "one of"),
            ("uid=root", "number"),
            ("uid=-1", "number"),
            ("cid=4294967296", "number"),
            ("ip=localhost", "address"),
            ("ip=10.0.0.1/8", "10.0.0.0/8"),
            ("ip=10.0.0.0/33", "32"),
            ("ip=::/129", "128"),
            ("ip=::/-1", "128"),
            ("ip=::ffff:10.0.0.1", "10.0.0.1"),
            ("san=host", "DNS:"),
            ("psk=", "empty"),
        ] {
            let error = text.parse::<Rule>().unwrap_err().to_string();
            assert!(error.contains(word) && error.contains(text), "{text}: {error}");
        }
    }
}
