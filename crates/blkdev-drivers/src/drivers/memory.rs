//! RAM disks.

use std::sync::Arc;

use blkdev::memory::Memory;

use crate::{
    common::{NUM_QUEUES, SIZE, u16_of},
    driver::Driver,
    narrow::narrow,
};

pub(crate) const DRIVER: Driver = Driver {
    name: "memory",
    aliases: &[],
    about: "a sparse RAM disk, empty at start; its content is lost at exit",
    value: "size",
    open_ended: false,
    own: &[SIZE, NUM_QUEUES],
    open: |settings| {
        let size = settings.u64("size").ok_or_else(|| settings.missing("size"))?;
        narrow(Arc::new(Memory::new(size)), u16_of(settings, "num-queues"))
    },
};
