//! [`Watch`]: a thread that distributes shared events: an interrupt vector shared by queues, and the removal of the device.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{Arc, Mutex, PoisonError},
};

use blkdev::{
    thread::Role,
    wake::{Stop, Wake, Watcher, ring, wait},
};
use blkdev_virtio::Liveness;

#[derive(Debug)]
pub(crate) struct Watch {
    shared: Arc<Shared>,
    _watcher: Watcher,
}

#[derive(Debug)]
struct Shared {
    life: Arc<Liveness>,
    /// Written by the device, or by this thread, when the configuration may have changed.
    config_changes: Wake,
    /// Written by the device when any queue of the shared vector has used buffers.
    queues: Wake,
    /// The device has a single vector, which also reports configuration changes.
    only_one: bool,
    removal: Wake,
    /// Call eventfds of the queues that share the vector.
    calls: Mutex<Vec<OwnedFd>>,
}

impl Watch {
    pub(crate) fn new(life: Arc<Liveness>, vectors: u16, own: bool) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            life,
            config_changes: Wake::new()?,
            queues: Wake::new()?,
            only_one: vectors == 1 && !own,
            removal: Wake::new()?,
            calls: Mutex::default(),
        });
        let seen = Arc::clone(&shared);
        let watcher = Watcher::start(Role::Watcher, "virtio-pci", move |stop| seen.run(stop))?;
        Ok(Self { shared, _watcher: watcher })
    }

    /// The eventfd of the shared vector.
    pub(crate) fn queues(&self) -> BorrowedFd<'_> {
        self.shared.queues.as_fd()
    }

    pub(crate) fn config_changes(&self) -> BorrowedFd<'_> {
        self.shared.config_changes.as_fd()
    }

    pub(crate) fn removal(&self) -> BorrowedFd<'_> {
        self.shared.removal.as_fd()
    }

    /// Registers `call`, to be written whenever the shared vector fires.
    pub(crate) fn share(&self, call: BorrowedFd<'_>) -> io::Result<()> {
        let call = call.try_clone_to_owned()?;
        self.shared.calls.lock().unwrap_or_else(PoisonError::into_inner).push(call);
        Ok(())
    }
}

impl Shared {
    fn run(&self, stop: &Stop) {
        loop {
            let [queues, removal, _] = wait([&self.queues, &self.removal, stop.wake()].map(AsFd::as_fd), None);
            if stop.is_requested() {
                return;
            }
            if removal {
                self.removal.clear();
                self.life.end("it is being removed, or has failed");
            }
            if queues {
                // Emptied first: a later interrupt makes it readable again.
                self.queues.clear();
                self.calls.lock().unwrap_or_else(PoisonError::into_inner).iter().for_each(|call| ring(call.as_fd()));
                if self.only_one {
                    self.config_changes.ring();
                }
            }
        }
    }
}
