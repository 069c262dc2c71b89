//! [`Watch`]: a thread that reads the configuration again, after a change notification or on request.

use std::{
    io,
    os::fd::AsFd,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use blkdev::wake::{Stop, Watcher, wait};

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
        let (core, seen) = (Arc::clone(core), Arc::clone(&shared));
        let watcher = Watcher::start("virtio-config", move |stop| {
            seen.run(&core, stop);
            seen.state().over = true;
            seen.read.notify_all();
        })?;
        Ok(Self { shared, watcher })
    }

    /// Requests a read of the configuration, and waits for it for up to 250 ms.
    pub(crate) fn refresh(&self) {
        let mut state = self.shared.state();
        state.asked += 1;
        let mine = state.asked;
        self.watcher.wake().ring();
        let unserved = |state: &mut State| state.served < mine && !state.over;
        drop(self.shared.read.wait_timeout_while(state, REFRESH, unserved));
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run<T: Transport>(&self, core: &Core<T>, stop: &Stop) {
        let changes = core.transport().config_changes();
        let mut next = Instant::now();
        while !core.life().is_dead() {
            let pause = next.saturating_duration_since(Instant::now());
            let resting = !pause.is_zero();
            let heard = changes.filter(|_| !resting);
            let wake = stop.wake();
            let mut ready = false;
            let asked = {
                let state = self.state();
                (state.asked > state.served).then_some(state.asked)
            };
            if resting || asked.is_none() {
                [_, ready] = wait([wake.as_fd(), heard.unwrap_or(wake.as_fd())], resting.then_some(pause));
                wake.clear();
            }
            if stop.is_requested() {
                return;
            }
            if resting {
                continue;
            }
            let changed = heard.filter(|_| ready);
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
