//! The fuzz target without a fuzzer: what it found, and seeded mutations of that.

mod bodies;

#[test]
fn device() {
    let corpus = concat!(env!("CARGO_MANIFEST_DIR"), "/fuzz/corpus/virtio");
    blkdev::fuzz::replay(corpus, 4000, bodies::device);
}
