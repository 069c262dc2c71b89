//! `nbdblk drivers`: lists the drivers and their properties.

use std::{fmt::Write, process::ExitCode};

use blkdev_drivers::{Access, Driver, drivers, find};
use serde_json::{Value, json};

use crate::cli;

pub(crate) fn run(args: &cli::Drivers) -> anyhow::Result<ExitCode> {
    let one = args.name.as_deref().map(find).transpose()?;
    crate::print(&match (one, args.json) {
        (None, false) => {
            drivers().iter().map(line).collect::<String>() + "\n\"nbdblk drivers NAME\" lists the properties.\n"
        }
        (Some(driver), false) => text(driver),
        (None, true) => format!("{:#}\n", Value::Array(drivers().iter().map(json).collect())),
        (Some(driver), true) => format!("{:#}\n", json(driver)),
    })
}

fn line(driver: &Driver) -> String {
    format!("{:<24}{}\n", format!("{}={}", driver.name, driver.value.to_uppercase()), driver.about)
}

fn text(driver: &Driver) -> String {
    let mut text = line(driver);
    if !driver.aliases.is_empty() {
        writeln!(text, "{:<24}also: {}", "", driver.aliases.join(", ")).expect("a string takes everything");
    }
    for (title, read_only) in [("\nCan be set:\n", false), ("\nCan be read, with \"nbdblk info\":\n", true)] {
        text.push_str(title);
        for property in driver.properties().filter(|property| (property.access == Access::ReadOnly) == read_only) {
            let default = property.default.filter(|default| !default.is_empty());
            let default = default.map(|default| format!(" [{default}]")).unwrap_or_default();
            let left = format!("{} ({})", property.name, property.kind.name());
            writeln!(text, "    {left:<30}{}{default}", property.about).expect("a string takes everything");
        }
    }
    if driver.open_ended {
        text.push_str("\nAll other properties are passed on.\n");
    }
    text
}

fn json(driver: &Driver) -> Value {
    let properties = driver.properties().map(|property| {
        json!({
            "name": property.name,
            "type": property.kind.name(),
            "default": property.default,
            "access": property.access.name(),
            "about": property.about,
        })
    });
    json!({
        "name": driver.name,
        "aliases": driver.aliases,
        "about": driver.about,
        "value": driver.value,
        "open_ended": driver.open_ended,
        "properties": properties.collect::<Vec<_>>(),
    })
}
