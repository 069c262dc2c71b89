//! A device that grows and shrinks while it is served.
//!
//! QEMU reports changes only for virtio disks: its NVMe controllers keep their initial size. The model controller tests the NVMe
//! driver.

use nbdblk_tests::{Dir, Nbdblk, eventually, nbdinfo};

use crate::removal::monitor;
use crate::target::{check, expand};

#[test]
fn virtio_pci() {
    check("$NBDBLK_VBLK", || changed("vblk-512", &expand("virtio-pci=$NBDBLK_VBLK")));
}

#[test]
fn vdpa_pci() {
    check("$NBDBLK_VBLK_VDPA", || changed("vblk-vdpa", &expand("vdpa=$NBDBLK_VDPA_PCI")));
}

/// A client that connects after the change sees the new size, and the log has both.
fn changed(disk: &str, spec: &str) {
    let dir = Dir::new();
    let server = Nbdblk::unix(&dir, &["-v", spec]);
    let size = || nbdinfo(&server.uri())["exports"][0]["export-size"].as_u64().expect("a size is a number");
    let before = size();
    for (from, to) in [(before, before + (16 << 20)), (before + (16 << 20), before)] {
        monitor(&format!("block_resize {disk} {}M", to >> 20));
        let line = format!("the capacity changed from {from} to {to} bytes");
        eventually(&line, || server.log().contains(&line));
        assert_eq!(size(), to);
    }
    assert!(server.terminate().success());
}
