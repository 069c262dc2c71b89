//! Files and block devices of the kernel, through io_uring.

use std::sync::Arc;

use crate::{
    common::{
        DRIVER_ABOUT, NUM_POLL_QUEUES, NUM_QUEUES, PATH, READ_ONLY, can_add_queues, may_pin_mem_regions,
        needs_mem_regions, num_entries, source, u16_of,
    },
    driver::Driver,
    format,
    narrow::narrow,
    property::{Kind, Property},
};

pub(crate) const DRIVER: Driver = Driver {
    name: "io_uring",
    aliases: &[],
    about: "a file or a kernel block device, through io_uring",
    value: "path",
    open_ended: false,
    own: &[
        PATH,
        Property::created("fd", Kind::I32, Some("-1"), "number of an inherited file descriptor, instead of a path"),
        READ_ONLY,
        Property::created("direct", Kind::Bool, Some("false"), "bypass the page cache (O_DIRECT)"),
        Property::created(
            "force-share",
            Kind::Bool,
            Some("false"),
            "open an image that another program has open for writing, or a mounted block device",
        ),
        NUM_QUEUES,
        NUM_POLL_QUEUES,
        Property::connected("num-entries", Kind::I32, Some("128"), "most requests in flight per queue")
            .checked(num_entries),
        Property::constant("driver", Kind::Str, "io_uring", DRIVER_ABOUT),
        can_add_queues("true"),
        needs_mem_regions("false"),
        may_pin_mem_regions("false"),
    ],
    open: |settings| {
        let source = source(settings)?;
        format::warn(&source);
        let mut options = blkdev_io_uring::Options::from(source);
        options.direct = settings.bool("direct");
        options.read_only = settings.bool("read-only");
        options.entries = u16_of(settings, "num-entries").expect("num-entries has a default");
        options.force_share = settings.bool("force-share");
        narrow(Arc::new(blkdev_io_uring::IoUring::open(options)?), u16_of(settings, "num-queues"))
    },
};
