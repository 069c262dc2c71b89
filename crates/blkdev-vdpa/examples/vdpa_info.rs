//! Prints the size and the properties of a vhost-vdpa device:
//!
//! ```text
//! cargo run -p blkdev-vdpa --example vdpa_info -- /dev/vhost-vdpa-0
//! ```

use std::{env, process::ExitCode};

use blkdev::Device;
use blkdev_vdpa::{Options, Source, Vdpa};

fn main() -> ExitCode {
    let Some(path) = env::args_os().nth(1) else {
        eprintln!("usage: vdpa_info /dev/vhost-vdpa-N");
        return ExitCode::from(2);
    };
    match Vdpa::open(Options::new(Source::Path(path.into()))) {
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
