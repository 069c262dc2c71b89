//! The fuzz target without a fuzzer: what it found, and seeded mutations of that.

mod bodies;

#[test]
fn uri() {
    blkdev::fuzz::replay(concat!(env!("CARGO_MANIFEST_DIR"), "/fuzz/corpus/uri"), 4000, bodies::uri);
}
