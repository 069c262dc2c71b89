//! Opens a device with a libblkio driver, and prints its size and properties:
//!
//! ```text
//! cargo run -p blkdev-libblkio --example libblkio_info -- io_uring path=disk.img
//! ```

use std::{env, io, process::ExitCode};

use blkdev::Device;
use blkdev_libblkio::Libblkio;

fn main() -> ExitCode {
    let mut arguments = env::args().skip(1);
    let Some(driver) = arguments.next() else {
        eprintln!("usage: libblkio_info DRIVER [PROPERTY=VALUE]...");
        return ExitCode::from(2);
    };
    match open(&driver, arguments) {
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

fn open(driver: &str, words: impl Iterator<Item = String>) -> io::Result<Libblkio> {
    let properties = words
        .map(|word| match word.split_once('=') {
            Some((name, value)) => Ok((name.to_owned(), value.to_owned())),
            None => Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{word}: expected a property NAME=VALUE"))),
        })
        .collect::<io::Result<Vec<_>>>()?;
    Libblkio::open(driver, &properties)
}
