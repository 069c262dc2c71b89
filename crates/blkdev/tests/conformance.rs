//! The suite of `blkdev::conformance` over the devices of this crate, which are made as awkward as real ones can be.

use std::sync::Arc;

use blkdev::{
    Device, Info,
    conformance::{Suite, check, check_give_up, check_null, check_read_only},
    fault::{Fault, Faults},
    memory::Memory,
    null::Null,
};

const SIZE: u64 = 34 << 20;

/// Runs the suite over a RAM disk that is changed in this way: as it is, and late, disorderly and full for no reason.
fn awkward(change: fn(&mut Info)) {
    let plain: Arc<dyn Device> = Arc::new(Memory::new(SIZE).with(change));
    check(&plain);
    let disorderly: Arc<dyn Device> = Arc::new(Fault::new(Memory::new(SIZE).with(change), Faults::new(2)));
    Suite { seed: 2, ..Suite::default() }.run(&disorderly);
}

#[test]
fn as_it_comes() {
    awkward(|_| {});
}

#[test]
fn blocks_of_512_bytes_with_a_cache_and_no_fua() {
    awkward(|info| {
        info.block_size = 512;
        info.discard_alignment = 512;
        (info.caps.fua, info.caps.flush) = (false, true);
    });
}

#[test]
fn blocks_of_4096_bytes_and_tiny_limits() {
    awkward(|info| {
        info.block_size = 4096;
        info.transfer_max = 8192;
        info.zero_max = 12288;
        info.discard_alignment = 16384;
        info.discard_max = 32768;
        (info.queues_max, info.depth_max) = (2, 2);
    });
}

#[test]
fn the_largest_blocks() {
    awkward(|info| {
        (info.block_size, info.preferred_block_size, info.discard_alignment) = (65536, 65536, 65536);
        info.transfer_max = 65536;
        info.caps.flush = true;
    });
}

#[test]
fn one_queue_for_one_request_that_only_reads_and_writes() {
    awkward(|info| {
        info.block_size = 512;
        info.discard_alignment = 512;
        (info.queues_max, info.depth_max) = (1, 1);
        info.transfer_max = 128 << 10;
        info.caps = blkdev::Caps::default();
    });
}

#[test]
fn a_cache_and_nothing_else() {
    awkward(|info| (info.caps, info.caps.flush) = (blkdev::Caps::default(), true));
}

#[test]
fn read_only() {
    for block_size in [1, 512, 4096] {
        let disk = Memory::new(SIZE).with(|info| {
            (info.block_size, info.discard_alignment) = (block_size, block_size);
            info.caps.read_only = true;
        });
        disk.write(1 << 20, &[7; 1 << 20]);
        disk.write(SIZE - 5, &[1, 2, 3, 4, 5]);
        let device: Arc<dyn Device> = Arc::new(Fault::new(disk, Faults::new(3)));
        check_read_only(&device);
    }
}

#[test]
fn null() {
    for size in [SIZE, 1 << 62] {
        let device: Arc<dyn Device> = Arc::new(Null::new(size));
        check_null(&device);
    }
}

#[test]
fn given_up() {
    let device: Arc<dyn Device> = Arc::new(Memory::new(SIZE));
    check_give_up(&device);
    let device: Arc<dyn Device> = Arc::new(Fault::new(Memory::new(SIZE), Faults { lost: 0.5, ..Faults::new(4) }));
    check_give_up(&device);
}
