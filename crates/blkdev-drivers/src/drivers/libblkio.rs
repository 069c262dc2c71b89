//! Libblkio's drivers.

use std::sync::Arc;

use crate::{
    common::{READ_ONLY, REQUEST_TIMEOUT},
    driver::Driver,
    property::{Kind, Property},
};

pub(crate) const DRIVER: Driver = Driver {
    name: "libblkio",
    aliases: &[],
    about: "any driver of libblkio, for comparison: libblkio=DRIVER,path=PATH",
    value: "driver",
    open_ended: true,
    own: &[
        Property::created("driver", Kind::Str, Some(""), "libblkio's name for the driver, such as nvme-io_uring"),
        READ_ONLY,
        REQUEST_TIMEOUT,
    ],
    open: |settings| {
        let mut properties = settings.extra().to_vec();
        if settings.bool("read-only") {
            properties.insert(0, ("read-only".into(), "true".into()));
        }
        let device = blkdev_libblkio::Libblkio::open(&settings.needed("driver")?, &properties)?;
        Ok(Arc::new(device.timeout(Some(settings.time("request-timeout")))))
    },
};
