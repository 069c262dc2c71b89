//! [`Null`]: reads as zeroes, and discards writes. For benchmarks of everything except the device.

use std::{io, sync::Arc};

use crate::{
    device::{Caps, Device, Info, Op, Queue},
    error::Error,
    extent::{Extent, ExtentKind},
    inline::Inline,
    mem::Mapping,
    memory::range,
    serve::Serve,
};

/// A device of any size that holds nothing. Requests are complete when [`Queue::push`] returns.
///
/// A read fills its buffer with zeroes, which costs time. An unchanged buffer would show one client another client's data.
#[derive(Debug)]
pub struct Null {
    nothing: Inline<Nothing>,
}

#[derive(Debug)]
struct Nothing {
    info: Info,
    size: u64,
}

impl Null {
    /// Returns a device of `size` bytes.
    pub fn new(size: u64) -> Self {
        let caps = Caps { fua: true, zero: true, discard: true, status: true, prefetch: true, ..Caps::default() };
        let mut info = Info::new("null", format!("{size} bytes"));
        (info.queues_max, info.depth_max, info.caps) = (256, 1024, caps);
        Self { nothing: Inline::new(Nothing { info, size }) }
    }
}

impl Device for Null {
    fn info(&self) -> &Info {
        self.nothing.info()
    }

    fn capacity(&self) -> u64 {
        self.nothing.capacity()
    }

    fn pins_memory(&self) -> bool {
        self.nothing.pins_memory()
    }

    fn register(&self, mapping: &Arc<Mapping>) -> io::Result<()> {
        self.nothing.register(mapping)
    }

    fn open_queue(&self, depth: u16) -> io::Result<Box<dyn Queue>> {
        self.nothing.open_queue(depth)
    }
}

impl Serve for Nothing {
    fn info(&self) -> &Info {
        &self.info
    }

    fn capacity(&self) -> u64 {
        self.size
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
    fn a_read_does_not_show_old_content_of_the_buffer() {
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
