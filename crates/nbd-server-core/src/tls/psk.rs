//! TLS with pre-shared keys. OpenSSL does the handshake and yields the secrets, because rustls does not support such keys.

use std::{
    collections::HashMap,
    fmt, fs,
    io::{self, Read, Write},
    mem,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use blkdev::Context;
use openssl::{
    error::ErrorStack,
    ex_data::Index,
    ssl::{ErrorCode, Ssl, SslContext, SslMethod, SslOptions, SslSessionCacheMode, SslStream, SslVersion},
};
use ring::{hkdf, hmac};

use super::records::{Agreed, Cipher, Secret, Version, broken};
use crate::peer::Identity;

/// The state that all connections share.
#[derive(Clone)]
pub(super) struct Offer {
    context: SslContext,
    told: Index<Ssl, Arc<Mutex<Told>>>,
}

/// The results of one handshake that OpenSSL reports: the user, and the secrets.
#[derive(Default)]
struct Told {
    user: Option<String>,
    /// TLS 1.3: the client's secret and ours.
    traffic: [Option<Vec<u8>>; 2],
    /// TLS 1.2: the master secret.
    master: Option<Vec<u8>>,
}

impl Offer {
    pub(super) fn new(file: &Path) -> io::Result<Self> {
        let text = fs::read_to_string(file).map_err(|e| Context::wrap(format!("{}: {e}", file.display()), e))?;
        let keys = keys(&text)
            .map_err(|what| io::Error::new(io::ErrorKind::InvalidInput, format!("{}: {what}", file.display())))?;
        Ok(Self::of(keys)?)
    }

    fn of(keys: HashMap<String, Vec<u8>>) -> Result<Self, ErrorStack> {
        let told: Index<Ssl, Arc<Mutex<Told>>> = Ssl::new_ex_index()?;
        let mut builder = SslContext::builder(SslMethod::tls_server())?;
        builder.set_min_proto_version(Some(SslVersion::TLS1_2))?;
        // Ciphers with SHA-256, which pre-shared keys are bound to, with AEAD, and with ephemeral secrets.
        builder.set_ciphersuites("TLS_AES_128_GCM_SHA256:TLS_CHACHA20_POLY1305_SHA256")?;
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
            tell(ssl.ex_data(told), |told| told.user = Some(user.clone()));
            Ok(key.len())
        });
        builder.set_keylog_callback(move |ssl, line| {
            let mut words = line.split(' ');
            let (Some(label), _, Some(secret)) = (words.next(), words.next(), words.next()) else { return };
            let secret = hex(secret);
            tell(ssl.ex_data(told), |told| match label {
                "CLIENT_TRAFFIC_SECRET_0" => told.traffic[0] = secret,
                "SERVER_TRAFFIC_SECRET_0" => told.traffic[1] = secret,
                "CLIENT_RANDOM" => told.master = secret,
                _ => {}
            });
        });
        Ok(Self { context: builder.build(), told })
    }
}

fn tell(told: Option<&Arc<Mutex<Told>>>, what: impl FnOnce(&mut Told)) {
    if let Some(told) = told {
        what(&mut told.lock().unwrap_or_else(PoisonError::into_inner));
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

/// One connection's handshake.
pub(super) struct Engine {
    stream: SslStream<Pipe>,
    told: Arc<Mutex<Told>>,
}

/// The transport for OpenSSL, in place of a socket.
#[derive(Default)]
struct Pipe {
    input: Vec<u8>,
    out: Vec<u8>,
}

impl Read for Pipe {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if self.input.is_empty() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let len = into.len().min(self.input.len());
        into[..len].copy_from_slice(&self.input[..len]);
        self.input.drain(..len);
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

impl Engine {
    pub(super) fn new(offer: &Offer) -> io::Result<Self> {
        let mut ssl = Ssl::new(&offer.context)?;
        let told = Arc::new(Mutex::new(Told::default()));
        ssl.set_ex_data(offer.told, Arc::clone(&told));
        Ok(Self { stream: SslStream::new(ssl, Pipe::default())?, told })
    }

    /// As [`x509::Engine::go`](super::x509::Engine::go). OpenSSL reads record by record, and none after the handshake.
    pub(super) fn go(&mut self, input: &mut Vec<u8>, out: &mut Vec<u8>) -> io::Result<bool> {
        mem::swap(input, &mut self.stream.get_mut().input);
        let accepted = self.stream.accept();
        let pipe = self.stream.get_mut();
        mem::swap(input, &mut pipe.input);
        out.append(&mut pipe.out);
        match accepted {
            Ok(()) => Ok(true),
            Err(e) if e.code() == ErrorCode::WANT_READ => Ok(false),
            Err(e) => Err(io::Error::other(e)),
        }
    }

    pub(super) fn agreed(self) -> io::Result<(Agreed, Option<Identity>)> {
        let Told { user, traffic, master } = mem::take(&mut *self.told.lock().unwrap_or_else(PoisonError::into_inner));
        let user = user.ok_or_else(|| broken("the client sent no user"))?;
        let ssl = self.stream.ssl();
        let cipher = match ssl.current_cipher().map(|cipher| cipher.name()) {
            Some("TLS_AES_128_GCM_SHA256") => Cipher::Aes128Gcm,
            Some("TLS_CHACHA20_POLY1305_SHA256" | "ECDHE-PSK-CHACHA20-POLY1305") => Cipher::Chacha20Poly1305,
            _ => return Err(broken("a cipher that was not offered")),
        };
        let agreed = match (ssl.version2(), traffic, master) {
            (Some(SslVersion::TLS1_3), [Some(client), Some(server)], _) => {
                let mut ratchets = [Ratchet { cipher, secret: client }, Ratchet { cipher, secret: server }];
                let [receive, send] = [ratchets[0].secret()?, ratchets[1].secret()?];
                let next = move |way| ratchets[way as usize].step();
                Agreed { version: Version::Tls13, receive, send, next: Box::new(next) }
            }
            (Some(SslVersion::TLS1_2), _, Some(master)) => {
                let mut randoms = [0; 64];
                ssl.server_random(&mut randoms[..32]);
                ssl.client_random(&mut randoms[32..]);
                // The client's key and ours, the client's nonce and ours (RFC 5246, 6.3; RFC 7905, 2).
                let block = prf(&master, b"key expansion", &randoms, 2 * (32 + 12));
                let secret = |key: usize, iv: usize| Secret {
                    cipher,
                    key: block[key..key + 32].to_vec(),
                    iv: block[iv..iv + 12].try_into().expect("12 bytes were taken"),
                    // Each side has sent one record, Finished.
                    seq: 1,
                };
                let next = |_| Err(broken("TLS 1.2 cannot change keys"));
                Agreed { version: Version::Tls12, receive: secret(0, 64), send: secret(32, 76), next: Box::new(next) }
            }
            _ => return Err(broken("a handshake without secrets")),
        };
        Ok((agreed, Some(Identity { psk: Some(user), ..Identity::default() })))
    }
}

impl fmt::Debug for Offer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Offer").finish_non_exhaustive()
    }
}

/// The TLS 1.3 secret of one direction, from which the next ones are derived (RFC 8446, 7.2 and 7.3).
struct Ratchet {
    cipher: Cipher,
    secret: Vec<u8>,
}

impl Ratchet {
    fn secret(&self) -> io::Result<Secret> {
        let iv = expand(&self.secret, "iv", 12)?;
        Ok(Secret {
            cipher: self.cipher,
            key: expand(&self.secret, "key", self.cipher.algorithm().key_len())?,
            iv: iv[..].try_into().expect("12 bytes were asked for"),
            seq: 0,
        })
    }

    fn step(&mut self) -> io::Result<Secret> {
        self.secret = expand(&self.secret, "traffic upd", self.secret.len())?;
        self.secret()
    }
}

/// HKDF-Expand-Label without a context (RFC 8446, 7.1).
fn expand(secret: &[u8], label: &str, len: usize) -> io::Result<Vec<u8>> {
    struct Len(usize);
    impl hkdf::KeyType for Len {
        fn len(&self) -> usize {
            self.0
        }
    }
    let label = [b"tls13 ", label.as_bytes()].concat();
    let info = [&[0, len as u8, label.len() as u8], &label[..], &[0]];
    let (prk, mut out) = (hkdf::Prk::new_less_safe(hkdf::HKDF_SHA256, secret), vec![0; len]);
    let filled = prk.expand(&info, Len(len)).and_then(|okm| okm.fill(&mut out));
    filled.map_err(|_| broken("a secret of the wrong length"))?;
    Ok(out)
}

/// The pseudorandom function of TLS 1.2 (RFC 5246, 5).
fn prf(secret: &[u8], label: &[u8], seed: &[u8], len: usize) -> Vec<u8> {
    let (key, seed) = (hmac::Key::new(hmac::HMAC_SHA256, secret), [label, seed].concat());
    let (mut a, mut out) = (hmac::sign(&key, &seed), Vec::new());
    while out.len() < len {
        out.extend_from_slice(hmac::sign(&key, &[a.as_ref(), &seed].concat()).as_ref());
        a = hmac::sign(&key, a.as_ref());
    }
    out.truncate(len);
    out
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
