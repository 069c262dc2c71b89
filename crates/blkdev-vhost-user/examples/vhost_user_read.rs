//! Prints the first 512 bytes of a vhost-user-blk device:
//!
//! ```text
//! cargo run -p blkdev-vhost-user --example vhost_user_read -- vhost.sock
//! ```

use std::{env, io, process::ExitCode, sync::Arc};

use blkdev::{Device, Mapping, Op, Registration, Request};
use blkdev_vhost_user::{Options, VhostUser};

fn main() -> ExitCode {
    let Some(path) = env::args_os().nth(1) else {
        eprintln!("usage: vhost_user_read SOCKET");
        return ExitCode::from(2);
    };
    match first_block(&Options::new(path)) {
        Ok(bytes) => {
            for (n, line) in bytes[..512].chunks(16).enumerate() {
                let hex: String = line.iter().map(|b| format!(" {b:02x}")).collect();
                println!("{:04x}:{hex}", n * 16);
            }
            ExitCode::SUCCESS
        }
        Err(e) => {
            eprintln!("{e}");
            ExitCode::FAILURE
        }
    }
}

fn first_block(options: &Options) -> io::Result<Vec<u8>> {
    let device: Arc<dyn Device> = Arc::new(VhostUser::connect(options)?);
    let memory = Registration::new(&device, &Mapping::new(1 << 20)?)?;
    let mut arena = memory.mapping().arenas(1).remove(0);
    let mut queue = device.open_queue(1)?;

    let buf = arena.alloc(device.info().block_size as usize).ok_or(io::ErrorKind::OutOfMemory)?;
    let request = Request { tag: 1, op: Op::Read { at: 0, buf } };
    queue.push(request).map_err(|_| io::ErrorKind::ResourceBusy)?;
    queue.kick();
    let mut done = Vec::new();
    loop {
        queue.reap(&mut done);
        let Some(completion) = done.pop() else {
            std::thread::yield_now();
            continue;
        };
        completion.result?;
        let Op::Read { buf, .. } = completion.op else { unreachable!("a read completes as a read") };
        return Ok(buf.to_vec());
    }
}
