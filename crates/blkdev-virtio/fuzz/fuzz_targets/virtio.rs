//! The driver, a client, and a device whose behaviour comes from the input.
#![no_main]
#![allow(dead_code, reason = "each target uses one body")]

#[path = "../../tests/bodies/mod.rs"]
mod bodies;

libfuzzer_sys::fuzz_target!(|data: &[u8]| bodies::device(data));
