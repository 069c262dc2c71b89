//! Virtio-blk PCI devices over VFIO.

use std::sync::Arc;

use crate::{
    common::{
        DRIVER_ABOUT, MAX_QUEUE_SIZE, NUM_POLL_QUEUES, NUM_QUEUES, QUEUE_SIZE, READ_ONLY, REQUEST_TIMEOUT, RING,
        WRITE_CACHE, can_add_queues, may_pin_mem_regions, needs_mem_regions, num_vectors, u16_of,
    },
    driver::Driver,
    property::{Kind, Property},
    reconnect::{RECONNECT, UNFLUSHED, UNFLUSHED_MEMORY},
    virtio,
};

pub(crate) const DRIVER: Driver = Driver {
    name: "virtio-pci",
    aliases: &["virtio-blk-vfio-pci"],
    about: "a virtio-blk PCI device bound to vfio-pci",
    value: "path",
    open_ended: false,
    own: &[
        Property::created("path", Kind::Str, Some(""), "PCI address of the device or its path in sysfs"),
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
        Property::connected(
            "num-vectors",
            Kind::I32,
            Some("65535"),
            "most interrupt vectors to use; without enough for one per queue, queues share one",
        )
        .checked(num_vectors),
        Property::constant("driver", Kind::Str, "virtio-blk-vfio-pci", DRIVER_ABOUT),
        MAX_QUEUE_SIZE,
        can_add_queues("false"),
        needs_mem_regions("true"),
        may_pin_mem_regions("true"),
    ],
    open: |settings| {
        let mut options = blkdev_virtio_pci::Options::new(settings.needed("path")?);
        options.virtio = virtio::options(settings);
        options.vectors = u16_of(settings, "num-vectors").expect("num-vectors has a default");
        Ok(Arc::new(blkdev_virtio_pci::VirtioPci::open(&options)?))
    },
};
