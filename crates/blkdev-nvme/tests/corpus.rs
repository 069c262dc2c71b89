//! The fuzz target without a fuzzer: what it found, and seeded mutations of that.

mod bodies;

#[test]
fn nvme() {
    blkdev::fuzz::replay(concat!(env!("CARGO_MANIFEST_DIR"), "/fuzz/corpus/nvme"), 300, bodies::nvme);
}
