//! Hands a connection's records over to the kernel (TLS in the kernel: Documentation/networking/tls.rst), which then does
//! what [`records`](super::records) does, on the way that the bytes take anyhow.

use std::os::fd::BorrowedFd;

use nix::{
    libc,
    sys::socket::{
        setsockopt,
        sockopt::{TcpTlsRx, TcpTlsTx, TcpUlp, TlsCryptoInfo},
    },
};

use super::records::{Cipher, Secret, Version};

/// Whether the kernel is ready to take a way over; many are not, and sockets other than TCP's never.
pub(super) fn is_ready(socket: BorrowedFd<'_>) -> bool {
    setsockopt(&socket, TcpUlp::default(), b"tls").is_ok()
}

/// Has the kernel open what comes.
pub(super) fn receive(socket: BorrowedFd<'_>, version: Version, secret: &Secret) -> nix::Result<()> {
    setsockopt(&socket, TcpTlsRx, &info(version, secret))
}

/// Has the kernel seal what goes.
pub(super) fn send(socket: BorrowedFd<'_>, version: Version, secret: &Secret) -> nix::Result<()> {
    setsockopt(&socket, TcpTlsTx, &info(version, secret))
}

fn info(version: Version, secret: &Secret) -> TlsCryptoInfo {
    let Secret { cipher, key, iv, seq } = secret;
    let rec_seq = seq.to_be_bytes();
    let salt = *iv.first_chunk().expect("the salt is the first part");
    let mut nonce: [u8; 8] = *iv.last_chunk().expect("a nonce of 8 bytes is the rest");
    if version == Version::Tls12 {
        // The kernel counts up from here, where we count by exclusive or: another half of all nonces, since none may be
        // used twice under one key.
        nonce[0] ^= 0x80;
    }
    let kind = |cipher_type| libc::tls_crypto_info {
        version: match version {
            Version::Tls12 => libc::TLS_1_2_VERSION,
            Version::Tls13 => libc::TLS_1_3_VERSION,
        },
        cipher_type,
    };
    const WHOLE: &str = "a key is as long as its cipher wants it";
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
