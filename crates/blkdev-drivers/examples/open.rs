//! Opens a device of any driver, and prints its limits and properties:
//!
//! ```text
//! cargo run -p blkdev-drivers --example open -- io_uring=disk.img
//! ```

use std::{env, error::Error, process::ExitCode};

use blkdev_drivers::{Spec, properties};

fn main() -> ExitCode {
    let spec = env::args().nth(1).unwrap_or_else(|| "memory=64M".into());
    match open(&spec) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn open(spec: &str) -> Result<(), Box<dyn Error>> {
    let Spec { settings, .. } = spec.parse()?;
    let device = settings.open()?;
    println!("{:?}", device.info());
    for (name, value) in properties(&*device, &settings) {
        println!("{name} = {value}");
    }
    Ok(())
}
