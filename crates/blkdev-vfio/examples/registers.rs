//! Prints the ids and the first registers of a PCI device bound to vfio-pci:
//!
//! ```text
//! cargo run -p blkdev-vfio --example registers -- 0000:01:00.0
//! ```

use std::{env, io, process::ExitCode};

use blkdev_vfio::{Options, PciDevice, Vfio};

fn main() -> ExitCode {
    let Some(address) = env::args().nth(1) else {
        eprintln!("usage: registers ADDRESS");
        return ExitCode::from(2);
    };
    match print(&address) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("{e}");
            ExitCode::FAILURE
        }
    }
}

fn print(address: &str) -> io::Result<()> {
    let device = Vfio::open(address, &Options::default())?;
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
