//! The fuzz target without a fuzzer: what it found, and seeded mutations of that.

mod bodies;

#[test]
fn spec() {
    blkdev::fuzz::replay(concat!(env!("CARGO_MANIFEST_DIR"), "/fuzz/corpus/spec"), 4000, bodies::spec);
}
