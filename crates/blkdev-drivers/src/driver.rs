//! The table: every driver, its properties, and how it is opened. A new driver is one more entry of [`DRIVERS`].

use std::{borrow::Cow, io, sync::Arc, time::Duration};

use blkdev::{Device, memory::Memory, null::Null};
use blkdev_io_uring as io_uring;
use blkdev_nvme as nvme;
use blkdev_vdpa as vdpa;
use blkdev_vhost_user::{self as vhost_user, Format, WriteCache};
use blkdev_virtio_pci as virtio_pci;

use crate::{
    error::Error,
    fd::inherited,
    format,
    narrow::narrow,
    property::{Kind, Property, Value},
    settings::Settings,
    suggest::nearest,
};

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
    /// Properties that are not in the table are passed on instead of refused: somebody else knows them.
    pub open_ended: bool,
    own: &'static [Property],
    pub(crate) open: fn(&Settings) -> io::Result<Arc<dyn Device>>,
}

impl Driver {
    /// All its properties: first those that can be set.
    pub fn properties(&self) -> impl Iterator<Item = &'static Property> {
        self.own.iter().chain(COMMON)
    }
}

/// All drivers of this build.
pub fn drivers() -> &'static [Driver] {
    DRIVERS
}

/// The driver of this name or alias; `_` and `-` are the same.
///
/// # Errors
/// `ENOENT`, with a suggestion or the names that there are.
pub fn find(name: &str) -> Result<&'static Driver, Error> {
    let dashed = name.replace('_', "-");
    let names = |driver: &'static Driver| std::iter::once(driver.name).chain(driver.aliases.iter().copied());
    let found = DRIVERS.iter().find(|driver| names(driver).any(|known| known.replace('_', "-") == dashed));
    found.ok_or_else(|| {
        let hint = if let Some(meant) = meant(&dashed) {
            format!("did you mean {meant}?")
        } else if dashed == "libblkio" {
            "this build has no libblkio: build it with \"cargo build --release -p nbdblk --features libblkio\"".into()
        } else if let Some(near) = nearest(name, DRIVERS.iter().flat_map(names)) {
            format!("did you mean {near}?")
        } else {
            format!("known drivers: {}", DRIVERS.iter().map(|driver| driver.name).collect::<Vec<_>>().join(", "))
        };
        Error::unknown_driver(name, &hint)
    })
}

/// The driver that other programs know under this name.
pub(crate) fn meant(name: &str) -> Option<&'static str> {
    Some(match name.to_ascii_lowercase().replace('_', "-").as_str() {
        "file" | "path" | "filename" | "raw" | "disk" | "image" | "img" | "dev" | "device" | "block" | "bdev"
        | "aio" | "linux-aio" | "host-device" | "uring" | "io-uring" => "io_uring",
        "socket" | "sock" | "unix" | "vhost" | "vhost-user-blk" => "vhost-user",
        "ram" | "mem" | "malloc" | "ramdisk" => "memory",
        "vhost-vdpa" | "virtio-blk-vdpa" => "vdpa",
        "zero" | "null-co" | "null-aio" => "null",
        _ => return None,
    })
}

static DRIVERS: &[Driver] = &[
    Driver {
        name: "io_uring",
        aliases: &[],
        about: "a file or a block device of the kernel, through io_uring",
        value: "path",
        open_ended: false,
        own: &[
            PATH,
            Property::created("fd", Kind::I32, Some("-1"), "an inherited file descriptor, instead of a path"),
            READ_ONLY,
            Property::created("direct", Kind::Bool, Some("false"), "past the page cache (O_DIRECT)"),
            Property::created(
                "force-share",
                Kind::Bool,
                Some("false"),
                "opens an image that another program writes to, or a block device that is mounted",
            ),
            NUM_QUEUES,
            NUM_POLL_QUEUES,
            Property::connected("num-entries", Kind::I32, Some("128"), "requests in flight on one queue, at most")
                .checked(num_entries),
            Property::constant("driver", Kind::Str, "io_uring", DRIVER_ABOUT),
            can_add_queues("true"),
            needs_mem_regions("false"),
            may_pin_mem_regions("false"),
        ],
        open: |settings| {
            let source = match (settings.path("path"), settings.i32("fd")) {
                (Some(_), Some(0..)) => {
                    return Err(Error::invalid("io_uring: path and fd cannot be set at the same time".into()).into());
                }
                (None, Some(fd @ 0..)) => io_uring::Source::Fd(inherited(fd)?),
                (path, _) => io_uring::Source::Path(path.ok_or_else(|| settings.missing("path"))?),
            };
            format::warn(&source);
            let options = io_uring::Options {
                source,
                direct: settings.bool("direct"),
                read_only: settings.bool("read-only"),
                entries: u16_of(settings, "num-entries").expect("num-entries has a default"),
                force_share: settings.bool("force-share"),
            };
            narrow(Arc::new(io_uring::IoUring::open(options)?), u16_of(settings, "num-queues"))
        },
    },
    Driver {
        name: "vhost-user",
        aliases: &["virtio-blk-vhost-user"],
        about: "a vhost-user-blk server, such as qemu-storage-daemon or SPDK",
        value: "path",
        open_ended: false,
        own: &[
            Property { about: "the socket that the server listens on", ..PATH },
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
                "how long the server may take to answer when the device is opened",
            )
            .checked(some_time),
            REQUEST_TIMEOUT,
            Property::created(
                "huge-pages",
                Kind::Bool,
                Some("false"),
                "uses reserved huge pages for the memory shared with the server, which is trusted not to punch holes in it",
            ),
            Property::constant("driver", Kind::Str, "virtio-blk-vhost-user", DRIVER_ABOUT),
            MAX_QUEUE_SIZE,
            can_add_queues("false"),
            needs_mem_regions("true"),
            may_pin_mem_regions("true"),
        ],
        open: |settings| {
            let options = vhost_user::Options {
                path: settings.path("path").ok_or_else(|| settings.missing("path"))?,
                read_only: settings.bool("read-only"),
                num_queues: u16_of(settings, "num-queues"),
                queue_size: u16_of(settings, "queue-size").expect("queue-size has a default"),
                connect_timeout: settings.time("connect-timeout"),
                request_timeout: settings.time("request-timeout"),
                ring: ring(settings),
                write_cache: write_cache(settings),
                huge_pages: settings.bool("huge-pages"),
            };
            Ok(Arc::new(vhost_user::VhostUser::connect(&options)?))
        },
    },
    Driver {
        name: "nvme",
        aliases: &[],
        about: "an NVMe controller of its own, over VFIO: nvme=ADDRESS[/NSID]",
        value: "path",
        open_ended: false,
        own: &[
            Property::created(
                "path",
                Kind::Str,
                Some(""),
                "the controller's PCI address or its path in sysfs, and perhaps /NSID: 0000:01:00.0/1",
            ),
            READ_ONLY,
            Property::created(
                "no-iommu",
                Kind::Bool,
                Some("false"),
                "does without an IOMMU where there is none: UNSAFE",
            ),
            NUM_QUEUES,
            NUM_POLL_QUEUES,
            Property::connected("queue-size", Kind::I32, Some("256"), "places in one queue, 2 to 1024")
                .checked(nvme_queue_size),
            REQUEST_TIMEOUT,
            Property::constant("driver", Kind::Str, "nvme", "the driver's name; libblkio has none like it"),
            Property::told(
                "max-queue-size",
                Kind::I32,
                |device| Value::I32(i32::from(device.info().depth_max) + 1),
                "the largest queue-size",
            ),
            can_add_queues("true"),
            needs_mem_regions("true"),
            may_pin_mem_regions("true"),
        ],
        open: |settings| {
            let target = settings.needed("path")?.parse()?;
            let how = nvme::VfioOptions { no_iommu: settings.bool("no-iommu") };
            let options = nvme::Options {
                nsid: None,
                read_only: settings.bool("read-only"),
                queues: u16_of(settings, "num-queues"),
                queue_size: u16_of(settings, "queue-size").expect("queue-size has a default"),
                timeout: Some(settings.time("request-timeout")),
            };
            Ok(Arc::new(nvme::Nvme::open_vfio(&target, &how, &options)?))
        },
    },
    Driver {
        name: "nvme-io_uring",
        aliases: &[],
        about: "an NVMe namespace past the kernel's block layer: /dev/ngXnY",
        value: "path",
        open_ended: false,
        own: &[
            Property { about: "the namespace's character device, /dev/ngXnY", ..PATH },
            Property::created("fd", Kind::I32, Some("-1"), "an inherited file descriptor, instead of a path"),
            READ_ONLY,
            NUM_QUEUES,
            NUM_POLL_QUEUES,
            Property::connected("num-entries", Kind::I32, Some("128"), "requests in flight on one queue, at most")
                .checked(num_entries),
            Property::created(
                "polled",
                Kind::Bool,
                Some("false"),
                "polls for completions, which keeps a processor busy; the kernel needs nvme.poll_queues for it",
            ),
            REQUEST_TIMEOUT,
            Property::constant("driver", Kind::Str, "nvme-io_uring", DRIVER_ABOUT),
            can_add_queues("true"),
            needs_mem_regions("false"),
            may_pin_mem_regions("false"),
        ],
        open: |settings| {
            let source = match (settings.path("path"), settings.i32("fd")) {
                (Some(_), Some(0..)) => {
                    let why = "nvme-io_uring: path and fd cannot be set at the same time";
                    return Err(Error::invalid(why.into()).into());
                }
                (None, Some(fd @ 0..)) => nvme::Source::Fd(inherited(fd)?),
                (path, _) => nvme::Source::Path(path.ok_or_else(|| settings.missing("path"))?),
            };
            let options = nvme::PassthroughOptions {
                source,
                read_only: settings.bool("read-only"),
                entries: u16_of(settings, "num-entries").expect("num-entries has a default"),
                polled: settings.bool("polled"),
                timeout: Some(settings.time("request-timeout")),
            };
            narrow(Arc::new(nvme::Passthrough::open(options)?), u16_of(settings, "num-queues"))
        },
    },
    Driver {
        name: "vdpa",
        aliases: &["virtio-blk-vhost-vdpa"],
        about: "a virtio-blk device behind the kernel's vhost-vdpa, in hardware or VDUSE",
        value: "path",
        open_ended: false,
        own: &[
            Property { about: "the character device, /dev/vhost-vdpa-N", ..PATH },
            Property::created("fd", Kind::I32, Some("-1"), "an inherited file descriptor, instead of a path"),
            READ_ONLY,
            NUM_QUEUES,
            NUM_POLL_QUEUES,
            QUEUE_SIZE,
            RING,
            WRITE_CACHE,
            REQUEST_TIMEOUT,
            Property::constant("driver", Kind::Str, "virtio-blk-vhost-vdpa", DRIVER_ABOUT),
            MAX_QUEUE_SIZE,
            can_add_queues("false"),
            needs_mem_regions("true"),
            may_pin_mem_regions("true"),
        ],
        open: |settings| {
            let source = match (settings.path("path"), settings.i32("fd")) {
                (Some(_), Some(0..)) => {
                    return Err(Error::invalid("vdpa: path and fd cannot be set at the same time".into()).into());
                }
                (None, Some(fd @ 0..)) => vdpa::Source::Fd(inherited(fd)?),
                (path, _) => vdpa::Source::Path(path.ok_or_else(|| settings.missing("path"))?),
            };
            let options = vdpa::Options {
                source,
                read_only: settings.bool("read-only"),
                num_queues: u16_of(settings, "num-queues"),
                queue_size: u16_of(settings, "queue-size").expect("queue-size has a default"),
                ring: ring(settings),
                write_cache: write_cache(settings),
                request_timeout: settings.time("request-timeout"),
            };
            Ok(Arc::new(vdpa::Vdpa::open(options)?))
        },
    },
    Driver {
        name: "virtio-pci",
        aliases: &["virtio-blk-vfio-pci"],
        about: "a virtio-blk PCI device, over VFIO",
        value: "path",
        open_ended: false,
        own: &[
            Property::created("path", Kind::Str, Some(""), "the device's PCI address or its path in sysfs"),
            READ_ONLY,
            NUM_QUEUES,
            NUM_POLL_QUEUES,
            QUEUE_SIZE,
            RING,
            WRITE_CACHE,
            REQUEST_TIMEOUT,
            Property::connected(
                "num-vectors",
                Kind::I32,
                Some("65535"),
                "interrupt vectors to use, at most; with too few for one each, queues share one",
            )
            .checked(num_vectors),
            Property::constant("driver", Kind::Str, "virtio-blk-vfio-pci", DRIVER_ABOUT),
            MAX_QUEUE_SIZE,
            can_add_queues("false"),
            needs_mem_regions("true"),
            may_pin_mem_regions("true"),
        ],
        open: |settings| {
            let options = virtio_pci::Options {
                address: settings.needed("path")?,
                read_only: settings.bool("read-only"),
                num_queues: u16_of(settings, "num-queues"),
                queue_size: u16_of(settings, "queue-size").expect("queue-size has a default"),
                ring: ring(settings),
                write_cache: write_cache(settings),
                vectors: u16_of(settings, "num-vectors").expect("num-vectors has a default"),
                request_timeout: settings.time("request-timeout"),
            };
            Ok(Arc::new(virtio_pci::VirtioPci::open(&options)?))
        },
    },
    Driver {
        name: "memory",
        aliases: &[],
        about: "a sparse RAM disk, empty at the start and forgotten at the end",
        value: "size",
        open_ended: false,
        own: &[SIZE, NUM_QUEUES],
        open: |settings| {
            let size = settings.u64("size").ok_or_else(|| settings.missing("size"))?;
            narrow(Arc::new(Memory::new(size)), u16_of(settings, "num-queues"))
        },
    },
    Driver {
        name: "null",
        aliases: &[],
        about: "reads zeroes and forgets what is written; for measuring",
        value: "size",
        open_ended: false,
        own: &[SIZE, NUM_QUEUES],
        open: |settings| {
            let size = settings.u64("size").ok_or_else(|| settings.missing("size"))?;
            narrow(Arc::new(Null::new(size)), u16_of(settings, "num-queues"))
        },
    },
    #[cfg(feature = "libblkio")]
    Driver {
        name: "libblkio",
        aliases: &[],
        about: "any driver of libblkio, for comparison: libblkio=DRIVER,path=PATH",
        value: "driver",
        open_ended: true,
        own: &[
            Property::created("driver", Kind::Str, Some(""), "libblkio's name of the driver, such as nvme-io_uring"),
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
    },
];

const PATH: Property = Property::created("path", Kind::Path, Some(""), "the file or block device");

const SIZE: Property =
    Property::created("size", Kind::Size, None, "in bytes, or with a suffix K, M, G, T, P, E").checked(size);

const READ_ONLY: Property =
    Property::created("read-only", Kind::Bool, Some("false"), "opens the device for reading only")
        .answered(|device| Value::Bool(device.info().caps.read_only));

const NUM_QUEUES: Property = Property::connected(
    "num-queues",
    Kind::I32,
    None,
    "queues to use; not set: one for each worker, as far as the device has them",
)
.checked(num_queues)
.answered(|device| Value::I32(device.info().queues_max.into()));

const NUM_POLL_QUEUES: Property =
    Property::connected("num-poll-queues", Kind::I32, Some("0"), "only 0: queues that are polled are not supported")
        .checked(no_poll_queues);

const REQUEST_TIMEOUT: Property = Property::created(
    "request-timeout",
    Kind::Time,
    Some("30s"),
    "how long a request may take before the device is given up",
)
.checked(some_time);

const QUEUE_SIZE: Property =
    Property::connected("queue-size", Kind::I32, Some("256"), "descriptors of one queue: a power of two")
        .checked(queue_size);

const MAX_QUEUE_SIZE: Property = Property::told(
    "max-queue-size",
    Kind::I32,
    |device| Value::I32(device.info().depth_max.into()),
    "the largest queue-size",
);

const RING: Property = Property::created(
    "ring",
    Kind::Str,
    Some("auto"),
    "format of the rings: split, packed, or auto, which is packed where the device offers it",
)
.checked(|value| one_of(value, &["auto", "split", "packed"]));

const WRITE_CACHE: Property = Property::created(
    "write-cache",
    Kind::Str,
    Some("unchanged"),
    "switches the device's write cache: writeback or writethrough; unchanged: left as it is",
)
.checked(|value| one_of(value, &["unchanged", "writeback", "writethrough"]));

const fn can_add_queues(answer: &'static str) -> Property {
    Property::constant("can-add-queues", Kind::Bool, answer, "queues can be added to an open device")
}

const fn needs_mem_regions(answer: &'static str) -> Property {
    Property::constant("needs-mem-regions", Kind::Bool, answer, "the device must know payload memory beforehand")
}

const fn may_pin_mem_regions(answer: &'static str) -> Property {
    Property::constant("may-pin-mem-regions", Kind::Bool, answer, "payload memory may be pinned")
}

const DRIVER_ABOUT: &str = "libblkio's name of the driver";

/// What every device can tell.
static COMMON: &[Property] = &[
    Property::told("capacity", Kind::U64, |device| Value::U64(device.capacity()), "size of the device in bytes"),
    Property::told(
        "max-queues",
        Kind::I32,
        |device| Value::I32(device.info().queues_max.into()),
        "queues that can be open at a time",
    ),
    Property::constant(
        "supports-poll-queues",
        Kind::Bool,
        "false",
        "there are queues without a file descriptor to wait on",
    ),
    Property::told(
        "request-alignment",
        Kind::I32,
        |device| i32_value(device.info().block_size),
        "the device's blocks; what is not aligned to them is read, changed and written back",
    ),
    Property::told(
        "optimal-io-alignment",
        Kind::I32,
        |device| i32_value(device.info().preferred_block_size),
        "requests aligned to this are fast",
    ),
    Property::told(
        "max-transfer",
        Kind::I32,
        |device| i32_value(device.info().transfer_max),
        "the longest read or write that the device takes in one piece",
    ),
    Property::told(
        "max-write-zeroes-len",
        Kind::U64,
        |device| unlimited_as_zero(device.info().zero_max),
        "the longest write of zeroes that the device takes in one piece; 0: no limit",
    ),
    Property::told(
        "max-discard-len",
        Kind::U64,
        |device| unlimited_as_zero(device.info().discard_max),
        "the longest discard that the device takes in one piece; 0: no limit",
    ),
    Property::told(
        "discard-alignment",
        Kind::I32,
        |device| i32_value(device.info().discard_alignment),
        "discards not aligned to this are lost on the device",
    ),
    Property::told(
        "supports-fua-natively",
        Kind::Bool,
        |device| Value::Bool(device.info().caps.fua),
        "a write can be made durable without a flush",
    ),
    Property::told(
        "flush-needed",
        Kind::Bool,
        |device| Value::Bool(device.info().caps.flush),
        "writes are durable only after a flush",
    ),
];

fn i32_value(number: u32) -> Value {
    Value::I32(number.try_into().unwrap_or(i32::MAX))
}

/// libblkio's way to write "no limit".
fn unlimited_as_zero(limit: u64) -> Value {
    Value::U64(if limit == u64::MAX { 0 } else { limit })
}

/// For properties whose check keeps them within 16 bits.
fn u16_of(settings: &Settings, name: &str) -> Option<u16> {
    settings.i32(name).map(|value| value.try_into().expect("its check keeps it within 16 bits"))
}

type Checked = Result<(), Cow<'static, str>>;

fn within(value: &Value, low: i32, high: i32, too_low: &'static str) -> Checked {
    match value {
        Value::I32(value) if *value < low => Err(too_low.into()),
        Value::I32(value) if *value > high => Err(format!("Value must not be greater than {high}").into()),
        _ => Ok(()),
    }
}

fn num_queues(value: &Value) -> Checked {
    within(value, 1, u16::MAX.into(), "At least one of num_queues and num_poll_queues must be greater than 0")
}

fn num_vectors(value: &Value) -> Checked {
    within(value, 1, u16::MAX.into(), "num-vectors must be greater than 0")
}

fn num_entries(value: &Value) -> Checked {
    // What io_uring_setup(2) allows.
    within(value, 1, 32768, "num-entries must be greater than 0")
}

fn no_poll_queues(value: &Value) -> Checked {
    within(value, 0, i32::MAX, "num_poll_queues must be equal to or greater than 0")?;
    within(value, 0, 0, "").map_err(|_| "Poll queues not supported".into())
}

fn queue_size(value: &Value) -> Checked {
    within(value, 1, 32768, "queue_size must be greater than 0")?;
    match value {
        Value::I32(value) if value.count_ones() != 1 => Err("queue_size must be a power of two".into()),
        _ => Ok(()),
    }
}

fn one_of(value: &Value, words: &[&str]) -> Checked {
    match value {
        Value::Str(value) if !words.contains(&value.as_str()) => {
            Err(format!("Value must be one of {}", words.join(", ")).into())
        }
        _ => Ok(()),
    }
}

fn ring(settings: &Settings) -> Option<Format> {
    match settings.str("ring").as_deref() {
        Some("split") => Some(Format::Split),
        Some("packed") => Some(Format::Packed),
        _ => None,
    }
}

fn write_cache(settings: &Settings) -> Option<WriteCache> {
    match settings.str("write-cache").as_deref() {
        Some("writeback") => Some(WriteCache::Writeback),
        Some("writethrough") => Some(WriteCache::Writethrough),
        _ => None,
    }
}

fn nvme_queue_size(value: &Value) -> Checked {
    within(value, 2, 1024, "queue_size must be greater than 1")
}

fn some_time(value: &Value) -> Checked {
    match value {
        Value::Time(Duration::ZERO) => Err("Value must be greater than 0".into()),
        // Longer than any device takes, and short enough to be added to the time of day.
        Value::Time(time) if *time > Duration::from_secs(7 * 86400) => {
            Err("Value must be at most a week, 604800s".into())
        }
        _ => Ok(()),
    }
}

fn size(value: &Value) -> Checked {
    match value {
        // Clients and kernels count in signed 64-bit numbers.
        Value::U64(value) if *value > i64::MAX as u64 => Err("Value must be less than 8E".into()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn the_table_is_sound() {
        let mut names = HashSet::new();
        for driver in DRIVERS {
            for name in std::iter::once(&driver.name).chain(driver.aliases) {
                assert!(names.insert(*name), "{name} means one driver");
                assert_eq!(find(name).unwrap().name, driver.name);
            }
            let settings = Settings::new(driver);
            assert!(settings.can_set(driver.value), "{}={}", driver.name, driver.value.to_uppercase());
            let mut names = HashSet::new();
            for property in driver.properties() {
                assert!(names.insert(property.name), "{}: {} stands there once", driver.name, property.name);
                assert!(
                    !property.name.contains('_') && !property.about.is_empty(),
                    "{}: {}",
                    driver.name,
                    property.name
                );
                // Parses the default, too.
                assert_eq!(settings.get(property.name).is_ok(), property.default.is_some(), "{}", property.name);
            }
        }
    }

    #[test]
    fn libblkio_s_properties_have_its_defaults() {
        let check = |driver, expected: &[(&str, &str)]| {
            let settings = Settings::new(find(driver).unwrap());
            for (name, value) in expected {
                assert_eq!(settings.get(name).as_deref(), Ok(*value), "{driver}: {name}");
            }
        };
        let common = [("path", ""), ("read-only", "false"), ("num-poll-queues", "0")];
        check("io_uring", &common);
        check("io_uring", &[("driver", "io_uring"), ("fd", "-1"), ("direct", "false"), ("num-entries", "128")]);
        check("virtio-blk-vhost-user", &common);
        check("virtio-blk-vhost-user", &[("driver", "virtio-blk-vhost-user"), ("queue-size", "256")]);
        check("nvme-io_uring", &common);
        check("nvme-io_uring", &[("driver", "nvme-io_uring"), ("fd", "-1"), ("num-entries", "128")]);
        check("nvme", &[("queue-size", "256"), ("no-iommu", "false")]);
        check("vhost-user", &[("connect-timeout", "5s"), ("request-timeout", "30s")]);
    }

    #[test]
    fn values_are_refused_in_libblkio_s_words() {
        let check = |driver, name, value, errno, message| {
            let error = Settings::new(find(driver).unwrap()).set(name, value).expect_err(value);
            assert_eq!((error.errno(), error.message()), (errno, message), "{driver}: {name}={value}");
        };
        check("io_uring", "nosuch", "1", libc::ENOENT, "Unknown property name");
        check("io_uring", "queue-size", "1", libc::ENOENT, "Unknown property name");
        check("io_uring", "capacity", "1", libc::EACCES, "Property is read-only");
        check("io_uring", "driver", "io_uring", libc::EACCES, "Property is read-only");
        check("io_uring", "direct", "1", libc::EINVAL, "Value must be \"true\" or \"false\"");
        check("io_uring", "direct", "True", libc::EINVAL, "Value must be \"true\" or \"false\"");
        check("io_uring", "num-queues", "0x1", libc::EINVAL, "Value must be a signed 32-bit integer");
        check("io_uring", "num-queues", "2147483648", libc::EINVAL, "Value must be a signed 32-bit integer");
        check("io_uring", "num-entries", "0", libc::EINVAL, "num-entries must be greater than 0");
        check("io_uring", "num-poll-queues", "-1", libc::EINVAL, "num_poll_queues must be equal to or greater than 0");
        check("io_uring", "num-poll-queues", "1", libc::EINVAL, "Poll queues not supported");
        check("vhost-user", "queue-size", "0", libc::EINVAL, "queue_size must be greater than 0");
        check("nvme", "queue-size", "1", libc::EINVAL, "queue_size must be greater than 1");
        check("nvme", "queue-size", "1025", libc::EINVAL, "Value must not be greater than 1024");
        check("vhost-user", "queue-size", "100", libc::EINVAL, "queue_size must be a power of two");
        check("vhost-user", "queue-size", "65536", libc::EINVAL, "Value must not be greater than 32768");
        check(
            "vhost-user",
            "request-timeout",
            "soon",
            libc::EINVAL,
            "Value must be a time in whole milliseconds, such as 5, 0.5s or 500ms",
        );
        check("memory", "size", "8E", libc::EINVAL, "Value must be less than 8E");
        assert_eq!(Settings::new(find("io_uring").unwrap()).get("capacity").unwrap_err().errno(), libc::ENODEV);
        assert_eq!(find("nosuch").unwrap_err().message(), "Unknown driver name");
    }

    #[test]
    fn an_open_device_tells_its_properties() {
        let mut settings = Settings::new(find("memory").unwrap());
        settings.set("size", "1M").unwrap();
        settings.set("num-queues", "+3").unwrap();
        let device = settings.open().unwrap();
        let values = crate::properties(&*device, &settings);
        let check = |name, value| {
            let found = values.iter().find(|(key, _)| key == name).unwrap_or_else(|| panic!("{name}"));
            assert_eq!(found.1.to_string(), value, "{name}");
        };
        check("size", "1048576");
        check("capacity", "1048576");
        check("num-queues", "3");
        check("max-queues", "3");
        check("request-alignment", "1");
        check("optimal-io-alignment", "4096");
        check("max-transfer", "33554432");
        check("max-discard-len", "0");
        check("supports-fua-natively", "true");
        check("flush-needed", "false");
    }

    #[test]
    fn what_is_missing_is_said() {
        let check = |driver, line: &str| {
            let error = Settings::new(find(driver).unwrap()).open().expect_err(driver);
            assert_eq!(error.to_string(), line);
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        };
        check("io_uring", "io_uring needs a path: io_uring=PATH");
        check("vhost-user", "vhost-user needs a path: vhost-user=PATH");
        check("nvme", "nvme needs a path: nvme=PATH");
        check("nvme-io_uring", "nvme-io_uring needs a path: nvme-io_uring=PATH");
        check("memory", "memory needs a size: memory=SIZE");
    }

    #[test]
    fn more_queues_than_there_are_is_an_error() {
        let mut settings = Settings::new(find("null").unwrap());
        settings.set("size", "1M").unwrap();
        settings.set("num-queues", "65535").unwrap();
        let line = settings.open().expect_err("65535 queues").to_string();
        assert!(line.starts_with("null: num-queues=65535: the device has "), "{line}");
    }
}
