//! Prints the size and the properties of a virtio-blk PCI device bound to vfio-pci:
//!
//! ```text
//! cargo run -p blkdev-virtio-pci --example virtio_pci_info -- 0000:00:07.0
//! ```

use std::{env, process::ExitCode};

use blkdev::Device;
use blkdev_virtio_pci::{Options, VirtioPci};

fn main() -> ExitCode {
    let Some(address) = env::args().nth(1) else {
        eprintln!("usage: virtio_pci_info ADDRESS");
        return ExitCode::from(2);
    };
    match VirtioPci::open(&Options::new(address)) {
        Ok(device) => {
            println!("{} bytes, {:#?}", device.capacity(), device.info());
            ExitCode::SUCCESS
        }
        Err(e) => {
            eprintln!("{e}");
            ExitCode::FAILURE
        }
    }
}
