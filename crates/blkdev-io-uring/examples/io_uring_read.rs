//! Prints the properties and the first 512 bytes of a file or block device, through a single queue:
//!
//! ```text
//! cargo run -p blkdev-io-uring --example io_uring_read -- disk.img
//! ```

use std::{env, io, path::PathBuf, process::ExitCode, sync::Arc};

use blkdev::{Device, Mapping, Op, Registration, Request};
use blkdev_io_uring::{IoUring, Options};

fn main() -> ExitCode {
    let Some(path) = env::args_os().nth(1) else {
        eprintln!("usage: io_uring_read PATH");
        return ExitCode::from(2);
    };
    match print(path.into()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("{e}");
            ExitCode::FAILURE
        }
    }
}

fn print(path: PathBuf) -> io::Result<()> {
    let mut options = Options::path(path);
    options.read_only = true;
    let device: Arc<dyn Device> = Arc::new(IoUring::open(options)?);
    println!("{:#?}", device.info());
    println!("{} bytes", device.capacity());

    // Memory registered with the device once, and a buffer in it.
    let memory = Registration::new(&device, &Mapping::new(1 << 20)?)?;
    let mut arena = memory.mapping().arenas(1).remove(0);
    let len = device.capacity().min(512.max(device.info().block_size.into())) as usize;
    let buf = arena.alloc(len).ok_or(io::ErrorKind::OutOfMemory)?;
    if len == 0 {
        return Ok(());
    }

    // The buffer moves in with the request and comes back with the completion.
    let mut queue = device.open_queue(1)?;
    queue.push(Request { tag: 0, op: Op::Read { at: 0, buf } }).expect("a new queue has room");
    queue.kick();
    let mut done = Vec::new();
    while done.is_empty() {
        queue.reap(&mut done);
    }
    for completion in done {
        completion.result?;
        if let Op::Read { buf, .. } = completion.op {
            for (n, line) in buf.to_vec().iter().take(512).collect::<Vec<_>>().chunks(16).enumerate() {
                let hex: Vec<String> = line.iter().map(|byte| format!("{byte:02x}")).collect();
                println!("{:04x}  {}", n * 16, hex.join(" "));
            }
        }
    }
    Ok(())
}
