//! [`Remains`]: the file and the memory of a device that is being closed, and the reset of the device.

use std::{
    io,
    sync::{Arc, atomic::Ordering},
    thread,
    time::{Duration, Instant},
};

use blkdev::{Mapping, window::Window};

use crate::sys::{BACKEND_F_IOTLB_BATCH, BACKEND_F_IOTLB_MSG_V2, Iotlb, Vhost};

/// Longest reset of a device.
pub(crate) const RESET: Duration = Duration::from_secs(5);
/// Time for the requests in flight of a dead device, before it is reset.
pub(crate) const GRACE: Duration = Duration::from_millis(500);

/// The file of a device, and memory that the device may access as long as it is not reset.
#[derive(Debug)]
pub(crate) struct Remains {
    pub(crate) vhost: Arc<Vhost>,
    /// Backend features in use.
    pub(crate) backend: u64,
    pub(crate) mappings: Vec<Arc<Mapping>>,
    /// Addresses of the driver area and the device area of each split ring.
    pub(crate) rings: Vec<[u64; 2]>,
}

impl Remains {
    /// Whether all rings show how many of their requests the device has completed.
    pub(crate) fn shows_requests(&self) -> bool {
        !self.rings.is_empty()
    }

    /// Whether the device may not have used all that is available to it (virtio 1.2, 2.7).
    pub(crate) fn may_be_busy(&self) -> bool {
        let is_busy = |areas: &[u64; 2]| {
            let [available, used] = areas.map(|area| self.index(area));
            available != used
        };
        self.rings.is_empty() || self.rings.iter().any(is_busy)
    }

    /// The index in the area of a ring.
    fn index(&self, area: u64) -> Option<u16> {
        let lies_in = |mapping: &&Arc<Mapping>| {
            let base = mapping.iova().get();
            (base..base + mapping.len() as u64).contains(&area)
        };
        let mapping = self.mappings.iter().find(lies_in)?;
        let at = (area - mapping.iova().get()) as usize;
        // The queues are closed, so no other window is here.
        let start = at & !63;
        Some(Window::new(mapping, start, at - start + 4).load16(at - start + 2, Ordering::Acquire))
    }

    /// Resets the device explicitly, because the file may be open elsewhere. Closing the file, which comes next, does the same.
    ///
    /// # Errors
    /// The reset failed, so the device may still access the memory.
    pub(crate) fn reset(&self) -> io::Result<()> {
        let done = reset(&self.vhost);
        let _ = iotlb(&self.vhost, self.backend, Iotlb::Invalidate, &self.mappings);
        done
    }
}

/// Resets the device and waits until the reset is complete: the kernel's driver of virtio-pci devices (vp-vdpa) does not wait
/// (virtio 1.2, 4.1.4.3.2).
pub(crate) fn reset(vhost: &Vhost) -> io::Result<()> {
    vhost.set_status(0)?;
    let end = Instant::now() + RESET;
    loop {
        match vhost.get_status()? {
            0 => return Ok(()),
            status if Instant::now() >= end => {
                let why = format!("the device did not complete a reset within {RESET:?} (status {status:#x})");
                return Err(io::Error::new(io::ErrorKind::TimedOut, why));
            }
            _ => thread::sleep(Duration::from_millis(1)),
        }
    }
}

/// Writes IOTLB messages, as one batch if the kernel supports that.
pub(crate) fn iotlb<'a>(
    vhost: &Vhost,
    backend: u64,
    what: Iotlb,
    mappings: impl IntoIterator<Item = &'a Arc<Mapping>>,
) -> io::Result<()> {
    let (v2, batch) = (backend & BACKEND_F_IOTLB_MSG_V2 != 0, backend & BACKEND_F_IOTLB_BATCH != 0);
    if batch {
        vhost.iotlb(v2, Iotlb::BatchBegin, 0, 0)?;
    }
    let mut done = Ok(());
    for mapping in mappings {
        done = done.and(vhost.iotlb(v2, what, mapping.iova().get(), mapping.len() as u64));
    }
    // Also after a failure: an open batch would hold back all later messages.
    if batch {
        done = done.and(vhost.iotlb(v2, Iotlb::BatchEnd, 0, 0));
    }
    done
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    #[test]
    fn a_ring_shows_whether_the_device_has_used_all_that_is_available() {
        let mapping = Mapping::new(1 << 16).unwrap();
        let base = mapping.iova().get();
        let remains = |rings| Remains {
            vhost: Arc::new(Vhost::new(File::open("/dev/null").unwrap().into())),
            backend: 0,
            mappings: vec![Arc::clone(&mapping)],
            rings,
        };
        assert!(remains(vec![]).may_be_busy() && !remains(vec![]).shows_requests(), "there is no ring");
        let ring = remains(vec![[base + 4096 + 6, base + 8192]]);
        assert!(ring.shows_requests() && !ring.may_be_busy());
        Window::new(&mapping, 4096, 64).store16(8, 65535, Ordering::Relaxed);
        assert!(ring.may_be_busy());
        Window::new(&mapping, 8192, 64).store16(2, 65535, Ordering::Relaxed);
        assert!(!ring.may_be_busy());
    }
}
