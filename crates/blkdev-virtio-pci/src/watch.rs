//! [`Watch`]: a thread that passes on what several have to hear: an interrupt that queues share, and the device's removal.

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
    /// Written to by the device, or by us, when the configuration may have changed.
    config_changes: EventFd,
    /// Written to by the device when any of the queues that share it has something.
    queues: EventFd,
    /// Changes of configuration come over the same vector.
    only_one: bool,
    removal: EventFd,
    stop: EventFd,
    /// Whom to tell.
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

    /// What a vector that queues share writes to.
    pub(crate) fn queues(&self) -> BorrowedFd<'_> {
        self.shared.queues.as_fd()
    }

    pub(crate) fn config_changes(&self) -> BorrowedFd<'_> {
        self.shared.config_changes.as_fd()
    }

    pub(crate) fn removal(&self) -> BorrowedFd<'_> {
        self.shared.removal.as_fd()
    }

    /// From now on `call` is told when the shared vector fires.
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
            // EINTR is as good as nothing having happened.
            let _ = poll(&mut fds, PollTimeout::NONE);
            let [queues, removal, stop] = fds.map(|fd| fd.any() == Some(true));
            if stop {
                return;
            }
            if removal {
                let _ = self.removal.read();
                self.life.end("the device is being taken away, or has failed; it is not used any more");
            }
            if queues {
                // Emptied first: what comes from here on is one more.
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
