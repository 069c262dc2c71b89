//! [`Watch`]: a thread that reads the configuration again, after a change notification or on request.

use std::{
    io,
    os::fd::AsFd,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use blkdev::wake::{Stop, Watcher, now, wait};

use crate::{core::Core, transport::Transport};

/// Shortest interval between two reads of the configuration, whatever the device reports. The last change is always read.
const PAUSE: Duration = Duration::from_millis(100);

/// Longest wait of [`Watch::refresh`] for the device.
const REFRESH: Duration = Duration::from_millis(250);

#[derive(Debug)]
pub(crate) struct Watch {
    shared: Arc<Shared>,
    /// Woken after every change of `state`.
    watcher: Watcher,
}

#[derive(Debug, Default)]
struct Shared {
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
}

impl Watch {
    pub(crate) fn new<T: Transport>(core: &Arc<Core<T>>) -> io::Result<Self> {
        let shared = Arc::<Shared>::default();
        let mut reader = Reader { core: Arc::clone(core), shared: Arc::clone(&shared), next: now() };
        let watcher = Watcher::with_turns("virtio-config", move |stop| {
            let goes_on = reader.turn(stop);
            if !goes_on {
                reader.shared.state().over = true;
                reader.shared.read.notify_all();
            }
            goes_on
        })?;
        Ok(Self { shared, watcher })
    }

    /// Requests a read of the configuration, and waits for it for up to 250 ms.
    pub(crate) fn refresh(&self) {
        let mine = {
            let mut state = self.shared.state();
            state.asked += 1;
            state.asked
        };
        self.watcher.rouse();
        let unserved = |state: &mut State| state.served < mine && !state.over;
        drop(self.shared.read.wait_timeout_while(self.shared.state(), REFRESH, unserved));
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The state of the thread.
struct Reader<T: Transport> {
    core: Arc<Core<T>>,
    shared: Arc<Shared>,
    /// Earliest time of the next read.
    next: Instant,
}

impl<T: Transport> Reader<T> {
    /// Waits for a reason to read the configuration, and reads it. Returns whether there is more to do.
    fn turn(&mut self, stop: &Stop) -> bool {
        if self.core.life().is_dead() {
            return false;
        }
        let pause = self.next.saturating_duration_since(now());
        let resting = !pause.is_zero();
        let heard = self.core.transport().config_changes().filter(|_| !resting);
        let wake = stop.wake();
        let mut ready = false;
        let asked = {
            let state = self.shared.state();
            (state.asked > state.served).then_some(state.asked)
        };
        if resting || asked.is_none() {
            let fds = [wake.as_fd(), heard.unwrap_or(wake.as_fd())];
            [_, ready] = wait(fds, stop.patience(resting.then_some(pause)));
            wake.clear();
        }
        if stop.is_requested() {
            return false;
        }
        if resting {
            return true;
        }
        let changed = heard.filter(|_| ready);
        if let Some(changes) = changed {
            // Emptied before the read: a later change makes it readable again.
            let _ = nix::unistd::read(changes, &mut [0; 8]);
        }
        if changed.is_some() || asked.is_some() {
            self.core.config_changed();
            self.next = now() + PAUSE;
            if let Some(asked) = asked {
                self.shared.state().served = asked;
                self.shared.read.notify_all();
            }
        }
        true
    }
}
