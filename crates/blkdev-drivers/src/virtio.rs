//! What the drivers of virtio-blk devices have in common.

use blkdev_virtio::{Format, WriteCache};

use crate::settings::Settings;

/// What the property `ring` says.
pub(crate) fn ring(settings: &Settings) -> Option<Format> {
    match settings.str("ring").as_deref() {
        Some("split") => Some(Format::Split),
        Some("packed") => Some(Format::Packed),
        _ => None,
    }
}

/// What the property `write-cache` says.
pub(crate) fn write_cache(settings: &Settings) -> Option<WriteCache> {
    match settings.str("write-cache").as_deref() {
        Some("writeback") => Some(WriteCache::Writeback),
        Some("writethrough") => Some(WriteCache::Writethrough),
        _ => None,
    }
}
