//! The body of the fuzz target, as a plain function: the fuzzer calls it, and an ordinary test replays the corpus through it.

mod controller;

use std::{sync::Arc, time::Duration};

use blkdev::fuzz::{Client, Clock, Ledger, Script};
use blkdev_nvme::{Nvme, Options};
use controller::Machine;

/// How much time passes until the controller acts again on its own: half a tick of the driver's.
const STEP: Duration = Duration::from_micros(500);

/// A client, the driver, and a controller that does what the bytes say.
pub(crate) fn nvme(data: &[u8]) {
    let (script, clock) = (Script::new(data), Clock::default());
    let _entered = clock.enter();
    let options = options(&script);
    let ledger = Arc::new(Ledger::default());
    let machine = Machine::new(&script, &ledger);
    let Ok(disk) = Nvme::open(Arc::clone(&machine) as _, &options) else { return };
    if let Some(client) = Client::new(Arc::new(disk), &script, &ledger) {
        client.run(&mut || {
            clock.pass(STEP);
            machine.step();
            clock.turn();
        });
    }
}

fn options(script: &Script) -> Options {
    let mut options = Options::default();
    options.nsid = *script.pick(&[None, None, None, None, None, Some(1), Some(2), Some(0)]);
    options.read_only = script.one_in(16);
    options.queues = *script.pick(&[Some(2), None, Some(1), Some(3), Some(0)]);
    options.queue_size = *script.pick(&[16, 2, 3, 64, 1024]);
    // Short, so that the driver aborts commands and resets the controller within a run.
    options.timeout = Some(Duration::from_millis(4));
    options
}
