//! [`Watch`]: a thread that distributes shared events: an interrupt vector shared by queues, and the removal of the device.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{Arc, Mutex, PoisonError},
    thread::{self, JoinHandle},
};

use blkdev_virtio::Liveness;
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::eventfd::EventFd,
};

use crate::eventfd::{eventfd, signal};

#[derive(Debug)]
pub(crate) struct Watch {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    life: Arc<Liveness>,
    /// Written by the device, or by this thread, when the configuration may have changed.
    config_changes: EventFd,
    /// Written by the device when any queue of the shared vector has used buffers.
    queues: EventFd,
    /// The device has a single vector, which also reports configuration changes.
    only_one: bool,
    removal: EventFd,
    stop: EventFd,
    /// Call eventfds of the queues that share the vector.
    calls: Mutex<Vec<OwnedFd>>,
}

impl Watch {
    pub(crate) fn new(life: Arc<Liveness>, vectors: u16, own: bool) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            life,
            config_changes: eventfd()?,
            queues: eventfd()?,
            only_one: vectors == 1 && !own,
            removal: eventfd()?,
            stop: eventfd()?,
            calls: Mutex::default(),
        });
        let seen = Arc::clone(&shared);
        let thread = thread::Builder::new().name("virtio-pci".to_owned()).spawn(move || seen.run())?;
        Ok(Self { shared, thread: Some(thread) })
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
    fn run(&self) {
        loop {
            let mut fds =
                [&self.queues, &self.removal, &self.stop].map(|fd| PollFd::new(fd.as_fd(), PollFlags::POLLIN));
            // EINTR is harmless: the loop checks everything again.
            let _ = poll(&mut fds, PollTimeout::NONE);
            let [queues, removal, stop] = fds.map(|fd| fd.any() == Some(true));
            if stop {
                return;
            }
            if removal {
                let _ = self.removal.read();
                self.life.end("the device is being removed, or has failed; it is declared dead");
            }
            if queues {
                // Emptied first: a later interrupt makes it readable again.
                let _ = self.queues.read();
                self.calls.lock().unwrap_or_else(PoisonError::into_inner).iter().for_each(|call| signal(call.as_fd()));
                if self.only_one {
                    signal(self.config_changes.as_fd());
                }
            }
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let _ = self.shared.stop.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
