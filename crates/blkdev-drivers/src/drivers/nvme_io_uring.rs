//! NVMe namespaces through io_uring passthrough.

use std::sync::Arc;

use crate::{
    common::{
        DRIVER_ABOUT, NUM_POLL_QUEUES, NUM_QUEUES, PATH, READ_ONLY, REQUEST_TIMEOUT, can_add_queues,
        may_pin_mem_regions, needs_mem_regions, num_entries, source, u16_of,
    },
    driver::Driver,
    narrow::narrow,
    property::{Kind, Property},
};

pub(crate) const DRIVER: Driver = Driver {
    name: "nvme-io_uring",
    aliases: &[],
    about: "an NVMe namespace, through io_uring passthrough: /dev/ngXnY",
    value: "path",
    open_ended: false,
    own: &[
        Property { about: "character device of the namespace, /dev/ngXnY", ..PATH },
        Property::created("fd", Kind::I32, Some("-1"), "number of an inherited file descriptor, instead of a path"),
        READ_ONLY,
        NUM_QUEUES,
        NUM_POLL_QUEUES,
        Property::connected("num-entries", Kind::I32, Some("128"), "most requests in flight per queue")
            .checked(num_entries),
        Property::created(
            "polled",
            Kind::Bool,
            Some("false"),
            "poll for completions, which keeps a CPU busy; the kernel needs nvme.poll_queues",
        ),
        REQUEST_TIMEOUT,
        Property::constant("driver", Kind::Str, "nvme-io_uring", DRIVER_ABOUT),
        can_add_queues("true"),
        needs_mem_regions("false"),
        may_pin_mem_regions("false"),
    ],
    open: |settings| {
        let source = source(settings)?;
        let mut options = blkdev_nvme::PassthroughOptions::from(source);
        options.read_only = settings.bool("read-only");
        options.entries = u16_of(settings, "num-entries").expect("num-entries has a default");
        options.polled = settings.bool("polled");
        options.timeout = Some(settings.time("request-timeout"));
        narrow(Arc::new(blkdev_nvme::Passthrough::open(options)?), u16_of(settings, "num-queues"))
    },
};
