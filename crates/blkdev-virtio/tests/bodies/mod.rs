//! The body of the fuzz target, as a plain function: the fuzzer calls it, and an ordinary test replays the corpus through it.

mod device;
mod ring;

use std::{sync::Arc, time::Duration};

use blkdev::fuzz::{Client, Ledger, Script};
use blkdev_virtio::{Format, Options, VirtioBlk, WriteCache};
use device::{Machine, Wire};

/// A client, the driver, and a device that does what the bytes say.
pub(crate) fn device(data: &[u8]) {
    let script = Script::new(data);
    if script.one_in(2) { run::<true>(&script) } else { run::<false>(&script) }
}

fn run<const RESTARTS: bool>(script: &Script) {
    let options = options(script);
    let ledger = Arc::new(Ledger::default());
    let machine = Machine::new(script, &ledger);
    let Ok(disk) = VirtioBlk::open(Wire::<RESTARTS>::new(&machine), &options) else { return };
    if let Some(client) = Client::new(Arc::new(disk), script, &ledger) {
        client.run(&mut || machine.step());
    }
}

fn options(script: &Script) -> Options {
    let mut options = Options::default();
    options.queue_size = *script.pick(&[16, 4, 8, 64, 256, 1024]);
    options.ring = *script.pick(&[None, Some(Format::Split), Some(Format::Packed), None]);
    options.read_only = script.one_in(16);
    options.queues = *script.pick(&[None, None, None, None, Some(1), Some(2), Some(3), Some(0)]);
    options.write_cache = *script.pick(&[None, None, Some(WriteCache::Writeback), Some(WriteCache::Writethrough)]);
    // The device acts only in calls of the driver or the client, so a wait is never worth it.
    options.timeout = Some(Duration::from_nanos(1));
    options
}
