//! [`Nvme`]: a namespace of a controller as a [`Device`].

use std::{
    io,
    sync::{Arc, atomic::Ordering},
};

use blkdev::{Context, Device, Info, Mapping, Peer, State, wake::Wake};
use blkdev_vfio::{PciDevice, Vfio};

use crate::{bring_up::bring_up, options::Options, owner::Owner, queue::IoQueue, target::Target, watch::Watch};

/// A namespace of an NVMe controller, driven by this process.
#[derive(Debug)]
pub struct Nvme {
    owner: Arc<Owner>,
}

impl Nvme {
    /// Opens a controller that is bound to `vfio-pci`. A namespace in the target takes precedence over [`Options::nsid`].
    ///
    /// # Errors
    /// Those of [`Vfio::open`] and [`open`](Self::open).
    pub fn open_vfio(target: &Target, how: &blkdev_vfio::Options, options: &Options) -> io::Result<Self> {
        let pci = Vfio::open(&target.controller, how)?;
        Self::open(Arc::new(pci), &Options { nsid: target.nsid.or(options.nsid), ..options.clone() })
    }

    /// Initialises the controller, and reads the namespace's limits.
    ///
    /// # Errors
    /// The text names the reason.
    ///
    /// - [`NotFound`](io::ErrorKind::NotFound): there is no such namespace.
    /// - [`InvalidInput`](io::ErrorKind::InvalidInput): the device is not an NVMe controller, an option is out of range, or
    ///   there are fewer queues than requested.
    /// - [`Unsupported`](io::ErrorKind::Unsupported): the controller lacks a feature that is required, or the format of the
    ///   namespace is not supported.
    /// - [`TimedOut`](io::ErrorKind::TimedOut): the controller does not respond.
    /// - [`NotConnected`](io::ErrorKind::NotConnected): the controller has failed or was removed.
    ///
    /// If the controller refuses a command, the kind is that of the [`blkdev::Error`] of its status. Any other error of the
    /// system has its own kind; [`Context::os_error`](blkdev::Context::os_error) returns its errno.
    pub fn open(pci: Arc<dyn PciDevice>, options: &Options) -> io::Result<Self> {
        let name = format!("nvme {}", pci.address());
        let core = bring_up(pci, options).map_err(|e| Context::wrap(format!("{name}: {e}"), e))?;
        let core = Arc::new(core);
        let watch = Watch::start(&core)?;
        Ok(Self { owner: Arc::new(Owner { core, watch }) })
    }
}

impl Device for Nvme {
    fn info(&self) -> &Info {
        &self.owner.core.info
    }

    fn capacity(&self) -> u64 {
        self.owner.core.capacity.load(Ordering::Relaxed)
    }

    fn register(&self, mapping: &Arc<Mapping>) -> io::Result<()> {
        let core = &self.owner.core;
        core.pci.dma_map(mapping).map_err(|e| Context::wrap(format!("nvme {}: {e}", core.info.target), e))?;
        Ok(())
    }

    fn unregister(&self, mapping: &Arc<Mapping>) {
        let core = &self.owner.core;
        if core.life.is_dead() && core.addresses.is_translated() {
            // Without an IOMMU, a dead device that could not be stopped may write here as long as the process lives.
            return;
        }
        if let Err(e) = core.pci.dma_unmap(mapping) {
            log::warn!("nvme {}: cannot unmap {} MiB of memory: {e}", core.info.target, mapping.len() >> 20);
        }
    }

    /// Without an IOMMU nothing stops a dead device.
    fn peer(&self) -> Option<Arc<Peer>> {
        self.owner.core.addresses.is_translated().then(|| Arc::new(Peer::device()))
    }

    fn ring_at_death(&self, bell: &Arc<Wake>) {
        self.owner.core.life.ring_at_end(bell);
    }

    fn details(&self) -> Vec<(&'static str, String)> {
        let core = &self.owner.core;
        vec![
            ("resets", core.resets.load(Ordering::Relaxed).to_string()),
            ("queue size", core.queue_layout.size.to_string()),
            ("data pointers", if core.sgl { "SGL" } else { "PRP" }.into()),
        ]
    }

    fn state(&self) -> State {
        if self.owner.core.life.is_dead() { State::Dead } else { State::Working }
    }

    fn open_queue(&self, depth: u16) -> io::Result<Box<dyn blkdev::Queue>> {
        let (pair, wake) = self.owner.core.open_queue(depth)?;
        Ok(Box::new(IoQueue::new(&self.owner, pair, wake)))
    }
}
