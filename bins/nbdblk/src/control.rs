//! What a running server has to react to: signals, the end of the command of `--run`, `nbdblk reload`, as one stream of
//! events.

use std::{
    process,
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
        mpsc,
    },
    thread,
};

use anyhow::Context;
use nix::sys::{
    signal::{SigSet, Signal},
    signalfd::{SfdFlags, SignalFd},
};

use crate::reload::Answer;

/// Something to react to.
#[derive(Debug)]
pub(crate) enum Event {
    /// Asked to stop.
    Stop,
    /// The command of `--run` ended with this status.
    Ended(u8),
    /// The file is to be read again, and somebody perhaps to be told how that went.
    Reload(Option<mpsc::Sender<Answer>>),
}

/// What a signal means at the moment.
#[derive(Clone, Copy, Debug)]
#[repr(u8)]
pub(crate) enum Phase {
    /// Nothing has to be cleaned up: a signal ends the process at once.
    Opening,
    /// A signal asks to stop.
    Serving,
    /// The same, but a keyboard's signals are meant for the command of `--run`.
    Running,
    /// A signal is impatient: it ends the process at once.
    Stopping,
}

/// Receives events. Made before any other thread, so that all of them have the signals blocked.
#[derive(Debug)]
pub(crate) struct Control {
    events: mpsc::Receiver<Event>,
    sender: mpsc::Sender<Event>,
    phase: Arc<AtomicU8>,
}

impl Control {
    /// Blocks the signals and listens to them; to SIGHUP only where there is a file to read again.
    pub(crate) fn start(has_file: bool) -> anyhow::Result<Self> {
        let mut set = stop_signals();
        if has_file {
            set.add(Signal::SIGHUP);
        }
        set.thread_block().context("blocking signals")?;
        let signals = SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC).context("opening a signalfd")?;
        let (sender, events) = mpsc::channel();
        let phase = Arc::new(AtomicU8::new(Phase::Opening as u8));
        let control = Self { events, sender: sender.clone(), phase: phase.clone() };
        let listen = move || {
            while let Ok(Some(info)) = signals.read_signal() {
                let signal = Signal::try_from(info.ssi_signo as i32).expect("a signal of the set");
                log::info!("{signal}");
                if signal == Signal::SIGHUP {
                    let _ = sender.send(Event::Reload(None));
                    continue;
                }
                let now = phase.load(Ordering::SeqCst);
                if now == Phase::Running as u8 && signal != Signal::SIGTERM {
                    continue;
                }
                if now == Phase::Opening as u8 {
                    process::exit(0);
                }
                if now == Phase::Stopping as u8 {
                    process::exit(128 + signal as i32);
                }
                phase.store(Phase::Stopping as u8, Ordering::SeqCst);
                if sender.send(Event::Stop).is_err() {
                    return;
                }
            }
        };
        thread::Builder::new().name("signals".into()).spawn(listen).context("starting a thread")?;
        Ok(control)
    }

    /// Changes what a signal means.
    pub(crate) fn enter(&self, phase: Phase) {
        self.phase.store(phase as u8, Ordering::SeqCst);
    }

    /// For whoever else has events to tell.
    pub(crate) fn sender(&self) -> mpsc::Sender<Event> {
        self.sender.clone()
    }

    /// Sleeps until something happens.
    pub(crate) fn wait(&self) -> Event {
        self.events.recv().expect("a sender is kept here")
    }
}

/// The signals that stop a server.
pub(crate) fn stop_signals() -> SigSet {
    [Signal::SIGTERM, Signal::SIGINT, Signal::SIGQUIT].into_iter().collect()
}
