//! What the drivers of virtio-blk devices have in common.

use blkdev_virtio::{Format, Options, WriteCache};

use crate::{common::u16_of, settings::Settings};

/// What the common properties of virtio-blk devices say.
pub(crate) fn options(settings: &Settings) -> Options {
    let mut options = Options::default();
    options.queues = u16_of(settings, "num-queues");
    options.queue_size = u16_of(settings, "queue-size").expect("queue-size has a default");
    options.ring = ring(settings);
    options.write_cache = write_cache(settings);
    options.read_only = settings.bool("read-only");
    options.timeout = Some(settings.time("request-timeout"));
    options
}

/// What the property `ring` says.
fn ring(settings: &Settings) -> Option<Format> {
    match settings.str("ring").as_deref() {
        Some("split") => Some(Format::Split),
        Some("packed") => Some(Format::Packed),
        _ => None,
    }
}

/// What the property `write-cache` says.
fn write_cache(settings: &Settings) -> Option<WriteCache> {
    match settings.str("write-cache").as_deref() {
        Some("writeback") => Some(WriteCache::Writeback),
        Some("writethrough") => Some(WriteCache::Writethrough),
        _ => None,
    }
}
