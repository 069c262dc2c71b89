//! The suite of [`blkdev::conformance`], against qemu-storage-daemon and against a model behind a socket.

mod common;

use std::sync::Arc;

use blkdev::{Device, conformance};
use blkdev_vhost_user::{Options, VhostUser};
use blkdev_virtio::model::{Fault, Model, Spec};
use common::{ALL, Answer, Backend, MEM_SLOTS, MQ, Qemu, Quirks, REPLY_ACK};

const MIB: u64 = 1 << 20;

/// The options with a change.
fn with(mut options: Options, change: impl FnOnce(&mut Options)) -> Options {
    change(&mut options);
    options
}

fn connect(options: &Options) -> Arc<dyn Device> {
    Arc::new(VhostUser::connect(options).unwrap())
}

#[test]
fn qemu_with_one_queue_and_one_client_after_the_other() {
    let qemu = Qemu::file(32 * MIB, "writable=on");
    for _ in 0..2 {
        let device = connect(&Options::new(&qemu.socket));
        assert_eq!(device.info().queues_max, 1);
        conformance::check(&device);
    }
}

#[test]
fn qemu_with_queues_in_a_thread_of_their_own() {
    let qemu = Qemu::file(32 * MIB, "writable=on,num-queues=4,iothread=io0");
    let device = connect(&with(Options::new(&qemu.socket), |o| o.virtio.queues = Some(3)));
    assert_eq!(device.info().queues_max, 3);
    conformance::check(&device);
}

#[test]
fn qemu_with_large_blocks() {
    let qemu = Qemu::file(32 * MIB, "writable=on,num-queues=2,logical-block-size=4096");
    let device = connect(&with(Options::new(&qemu.socket), |o| o.virtio.queue_size = 16));
    assert_eq!(device.info().block_size, 4096);
    conformance::check(&device);
}

#[test]
fn qemu_read_only() {
    let qemu = Qemu::file(32 * MIB, "writable=off");
    conformance::check_read_only(&connect(&Options::new(&qemu.socket)));
    let qemu = Qemu::file(32 * MIB, "writable=on");
    conformance::check_read_only(&connect(&with(Options::new(&qemu.socket), |o| o.virtio.read_only = true)));
}

#[test]
fn qemu_null() {
    let qemu = Qemu::null(1 << 30, "writable=on");
    conformance::check_null(&connect(&Options::new(&qemu.socket)));
}

#[test]
fn qemu_given_up() {
    let qemu = Qemu::file(32 * MIB, "writable=on");
    conformance::check_give_up(&connect(&Options::new(&qemu.socket)));
}

fn model(spec: Spec, quirks: Quirks) {
    let backend = Backend::new(Model::new(spec), quirks);
    conformance::check(&connect(&Options::new(&backend.socket)));
}

#[test]
fn model_with_everything() {
    model(Spec::new(32 * MIB), Quirks::default());
}

#[test]
fn model_without_memory_slots() {
    model(Spec::new(32 * MIB), Quirks { protocol: ALL & !MEM_SLOTS, ..Quirks::default() });
}

#[test]
fn model_with_next_to_nothing() {
    let protocol = ALL & !MEM_SLOTS & !MQ & !REPLY_ACK;
    let quirks = Quirks { protocol, config: Answer::AtMost(24), ..Quirks::default() };
    let spec = Spec::new(32 * MIB).without(28).without(29).fault(Fault::NoLengths, 0);
    model(spec, quirks);
}

#[test]
fn model_with_packed_rings() {
    model(Spec::new(32 * MIB).packed(), Quirks::default());
    model(
        Spec::new(32 * MIB).packed().without(28).without(29),
        Quirks { protocol: ALL & !MEM_SLOTS, ..Quirks::default() },
    );
}
