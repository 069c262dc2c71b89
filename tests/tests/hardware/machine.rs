//! The machine itself: checks the devices that the other tests need.

use std::path::Path;

use nbdblk_tests::tool;

use crate::target::{Other, Target, check, expand};

/// On each PCI device of vfio-pci or vp-vdpa, the kernel's drivers see a disk with the expected blocks.
#[test]
fn devices_change_hands() {
    let devices = [
        (Other::Nvme("$NBDBLK_NVME", 1), 512),
        (Other::Nvme("$NBDBLK_NVME", 2), 4096),
        (Other::Nvme("$NBDBLK_NVME_MDTS", 1), 512),
        (Other::VirtioPci("$NBDBLK_VBLK"), 512),
        (Other::VirtioPci("$NBDBLK_VBLK4K"), 4096),
        (Other::VirtioPci("$NBDBLK_VBLK_PACKED"), 512),
        (Other::VirtioPci("$NBDBLK_VBLK_SOCKET"), 512),
        (Other::VirtioPci("$NBDBLK_VBLK_VDPA"), 512),
    ];
    for (other, block) in devices {
        Target { spec: "", block, other }.check(|target| {
            let said = target.behind(|disk| tool("blockdev").args(["--getss".as_ref(), disk]).ok().out);
            assert_eq!(said.trim(), block.to_string(), "{target:?}");
        });
    }
}

/// vfio-pci has every device again, each in its own group.
#[test]
fn vfio_has_a_group_for_each_device() {
    let names = [
        "$NBDBLK_NVME",
        "$NBDBLK_NVME_MDTS",
        "$NBDBLK_VBLK",
        "$NBDBLK_VBLK4K",
        "$NBDBLK_VBLK_PACKED",
        "$NBDBLK_VBLK_SOCKET",
    ];
    for name in names {
        check(name, || {
            let address = expand(name);
            let device = Path::new("/sys/bus/pci/devices").join(&address);
            let link =
                |name: &str| std::fs::read_link(device.join(name)).unwrap_or_else(|error| panic!("{address}: {error}"));
            assert!(link("driver").ends_with("vfio-pci"), "{address} has the driver {:?}", link("driver"));
            let group = Path::new("/dev/vfio").join(link("iommu_group").file_name().expect("a group has a number"));
            assert!(group.exists(), "{address} has no {}", group.display());
        });
    }
}
