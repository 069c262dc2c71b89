//! Devices that read zeroes.

use std::sync::Arc;

use blkdev::null::Null;

use crate::{
    common::{NUM_QUEUES, SIZE, u16_of},
    driver::Driver,
    narrow::narrow,
};

pub(crate) const DRIVER: Driver = Driver {
    name: "null",
    aliases: &[],
    about: "reads as zeroes and discards writes, for benchmarks",
    value: "size",
    open_ended: false,
    own: &[SIZE, NUM_QUEUES],
    open: |settings| {
        let size = settings.u64("size").ok_or_else(|| settings.missing("size"))?;
        narrow(Arc::new(Null::new(size)), u16_of(settings, "num-queues"))
    },
};
