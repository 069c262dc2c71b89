//! The driver, a client, and a controller whose behaviour comes from the input.
#![no_main]

#[path = "../../tests/bodies/mod.rs"]
mod bodies;

libfuzzer_sys::fuzz_target!(|data: &[u8]| bodies::nvme(data));
