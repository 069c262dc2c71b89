//! Compares hardware drivers with those of libblkio, on two equal devices. `cargo xtask vm test` runs this in its virtual
//! machine, and names the devices in variables. THE DEVICES ARE OVERWRITTEN.

use std::{env, sync::Arc};

use blkdev::{Device, Io};
use blkdev_nvme::{Passthrough, PassthroughOptions};
use blkdev_vdpa::{Source, Vdpa};
use blkdev_virtio_pci::VirtioPci;

use crate::{
    open,
    script::{Side, same_all_the_way},
    shared,
};

/// A number of requests that an emulated CPU completes in some seconds.
const COUNT: usize = 200;

/// Two equal devices, if this machine has them.
fn devices(names: [&str; 2]) -> Option<[String; 2]> {
    let values = names.map(|name| env::var(name).ok());
    if let [Some(ours), Some(theirs)] = values {
        return Some([ours, theirs]);
    }
    eprintln!("SKIPPED: {names:?} do not name devices: `cargo xtask vm test` runs this test");
    None
}

fn same(ours: Arc<dyn Device>, theirs: Arc<dyn Device>) {
    let mut sides = [ours, theirs].map(|device| {
        let (mut side, len) = (Side::open(&device), device.capacity());
        assert_eq!(side.one(|_| Io::Zero { at: 0, len, fua: false, unmap: true, fast: false }).0, Ok(()));
        side
    });
    let [own, other] = &mut sides;
    same_all_the_way(own, other, COUNT, true);
}

#[test]
fn nvme_io_uring_is_the_same() {
    let Some([ours, theirs]) = devices(["NBDBLK_NG", "NBDBLK_NG_TWIN"]) else { return };
    let own = Passthrough::open(PassthroughOptions::new(&ours)).unwrap();
    same(Arc::new(own), shared(open("nvme-io_uring", &[("path", &theirs)])));
}

#[test]
fn virtio_pci_is_the_same() {
    let Some([ours, theirs]) = devices(["NBDBLK_VBLK", "NBDBLK_VBLK_PACKED"]) else { return };
    for [ours, theirs] in [[&ours, &theirs], [&theirs, &ours]] {
        let own = VirtioPci::open(&blkdev_virtio_pci::Options::new(ours)).unwrap();
        let path = format!("/sys/bus/pci/devices/{theirs}");
        same(Arc::new(own), shared(open("virtio-blk-vfio-pci", &[("path", &path)])));
    }
}

#[test]
fn vdpa_is_the_same() {
    let Some([ours, theirs]) = devices(["NBDBLK_VDPA", "NBDBLK_VDPA_TWIN"]) else { return };
    let own = Vdpa::open(blkdev_vdpa::Options::new(Source::Path(ours.into()))).unwrap();
    same(Arc::new(own), shared(open("virtio-blk-vhost-vdpa", &[("path", &theirs)])));
}
