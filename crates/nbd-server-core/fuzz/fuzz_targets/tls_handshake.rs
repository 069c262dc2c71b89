//! The body `tls::fuzz::handshake` with any input.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| nbd_server_core::tls::fuzz::handshake(data));
