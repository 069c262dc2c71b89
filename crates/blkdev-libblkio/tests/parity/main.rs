//! libblkio's drivers held against the suite that ours are held against, and then against ours, request by request.

mod backend;

use std::sync::Arc;

use backend::{Export, Scratch};
use blkdev::{
    Device,
    conformance::{Suite, check, check_read_only},
};
use blkdev_libblkio::Libblkio;

const SIZE: u64 = 40 << 20;

fn open(driver: &str, properties: &[(&str, &str)]) -> Libblkio {
    let properties: Vec<_> = properties.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect();
    Libblkio::open(driver, &properties).unwrap()
}

fn shared(device: Libblkio) -> Arc<dyn Device> {
    Arc::new(device)
}

#[test]
fn io_uring_conforms() {
    let scratch = Scratch::new();
    let file = scratch.file("disk", SIZE);
    check(&shared(open("io_uring", &[("path", &file)])));
    check(&shared(open("io_uring", &[("path", &file), ("num-queues", "1"), ("num-entries", "4")])));
    check_read_only(&shared(open("io_uring", &[("path", &file), ("read-only", "true")])));
}

#[test]
fn virtio_conforms() {
    let scratch = Scratch::new();
    let export = Export::start(&scratch, &scratch.file("disk", SIZE), 2, true);
    check(&shared(open("virtio-blk-vhost-user", &[("path", export.socket())])));
}

#[test]
fn a_small_ring_is_never_overfilled() {
    let scratch = Scratch::new();
    let export = Export::start(&scratch, &scratch.file("disk", SIZE), 1, true);
    let device = open("virtio-blk-vhost-user", &[("path", export.socket()), ("queue-size", "16")]);
    assert_eq!((device.info().depth_max, device.info().queues_max), (5, 1));
    Suite { seed: 5, ..Suite::default() }.run(&shared(device));
}

#[test]
fn a_read_only_export_is_opened_read_only() {
    let scratch = Scratch::new();
    let export = Export::start(&scratch, &scratch.file("disk", SIZE), 1, false);
    check_read_only(&shared(open("virtio-blk-vhost-user", &[("path", export.socket())])));
}
