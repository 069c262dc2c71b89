//! The body `control` with any input.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| nbdblk::fuzz::control(data));
