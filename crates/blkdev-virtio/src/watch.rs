//! [`Watch`]: a thread that sleeps until the device says that its configuration has changed.

use std::{
    io,
    os::fd::AsFd,
    sync::Arc,
    thread::{self, JoinHandle},
};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::eventfd::{EfdFlags, EventFd},
};

use crate::{Transport, blk::Core};

#[derive(Debug)]
pub(crate) struct Watch {
    stop: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    /// Watches, where the transport has anything to watch.
    pub(crate) fn new<T: Transport>(core: &Arc<Core<T>>) -> io::Result<Option<Self>> {
        if core.transport().config_changes().is_none() {
            return Ok(None);
        }
        let stop = Arc::new(EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?);
        let (core, seen) = (Arc::clone(core), Arc::clone(&stop));
        let thread = thread::Builder::new().name("virtio-config".to_owned()).spawn(move || run(&core, &seen))?;
        Ok(Some(Self { stop, thread: Some(thread) }))
    }
}

fn run<T: Transport>(core: &Core<T>, stop: &EventFd) {
    let Some(changes) = core.transport().config_changes() else { return };
    while !core.life().is_dead() {
        let mut fds = [PollFd::new(changes, PollFlags::POLLIN), PollFd::new(stop.as_fd(), PollFlags::POLLIN)];
        // EINTR is as good as nothing having happened.
        let _ = poll(&mut fds, PollTimeout::NONE);
        if fds[1].any() == Some(true) {
            return;
        }
        if fds[0].any() == Some(true) {
            // Emptied first: a change from here on is one more.
            let _ = nix::unistd::read(changes, &mut [0; 8]);
            core.config_changed();
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let _ = self.stop.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
