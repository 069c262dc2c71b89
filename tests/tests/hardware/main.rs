//! nbdblk on real devices of every kind; runs in the machine of `cargo xtask vm test` only, and is skipped elsewhere.
//!
//! A new driver is one line of the table: what nbdblk is given, the block size that clients must be told, and the other
//! way to the same storage, by which what nbdblk wrote is looked at.

mod client;
mod crash;
mod data;
mod info;
mod machine;
mod removal;
mod target;

use target::{Other, Target};

/// Every check on every target.
macro_rules! table {
    ($($name:ident: $spec:literal, $block:literal, $other:expr;)*) => { $(
        mod $name {
            use super::*;

            const TARGET: Target = Target { spec: $spec, block: $block, other: $other };

            #[test] fn info_is_true() { TARGET.check(info::is_true); }
            #[test] fn copied_in_and_out() { TARGET.check(data::copied_in_and_out); }
            #[test] fn verified_by_fio() { TARGET.check(data::verified_by_fio); }
            #[test] fn zeroes_and_trims() { TARGET.check(data::zeroes_and_trims); }
            #[test] fn whole_device_zeroed_and_trimmed() { TARGET.check(data::whole_device_zeroed_and_trimmed); }
            #[test] fn fua_survives_a_kill() { TARGET.check(data::fua_survives_a_kill); }
            #[test] fn unaligned_requests() { TARGET.check(data::unaligned_requests); }
            #[test] fn longest_requests() { TARGET.check(data::longest_requests); }
            #[test] fn two_clients_in_the_same_blocks() { TARGET.check(data::two_clients_in_the_same_blocks); }
            #[test] fn killed_in_mid_write() { TARGET.check(crash::killed_in_mid_write); }
            #[test] fn kernel_client_over_unix() { TARGET.check(client::kernel_over_unix); }
            #[test] fn kernel_client_over_tcp() { TARGET.check(client::kernel_over_tcp); }
        }
    )* };
}

#[rustfmt::skip]
table! {
    io_uring_nvme:           "io_uring=$NBDBLK_NVME_KERNEL",               512,  Other::Disk("$NBDBLK_NVME_KERNEL");
    io_uring_nvme_direct:    "io_uring=$NBDBLK_NVME_KERNEL,direct=true",   512,  Other::Disk("$NBDBLK_NVME_KERNEL");
    io_uring_nvme_4k_direct: "io_uring=$NBDBLK_NVME_KERNEL4K,direct=true", 4096, Other::Disk("$NBDBLK_NVME_KERNEL4K");
    vhost_user:              "vhost-user=$NBDBLK_VHOST_USER",              512,  Other::File("/tmp/vhost-user.img");
}
