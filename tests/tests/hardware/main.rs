//! nbdblk on real devices of every kind. Runs only in the machine of `cargo xtask vm test`, and is skipped elsewhere.
//!
//! A new driver is one line of a table: the argument of nbdblk, the block size for clients, and the other way to the same
//! storage, which checks the writes of nbdblk. Tests of one device wait for each other. Tests of several devices run at the same
//! time, so they are sorted by their subject.

mod capacity;
mod client;
mod crash;
mod data;
mod fabrics;
mod info;
mod machine;
mod removal;
mod restarts;
mod target;
mod tls;
mod vduse;
mod vsock;

use target::{Other, Target};

/// A test for each row; a function gets the target.
#[rustfmt::skip]
macro_rules! targets {
    ($test:path) => {
        row! { $test, io_uring_4k,       "io_uring=$NBDBLK_NVME_KERNEL4K,direct=true", 4096, Other::Disk("$NBDBLK_NVME_KERNEL4K") }
        row! { $test, nvme,              "nvme=$NBDBLK_NVME/1",                        512,  Other::Nvme("$NBDBLK_NVME", 1) }
        row! { $test, nvme_4k,           "nvme=$NBDBLK_NVME/2",                        4096, Other::Nvme("$NBDBLK_NVME", 2) }
        row! { $test, nvme_io_uring,     "nvme-io_uring=$NBDBLK_NG",                   512,  Other::Disk("$NBDBLK_NVME_KERNEL") }
        row! { $test, vdpa,              "vdpa=$NBDBLK_VDPA",                          512,  Other::File("/tmp/vduse0.img") }
        row! { $test, vdpa_pci,          "vdpa=$NBDBLK_VDPA_PCI",                      512,  Other::VirtioPci("$NBDBLK_VBLK_VDPA") }
        row! { $test, virtio_pci,        "virtio-pci=$NBDBLK_VBLK,ring=split",         512,  Other::VirtioPci("$NBDBLK_VBLK") }
        row! { $test, virtio_pci_packed, "virtio-pci=$NBDBLK_VBLK_PACKED,ring=packed", 512,  Other::VirtioPci("$NBDBLK_VBLK_PACKED") }
    };
}

/// Most of their subjects are also tested by the ones above, or by the tests outside of the machine.
#[rustfmt::skip]
macro_rules! more_targets {
    ($test:path) => {
        row! { $test, io_uring,          "io_uring=$NBDBLK_NVME_KERNEL",               512,  Other::Disk("$NBDBLK_NVME_KERNEL") }
        row! { $test, io_uring_direct,   "io_uring=$NBDBLK_NVME_KERNEL,direct=true",   512,  Other::Disk("$NBDBLK_NVME_KERNEL") }
        row! { $test, nvme_io_uring_4k,  "nvme-io_uring=$NBDBLK_NG4K",                 4096, Other::Disk("$NBDBLK_NVME_KERNEL4K") }
        row! { $test, nvme_small_mdts,   "nvme=$NBDBLK_NVME_MDTS/1",                   512,  Other::Nvme("$NBDBLK_NVME_MDTS", 1) }
        row! { $test, vdpa_pci_split,    "vdpa=$NBDBLK_VDPA_PCI,ring=split",           512,  Other::VirtioPci("$NBDBLK_VBLK_VDPA") }
        row! { $test, vhost_user,        "vhost-user=$NBDBLK_VHOST_USER",              512,  Other::File("/tmp/vhost-user.img") }
        row! { $test, virtio_pci_4k,     "virtio-pci=$NBDBLK_VBLK4K,ring=split",       4096, Other::VirtioPci("$NBDBLK_VBLK4K") }
    };
}

macro_rules! row {
    ($test:path, $name:ident, $spec:literal, $block:literal, $other:expr) => {
        #[test]
        fn $name() {
            Target { spec: $spec, block: $block, other: $other }.check($test);
        }
    };
}

/// Every check on every target of a table.
#[rustfmt::skip]
macro_rules! checks {
    ($targets:ident) => {
        mod info_is_true { use super::*; $targets! { info::is_true } }
        mod copied_in_and_out { use super::*; $targets! { data::copied_in_and_out } }
        mod copied_in_by_the_plugin { use super::*; $targets! { data::copied_in_by_the_plugin } }
        mod verified_by_fio { use super::*; $targets! { data::verified_by_fio } }
        mod zeroes_and_trims { use super::*; $targets! { data::zeroes_and_trims } }
        mod whole_device_zeroed_and_trimmed { use super::*; $targets! { data::whole_device_zeroed_and_trimmed } }
        mod fua_survives_a_kill { use super::*; $targets! { data::fua_survives_a_kill } }
        mod unaligned_requests { use super::*; $targets! { data::unaligned_requests } }
        mod longest_requests { use super::*; $targets! { data::longest_requests } }
        mod two_clients_in_the_same_blocks { use super::*; $targets! { data::two_clients_in_the_same_blocks } }
        mod killed_in_mid_write { use super::*; $targets! { crash::killed_in_mid_write } }
        mod upgraded { use super::*; $targets! { restarts::upgraded } }
        mod kernel_client { use super::*; $targets! { client::kernel_over_unix } }
    };
}

checks! { targets }

/// Only with `cargo xtask vm test --all`.
mod more {
    use super::*;

    checks! { more_targets }

    mod kernel_client_over_tcp {
        use super::*;

        more_targets! { client::kernel_over_tcp }
    }
}
