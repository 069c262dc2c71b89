//! [`Driver`]: what there is to know of a driver: its names, its properties, and how it is opened.

use std::{io, sync::Arc};

use blkdev::Device;

use crate::{common::COMMON, property::Property, settings::Settings};

/// A way to reach block devices.
#[derive(Debug)]
pub struct Driver {
    /// What it is called here.
    pub name: &'static str,
    /// Other names that are accepted, libblkio's among them.
    pub aliases: &'static [&'static str],
    /// One line for people.
    pub about: &'static str,
    /// The property that the value right after the driver's name sets: `path` in `io_uring=disk.img`.
    pub value: &'static str,
    /// Properties that are not in the table are passed on instead of refused: the library behind the driver knows them.
    pub open_ended: bool,
    pub(crate) own: &'static [Property],
    pub(crate) open: fn(&Settings) -> io::Result<Arc<dyn Device>>,
}

impl Driver {
    /// All its properties: first those that can be set.
    pub fn properties(&self) -> impl Iterator<Item = &'static Property> {
        self.own.iter().chain(COMMON)
    }

    /// Whether it has a property of this name.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.properties().any(|property| property.name == name)
    }
}
