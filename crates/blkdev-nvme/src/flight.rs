//! [`Flight`]: a request in the ring of a namespace.

use std::mem;

use blkdev::{Buf, Op, Request};
use blkdev_ring::{Data, NvmeCommand, Operation, Passthrough};

use crate::spec::Command;

/// A request that the kernel works on.
#[derive(Debug)]
pub(crate) struct Flight {
    pub(crate) request: Request,
    pub(crate) command: Command,
    /// What Dataset Management reads.
    pub(crate) ranges: Box<[[u64; 2]]>,
    /// It uses registered memory, if it can.
    pub(crate) fixed: bool,
    pub(crate) timeout_ms: u32,
}

impl Operation<Passthrough> for Flight {
    #[inline]
    fn command(&self) -> NvmeCommand<'_> {
        let data = match &self.request.op {
            Op::Read { buf, .. } | Op::Write { buf, .. } => Data::Buf { buf, fixed: self.fixed },
            Op::Discard { .. } => Data::Ranges(&self.ranges),
            _ => Data::None,
        };
        NvmeCommand { words: self.command.0, data, timeout_ms: self.timeout_ms }
    }

    fn buf_mut(&mut self) -> Option<&mut Buf> {
        match &mut self.request.op {
            Op::Read { buf, .. } | Op::Write { buf, .. } => Some(buf),
            _ => None,
        }
    }

    fn abandon(&mut self) {
        mem::forget(mem::take(&mut self.ranges));
        if let Some(buf) = self.buf_mut() {
            buf.abandon();
        }
    }
}
