//! [`Null`]: reads as zeroes, forgets what is written. What remains to be measured is everything else.

use std::{
    io,
    sync::{Arc, atomic::AtomicU16},
};

use crate::{
    device::{Caps, Device, Info, Op, Queue},
    error::Error,
    extent::{Extent, ExtentKind},
    mem::Mapping,
    memory::{AtOnce, Serve, range},
};

/// A device of any size that holds nothing. Requests are done by the time [`Queue::push`] returns.
///
/// A read costs the filling of its buffer with zeroes: to leave it as it was would show one client another one's data.
#[derive(Debug)]
pub struct Null {
    nothing: Arc<Nothing>,
    size: u64,
}

#[derive(Debug)]
struct Nothing {
    info: Info,
    open: AtomicU16,
}

impl Null {
    /// A device of `size` bytes.
    pub fn new(size: u64) -> Self {
        let caps = Caps { fua: true, zero: true, discard: true, status: true, prefetch: true, ..Caps::default() };
        let info = Info {
            driver: "null",
            target: format!("{size} bytes"),
            serial: String::new(),
            queues_max: 256,
            depth_max: 1024,
            block_size: 1,
            preferred_block_size: 4096,
            transfer_max: 32 << 20,
            zero_max: u64::MAX,
            discard_max: u64::MAX,
            discard_alignment: 1,
            timeout: None,
            caps,
        };
        Self { nothing: Arc::new(Nothing { info, open: 0.into() }), size }
    }
}

impl Device for Null {
    fn info(&self) -> &Info {
        &self.nothing.info
    }

    fn capacity(&self) -> u64 {
        self.size
    }

    fn pins_memory(&self) -> bool {
        false
    }

    fn register(&self, _: &Arc<Mapping>) -> io::Result<()> {
        Ok(())
    }

    fn open_queue(&self, depth: u16) -> io::Result<Box<dyn Queue>> {
        AtOnce::open(&self.nothing, depth)
    }
}

impl Serve for Nothing {
    fn info(&self) -> &Info {
        &self.info
    }

    fn open(&self) -> &AtomicU16 {
        &self.open
    }

    #[inline]
    fn serve(&self, op: &mut Op) -> Result<(), Error> {
        if cfg!(debug_assertions)
            && let Some((at, len)) = range(op)
        {
            self.info.insist(op, at, len);
        }
        match op {
            Op::Read { buf, .. } => buf.zero(0, buf.len()),
            Op::Status { at, len, extents } => extents.push(Extent { at: *at, len: *len, kind: ExtentKind::Hole }),
            Op::Write { .. } | Op::Zero { .. } | Op::Discard { .. } | Op::Flush | Op::Prefetch { .. } => {}
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Request;

    #[test]
    fn a_read_shows_nothing_of_what_the_buffer_held() {
        let mut arena = Mapping::new(1).unwrap().arenas(1).remove(0);
        let mut buf = arena.alloc(10_000).unwrap();
        buf.copy_from(0, &[0x5e; 10_000]);
        let mut queue = Null::new(u64::MAX).open_queue(8).unwrap();
        queue.push(Request { tag: 1, op: Op::Read { at: 1 << 40, buf } }).unwrap();
        let mut done = Vec::new();
        queue.reap(&mut done);
        let Op::Read { buf, .. } = &done[0].op else { panic!("a read comes back as a read") };
        assert_eq!((done[0].result, buf.to_vec()), (Ok(()), vec![0; 10_000]));
    }
}
