//! The configuration space of a virtio-blk device, as vDPA and every other transport read it.
#![no_main]
#![allow(dead_code, reason = "each target uses one body")]

#[path = "../../tests/bodies/mod.rs"]
mod bodies;

libfuzzer_sys::fuzz_target!(|data: &[u8]| bodies::config_space(data));
