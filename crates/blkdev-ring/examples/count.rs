//! Counts the zero bytes of a file, with eight reads in flight:
//!
//! ```text
//! cargo run -p blkdev-ring --example count -- disk.img
//! ```

use std::{env, fs::File, io, os::fd::AsFd, path::Path, process::ExitCode};

use blkdev::{Buf, Mapping};
use blkdev_ring::{Command, Operation, Ring};

/// An operation owns its memory; the ring owns the operation.
struct Read {
    at: u64,
    buf: Buf,
}

impl Operation for Read {
    fn command(&self) -> Command<'_> {
        Command::Read { at: self.at, buf: &self.buf, skip: 0 }
    }

    fn buf_mut(&mut self) -> Option<&mut Buf> {
        Some(&mut self.buf)
    }
}

const CHUNK: usize = 64 << 10;

fn main() -> ExitCode {
    let Some(path) = env::args_os().nth(1) else {
        eprintln!("usage: count PATH");
        return ExitCode::from(2);
    };
    match count(Path::new(&path)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("{e}");
            ExitCode::FAILURE
        }
    }
}

fn count(path: &Path) -> io::Result<()> {
    let file = File::open(path)?;
    let size = file.metadata()?.len();
    let mut arena = Mapping::new(8 * CHUNK)?.arenas(1).remove(0);
    let mut ring = Ring::new(8, file.as_fd())?;

    let (mut at, mut zeroes, mut failed, mut chunk) = (0, 0usize, None, vec![0; CHUNK]);
    while at < size || ring.in_flight() > 0 {
        while at < size
            && let Some(buf) = arena.alloc(CHUNK)
            && ring.push(Read { at, buf }).is_ok()
        {
            at += CHUNK as u64;
        }
        ring.kick();
        // A service would sleep until the ring's descriptor is readable, if `ring.arm()`; this example spins.
        ring.reap(|Read { buf, .. }, result| {
            match result {
                Ok(len) => {
                    buf.copy_to(0, &mut chunk[..len as usize]);
                    zeroes += chunk[..len as usize].iter().filter(|&&byte| byte == 0).count();
                }
                Err(errno) => failed = Some(errno),
            }
            None // done with; giving the operation back would submit it again
        });
    }
    if let Some(errno) = failed {
        return Err(io::Error::from_raw_os_error(errno));
    }
    println!("{zeroes} of {size} bytes are zero");
    Ok(())
}
