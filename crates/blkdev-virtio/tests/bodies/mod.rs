//! The bodies of the fuzz targets, as plain functions: the fuzzer calls them, and an ordinary test replays the corpus through
//! them.

mod device;
mod ring;

use std::{sync::Arc, time::Duration};

use blkdev::fuzz::{Client, Clock, Ledger, Script};
use blkdev_virtio::{Format, Options, VirtioBlk, WriteCache};
use device::{Machine, Wire};

/// A client, the driver, and a device that does what the bytes say.
pub(crate) fn device(data: &[u8]) {
    let (script, clock) = (Script::new(data), Clock::default());
    let _entered = clock.enter();
    if script.one_in(2) { run::<true>(&script) } else { run::<false>(&script) }
}

/// The configuration space of a device behind vDPA, or any other transport: the driver refuses it, or keeps the promises of
/// [`blkdev::Info`].
pub(crate) fn config_space(data: &[u8]) {
    let (script, clock) = (Script::new(data), Clock::default());
    let _entered = clock.enter();
    let (options, ledger) = (options(&script), Arc::new(Ledger::default()));
    // Mostly, the negotiation ends when the driver has read all of it: a running device takes much longer.
    let runs = script.one_in(128);
    let machine = Machine::with_config(&script, &ledger, runs);
    match VirtioBlk::open(Wire::<false>::new(&machine), &options) {
        Ok(disk) => drop(Client::new(Arc::new(disk), &script, &ledger)),
        Err(error) => assert!(error.to_string().starts_with("virtio fuzz: "), "an error names the device: {error}"),
    }
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
