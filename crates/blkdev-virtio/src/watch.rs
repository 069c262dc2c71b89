//! [`Watch`]: a thread that reads the configuration again, after a change notification or on request.

use std::{
    io,
    os::fd::AsFd,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::eventfd::{EfdFlags, EventFd},
};

use crate::{core::Core, transport::Transport};

/// Shortest interval between two reads of the configuration, whatever the device reports. The last change is always read.
const PAUSE: Duration = Duration::from_millis(100);

/// Longest wait of [`Watch::refresh`] for the device.
const REFRESH: Duration = Duration::from_millis(250);

#[derive(Debug)]
pub(crate) struct Watch {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    /// Written after every change of `state`.
    wake: EventFd,
    state: Mutex<State>,
    read: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// Number of requested reads, and of requests served.
    asked: u64,
    served: u64,
    /// The thread has ended.
    over: bool,
    stop: bool,
}

impl Watch {
    pub(crate) fn new<T: Transport>(core: &Arc<Core<T>>) -> io::Result<Self> {
        let wake = EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        let shared = Arc::new(Shared { wake, state: Mutex::default(), read: Condvar::new() });
        let (core, seen) = (Arc::clone(core), Arc::clone(&shared));
        let thread = thread::Builder::new().name("virtio-config".to_owned()).spawn(move || {
            seen.run(&core);
            seen.state().over = true;
            seen.read.notify_all();
        })?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Requests a read of the configuration, and waits for it for up to 250 ms.
    pub(crate) fn refresh(&self) {
        let mut state = self.shared.state();
        state.asked += 1;
        let mine = state.asked;
        let _ = self.shared.wake.write(1);
        let unserved = |state: &mut State| state.served < mine && !state.over;
        drop(self.shared.read.wait_timeout_while(state, REFRESH, unserved));
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run<T: Transport>(&self, core: &Core<T>) {
        let changes = core.transport().config_changes();
        let mut next = Instant::now();
        while !core.life().is_dead() {
            let pause = next.saturating_duration_since(Instant::now());
            let resting = !pause.is_zero();
            let heard = changes.filter(|_| !resting);
            let timeout = if resting {
                PollTimeout::try_from(pause + Duration::from_micros(999)).unwrap_or(PollTimeout::MAX)
            } else {
                PollTimeout::NONE
            };
            let wake = PollFd::new(self.wake.as_fd(), PollFlags::POLLIN);
            let mut fds = [wake, PollFd::new(heard.unwrap_or(self.wake.as_fd()), PollFlags::POLLIN)];
            let asked = {
                let state = self.state();
                (state.asked > state.served).then_some(state.asked)
            };
            if resting || asked.is_none() {
                // EINTR is harmless: the loop checks everything again.
                let _ = poll(&mut fds, timeout);
                let _ = self.wake.read();
            }
            if self.state().stop {
                return;
            }
            if resting {
                continue;
            }
            let changed = heard.filter(|_| fds[1].any() == Some(true));
            if let Some(changes) = changed {
                // Emptied before the read: a later change makes it readable again.
                let _ = nix::unistd::read(changes, &mut [0; 8]);
            }
            if changed.is_some() || asked.is_some() {
                core.config_changed();
                next = Instant::now() + PAUSE;
                if let Some(asked) = asked {
                    self.state().served = asked;
                    self.read.notify_all();
                }
            }
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.shared.state().stop = true;
        let _ = self.shared.wake.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
