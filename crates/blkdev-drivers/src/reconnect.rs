//! The properties of drivers whose devices are opened again when they die.

use std::{io, sync::Arc};

use blkdev::{
    Device,
    reconnect::{Options, Reconnect, Unflushed},
};

use crate::{
    common::{a_week, one_of, size},
    property::{Kind, Property},
    settings::Settings,
};

pub(crate) const RECONNECT: Property = Property::created(
    "reconnect",
    Kind::Time,
    Some("60s"),
    "how long requests wait for a device that has died to come back; 0: never reconnect",
)
.checked(a_week);

pub(crate) const UNFLUSHED: Property = Property::created(
    "unflushed",
    Kind::Str,
    Some("keep"),
    "changes that completed, but were not flushed, when the device dies: keep (make them again), fail (disconnect clients) or \
     trust (the device loses none)",
)
.checked(|value| one_of(value, &["keep", "fail", "trust"]));

pub(crate) const UNFLUSHED_MEMORY: Property = Property::created(
    "unflushed-memory",
    Kind::Size,
    None,
    "most memory of changes that are kept until a flush; default: a quarter of the payload memory",
)
.checked(size);

/// Opens the device, and opens it again whenever it has died, if the driver can and the settings say so.
pub(crate) fn open(settings: &Settings) -> io::Result<Arc<dyn Device>> {
    let open = settings.driver().open;
    let device = open(settings)?;
    // A descriptor is inherited, and cannot be opened again.
    let is_inherited = settings.driver().has("fd") && settings.i32("fd").is_some_and(|fd| fd >= 0);
    if !settings.driver().has("reconnect") || settings.time("reconnect").is_zero() || is_inherited {
        return Ok(device);
    }
    let mut options = Options::default();
    options.window = settings.time("reconnect");
    options.unflushed = match settings.str("unflushed").as_deref() {
        Some("fail") => Unflushed::Fail,
        Some("trust") => Unflushed::Trust,
        _ => Unflushed::Keep,
    };
    options.unflushed_memory = settings.u64("unflushed-memory").map(|size| usize::try_from(size).unwrap_or(usize::MAX));
    // The current directory may change.
    let again = settings.absolute()?;
    Ok(Arc::new(Reconnect::new(device, Box::new(move || open(&again)), options)?))
}
