//! Tests on a real device bound to vfio-pci, which is overwritten: `NBDBLK_VBLK=0000:00:07.0 cargo test --test hardware`.
//! Without the variable the tests print SKIPPED.

use std::{
    env,
    sync::{Arc, Mutex},
};

use blkdev::{Device, conformance};
use blkdev_virtio_pci::{Format, Options, VirtioPci};

/// Serialises the tests: a device has one user at a time.
static ONE: Mutex<()> = Mutex::new(());

/// The options with a change.
fn with(mut options: Options, change: impl FnOnce(&mut Options)) -> Options {
    change(&mut options);
    options
}

fn address(test: &str) -> Option<String> {
    let address = env::var("NBDBLK_VBLK").ok();
    if address.is_none() {
        eprintln!("SKIPPED: {test}: NBDBLK_VBLK does not name a virtio-blk PCI device");
    }
    address
}

fn conforms(options: &Options) {
    let device: Arc<dyn Device> = Arc::new(VirtioPci::open(options).unwrap());
    eprintln!("{:?}, {} bytes", device.info(), device.capacity());
    conformance::check(&device);
}

#[test]
fn conforms_with_split_rings_and_a_vector_for_each_queue() {
    let Some(address) = address("split rings") else { return };
    let _one = ONE.lock();
    conforms(&with(Options::new(address), |o| o.virtio.ring = Some(Format::Split)));
}

#[test]
fn conforms_with_packed_rings() {
    let Some(address) = address("packed rings") else { return };
    let _one = ONE.lock();
    let options = with(Options::new(address), |o| o.virtio.ring = Some(Format::Packed));
    match VirtioPci::open(&options) {
        Err(e) if e.to_string().contains("VIRTIO_F_RING_PACKED") => eprintln!("SKIPPED: packed rings: {e}"),
        Err(e) => panic!("{e}"),
        Ok(device) => {
            drop(device);
            conforms(&options);
        }
    }
}

#[test]
fn conforms_with_vectors_that_are_shared() {
    let Some(address) = address("shared vectors") else { return };
    let _one = ONE.lock();
    for vectors in [1, 2] {
        conforms(&with(Options::new(address.clone()), |o| o.vectors = vectors));
    }
}

#[test]
fn can_be_given_up_and_opened_again() {
    let Some(address) = address("giving up") else { return };
    let _one = ONE.lock();
    for _ in 0..2 {
        let device: Arc<dyn Device> = Arc::new(VirtioPci::open(&Options::new(address.clone())).unwrap());
        conformance::check_give_up(&device);
    }
}
