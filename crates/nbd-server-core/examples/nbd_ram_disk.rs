//! Serves a RAM disk of 1 GiB on a Unix domain socket until killed, and prints its URI:
//!
//! ```text
//! cargo run --release -p nbd-server-core --example nbd_ram_disk -- nbd.sock
//! ```

use std::{os::unix::net::UnixListener, sync::Arc, thread};

use blkdev::memory::Memory;
use nbd_server_core::{Export, Limits, Server};

fn main() -> std::io::Result<()> {
    let path = std::env::args().nth(1).unwrap_or_else(|| "nbd.sock".into());
    let device = Arc::new(Memory::new(1 << 30));
    let export = Export::new("", device);
    let _server = Server::start(vec![export], vec![UnixListener::bind(&path)?.into()], None, Limits::default())?;
    println!("nbd+unix:///?socket={path}");
    loop {
        thread::park();
    }
}
