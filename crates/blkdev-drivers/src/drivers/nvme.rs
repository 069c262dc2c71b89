//! NVMe controllers over VFIO.

use std::sync::Arc;

use crate::{
    common::{
        NUM_POLL_QUEUES, NUM_QUEUES, READ_ONLY, REQUEST_TIMEOUT, can_add_queues, may_pin_mem_regions,
        needs_mem_regions, nvme_queue_size, u16_of,
    },
    driver::Driver,
    property::{Kind, Property, Value},
    reconnect::{RECONNECT, UNFLUSHED, UNFLUSHED_MEMORY},
};

pub(crate) const DRIVER: Driver = Driver {
    name: "nvme",
    aliases: &[],
    about: "an NVMe controller bound to vfio-pci, driven from user space: nvme=ADDRESS[/NSID]",
    value: "path",
    open_ended: false,
    own: &[
        Property::created(
            "path",
            Kind::Str,
            Some(""),
            "PCI address of the controller or its path in sysfs, optionally with /NSID: 0000:01:00.0/1",
        ),
        READ_ONLY,
        Property::created(
            "no-iommu",
            Kind::Bool,
            Some("false"),
            "if the machine has no IOMMU, work without it: UNSAFE",
        ),
        NUM_QUEUES,
        NUM_POLL_QUEUES,
        Property::connected("queue-size", Kind::I32, Some("256"), "number of entries per queue, 2 to 1024")
            .checked(nvme_queue_size),
        REQUEST_TIMEOUT,
        RECONNECT,
        UNFLUSHED,
        UNFLUSHED_MEMORY,
        Property::constant("driver", Kind::Str, "nvme", "name of the driver; libblkio has no such driver"),
        Property::told(
            "max-queue-size",
            Kind::I32,
            |device| Value::I32(i32::from(device.info().depth_max) + 1),
            "largest queue-size",
        ),
        can_add_queues("true"),
        needs_mem_regions("true"),
        may_pin_mem_regions("true"),
    ],
    open: |settings| {
        let target = settings.needed("path")?.parse()?;
        let mut how = blkdev_nvme::VfioOptions::default();
        how.no_iommu = settings.bool("no-iommu");
        let mut options = blkdev_nvme::Options::default();
        options.read_only = settings.bool("read-only");
        options.queues = u16_of(settings, "num-queues");
        options.queue_size = u16_of(settings, "queue-size").expect("queue-size has a default");
        options.timeout = Some(settings.time("request-timeout"));
        Ok(Arc::new(blkdev_nvme::Nvme::open_vfio(&target, &how, &options)?))
    },
};
