//! `num-queues` for drivers that would open any number of queues.

use std::{io, sync::Arc};

use blkdev::{Device, Info, Mapping, Peer, Queue, State};

use crate::error::Error;

/// The same device with `queues` queues at most; unchanged when nothing was asked for.
///
/// # Errors
/// The device has fewer.
pub(crate) fn narrow(device: Arc<dyn Device>, queues: Option<u16>) -> io::Result<Arc<dyn Device>> {
    let Some(queues_max) = queues else { return Ok(device) };
    let Info { driver, queues_max: has, .. } = *device.info();
    if queues_max > has {
        return Err(Error::invalid(format!("{driver}: num-queues={queues_max}: the device has {has}")).into());
    }
    let mut info = device.info().clone();
    info.queues_max = queues_max;
    Ok(Arc::new(Narrow { device, info }))
}

/// A device that reports fewer queues. Callers open at most [`Info::queues_max`], so nothing is counted here.
#[derive(Debug)]
struct Narrow {
    device: Arc<dyn Device>,
    info: Info,
}

impl Device for Narrow {
    fn info(&self) -> &Info {
        &self.info
    }

    fn capacity(&self) -> u64 {
        self.device.capacity()
    }

    fn register(&self, mapping: &Arc<Mapping>) -> io::Result<()> {
        self.device.register(mapping)
    }

    fn unregister(&self, mapping: &Arc<Mapping>) {
        self.device.unregister(mapping);
    }

    fn pins_memory(&self) -> bool {
        self.device.pins_memory()
    }

    fn shares_memory(&self) -> bool {
        self.device.shares_memory()
    }

    fn refresh(&self) {
        self.device.refresh();
    }

    fn peer(&self) -> Option<Arc<Peer>> {
        self.device.peer()
    }

    fn reconnects(&self) -> u64 {
        self.device.reconnects()
    }

    fn details(&self) -> Vec<(&'static str, String)> {
        self.device.details()
    }

    fn state(&self) -> State {
        self.device.state()
    }

    fn is_replaced(&self) -> bool {
        self.device.is_replaced()
    }

    fn open_queue(&self, depth: u16) -> io::Result<Box<dyn Queue>> {
        self.device.open_queue(depth)
    }
}
