//! Prints the ids and the first registers of a PCI device bound to vfio-pci: `registers 0000:01:00.0`.

use std::{env, io};

use blkdev_vfio::{Options, PciDevice, Vfio};

fn main() -> io::Result<()> {
    let Some(name) = env::args().nth(1) else {
        println!("usage: registers ADDRESS");
        return Ok(());
    };
    let device = Vfio::open(&name, &Options::default())?;
    let mut id = [0; 4];
    device.read_config(0, &mut id)?;
    let [vendor, device_id] = [[id[0], id[1]], [id[2], id[3]]].map(u16::from_le_bytes);
    println!("{}: {vendor:04x}:{device_id:04x}, {} MSI-X vectors", device.address(), device.vectors());
    let bar = device.bar(0)?;
    for at in (0..bar.len().min(64)).step_by(4) {
        println!("{at:#06x}: {:#010x}", bar.read32(at));
    }
    Ok(())
}
