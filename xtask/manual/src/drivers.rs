//! Sections about the drivers and their properties.

use anyhow::Result;
use blkdev_drivers::{Access, Driver, Property, drivers, find};

use crate::text;

/// The section with all drivers, a line for each.
pub(crate) const LIST: &str = "drivers";

/// The sections that the pages must have.
pub(crate) fn sections() -> Vec<String> {
    let names = drivers().iter().map(|driver| format!("properties of {}", driver.name));
    names.chain([LIST.into(), "values of open devices".into()]).collect()
}

/// A line for each driver.
pub(crate) fn list() -> String {
    let entry = |driver: &Driver| {
        let aliases: Vec<String> = driver.aliases.iter().map(|name| format!("**{name}**")).collect();
        let also = if aliases.is_empty() { String::new() } else { format!(" Also: {}.", aliases.join(", ")) };
        let about = text::ended(&text::capitalised(driver.about));
        let tag = format!("**{}**=*{}*", driver.name, driver.value.to_uppercase());
        text::entry(&tag, &[format!("{about}{also}")])
    };
    drivers().iter().map(entry).collect::<Vec<_>>().join("\n")
}

/// The properties of a driver that can be set, and what an open device has that others lack.
pub(crate) fn properties(name: &str) -> Result<String> {
    let driver = find(name)?;
    let own = driver.properties().filter(|property| is_settable(property));
    let mut entries: Vec<String> = own.map(entry).collect();
    if driver.open_ended {
        entries.push("All other properties are passed on.\n".into());
    }
    Ok(entries.join("\n"))
}

/// What can be read of open devices: a property of several drivers is listed once.
pub(crate) fn common_values() -> String {
    let mut found: Vec<&'static Property> = Vec::new();
    for property in drivers().iter().flat_map(Driver::properties).filter(|property| !is_settable(property)) {
        if !found.iter().any(|other| other.name == property.name) {
            found.push(property);
        }
    }
    found.sort_by_key(|property| property.name);
    let entry = |property: &&'static Property| {
        let about = text::ended(&text::capitalised(property.about));
        text::entry(&format!("**{}** ({})", property.name, property.kind.name()), &[about])
    };
    found.iter().map(entry).collect::<Vec<_>>().join("\n")
}

fn is_settable(property: &Property) -> bool {
    property.access != Access::ReadOnly
}

fn entry(property: &Property) -> String {
    let about = text::ended(&text::capitalised(property.about));
    let default = property.default.filter(|default| !default.is_empty());
    let default = default.map(|default| format!(" Default: **{default}**.")).unwrap_or_default();
    text::entry(&format!("**{}** ({})", property.name, property.kind.name()), &[format!("{about}{default}")])
}
