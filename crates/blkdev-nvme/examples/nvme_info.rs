//! Prints the size and the properties of an NVMe namespace, of a controller bound to vfio-pci or of the kernel's driver:
//!
//! ```text
//! cargo run -p blkdev-nvme --example nvme_info -- 0000:01:00.0/1
//! cargo run -p blkdev-nvme --example nvme_info -- /dev/ng0n1
//! ```

use std::{env, io, process::ExitCode};

use blkdev::Device;
use blkdev_nvme::{Nvme, Options, Passthrough, PassthroughOptions, Target, VfioOptions};

fn main() -> ExitCode {
    let Some(name) = env::args().nth(1) else {
        eprintln!("usage: nvme_info CONTROLLER[/NSID] | /dev/ngXnY");
        return ExitCode::from(2);
    };
    match open(&name) {
        Ok(device) => {
            println!("{} bytes\n{:#?}", device.capacity(), device.info());
            ExitCode::SUCCESS
        }
        Err(e) => {
            eprintln!("{e}");
            ExitCode::FAILURE
        }
    }
}

fn open(name: &str) -> io::Result<Box<dyn Device>> {
    Ok(if name.starts_with("/dev/") {
        Box::new(Passthrough::open(PassthroughOptions::new(name))?)
    } else {
        Box::new(Nvme::open_vfio(&name.parse::<Target>()?, &VfioOptions::default(), &Options::default())?)
    })
}
