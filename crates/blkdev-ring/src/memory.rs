//! [`Memory`]: the mappings that operations use.

use std::{mem, sync::Arc};

use blkdev::{Buf, Mapping};

/// Every mapping that an operation's memory was in, alive as long as the kernel may use it.
#[derive(Debug, Default)]
pub struct Memory {
    mappings: Vec<Arc<Mapping>>,
    /// The first of them is registered with the kernel.
    has_registered: bool,
}

impl Memory {
    pub(crate) fn new(mapping: Arc<Mapping>, is_registered: bool) -> Self {
        Self { mappings: vec![mapping], has_registered: is_registered }
    }

    pub(crate) fn has_registered(&self) -> bool {
        self.has_registered
    }

    /// Keeps the mapping of a buffer. Returns its number among registered buffers, if it is one.
    #[inline]
    pub(crate) fn keep(&mut self, buf: &Buf) -> Option<u16> {
        let known = self.mappings.iter().position(|known| Arc::ptr_eq(known, buf.mapping()));
        if known.is_none() {
            self.mappings.push(Arc::clone(buf.mapping()));
        }
        (self.has_registered && known == Some(0)).then_some(0)
    }

    /// The kernel may use it forever.
    pub(crate) fn leak(&mut self) {
        self.mappings.drain(..).for_each(mem::forget);
    }
}
