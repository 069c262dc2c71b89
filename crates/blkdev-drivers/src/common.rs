//! Properties that several drivers have, and the checks of their values.

use std::{borrow::Cow, io, time::Duration};

use blkdev::Source;

use crate::{
    error::Error,
    fd::inherited,
    property::{Kind, Property, Value},
    settings::Settings,
};

pub(crate) const PATH: Property = Property::created("path", Kind::Path, Some(""), "the file or block device");

pub(crate) const SIZE: Property =
    Property::created("size", Kind::Size, None, "size in bytes, or with a suffix K, M, G, T, P or E").checked(size);

pub(crate) const READ_ONLY: Property =
    Property::created("read-only", Kind::Bool, Some("false"), "open the device read-only")
        .answered(|device| Value::Bool(device.info().caps.read_only));

pub(crate) const NUM_QUEUES: Property = Property::connected(
    "num-queues",
    Kind::I32,
    None,
    "number of queues; if not set: one for each worker, up to the number of the device",
)
.checked(num_queues)
.answered(|device| Value::I32(device.info().queues_max.into()));

pub(crate) const NUM_POLL_QUEUES: Property =
    Property::connected("num-poll-queues", Kind::I32, Some("0"), "number of polled queues; only 0 is supported")
        .checked(no_poll_queues);

pub(crate) const REQUEST_TIMEOUT: Property = Property::created(
    "request-timeout",
    Kind::Time,
    Some("30s"),
    "longest time without a completion before requests fail",
)
.checked(some_time);

pub(crate) const QUEUE_SIZE: Property =
    Property::connected("queue-size", Kind::I32, Some("256"), "number of descriptors per queue, a power of two")
        .checked(queue_size);

pub(crate) const MAX_QUEUE_SIZE: Property = Property::told(
    "max-queue-size",
    Kind::I32,
    |device| Value::I32(device.info().depth_max.into()),
    "largest queue-size",
);

pub(crate) const RING: Property = Property::created(
    "ring",
    Kind::Str,
    Some("auto"),
    "ring format: split, packed or auto (packed if the device offers it)",
)
.checked(|value| one_of(value, &["auto", "split", "packed"]));

pub(crate) const WRITE_CACHE: Property = Property::created(
    "write-cache",
    Kind::Str,
    Some("unchanged"),
    "mode of the device's write cache: writeback, writethrough or unchanged",
)
.checked(|value| one_of(value, &["unchanged", "writeback", "writethrough"]));

pub(crate) const fn can_add_queues(answer: &'static str) -> Property {
    Property::constant("can-add-queues", Kind::Bool, answer, "queues can be added to an open device")
}

pub(crate) const fn needs_mem_regions(answer: &'static str) -> Property {
    Property::constant("needs-mem-regions", Kind::Bool, answer, "payload memory must be registered with the device")
}

pub(crate) const fn may_pin_mem_regions(answer: &'static str) -> Property {
    Property::constant("may-pin-mem-regions", Kind::Bool, answer, "the device may pin payload memory")
}

pub(crate) const DRIVER_ABOUT: &str = "libblkio's name for the driver";

/// What every device can tell.
pub(crate) static COMMON: &[Property] = &[
    Property::told("capacity", Kind::U64, |device| Value::U64(device.capacity()), "size of the device in bytes"),
    Property::told(
        "max-queues",
        Kind::I32,
        |device| Value::I32(device.info().queues_max.into()),
        "most queues that can be open at the same time",
    ),
    Property::constant(
        "supports-poll-queues",
        Kind::Bool,
        "false",
        "polled queues, without a file descriptor to wait on, are supported",
    ),
    Property::told(
        "request-alignment",
        Kind::I32,
        |device| i32_value(device.info().block_size),
        "block size of the device in bytes; unaligned writes read, change and write back whole blocks",
    ),
    Property::told(
        "optimal-io-alignment",
        Kind::I32,
        |device| i32_value(device.info().preferred_block_size),
        "alignment of fast requests, in bytes",
    ),
    Property::told(
        "max-transfer",
        Kind::I32,
        |device| i32_value(device.info().transfer_max),
        "longest read or write that the device accepts, in bytes; longer ones are split",
    ),
    Property::told(
        "max-write-zeroes-len",
        Kind::U64,
        |device| unlimited_as_zero(device.info().zero_max),
        "longest write of zeroes that the device accepts, in bytes; 0: no limit",
    ),
    Property::told(
        "max-discard-len",
        Kind::U64,
        |device| unlimited_as_zero(device.info().discard_max),
        "longest discard that the device accepts, in bytes; 0: no limit",
    ),
    Property::told(
        "discard-alignment",
        Kind::I32,
        |device| i32_value(device.info().discard_alignment),
        "alignment of discards, in bytes; the device ignores unaligned ones",
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

pub(crate) fn i32_value(number: u32) -> Value {
    Value::I32(number.try_into().unwrap_or(i32::MAX))
}

/// libblkio's way to write "no limit".
pub(crate) fn unlimited_as_zero(limit: u64) -> Value {
    Value::U64(if limit == u64::MAX { 0 } else { limit })
}

/// For properties whose check keeps them within 16 bits.
pub(crate) fn u16_of(settings: &Settings, name: &str) -> Option<u16> {
    settings.i32(name).map(|value| value.try_into().expect("its check keeps it within 16 bits"))
}

pub(crate) type Checked = Result<(), Cow<'static, str>>;

pub(crate) fn within(value: &Value, low: i32, high: i32, too_low: &'static str) -> Checked {
    match value {
        Value::I32(value) if *value < low => Err(too_low.into()),
        Value::I32(value) if *value > high => Err(format!("Value must not be greater than {high}").into()),
        _ => Ok(()),
    }
}

pub(crate) fn num_queues(value: &Value) -> Checked {
    within(value, 1, u16::MAX.into(), "At least one of num_queues and num_poll_queues must be greater than 0")
}

pub(crate) fn num_vectors(value: &Value) -> Checked {
    within(value, 1, u16::MAX.into(), "num-vectors must be greater than 0")
}

pub(crate) fn num_entries(value: &Value) -> Checked {
    // What io_uring_setup(2) allows.
    within(value, 1, 32768, "num-entries must be greater than 0")
}

pub(crate) fn no_poll_queues(value: &Value) -> Checked {
    within(value, 0, i32::MAX, "num_poll_queues must be equal to or greater than 0")?;
    within(value, 0, 0, "").map_err(|_| "Poll queues not supported".into())
}

pub(crate) fn queue_size(value: &Value) -> Checked {
    within(value, 1, 32768, "queue_size must be greater than 0")?;
    match value {
        Value::I32(value) if value.count_ones() != 1 => Err("queue_size must be a power of two".into()),
        _ => Ok(()),
    }
}

pub(crate) fn one_of(value: &Value, words: &[&str]) -> Checked {
    match value {
        Value::Str(value) if !words.contains(&value.as_str()) => {
            Err(format!("Value must be one of {}", words.join(", ")).into())
        }
        _ => Ok(()),
    }
}

pub(crate) fn nvme_queue_size(value: &Value) -> Checked {
    within(value, 2, 1024, "queue_size must be greater than 1")
}

pub(crate) fn some_time(value: &Value) -> Checked {
    match value {
        Value::Time(Duration::ZERO) => Err("Value must be greater than 0".into()),
        _ => a_week(value),
    }
}

pub(crate) fn a_week(value: &Value) -> Checked {
    match value {
        // Longer than any device takes, and short enough to be added to the time of day.
        Value::Time(time) if *time > Duration::from_secs(7 * 86400) => {
            Err("Value must be at most a week, 604800s".into())
        }
        _ => Ok(()),
    }
}

pub(crate) fn size(value: &Value) -> Checked {
    match value {
        // Clients and kernels count in signed 64-bit numbers.
        Value::U64(value) if *value > i64::MAX as u64 => Err("Value must be less than 8E".into()),
        _ => Ok(()),
    }
}

/// What the properties `path` and `fd` name.
pub(crate) fn source(settings: &Settings) -> io::Result<Source> {
    match (settings.path("path"), settings.i32("fd")) {
        (Some(_), Some(0..)) => {
            let why = format!("{}: path and fd cannot be set at the same time", settings.driver().name);
            Err(Error::invalid(why).into())
        }
        (None, Some(fd @ 0..)) => Ok(Source::Fd(inherited(fd)?)),
        (path, _) => Ok(Source::Path(path.ok_or_else(|| settings.missing("path"))?)),
    }
}
