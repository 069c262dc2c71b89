//! Vhost-user-blk servers.

use std::sync::Arc;

use crate::{
    common::{
        DRIVER_ABOUT, MAX_QUEUE_SIZE, NUM_POLL_QUEUES, NUM_QUEUES, PATH, QUEUE_SIZE, READ_ONLY, REQUEST_TIMEOUT, RING,
        WRITE_CACHE, can_add_queues, may_pin_mem_regions, needs_mem_regions, some_time,
    },
    driver::Driver,
    property::{Kind, Property},
    reconnect::{RECONNECT, UNFLUSHED, UNFLUSHED_MEMORY},
    virtio,
};

pub(crate) const DRIVER: Driver = Driver {
    name: "vhost-user",
    aliases: &["virtio-blk-vhost-user"],
    about: "a vhost-user-blk back end, such as qemu-storage-daemon or SPDK",
    value: "path",
    open_ended: false,
    own: &[
        Property { about: "socket of the back end", ..PATH },
        READ_ONLY,
        NUM_QUEUES,
        NUM_POLL_QUEUES,
        QUEUE_SIZE,
        RING,
        WRITE_CACHE,
        Property::created(
            "connect-timeout",
            Kind::Time,
            Some("5s"),
            "longest wait for the back end's replies when the device is opened",
        )
        .checked(some_time),
        REQUEST_TIMEOUT,
        RECONNECT,
        UNFLUSHED,
        UNFLUSHED_MEMORY,
        Property::created(
            "huge-pages",
            Kind::Bool,
            Some("false"),
            "use reserved huge pages for shared memory; the back end must be trusted not to punch holes in it",
        ),
        Property::constant("driver", Kind::Str, "virtio-blk-vhost-user", DRIVER_ABOUT),
        MAX_QUEUE_SIZE,
        can_add_queues("false"),
        needs_mem_regions("true"),
        may_pin_mem_regions("true"),
    ],
    open: |settings| {
        let mut options =
            blkdev_vhost_user::Options::new(settings.path("path").ok_or_else(|| settings.missing("path"))?);
        options.virtio = virtio::options(settings);
        options.connect_timeout = settings.time("connect-timeout");
        options.huge_pages = settings.bool("huge-pages");
        Ok(Arc::new(blkdev_vhost_user::VhostUser::connect(&options)?))
    },
};
