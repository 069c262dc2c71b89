//! The one list of drivers and their properties: turns `"vhost-user=/run/vhost.sock,num-queues=2"` into a
//! [`blkdev::Device`].
//!
//! Every program that opens devices from its arguments uses this crate. So a driver has the same name, the same properties and
//! the same error messages everywhere:
//!
//! ```
//! use blkdev_drivers::Spec;
//!
//! let spec: Spec = "scratch:memory=64M".parse()?;
//! assert_eq!(spec.name, "scratch");
//! let disk = spec.settings.open()?;
//! assert_eq!(disk.capacity(), 64 << 20);
//!
//! let error = "io_uring=disk.img,num-entires=64".parse::<Spec>().unwrap_err();
//! assert_eq!(error.to_string(), r#"io_uring has no property "num-entires"; did you mean num-entries?"#);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # The words
//!
//! ```text
//! [NAME:]DRIVER[=VALUE][,PROPERTY=VALUE]...
//!
//! io_uring=disk.img                        vhost-user=/run/vhost.sock,num-queues=2
//! backup:io_uring=/dev/sdb,read-only=true  virtio-blk-vhost-user,path=/run/vhost.sock
//! ```
//!
//! * `VALUE` right after the driver is its most important property, which [`Driver::value`] names: mostly `path`.
//! * `NAME` is what comes before the first colon, if that colon stands before the first `=`. So a path may hold colons, a
//!   name neither `:` nor `=`.
//! * A path need not be UTF-8 ([`Spec::parse`]); everything else is.
//! * A comma in a value is written twice: `io_uring=/srv/a,,b.img` opens `/srv/a,b.img`. Nothing else is special: neither
//!   quotes nor backslashes.
//! * When a property is given twice, the later value wins. `_` and `-` are the same in names of drivers and properties.
//!
//! # Properties
//!
//! Names, types, defaults, error messages and errnos are those of libblkio where libblkio has the property, and
//! [`Settings`] can be driven as it is there: [`set`](Settings::set), [`get`](Settings::get),
//! [`open`](Settings::open), [`properties`]. Where it differs, on purpose:
//!
//! * libblkio tells properties that are set before connecting from those that are set after it. Here everything is set
//!   before [`open`](Settings::open), in any order; [`Property::access`] still says which is which.
//! * `num-queues` that is not set is not 1, but as many queues as the server has workers, up to what the device has.
//! * `num-poll-queues` must be 0: completions come through file descriptors.
//! * `max-transfer` and `max-queue-size` are what the device says, not a constant, and never 0.
//! * Sizes of `memory` and `null` take the suffixes `K` to `E`, and time-outs `ms` and `s`; libblkio has neither.
//! * What describes libblkio's own calls (segments, alignment of buffers) and zones is absent.
//!
//! # Features
//!
//! Each driver has a feature of its name: `io-uring`, `vhost-user`, `nvme`, `nvme-io_uring`, `vdpa` and `virtio-pci`, which are on
//! by default, and `libblkio`, which is not. `memory` and `null` are always there. A driver that is off is not built, and
//! neither is what it depends on.

#![cfg_attr(
    not(all(
        feature = "io-uring",
        feature = "nvme",
        feature = "nvme-io_uring",
        feature = "vdpa",
        feature = "vhost-user",
        feature = "virtio-pci"
    )),
    allow(dead_code, reason = "what the drivers share is not used by each of them")
)]

mod common;
mod driver;
mod drivers;
mod error;
mod fd;
#[cfg(feature = "io-uring")]
mod format;
mod narrow;
mod open;
mod property;
mod reconnect;
mod settings;
mod spec;
mod suggest;
mod units;
#[cfg(any(feature = "vhost-user", feature = "vdpa", feature = "virtio-pci"))]
mod virtio;

pub use blkdev;
pub use driver::Driver;
pub use drivers::{drivers, find};
pub use error::Error;
pub use fd::inherited;
pub use property::{Access, Kind, Property, Value};
pub use settings::{Settings, properties};
pub use spec::Spec;
pub use suggest::nearest;
pub use units::{parse_size, parse_time};

/// The examples of the readme are tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
