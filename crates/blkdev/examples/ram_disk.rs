//! Opens a RAM disk, writes a line to it, and reads it back: the whole way of a request, from `submit` to `reap`.
//!
//! ```text
//! cargo run -p blkdev --example ram_disk
//! ```

use std::{io, sync::Arc};

use blkdev::{Channel, Device, Done, Io, Plan, memory::Memory};

fn main() -> io::Result<()> {
    // Blocks of 512 bytes, as most disks have; the channel takes care of what is shorter.
    let disk = Memory::new(1 << 30).with(|info| info.block_size = 512);
    let device: Arc<dyn Device> = Arc::new(disk);
    let mut plan = Plan::new(1 << 20);
    plan.depth = 64;
    let mut channel = plan.open(&device, 1)?.remove(0);

    let (at, text) = (1000, b"what goes in comes out");
    let mut buf = channel.alloc(at, text.len()).ok_or(io::ErrorKind::OutOfMemory)?;
    buf.copy_from(0, text);
    finish(&mut channel, Io::Write { at, buf, fua: true })?;

    let buf = channel.alloc(at, text.len()).ok_or(io::ErrorKind::OutOfMemory)?;
    if let Io::Read { buf, .. } = finish(&mut channel, Io::Read { at, buf })? {
        println!("{:?} at byte {at} of {}", String::from_utf8_lossy(&buf.to_vec()), device.capacity());
    }

    let status = Io::Status { at: 0, len: device.capacity(), extents: Vec::new() };
    if let Io::Status { extents, .. } = finish(&mut channel, status)? {
        for extent in extents {
            println!("{:?}: {} bytes at {}", extent.kind, extent.len, extent.at);
        }
    }
    Ok(())
}

/// Submits one request and waits for it. (A server would have many in flight, and sleep on `Channel::wake_fd`.)
fn finish(channel: &mut Channel, io: Io) -> io::Result<Io> {
    channel.submit(1, io);
    let mut done: Vec<Done> = Vec::new();
    while done.is_empty() {
        channel.reap(&mut done);
    }
    let Done { io, result, .. } = done.remove(0);
    result?;
    Ok(io)
}
