//! The record protocol of TLS 1.2 and 1.3 with their AEAD ciphers (RFC 8446, 5; RFC 5246, 6.2; RFC 5288; RFC 7905). It turns
//! plain text into records and back, many at a time, in the caller's memory.
//!
//! The keys come from the handshake of another library. So the data path has no allocation and no unnecessary copy, and the same
//! secrets can go to the kernel instead.

use std::{fmt, io};

use ring::aead::{
    AES_128_GCM, AES_256_GCM, Aad, Algorithm, CHACHA20_POLY1305, LessSafeKey, MAX_TAG_LEN, NONCE_LEN, Nonce, UnboundKey,
};

/// Longest plain text of one record (RFC 8446, 5.1).
const PLAIN_MAX: usize = 1 << 14;
const HEADER: usize = 5;
/// The part of the nonce that TLS 1.2 sends with AES-GCM (RFC 5288, 3).
const EXPLICIT: usize = 8;
/// Longest record that we send: a header, then the nonce of TLS 1.2 or the type of TLS 1.3, the plain text, and the tag.
pub(crate) const SEALED_MAX: usize = HEADER + EXPLICIT + PLAIN_MAX + MAX_TAG_LEN;
/// Longest record that we accept: 2^14 + 256 (RFC 8446, 5.2), which is more than AEAD ciphers add under TLS 1.2.
pub(crate) const RECORD_MAX: usize = HEADER + PLAIN_MAX + 256;

const ALERT: u8 = 21;
const HANDSHAKE: u8 = 22;
const DATA: u8 = 23;

/// A KeyUpdate message without its last byte, which requests an update from the other side (RFC 8446, 4.6.3).
const KEY_UPDATE: [u8; 4] = [24, 0, 0, 1];

/// Records after which a key of AES-GCM must change (RFC 8446, 5.5: 2^24.5). TLS 1.2 cannot change it.
const KEY_RECORDS: u64 = 1 << 24;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Version {
    Tls12,
    Tls13,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cipher {
    Aes128Gcm,
    Aes256Gcm,
    Chacha20Poly1305,
}

impl Cipher {
    pub(crate) fn algorithm(self) -> &'static Algorithm {
        match self {
            Self::Aes128Gcm => &AES_128_GCM,
            Self::Aes256Gcm => &AES_256_GCM,
            Self::Chacha20Poly1305 => &CHACHA20_POLY1305,
        }
    }
}

/// The secrets of one direction.
#[derive(Clone)]
pub(crate) struct Secret {
    pub(crate) cipher: Cipher,
    /// It has the length that the cipher needs.
    pub(crate) key: Vec<u8>,
    pub(crate) iv: [u8; NONCE_LEN],
    /// The sequence number of the next record.
    pub(crate) seq: u64,
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Secret").field("cipher", &self.cipher).field("seq", &self.seq).finish_non_exhaustive()
    }
}

/// The direction of records, from our side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    In,
    Out,
}

/// The results of a handshake.
pub(crate) struct Agreed {
    pub(crate) version: Version,
    pub(crate) receive: Secret,
    pub(crate) send: Secret,
    pub(crate) next: Next,
}

/// Returns the next secret of a direction (RFC 8446, 7.2).
pub(crate) type Next = Box<dyn FnMut(Way) -> io::Result<Secret> + Send>;

/// A connection's record protocol.
pub(crate) struct Records {
    receive: Half,
    send: Half,
    next: Next,
    /// The client has requested a new key for our next records.
    update_due: bool,
    /// The client has sent an alert: no more data comes.
    ended: bool,
}

/// The result of [`Records::open`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Opened {
    /// Bytes of plain text, now at the front.
    pub(crate) plain: usize,
    /// Bytes of records that were used up. The rest is the beginning of a record.
    pub(crate) used: usize,
}

impl Records {
    pub(crate) fn new(agreed: Agreed) -> io::Result<Self> {
        let Agreed { version, receive, send, next } = agreed;
        let (receive, send) = (Half::new(version, receive)?, Half::new(version, send)?);
        Ok(Self { receive, send, next, update_due: false, ended: false })
    }

    /// Whether the client has closed its direction.
    pub(crate) fn ended(&self) -> bool {
        self.ended
    }

    /// The secrets of both directions from the next record on; `None` if the client awaits a new one.
    pub(crate) fn secrets(&self) -> Option<(Version, &Secret, &Secret)> {
        let Self { receive, send, .. } = self;
        (!self.update_due && !self.ended).then_some((send.version, &receive.secret, &send.secret))
    }

    /// Opens all whole records of `bytes` in place, and moves their plain text to the front.
    ///
    /// # Errors
    /// The peer violated the protocol, or a record was tampered with: drop the connection.
    pub(crate) fn open(&mut self, bytes: &mut [u8]) -> io::Result<Opened> {
        let (mut plain, mut used) = (0, 0);
        while !self.ended
            && let Some(len) = record_len(&bytes[used..])?
            && used + len <= bytes.len()
        {
            let (kind, got) = self.receive.open(&mut bytes[plain..used + len], used - plain)?;
            used += len;
            match kind {
                DATA => plain += got,
                // Whatever the alert is, no data after it can be trusted.
                ALERT => self.ended = true,
                HANDSHAKE => self.post_handshake(&bytes[plain..plain + got])?,
                _ => return Err(broken("a record of an unexpected type")),
            }
        }
        Ok(Opened { plain, used })
    }

    fn post_handshake(&mut self, message: &[u8]) -> io::Result<()> {
        match message.split_last() {
            Some((&wanted @ 0..=1, rest)) if rest == KEY_UPDATE && self.receive.version == Version::Tls13 => {
                self.receive = Half::new(Version::Tls13, (self.next)(Way::In)?)?;
                self.update_due |= wanted == 1;
                Ok(())
            }
            _ => Err(broken("a handshake message after the handshake")),
        }
    }

    /// Seals records into `out`. `fill` puts plain text into a buffer and returns its length; it is called while it has data and
    /// `out` has room. Returns the length of the records. `out` has room for at least [`SEALED_MAX`].
    pub(crate) fn seal(&mut self, out: &mut [u8], mut fill: impl FnMut(&mut [u8]) -> usize) -> io::Result<usize> {
        let mut done = 0;
        while out.len() - done >= SEALED_MAX {
            if self.update_due || self.send.is_worn() {
                let message = [&KEY_UPDATE[..], &[0]].concat();
                done += self.send.seal(HANDSHAKE, &mut out[done..], |room| {
                    room[..message.len()].copy_from_slice(&message);
                    message.len()
                })?;
                self.send = Half::new(Version::Tls13, (self.next)(Way::Out)?)?;
                self.update_due = false;
                continue;
            }
            match self.send.seal(DATA, &mut out[done..], &mut fill)? {
                0 => break,
                len => done += len,
            }
        }
        Ok(done)
    }

    /// Seals a closure alert into `out`, which has room for [`SEALED_MAX`]. Returns its length.
    pub(crate) fn close(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let close_notify = [1, 0];
        self.send.seal(ALERT, out, |room| {
            room[..2].copy_from_slice(&close_notify);
            2
        })
    }
}

impl fmt::Debug for Records {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} with {:?}", self.send.version, self.send.secret.cipher)
    }
}

/// Returns the length of the record that begins here; `None` if its header is incomplete.
pub(crate) fn record_len(bytes: &[u8]) -> io::Result<Option<usize>> {
    let Some(&[_, major, _, high, low]) = bytes.first_chunk() else { return Ok(None) };
    let len = HEADER + usize::from(u16::from_be_bytes([high, low]));
    if major != 3 || len > RECORD_MAX {
        return Err(broken("the data is not TLS"));
    }
    Ok(Some(len))
}

/// One direction.
struct Half {
    version: Version,
    /// Its number is that of the next record.
    secret: Secret,
    key: LessSafeKey,
}

impl Half {
    fn new(version: Version, secret: Secret) -> io::Result<Self> {
        let key = UnboundKey::new(secret.cipher.algorithm(), &secret.key);
        let key = LessSafeKey::new(key.map_err(|_| broken("a key of the wrong length"))?);
        Ok(Self { version, secret, key })
    }

    fn has_explicit_nonce(&self) -> bool {
        self.version == Version::Tls12 && self.secret.cipher != Cipher::Chacha20Poly1305
    }

    /// Whether the key has reached its limit of use.
    fn is_worn(&self) -> bool {
        self.version == Version::Tls13
            && self.secret.cipher != Cipher::Chacha20Poly1305
            && self.secret.seq >= KEY_RECORDS
    }

    /// Returns the nonce and the number of the next record.
    fn step(&mut self) -> io::Result<([u8; NONCE_LEN], [u8; 8])> {
        let seq = self.secret.seq.to_be_bytes();
        self.secret.seq = self.secret.seq.checked_add(1).ok_or_else(|| broken("no more record numbers"))?;
        let mut nonce = self.secret.iv;
        nonce[NONCE_LEN - 8..].iter_mut().zip(seq).for_each(|(byte, s)| *byte ^= s);
        Ok((nonce, seq))
    }

    /// Opens the record that starts after the first `skip` of `bytes` and fills the rest. Moves its plain text to the front.
    /// Returns its true type and the length of the plain text.
    fn open(&mut self, bytes: &mut [u8], skip: usize) -> io::Result<(u8, usize)> {
        let header: [u8; HEADER] = *bytes[skip..].first_chunk().expect("the record is whole");
        let (mut nonce, seq) = self.step()?;
        let mut start = skip + HEADER;
        if self.has_explicit_nonce() {
            let explicit =
                bytes[start..].first_chunk::<EXPLICIT>().ok_or_else(|| broken("a record without a nonce"))?;
            nonce[NONCE_LEN - EXPLICIT..].copy_from_slice(explicit);
            start += EXPLICIT;
        }
        let len = bytes.len().checked_sub(start + MAX_TAG_LEN).ok_or_else(|| broken("a record without a tag"))?;
        let nonce = Nonce::assume_unique_for_key(nonce);
        let opened = match self.version {
            Version::Tls13 if header[0] != DATA => return Err(broken("a record that is not encrypted")),
            Version::Tls13 => self.key.open_within(nonce, Aad::from(header), bytes, start..),
            Version::Tls12 => self.key.open_within(nonce, Aad::from(aad12(seq, header, len)), bytes, start..),
        };
        let mut plain = &*opened.map_err(|_| broken("a record was changed on its way"))?;
        let mut kind = header[0];
        if self.version == Version::Tls13 {
            // The true type follows the plain text; padding may follow it.
            let end = plain.iter().rposition(|&byte| byte != 0).ok_or_else(|| broken("a record without a type"))?;
            (kind, plain) = (plain[end], &plain[..end]);
        }
        if plain.len() > PLAIN_MAX {
            return Err(broken("a record is too long"));
        }
        Ok((kind, plain.len()))
    }

    /// Seals one record at the front of `out`, with the plain text that `fill` supplies. Returns its length, 0 if there was no
    /// plain text.
    fn seal(&mut self, kind: u8, out: &mut [u8], fill: impl FnOnce(&mut [u8]) -> usize) -> io::Result<usize> {
        let start = HEADER + if self.has_explicit_nonce() { EXPLICIT } else { 0 };
        let mut end = start + fill(&mut out[start..start + PLAIN_MAX]);
        if end == start {
            return Ok(0);
        }
        let (nonce, seq) = self.step()?;
        let mut header = [kind, 3, 3, 0, 0];
        if self.version == Version::Tls13 {
            out[end] = kind;
            end += 1;
            header[0] = DATA;
        }
        let len = u16::try_from(end + MAX_TAG_LEN - HEADER).expect("a record is shorter than 64 KiB");
        header[3..].copy_from_slice(&len.to_be_bytes());
        out[..HEADER].copy_from_slice(&header);
        if self.has_explicit_nonce() {
            out[HEADER..start].copy_from_slice(&nonce[NONCE_LEN - EXPLICIT..]);
        }
        let (nonce, text) = (Nonce::assume_unique_for_key(nonce), &mut out[start..end]);
        let tag = match self.version {
            Version::Tls13 => self.key.seal_in_place_separate_tag(nonce, Aad::from(header), text),
            Version::Tls12 => {
                let aad = aad12(seq, header, text.len());
                self.key.seal_in_place_separate_tag(nonce, Aad::from(aad), text)
            }
        };
        let tag = tag.map_err(|_| broken("a record could not be sealed"))?;
        out[end..end + MAX_TAG_LEN].copy_from_slice(tag.as_ref());
        Ok(end + MAX_TAG_LEN)
    }
}

/// The additional data that TLS 1.2 authenticates (RFC 5246, 6.2.3.3).
fn aad12(seq: [u8; 8], header: [u8; HEADER], len: usize) -> [u8; 13] {
    let mut aad = [0; 13];
    aad[..8].copy_from_slice(&seq);
    aad[8..11].copy_from_slice(&header[..3]);
    aad[11..].copy_from_slice(&u16::try_from(len).expect("a record is shorter than 64 KiB").to_be_bytes());
    aad
}

pub(crate) fn broken(text: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("TLS: {text}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const CIPHERS: [Cipher; 3] = [Cipher::Aes128Gcm, Cipher::Aes256Gcm, Cipher::Chacha20Poly1305];

    fn secret(cipher: Cipher, n: u8) -> Secret {
        Secret { cipher, key: vec![n; cipher.algorithm().key_len()], iv: [n ^ 0xff; NONCE_LEN], seq: n.into() }
    }

    /// The two ends of a connection.
    fn pair(version: Version, cipher: Cipher) -> [Records; 2] {
        let next = |first: u8| -> Next {
            let mut count = [0, 0];
            Box::new(move |way| {
                count[way as usize] += 1;
                let side = first ^ u8::from(way == Way::Out);
                Ok(Secret { seq: 0, ..secret(cipher, 100 + side * 50 + count[way as usize]) })
            })
        };
        let (one, other) = (secret(cipher, 1), secret(cipher, 2));
        [(one.clone(), other.clone(), 0), (other, one, 1)]
            .map(|(receive, send, first)| Records::new(Agreed { version, receive, send, next: next(first) }).unwrap())
    }

    fn seal(records: &mut Records, mut text: &[u8]) -> Vec<u8> {
        let mut out = vec![0; 5 * SEALED_MAX];
        let len = records.seal(&mut out, |room| io::Read::read(&mut text, room).unwrap()).unwrap();
        assert!(text.is_empty());
        out.truncate(len);
        out
    }

    #[test]
    fn sealed_records_open_in_pieces_of_any_size() {
        let text: Vec<u8> = (0..70_000u32).map(|n| (n * 7 % 251) as u8).collect();
        for (version, cipher) in [Version::Tls12, Version::Tls13].into_iter().flat_map(|v| CIPHERS.map(|c| (v, c))) {
            for piece in [1, 5, 4000, 40_000, usize::MAX] {
                let [mut ours, mut theirs] = pair(version, cipher);
                let sealed = seal(&mut theirs, &text);
                let (mut part, mut got) = (Vec::new(), Vec::new());
                for bytes in sealed.chunks(piece.min(sealed.len())) {
                    part.extend_from_slice(bytes);
                    let Opened { plain, used } = ours.open(&mut part).unwrap();
                    got.extend_from_slice(&part[..plain]);
                    part.drain(..used);
                }
                assert!(got == text && part.is_empty(), "{version:?} {cipher:?} in pieces of {piece}");
            }
        }
    }

    #[test]
    fn a_changed_lost_repeated_or_cut_record_does_not_open() {
        for (version, cipher) in [Version::Tls12, Version::Tls13].into_iter().flat_map(|v| CIPHERS.map(|c| (v, c))) {
            let sealed = seal(&mut pair(version, cipher)[1], b"to be or not to be");
            for at in 0..sealed.len() {
                let mut changed = sealed.clone();
                changed[at] ^= 1;
                let opened = pair(version, cipher)[0].open(&mut changed);
                // If the length has grown, the rest is awaited. Nothing else may pass.
                assert!(matches!(opened, Err(_) | Ok(Opened { plain: 0, used: 0 })), "byte {at}: {opened:?}");
            }
            let [mut ours, mut theirs] = pair(version, cipher);
            let (mut first, mut second) = (seal(&mut theirs, b"1"), seal(&mut theirs, b"2"));
            assert!(pair(version, cipher)[0].open(&mut second).is_err(), "a record was left out");
            ours.open(&mut first.clone()).unwrap();
            assert!(ours.open(&mut first).is_err(), "a record came twice");
            for len in 0..HEADER + EXPLICIT + MAX_TAG_LEN {
                let mut short = vec![DATA, 3, 3, 0, len as u8];
                short.resize(HEADER + len, 0);
                assert!(pair(version, cipher)[0].open(&mut short).is_err(), "{len} bytes");
            }
        }
    }

    #[test]
    fn padding_is_removed_and_a_record_of_padding_only_is_refused() {
        let [mut ours, mut theirs] = pair(Version::Tls13, Cipher::Aes128Gcm);
        let mut out = vec![0; SEALED_MAX];
        // The same layout as a TLS 1.3 record with padding: text, type, zeroes, then the type that `seal` adds, which is zero.
        let mut padded = |text: &[u8]| {
            let len = theirs.send.seal(0, &mut out, |room| io::Read::read(&mut &*text, room).unwrap()).unwrap();
            out[..len].to_vec()
        };
        let (mut good, mut bad) = (padded(&[b'a', DATA, 0, 0]), padded(&[0, 0]));
        assert_eq!(ours.open(&mut good).unwrap().plain, 1);
        assert_eq!(good[0], b'a');
        assert!(ours.open(&mut bad).is_err());
    }

    #[test]
    fn keys_change_at_their_limit_and_when_the_client_requests_it() {
        let [mut ours, mut theirs] = pair(Version::Tls13, Cipher::Aes256Gcm);
        (theirs.send.secret.seq, ours.receive.secret.seq) = (KEY_RECORDS - 1, KEY_RECORDS - 1);
        for text in [b"last", b"next", b"more"] {
            let mut sealed = seal(&mut theirs, text);
            assert_eq!(ours.open(&mut sealed).unwrap().plain, 4);
            assert_eq!(sealed[..4], *text);
        }
        assert_eq!(theirs.send.secret.seq, 2, "two records under the new key");

        let mut out = vec![0; SEALED_MAX];
        let asked = [24, 0, 0, 1, 1];
        let fill = |room: &mut [u8]| io::Read::read(&mut &asked[..], room).unwrap();
        let len = theirs.send.seal(HANDSHAKE, &mut out, fill).unwrap();
        theirs.send = Half::new(Version::Tls13, (theirs.next)(Way::Out).unwrap()).unwrap();
        assert_eq!(ours.open(&mut out[..len]).unwrap(), Opened { plain: 0, used: len });
        let mut answer = seal(&mut ours, b"here");
        assert_eq!(theirs.open(&mut answer).unwrap().plain, 4);
        assert_eq!(ours.send.secret.seq, 1, "one record under the new key");
        let mut sealed = seal(&mut theirs, b"there");
        assert_eq!(ours.open(&mut sealed).unwrap().plain, 5);
    }

    #[test]
    fn after_an_alert_nothing_is_opened() {
        let [mut ours, mut theirs] = pair(Version::Tls12, Cipher::Chacha20Poly1305);
        let (before, mut alert) = (seal(&mut theirs, b"before"), vec![0; SEALED_MAX]);
        let len = theirs.close(&mut alert).unwrap();
        let mut all = [&before, &alert[..len], &seal(&mut theirs, b"after")].concat();
        assert_eq!(ours.open(&mut all).unwrap(), Opened { plain: 6, used: before.len() + len });
        assert!(ours.ended());
    }
}
