//! The fuzz target without a fuzzer: what it found, and seeded mutations of that.

mod bodies;

#[test]
fn conversation() {
    blkdev::fuzz::replay(concat!(env!("CARGO_MANIFEST_DIR"), "/fuzz/corpus/vhost_user"), 200, bodies::conversation);
}
