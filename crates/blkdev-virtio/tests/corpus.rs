//! The fuzz targets without a fuzzer: what they found, and seeded mutations of that.

mod bodies;

#[test]
fn device() {
    let corpus = concat!(env!("CARGO_MANIFEST_DIR"), "/fuzz/corpus/virtio");
    blkdev::fuzz::replay(corpus, 4000, bodies::device);
}

#[test]
fn config_space() {
    let corpus = concat!(env!("CARGO_MANIFEST_DIR"), "/fuzz/corpus/config_space");
    blkdev::fuzz::replay(corpus, 5000, bodies::config_space);
}
