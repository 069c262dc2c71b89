//! TLS in the kernel (Documentation/networking/tls.rst): the kernel seals and opens records instead of
//! [`records`](super::records), while it copies the bytes.

use std::os::fd::BorrowedFd;

use nix::{
    libc,
    sys::socket::{
        setsockopt,
        sockopt::{TcpTlsRx, TcpTlsTx, TcpUlp, TlsCryptoInfo},
    },
};

use super::records::{Cipher, Secret, Version};

/// Whether the kernel supports TLS on this socket. Many kernels do not, and only TCP sockets can.
pub(super) fn is_ready(socket: BorrowedFd<'_>) -> bool {
    setsockopt(&socket, TcpUlp::default(), b"tls").is_ok()
}

/// Makes the kernel open incoming records.
pub(super) fn receive(socket: BorrowedFd<'_>, version: Version, secret: &Secret) -> nix::Result<()> {
    setsockopt(&socket, TcpTlsRx, &info(version, secret))
}

/// Makes the kernel seal outgoing records.
pub(super) fn send(socket: BorrowedFd<'_>, version: Version, secret: &Secret) -> nix::Result<()> {
    setsockopt(&socket, TcpTlsTx, &info(version, secret))
}

fn info(version: Version, secret: &Secret) -> TlsCryptoInfo {
    let Secret { cipher, key, iv, seq } = secret;
    let rec_seq = seq.to_be_bytes();
    let salt = *iv.first_chunk().expect("the IV starts with the salt");
    let mut nonce: [u8; 8] = *iv.last_chunk().expect("8 bytes of nonce follow the salt");
    if version == Version::Tls12 {
        // The kernel counts nonces up from here; our records use exclusive or. Flip the first bit, so that the two use different
        // halves: no nonce may be used twice with one key.
        nonce[0] ^= 0x80;
    }
    let kind = |cipher_type| libc::tls_crypto_info {
        version: match version {
            Version::Tls12 => libc::TLS_1_2_VERSION,
            Version::Tls13 => libc::TLS_1_3_VERSION,
        },
        cipher_type,
    };
    const WHOLE: &str = "the key has the length that its cipher needs";
    match cipher {
        Cipher::Aes128Gcm => TlsCryptoInfo::Aes128Gcm(libc::tls12_crypto_info_aes_gcm_128 {
            info: kind(libc::TLS_CIPHER_AES_GCM_128),
            iv: nonce,
            key: key[..].try_into().expect(WHOLE),
            salt,
            rec_seq,
        }),
        Cipher::Aes256Gcm => TlsCryptoInfo::Aes256Gcm(libc::tls12_crypto_info_aes_gcm_256 {
            info: kind(libc::TLS_CIPHER_AES_GCM_256),
            iv: nonce,
            key: key[..].try_into().expect(WHOLE),
            salt,
            rec_seq,
        }),
        Cipher::Chacha20Poly1305 => TlsCryptoInfo::Chacha20Poly1305(libc::tls12_crypto_info_chacha20_poly1305 {
            info: kind(libc::TLS_CIPHER_CHACHA20_POLY1305),
            iv: *iv,
            key: key[..].try_into().expect(WHOLE),
            salt: [],
            rec_seq,
        }),
    }
}
