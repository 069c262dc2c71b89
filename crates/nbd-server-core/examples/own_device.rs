//! Serves a device of your own over NBD:
//!
//! ```text
//! cargo run -p nbd-server-core --example own_device -- nbd.sock
//! nbdcopy 'nbd+unix:///?socket=nbd.sock' - | head -3
//! ```
//!
//! Every block of 64 bytes holds a line of text with its number, until it is written. A block takes a moment to serve, as if over
//! a network. So `Blocking` serves several at a time, and one client's requests do not delay another's.
//!
//! `serve` can rely on `blkdev::Channel`: ranges lie within the capacity and consist of whole blocks, and only operations that
//! `Info::caps` names arrive. Clients may send any request; the channel adapts it.

use std::{collections::HashMap, io, os::unix::net::UnixListener, sync::Mutex, thread, time::Duration};

use blkdev::{Blocking, Error, Info, Op, Serve};
use nbd_server_core::{Export, Limits, Server};

const BLOCK: usize = 64;

struct Lines {
    info: Info,
    written: Mutex<HashMap<u64, [u8; BLOCK]>>,
}

impl Serve for Lines {
    fn info(&self) -> &Info {
        &self.info
    }

    fn capacity(&self) -> u64 {
        1 << 20
    }

    fn serve(&self, op: &mut Op) -> Result<(), Error> {
        thread::sleep(Duration::from_micros(100));
        let number = |at: u64, n: usize| at / BLOCK as u64 + n as u64;
        match op {
            Op::Read { at, buf } => {
                for n in 0..buf.len() / BLOCK {
                    let written = self.written.lock().map_err(|_| Error::Io)?.get(&number(*at, n)).copied();
                    let line = || format!("{:<63}\n", format!("block {}", number(*at, n)));
                    let block = written.unwrap_or_else(|| line().as_bytes().try_into().expect("64 bytes"));
                    buf.copy_from(n * BLOCK, &block);
                }
                Ok(())
            }
            Op::Write { at, buf, .. } => {
                for n in 0..buf.len() / BLOCK {
                    let mut block = [0; BLOCK];
                    buf.copy_to(n * BLOCK, &mut block);
                    self.written.lock().map_err(|_| Error::Io)?.insert(number(*at, n), block);
                }
                Ok(())
            }
            _ => Err(Error::NotSupported),
        }
    }
}

fn main() -> io::Result<()> {
    let path = std::env::args().nth(1).unwrap_or_else(|| "nbd.sock".into());
    let mut info = Info::new("lines", "16384 lines of text");
    info.block_size = BLOCK as u32;
    let device = Blocking::new(Lines { info, written: Mutex::default() }, 8).into_device();
    let listener = UnixListener::bind(&path)?;
    let server = Server::start(vec![Export::new("", device)], vec![listener.into()], None, Limits::default())?;
    println!("nbd+unix:///?socket={path}");
    Err(server.wait())
}
