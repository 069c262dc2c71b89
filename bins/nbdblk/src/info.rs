//! `nbdblk info`: prints a device's size, limits, capabilities and properties.

use std::{fmt::Write, process::ExitCode};

use blkdev::{Caps, Device};
use blkdev_drivers::{Settings, Spec, Value, properties};
use serde_json::json;

use crate::cli;

pub(crate) fn run(args: &cli::Info) -> anyhow::Result<ExitCode> {
    let spec = Spec::parse(&args.spec)?;
    let settings = restrict(&spec.settings, args.read_only);
    let device = settings.open()?;
    crate::print(&if args.json { json(&*device, &settings) } else { text(&*device, &settings) })
}

/// The settings for a device that is opened read-only. Drivers without such a property stay unchanged.
pub(crate) fn restrict(settings: &Settings, read_only: bool) -> Settings {
    let mut settings = settings.clone();
    if read_only && settings.can_set("read-only") {
        settings.set("read-only", "true").expect("read-only is a bool wherever it is");
    }
    settings
}

fn text(device: &dyn Device, settings: &Settings) -> String {
    let info = device.info();
    let can: Vec<&str> = caps(info.caps).into_iter().filter_map(|(name, can)| can.then_some(name)).collect();
    let longest = |limit: u64, can: bool| match limit {
        _ if !can => "not by the device".into(),
        u64::MAX => "any length".into(),
        limit => format!("at most {} in one piece", human(limit)),
    };
    let rows = [
        ("driver", info.driver.into()),
        ("target", info.target.clone()),
        ("serial", info.serial.clone()),
        ("size", format!("{} bytes, {}", device.capacity(), human(device.capacity()))),
        ("block size", format!("{}, preferred {}", info.block_size, info.preferred_block_size)),
        ("transfer", longest(info.transfer_max.into(), true)),
        ("zeroes", longest(info.zero_max, info.caps.zero)),
        ("discard", longest(info.discard_max, info.caps.discard)),
        ("queues", format!("up to {}, of {} requests each", info.queues_max, info.depth_max)),
        ("time-out", info.timeout.map_or("none".into(), |timeout| Value::Time(timeout).to_string())),
        ("can", can.join(" ")),
    ];
    let mut text = String::new();
    for (name, value) in rows.iter().filter(|(_, value)| !value.is_empty()) {
        writeln!(text, "{name:<12}{value}").expect("a string takes everything");
    }
    text.push_str("properties\n");
    for (name, value) in properties(device, settings) {
        writeln!(text, "    {name} = {value}").expect("a string takes everything");
    }
    text
}

fn json(device: &dyn Device, settings: &Settings) -> String {
    let info = device.info();
    let limit = |limit: u64| (limit != u64::MAX).then_some(limit);
    let properties = properties(device, settings).into_iter().map(|(name, value)| {
        let value = match value {
            Value::Bool(value) => json!(value),
            Value::I32(value) => json!(value),
            Value::U64(value) => json!(value),
            Value::Str(_) | Value::Path(_) | Value::Time(_) => json!(value.to_string()),
        };
        (name, value)
    });
    let caps = caps(info.caps).into_iter().map(|(name, can)| (name.to_owned(), json!(can)));
    let document = json!({
        "driver": info.driver,
        "target": info.target,
        "serial": info.serial,
        "size": device.capacity(),
        "block_size": info.block_size,
        "preferred_block_size": info.preferred_block_size,
        "transfer_max": info.transfer_max,
        "zero_max": limit(info.zero_max),
        "discard_max": limit(info.discard_max),
        "discard_alignment": info.discard_alignment,
        "queues_max": info.queues_max,
        "depth_max": info.depth_max,
        "timeout_ms": info.timeout.map(|timeout| timeout.as_millis() as u64),
        "caps": serde_json::Map::from_iter(caps),
        "properties": serde_json::Map::from_iter(properties),
    });
    format!("{document:#}\n")
}

fn caps(caps: Caps) -> [(&'static str, bool); 8] {
    let Caps { read_only, rotational, flush, fua, zero, discard, status, prefetch, .. } = caps;
    [
        ("read_only", read_only),
        ("rotational", rotational),
        ("flush", flush),
        ("fua", fua),
        ("zero", zero),
        ("discard", discard),
        ("status", status),
        ("prefetch", prefetch),
    ]
}

/// A size in the largest unit that gives at least one, with one decimal: `1.5 GiB`.
pub(crate) fn human(size: u64) -> String {
    let unit = size.checked_ilog2().unwrap_or(0) / 10;
    let name = ["bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"][unit as usize];
    let (whole, rest) = (size >> (10 * unit), size & ((1 << (10 * unit)) - 1));
    // A tenth of an exbibyte times ten still fits.
    match (u128::from(rest) * 10) >> (10 * unit) {
        0 => format!("{whole} {name}"),
        tenths => format!("{whole}.{tenths} {name}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_for_people() {
        let check = |size, text| assert_eq!(human(size), text);
        check(0, "0 bytes");
        check(512, "512 bytes");
        check(1023, "1023 bytes");
        check(1024, "1 KiB");
        check(1536, "1.5 KiB");
        check(64 << 20, "64 MiB");
        check((1 << 30) + 1, "1 GiB");
        check(u64::MAX, "15.9 EiB");
    }
}
