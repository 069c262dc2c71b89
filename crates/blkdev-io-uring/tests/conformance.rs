//! The conformance suite of `blkdev`, on every kind of file available here.

mod common;

use std::sync::Arc;

use blkdev::{Device, conformance};
use blkdev_io_uring::{IoUring, Options};
use common::{Loop, Scratch};

const SIZE: u64 = 64 << 20;

/// The options with a change.
fn with(mut options: Options, change: impl FnOnce(&mut Options)) -> Options {
    change(&mut options);
    options
}

fn open(options: Options) -> Arc<dyn Device> {
    Arc::new(IoUring::open(options).unwrap())
}

#[test]
fn a_file_through_the_page_cache() {
    let file = Scratch::on_disk(SIZE);
    conformance::check(&open(Options::path(file.path())));
}

#[test]
fn a_file_past_the_page_cache() {
    let file = Scratch::on_disk(SIZE);
    conformance::check(&open(with(Options::path(file.path()), |o| o.direct = true)));
}

#[test]
fn a_file_of_odd_size() {
    let file = Scratch::on_disk(SIZE + 12345);
    conformance::check(&open(Options::path(file.path())));
}

#[test]
fn a_file_in_memory() {
    let file = Scratch::in_memory(SIZE);
    conformance::check(&open(Options::path(file.path())));
}

#[test]
fn a_read_only_file() {
    let file = Scratch::on_disk(SIZE);
    conformance::check_read_only(&open(with(Options::path(file.path()), |o| o.read_only = true)));
}

#[test]
fn a_descriptor() {
    let file = Scratch::on_disk(SIZE);
    conformance::check(&open(Options::fd(file.open().into())));
}

#[test]
fn a_device_that_is_given_up() {
    let file = Scratch::on_disk(SIZE);
    conformance::check_give_up(&open(with(Options::path(file.path()), |o| o.direct = true)));
}

#[test]
fn a_block_device_through_the_page_cache() {
    let Some(disk) = Loop::new(SIZE, 512) else { return };
    conformance::check(&open(Options::path(disk.path())));
}

#[test]
fn a_block_device_past_the_page_cache() {
    let Some(disk) = Loop::new(SIZE, 512) else { return };
    conformance::check(&open(with(Options::path(disk.path()), |o| o.direct = true)));
}

#[test]
fn a_block_device_with_blocks_of_4096() {
    let Some(disk) = Loop::new(SIZE, 4096) else { return };
    conformance::check(&open(with(Options::path(disk.path()), |o| o.direct = true)));
}
