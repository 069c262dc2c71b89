//! TLS with pre-shared keys, by OpenSSL as a whole: rustls does not support such keys.

use std::{
    collections::HashMap,
    fmt, fs,
    io::{self, Read, Write},
    path::Path,
    sync::{Arc, OnceLock},
};

use blkdev::Context;
use openssl::{
    error::ErrorStack,
    ex_data::Index,
    ssl::{ErrorCode, Ssl, SslContext, SslMethod, SslOptions, SslSessionCacheMode, SslStream, SslVersion},
};

use super::engine::{Engine, Opening, PLAIN_MAX, RECORD_MAX, broken};
use crate::peer::Identity;

/// The state that all connections share.
#[derive(Clone)]
pub(super) struct Offer {
    context: SslContext,
    /// Where the callback puts the user of a connection.
    user: Index<Ssl, Arc<OnceLock<String>>>,
}

impl Offer {
    pub(super) fn new(file: &Path) -> io::Result<Self> {
        let text = fs::read_to_string(file).map_err(|e| Context::wrap(format!("{}: {e}", file.display()), e))?;
        let keys = keys(&text)
            .map_err(|what| io::Error::new(io::ErrorKind::InvalidInput, format!("{}: {what}", file.display())))?;
        Ok(Self::of(keys)?)
    }

    pub(super) fn of(keys: HashMap<String, Vec<u8>>) -> Result<Self, ErrorStack> {
        let index: Index<Ssl, Arc<OnceLock<String>>> = Ssl::new_ex_index()?;
        let mut builder = SslContext::builder(SslMethod::tls_server())?;
        builder.set_min_proto_version(Some(SslVersion::TLS1_2))?;
        // A cipher with SHA-256, which pre-shared keys are bound to, with AEAD, and with ephemeral secrets. OpenSSL does not change
        // keys on its own, so a key of AES-GCM would be used beyond its limit (RFC 8446, 5.5). This cipher has none.
        builder.set_ciphersuites("TLS_CHACHA20_POLY1305_SHA256")?;
        builder.set_cipher_list("ECDHE-PSK-CHACHA20-POLY1305")?;
        builder
            .set_options(SslOptions::NO_TICKET | SslOptions::NO_RENEGOTIATION | SslOptions::CIPHER_SERVER_PREFERENCE);
        builder.set_num_tickets(0)?;
        builder.set_session_cache_mode(SslSessionCacheMode::OFF);
        builder.set_psk_server_callback(move |ssl, identity, into| {
            let user = identity.and_then(|user| std::str::from_utf8(user).ok());
            // No key means that the user is unknown.
            let Some((user, key)) = user.and_then(|user| keys.get_key_value(user)) else { return Ok(0) };
            let Some(room) = into.get_mut(..key.len()) else { return Ok(0) };
            room.copy_from_slice(key);
            if let Some(place) = ssl.ex_data(index) {
                // A second call for one connection has the same user.
                let _ = place.set(user.clone());
            }
            Ok(key.len())
        });
        Ok(Self { context: builder.build(), user: index })
    }
}

impl fmt::Debug for Offer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Offer").finish_non_exhaustive()
    }
}

/// Parses users and keys. A user that is not plain text is written as "#" and its bytes as hexadecimal digits.
fn keys(text: &str) -> Result<HashMap<String, Vec<u8>>, String> {
    let mut keys = HashMap::new();
    for (n, line) in (1..).zip(text.lines()) {
        let line = line.trim();
        if line.is_empty() {
            continue;
        }
        let wrong = |what: &str| format!("line {n}: {what}");
        let (user, key) = line.rsplit_once(':').ok_or_else(|| wrong("expected USER:HEX"))?;
        let user = match user.strip_prefix('#') {
            Some(name) => hex(name).and_then(|name| String::from_utf8(name).ok()),
            None => Some(user.to_owned()),
        };
        let user =
            user.filter(|user| !user.is_empty()).ok_or_else(|| wrong("the user is empty or not valid hexadecimal"))?;
        let key = hex(key).filter(|key| (16..=256).contains(&key.len()));
        let key = key.ok_or_else(|| wrong("the key must be 32 to 512 hexadecimal digits"))?;
        if keys.insert(user, key).is_some() {
            return Err(wrong("this user occurs twice"));
        }
    }
    if keys.is_empty() { Err("it contains no key".into()) } else { Ok(keys) }
}

fn hex(text: &str) -> Option<Vec<u8>> {
    let digits: Vec<u8> = text.chars().map(|c| c.to_digit(16).map(|d| d as u8)).collect::<Option<_>>()?;
    digits.len().is_multiple_of(2).then(|| digits.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect())
}

/// A connection of OpenSSL.
pub(super) struct Connection {
    stream: SslStream<Pipe>,
    user: Arc<OnceLock<String>>,
}

/// The transport for OpenSSL, in place of a socket.
#[derive(Default)]
struct Pipe {
    /// Of these bytes, the first `taken` are used.
    input: Vec<u8>,
    taken: usize,
    out: Vec<u8>,
}

impl Read for Pipe {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if self.input.is_empty() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let rest = &self.input[self.taken..];
        let len = into.len().min(rest.len());
        into[..len].copy_from_slice(&rest[..len]);
        self.taken += len;
        if self.taken == self.input.len() {
            self.input.clear();
            self.taken = 0;
        }
        Ok(len)
    }
}

impl Write for Pipe {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.out.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Connection {
    pub(super) fn new(offer: &Offer) -> io::Result<Self> {
        let mut ssl = Ssl::new(&offer.context)?;
        let user = Arc::new(OnceLock::new());
        ssl.set_ex_data(offer.user, Arc::clone(&user));
        Ok(Self { stream: SslStream::new(ssl, Pipe::default())?, user })
    }

    /// Moves what OpenSSL wants to send to `out`.
    fn take_output(&mut self, out: &mut Vec<u8>) {
        out.append(&mut self.stream.get_mut().out);
    }
}

impl Engine for Connection {
    fn shake(&mut self, received: &[u8], _: &mut Vec<u8>, out: &mut Vec<u8>) -> io::Result<bool> {
        self.stream.get_mut().input.extend_from_slice(received);
        let accepted = self.stream.accept();
        self.take_output(out);
        match accepted {
            Ok(()) => Ok(true),
            Err(e) if e.code() == ErrorCode::WANT_READ => Ok(false),
            Err(e) => Err(io::Error::other(e)),
        }
    }

    fn identity(&self) -> io::Result<Option<Identity>> {
        let user = self.user.get().ok_or_else(|| broken("the client sent no user"))?;
        Ok(Some(Identity { psk: Some(user.clone()), ..Identity::default() }))
    }

    /// OpenSSL keeps the beginning of a record.
    fn rest(&self) -> usize {
        RECORD_MAX
    }

    fn load(&self, _: &mut [u8]) -> usize {
        0
    }

    fn open(&mut self, staging: &mut [u8], end: usize, out: &mut Vec<u8>) -> io::Result<Opening> {
        self.stream.get_mut().input.extend_from_slice(&staging[PLAIN_MAX..end]);
        let (mut plain, mut has_ended) = (0, false);
        // The plain text of these records, and of one that was incomplete before, fits.
        let result = loop {
            match self.stream.ssl_read(&mut staging[plain..]) {
                Ok(0) => break Err(broken("more plain text than records")),
                Ok(got) => plain += got,
                Err(e) if e.code() == ErrorCode::WANT_READ => break Ok(()),
                Err(e) if e.code() == ErrorCode::ZERO_RETURN => {
                    has_ended = true;
                    break Ok(());
                }
                Err(e) => break Err(io::Error::other(e)),
            }
        };
        self.take_output(out);
        result.map(|()| Opening { plain, has_ended })
    }

    fn seal<'a>(
        &'a mut self,
        staging: &'a mut [u8],
        fill: &mut dyn FnMut(&mut [u8]) -> usize,
        out: &mut Vec<u8>,
    ) -> io::Result<&'a [u8]> {
        let (text, room) = staging.split_at_mut(PLAIN_MAX);
        let pipe = self.stream.get_mut();
        pipe.out.clear();
        while self.stream.get_ref().out.len() < room.len() {
            let len = fill(text);
            if len == 0 {
                break;
            }
            match self.stream.ssl_write(&text[..len]) {
                Ok(written) if written == len => {}
                Ok(_) => return Err(broken("a record was cut")),
                Err(e) => {
                    self.take_output(out);
                    return Err(io::Error::other(e));
                }
            }
        }
        Ok(&self.stream.get_ref().out)
    }

    fn close(&mut self, out: &mut Vec<u8>) {
        let _ = self.stream.shutdown();
        self.take_output(out);
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ssl = self.stream.ssl();
        let version = match ssl.version2() {
            Some(SslVersion::TLS1_2) => "TLS 1.2",
            Some(SslVersion::TLS1_3) => "TLS 1.3",
            _ => "TLS",
        };
        write!(f, "{version} with ChaCha20-Poly1305")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_keys() {
        let key = "00112233445566778899aabbccddeeff";
        let good = keys(&format!("alice:{key}\n\nb:o:{}\r\n#c3a4:{key}\n", key.to_uppercase())).unwrap();
        assert_eq!((good.len(), good["alice"][15], &good["b:o"]), (3, 0xff, &good["ä"]));
        for (bad, line) in [
            ("alice", "line 1"),
            (&format!("a:{key}\nb:0011"), "line 2"),
            (&format!("a:{key}0"), "line 1"),
            (&format!("a:{key}xy"), "line 1"),
            (&format!(":{key}"), "line 1"),
            (&format!("#zz:{key}"), "line 1"),
            (&format!("a:{key}\na:{key}"), "line 2"),
            ("\n", "no key"),
        ] {
            let error = keys(bad).unwrap_err();
            assert!(error.contains(line), "{bad:?}: {error}");
        }
    }
}
