//! Prints the properties of an NVMe namespace: `info 0000:01:00.0/1` (a controller bound to vfio-pci) or `info /dev/ng0n1`.

use std::{env, io};

use blkdev::Device;
use blkdev_nvme::{Nvme, Options, Passthrough, PassthroughOptions, Target, VfioOptions};

fn main() -> io::Result<()> {
    let Some(name) = env::args().nth(1) else {
        println!("usage: info CONTROLLER[/NSID] | /dev/ngXnY");
        return Ok(());
    };
    let device: Box<dyn Device> = if name.starts_with("/dev/") {
        Box::new(Passthrough::open(PassthroughOptions::new(name))?)
    } else {
        Box::new(Nvme::open_vfio(&name.parse::<Target>()?, &VfioOptions::default(), &Options::default())?)
    };
    println!("{} bytes\n{:#?}", device.capacity(), device.info());
    Ok(())
}
