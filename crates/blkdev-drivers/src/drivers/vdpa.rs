//! Virtio-blk devices behind vhost-vdpa.

use std::sync::Arc;

use crate::{
    common::{
        DRIVER_ABOUT, MAX_QUEUE_SIZE, NUM_POLL_QUEUES, NUM_QUEUES, PATH, QUEUE_SIZE, READ_ONLY, REQUEST_TIMEOUT, RING,
        WRITE_CACHE, can_add_queues, may_pin_mem_regions, needs_mem_regions, source,
    },
    driver::Driver,
    property::{Kind, Property},
    reconnect::{RECONNECT, UNFLUSHED, UNFLUSHED_MEMORY},
    virtio,
};

pub(crate) const DRIVER: Driver = Driver {
    name: "vdpa",
    aliases: &["virtio-blk-vhost-vdpa"],
    about: "a virtio-blk device behind the kernel's vhost-vdpa, in hardware or VDUSE",
    value: "path",
    open_ended: false,
    own: &[
        Property { about: "the character device, /dev/vhost-vdpa-N", ..PATH },
        Property::created("fd", Kind::I32, Some("-1"), "number of an inherited file descriptor, instead of a path"),
        READ_ONLY,
        NUM_QUEUES,
        NUM_POLL_QUEUES,
        QUEUE_SIZE,
        RING,
        WRITE_CACHE,
        REQUEST_TIMEOUT,
        RECONNECT,
        UNFLUSHED,
        UNFLUSHED_MEMORY,
        Property::constant("driver", Kind::Str, "virtio-blk-vhost-vdpa", DRIVER_ABOUT),
        MAX_QUEUE_SIZE,
        can_add_queues("false"),
        needs_mem_regions("true"),
        may_pin_mem_regions("true"),
    ],
    open: |settings| {
        let source = source(settings)?;
        let mut options = blkdev_vdpa::Options::new(source);
        options.virtio = virtio::options(settings);
        Ok(Arc::new(blkdev_vdpa::Vdpa::open(options)?))
    },
};
