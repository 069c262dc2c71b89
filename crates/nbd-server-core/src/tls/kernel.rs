//! [`Kernel`]: TLS in the kernel (Documentation/networking/tls.rst). It opens and seals records while it copies the bytes, with the
//! secrets of rustls' handshake.

use std::{
    fmt,
    io::{self, IoSliceMut},
    net::{TcpListener, TcpStream},
    os::fd::{AsRawFd, BorrowedFd},
    sync::OnceLock,
};

use blkdev::{Buf, socket};
use nix::{
    cmsg_space, libc,
    sys::socket::{
        ControlMessageOwned, MsgFlags, TlsGetRecordType, getsockopt, recvmsg, setsockopt,
        sockopt::{SocketError, TcpTlsRx, TcpTlsTx, TcpUlp, TlsCryptoInfo},
    },
};
use rustls::{ConnectionTrafficSecrets, ExtractedSecrets, kernel::KernelConnection, server::ServerConnectionData};

use super::{
    engine::{PLAIN_MAX, broken},
    suite::{Cipher, Suite, Version},
};
use crate::{handover::KernelTls, outbox::Outbox, received::Received};

const ALERT: u8 = 21;
const HANDSHAKE: u8 = 22;

const CLOSE_NOTIFY: [u8; 2] = [1, 0];
/// Fatal: a record could not be opened.
const BAD_RECORD_MAC: [u8; 2] = [2, 20];
/// Fatal: a message that is not allowed here.
const UNEXPECTED_MESSAGE: [u8; 2] = [2, 10];

/// Fatal: the reason is none of the client's.
const INTERNAL_ERROR: [u8; 2] = [2, 80];

/// A KeyUpdate message without its last byte, which requests an update from the other side (RFC 8446, 4.6.3).
const KEY_UPDATE: [u8; 4] = [24, 0, 0, 1];

/// Records after which a key of AES-GCM must change (RFC 8446, 5.5: 2^24.5).
const KEY_RECORDS: u64 = 1 << 24;

/// Most KeyUpdate messages without data between them, as in rustls.
const KEY_UPDATES: u32 = 32;

/// A connection whose TLS the kernel does.
pub(crate) struct Kernel {
    suite: Suite,
    /// Derives further secrets. `None`: another process had them.
    state: Option<KernelConnection<ServerConnectionData>>,
    /// Most records that were sent with the present key.
    records: u64,
    /// Our key must change before the next data.
    is_update_due: bool,
    /// KeyUpdate messages since the last data.
    updates: u32,
}

/// The suites with which the kernel does TLS.
static KNOWN: OnceLock<Vec<Suite>> = OnceLock::new();

/// Learns what the kernel can do, and makes it load its module, before threads are confined.
pub(super) fn learn() {
    KNOWN.get_or_init(|| {
        let takes = |suite: &Suite| {
            probe(*suite).inspect_err(|e| log::debug!("the kernel does not continue {suite}: {e}")).is_ok()
        };
        Suite::all().filter(takes).collect()
    });
}

/// Whether the kernel does TLS on this socket with this suite. If it does not, nothing has changed.
pub(super) fn can_take(socket: BorrowedFd<'_>, suite: Suite) -> bool {
    KNOWN.get().is_some_and(|known| known.contains(&suite)) && setsockopt(&socket, TcpUlp::default(), b"tls").is_ok()
}

/// Tries the kernel on a connection of our own. TLS 1.3 needs one that can change keys, which Linux can from 6.14 on: clients change
/// theirs, as GnuTLS does after 2^24 records.
fn probe(suite: Suite) -> io::Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let socket = TcpStream::connect(listener.local_addr()?)?;
    setsockopt(&socket, TcpUlp::default(), b"tls")?;
    let key = info(suite, &Secret::default());
    setsockopt(&socket, TcpTlsRx, &key)?;
    setsockopt(&socket, TcpTlsTx, &key)?;
    if suite.version == Version::Tls13 {
        setsockopt(&socket, TcpTlsTx, &key)?;
    }
    Ok(())
}

impl Kernel {
    pub(super) fn new(
        socket: BorrowedFd<'_>,
        suite: Suite,
        secrets: ExtractedSecrets,
        state: KernelConnection<ServerConnectionData>,
    ) -> io::Result<Self> {
        setsockopt(&socket, TcpTlsTx, &info(suite, &Secret::new(secrets.tx)?))?;
        setsockopt(&socket, TcpTlsRx, &info(suite, &Secret::new(secrets.rx)?))?;
        Ok(Self { suite, state: Some(state), records: 0, is_update_due: false, updates: 0 })
    }

    /// What another process needs to go on. `None`: the key must change first.
    pub(crate) fn suspend(&self) -> Option<KernelTls> {
        let whole = !self.is_update_due && !self.is_worn();
        whole.then(|| KernelTls { suite: self.suite.to_string(), records: self.records })
    }

    /// Goes on with what another process has [left](Self::suspend).
    ///
    /// # Errors
    /// The suite is unknown.
    pub(crate) fn resume(tls: &KernelTls) -> io::Result<Self> {
        let suite = Suite::all().find(|suite| suite.to_string() == tls.suite);
        let suite = suite.ok_or_else(|| broken("an unknown suite"))?;
        Ok(Self { suite, state: None, records: tls.records, is_update_due: false, updates: 0 })
    }

    fn state(&mut self, socket: BorrowedFd<'_>) -> io::Result<&mut KernelConnection<ServerConnectionData>> {
        self.state.as_mut().ok_or_else(|| {
            let _ = socket::send_record(socket, ALERT, &INTERNAL_ERROR);
            broken("a key must change, and the server was replaced since the handshake")
        })
    }

    /// As [`Stream::receive`](crate::stream::Stream::receive).
    pub(crate) fn receive(
        &mut self,
        socket: BorrowedFd<'_>,
        mut landing: Option<(&mut Buf, usize)>,
        staging: &mut [u8],
    ) -> io::Result<Option<Received>> {
        loop {
            let landing = landing.as_mut().map(|(buf, at)| (&mut **buf, *at));
            match Received::from(socket, landing, staging) {
                Ok(received) => {
                    self.updates = 0;
                    // The kernel stops before a record that is not data, so less than the buffers hold does not mean that the socket is
                    // empty.
                    return Ok(received.map(|received| Received { more: true, ..received }));
                }
                // The next record is not data.
                Err(e) if e.raw_os_error() == Some(libc::EIO) => {
                    if !self.control(socket)? {
                        return Ok(None);
                    }
                }
                Err(e) => {
                    if e.raw_os_error() == Some(libc::EBADMSG) {
                        // Until it is read, the error of the socket makes sending fail as well.
                        let _ = getsockopt(&socket, SocketError);
                        let _ = socket::send_record(socket, ALERT, &BAD_RECORD_MAC);
                    }
                    return Err(e);
                }
            }
        }
    }

    /// Receives a record that is not data. `false`: the client has ended its direction.
    fn control(&mut self, socket: BorrowedFd<'_>) -> io::Result<bool> {
        let (mut bytes, mut space) = ([0; 64], cmsg_space!(u8));
        let mut list = [IoSliceMut::new(&mut bytes)];
        let message = recvmsg::<()>(socket.as_raw_fd(), &mut list, Some(&mut space), MsgFlags::MSG_DONTWAIT)?;
        let kind = message.cmsgs()?.find_map(|message| match message {
            ControlMessageOwned::TlsGetRecordType(kind) => Some(kind),
            _ => None,
        });
        let len = message.bytes;
        match (kind, bytes[..len].split_last()) {
            // Whatever the alert is, no data after it can be trusted.
            (Some(TlsGetRecordType::Alert), _) => Ok(false),
            (Some(TlsGetRecordType::Handshake), Some((&wanted @ 0..=1, rest)))
                if rest == KEY_UPDATE && self.suite.version == Version::Tls13 && self.updates < KEY_UPDATES =>
            {
                self.updates += 1;
                self.is_update_due |= wanted == 1;
                let secret = Secret::new(self.state(socket)?.update_rx_secret().map_err(io::Error::other)?)?;
                setsockopt(&socket, TcpTlsRx, &info(self.suite, &secret))?;
                Ok(true)
            }
            _ => {
                let _ = socket::send_record(socket, ALERT, &UNEXPECTED_MESSAGE);
                Err(broken("a record of an unexpected type"))
            }
        }
    }

    /// As [`Stream::send`](crate::stream::Stream::send).
    pub(crate) fn send(&mut self, socket: BorrowedFd<'_>, outbox: &mut Outbox) -> io::Result<bool> {
        if (self.is_update_due || self.is_worn()) && !self.change_key(socket)? {
            return Ok(false);
        }
        let (before, pieces) = (outbox.sent(), outbox.len());
        let sent = outbox.send(socket);
        // Each system call ends a record, and takes all pieces or at least as many as fit.
        self.records += (outbox.sent() - before) / PLAIN_MAX as u64 + (pieces / socket::PIECES) as u64 + 2;
        sent
    }

    /// Whether our key has reached its limit of use.
    fn is_worn(&self) -> bool {
        self.suite.cipher != Cipher::Chacha20Poly1305 && self.records >= KEY_RECORDS
    }

    /// Announces a new key for what we send, and sets it. `false`: the socket is full.
    fn change_key(&mut self, socket: BorrowedFd<'_>) -> io::Result<bool> {
        if self.suite.version == Version::Tls12 {
            return Err(broken("the key has reached its limit, and TLS 1.2 cannot change it"));
        }
        self.state(socket)?;
        let message = [&KEY_UPDATE[..], &[0]].concat();
        match socket::send_record(socket, HANDSHAKE, &message) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(false),
            sent => sent?,
        }
        let secret = Secret::new(self.state(socket)?.update_tx_secret().map_err(io::Error::other)?)?;
        setsockopt(&socket, TcpTlsTx, &info(self.suite, &secret))?;
        (self.is_update_due, self.records) = (false, 0);
        Ok(true)
    }

    /// As [`Secure::close`](super::Secure::close).
    pub(crate) fn close(&mut self, socket: BorrowedFd<'_>) {
        let _ = socket::send_record(socket, ALERT, &CLOSE_NOTIFY);
    }
}

impl fmt::Debug for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} in the kernel", self.suite)
    }
}

/// The secrets of one direction.
struct Secret {
    key: Vec<u8>,
    iv: [u8; 12],
    /// The sequence number of the next record.
    seq: u64,
}

impl Secret {
    fn new((seq, secrets): (u64, ConnectionTrafficSecrets)) -> io::Result<Self> {
        let (ConnectionTrafficSecrets::Aes128Gcm { key, iv }
        | ConnectionTrafficSecrets::Aes256Gcm { key, iv }
        | ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv }) = secrets
        else {
            return Err(broken("a cipher that was not offered"));
        };
        let iv = iv.as_ref().try_into().map_err(|_| broken("an initialization vector of the wrong length"))?;
        Ok(Self { key: key.as_ref().to_vec(), iv, seq })
    }
}

impl Default for Secret {
    fn default() -> Self {
        Self { key: vec![0; 32], iv: [0; 12], seq: 0 }
    }
}

fn info(suite: Suite, secret: &Secret) -> TlsCryptoInfo {
    let Secret { key, iv, seq } = secret;
    let rec_seq = seq.to_be_bytes();
    let salt = *iv.first_chunk().expect("the IV starts with the salt");
    let mut nonce: [u8; 8] = *iv.last_chunk().expect("8 bytes of nonce follow the salt");
    if suite.version == Version::Tls12 {
        // The kernel counts nonces up from here; rustls combined its own with the number of the record by exclusive or. Flip the
        // first bit, so that the two use different halves: no nonce may be used twice with one key.
        nonce[0] ^= 0x80;
    }
    let kind = |cipher_type| libc::tls_crypto_info {
        version: match suite.version {
            Version::Tls12 => libc::TLS_1_2_VERSION,
            Version::Tls13 => libc::TLS_1_3_VERSION,
        },
        cipher_type,
    };
    const WHOLE: &str = "the key has the length that its cipher needs";
    match suite.cipher {
        Cipher::Aes128Gcm => TlsCryptoInfo::Aes128Gcm(libc::tls12_crypto_info_aes_gcm_128 {
            info: kind(libc::TLS_CIPHER_AES_GCM_128),
            iv: nonce,
            key: *key.first_chunk().expect(WHOLE),
            salt,
            rec_seq,
        }),
        Cipher::Aes256Gcm => TlsCryptoInfo::Aes256Gcm(libc::tls12_crypto_info_aes_gcm_256 {
            info: kind(libc::TLS_CIPHER_AES_GCM_256),
            iv: nonce,
            key: *key.first_chunk().expect(WHOLE),
            salt,
            rec_seq,
        }),
        Cipher::Chacha20Poly1305 => TlsCryptoInfo::Chacha20Poly1305(libc::tls12_crypto_info_chacha20_poly1305 {
            info: kind(libc::TLS_CIPHER_CHACHA20_POLY1305),
            iv: *iv,
            key: *key.first_chunk().expect(WHOLE),
            salt: [],
            rec_seq,
        }),
    }
}
