//! [`Watch`]: a thread that reads the configuration again when the device says that it has changed, or when asked to.

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

/// The time between two reads of the configuration, whatever the device says. The last change is always read.
const PAUSE: Duration = Duration::from_millis(100);

/// How long [`Watch::refresh`] waits for the device.
const REFRESH: Duration = Duration::from_millis(250);

#[derive(Debug)]
pub(crate) struct Watch {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    /// Written to when `state` has changed.
    wake: EventFd,
    state: Mutex<State>,
    read: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// Reads that were asked for, and how many of those requests have been served.
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

    /// Has the configuration read, and waits for that for a moment.
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
                // EINTR is as good as nothing having happened.
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
                // Emptied first: a change from here on is one more.
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
