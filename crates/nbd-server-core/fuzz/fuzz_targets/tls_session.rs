//! The body `tls::fuzz::session` with any input.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| nbd_server_core::tls::fuzz::session(data));
