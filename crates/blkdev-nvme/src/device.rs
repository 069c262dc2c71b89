//! [`Nvme`]: a namespace of a controller as a [`Device`].

use std::{
    io,
    sync::{Arc, atomic::Ordering},
};

use blkdev::{Device, Info, Mapping};
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
    /// An option is out of range; the device is not an NVMe controller, has failed or does not respond; or the namespace does
    /// not exist or is not supported.
    pub fn open(pci: Arc<dyn PciDevice>, options: &Options) -> io::Result<Self> {
        let name = format!("nvme {}", pci.address());
        let core = bring_up(pci, options).map_err(|e| io::Error::new(e.kind(), format!("{name}: {e}")))?;
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
        core.pci.dma_map(mapping).map_err(|e| io::Error::new(e.kind(), format!("nvme {}: {e}", core.info.target)))?;
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

    fn open_queue(&self, depth: u16) -> io::Result<Box<dyn blkdev::Queue>> {
        let (pair, wake) = self.owner.core.open_queue(depth)?;
        Ok(Box::new(IoQueue::new(&self.owner, pair, wake)))
    }
}
