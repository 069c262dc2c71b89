//! The events of a running server in one stream: signals, the end of the command of `--run`, `nbdblk reload`. The thread that
//! reads signals, and the one that waits for events, never wait for a file system or for stderr.

use std::{
    fs,
    ops::ControlFlow,
    os::fd::AsFd,
    process,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU8, Ordering},
        mpsc,
    },
    thread,
    time::Duration,
};

use anyhow::Context;
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        signal::{SigSet, Signal},
        signalfd::{SfdFlags, SignalFd},
    },
};

use crate::{events::Event, files, logger, sandbox};

/// The present meaning of a signal.
#[derive(Clone, Copy, Debug)]
#[repr(u8)]
pub(crate) enum Phase {
    /// Nothing is served yet: a signal ends the process at once.
    Opening,
    /// A signal stops the server.
    Serving,
    /// The same, but signals from the keyboard are for the command of `--run`.
    Running,
    /// A second signal ends the process at once.
    Stopping,
}

/// Receives events. Create it before the serving threads, so that they inherit the blocked signals.
#[derive(Debug)]
pub(crate) struct Control {
    events: mpsc::Receiver<Event>,
    sender: mpsc::Sender<Event>,
    phase: Arc<AtomicU8>,
    /// Held while a signal is read and handled.
    gate: Arc<Mutex<()>>,
}

impl Control {
    /// Blocks the signals and reads them. `has_file`: SIGHUP makes the server read its file again.
    pub(crate) fn start(has_file: bool, first: Phase) -> anyhow::Result<Self> {
        // nohup(1) ignores SIGHUP, and blocking it would undo that.
        let hangs_up = !is_ignored(Signal::SIGHUP);
        let set = blocked();
        set.thread_block().context("blocking signals")?;
        let signals =
            SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK).context("opening a signalfd")?;
        let (sender, events) = mpsc::channel();
        let phase = Arc::new(AtomicU8::new(first as u8));
        let gate = Arc::new(Mutex::new(()));
        let control = Self { events, sender: sender.clone(), phase: phase.clone(), gate: gate.clone() };
        let reader = Reader { signals, sender, phase, gate, has_file, hangs_up };
        sandbox::spawn_trusted("signals", move || reader.run()).context("starting a thread")?;
        Ok(control)
    }

    /// Changes the meaning of a signal. `false`: a signal has already come; its event will follow.
    pub(crate) fn enter(&self, phase: Phase) -> bool {
        let change = |now| (now != Phase::Stopping as u8).then_some(phase as u8);
        self.phase.fetch_update(Ordering::SeqCst, Ordering::SeqCst, change).is_ok()
    }

    /// For other threads that report events.
    pub(crate) fn sender(&self) -> mpsc::Sender<Event> {
        self.sender.clone()
    }

    /// Reads no signal until the result is dropped: signals stay pending, also for a program that replaces this one. `None`: a
    /// signal has stopped the server.
    pub(crate) fn hold_signals(&self) -> Option<MutexGuard<'_, ()>> {
        let held = lock(&self.gate);
        (self.phase.load(Ordering::SeqCst) != Phase::Stopping as u8).then_some(held)
    }

    /// The next event, if there is one already.
    pub(crate) fn pending(&self) -> Option<Event> {
        self.events.try_recv().ok()
    }

    /// Sleeps until something happens.
    pub(crate) fn wait(&self) -> Event {
        self.events.recv().expect("a sender is kept here")
    }
}

/// The thread that reads signals.
struct Reader {
    signals: SignalFd,
    sender: mpsc::Sender<Event>,
    phase: Arc<AtomicU8>,
    gate: Arc<Mutex<()>>,
    /// SIGHUP makes the server read its file again.
    has_file: bool,
    /// SIGHUP stops a server without a file.
    hangs_up: bool,
}

impl Reader {
    fn run(self) {
        loop {
            let _ = poll(&mut [PollFd::new(self.signals.as_fd(), PollFlags::POLLIN)], PollTimeout::NONE);
            let _gate = lock(&self.gate);
            let info = match self.signals.read_signal() {
                Ok(Some(info)) => info,
                Ok(None) | Err(Errno::EINTR) => continue,
                Err(error) => return log::error!("cannot read signals: {error}"),
            };
            // Real-time signals have no name.
            let Ok(signal) = Signal::try_from(info.ssi_signo as i32) else { continue };
            if self.handle(signal).is_break() {
                return;
            }
        }
    }

    /// `Break`: no thread receives events any more.
    fn handle(&self, signal: Signal) -> ControlFlow<()> {
        let now = self.phase.load(Ordering::SeqCst);
        let is_keyboard = matches!(signal, Signal::SIGINT | Signal::SIGQUIT);
        let is_first = now != Phase::Stopping as u8;
        let stops = match signal {
            Signal::SIGHUP if self.has_file => {
                log::info!("{signal}: reading the configuration again");
                let _ = self.sender.send(Event::Reload(None));
                false
            }
            Signal::SIGUSR2 => {
                log::info!("{signal}: replacing the program");
                let _ = self.sender.send(Event::Upgrade(None, None));
                return ControlFlow::Continue(());
            }
            // These may come twice without a second request: for a closed terminal, and every second beyond the CPU limit.
            Signal::SIGHUP => self.hangs_up && is_first,
            Signal::SIGXCPU => is_first,
            Signal::SIGTERM => true,
            _ => is_keyboard && now != Phase::Running as u8,
        };
        log::info!("{signal}{}", if stops { "" } else { ": ignored" });
        if !stops {
            return ControlFlow::Continue(());
        }
        if now == Phase::Opening as u8 {
            log::warn!("{signal} before the server was ready: nothing was served");
        }
        if now == Phase::Opening as u8 || !is_first {
            end(128 + signal as i32);
        }
        self.phase.store(Phase::Stopping as u8, Ordering::SeqCst);
        match self.sender.send(Event::Stop(signal)) {
            Ok(()) => ControlFlow::Continue(()),
            Err(_) => ControlFlow::Break(()),
        }
    }
}

fn lock(gate: &Mutex<()>) -> MutexGuard<'_, ()> {
    gate.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Ends the process without waiting for any other thread.
fn end(status: i32) -> ! {
    within(Duration::from_secs(1), files::remove_all);
    logger::flush(logger::PATIENCE);
    process::exit(status);
}

/// Runs `work` on its own thread, and waits for its end, at most for `limit`. `None`: it has not ended yet.
pub(crate) fn within<T: Send + 'static>(limit: Duration, work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    let (sender, done) = mpsc::channel();
    let work = Arc::new(Mutex::new(Some(work)));
    let take = |work: &Mutex<Option<_>>| work.lock().unwrap_or_else(PoisonError::into_inner).take();
    let run = {
        let work = Arc::clone(&work);
        // If the caller has stopped waiting, the result is dropped.
        move || take(&work).into_iter().for_each(|work: _| drop(sender.send(work())))
    };
    match thread::Builder::new().name("deadline".into()).spawn(run) {
        Ok(_) => done.recv_timeout(limit).ok(),
        // No thread is left: run it here, without the limit.
        Err(_) => Some(take(&work)?()),
    }
}

/// All signals except those that report a thread's own fault, those that stop and continue a job, and those that end no process.
/// SIGXFSZ is included: then a write beyond the limit for file sizes fails with EFBIG instead of killing the process.
fn blocked() -> SigSet {
    let mut set = SigSet::all();
    let faults = [Signal::SIGSEGV, Signal::SIGBUS, Signal::SIGFPE, Signal::SIGILL, Signal::SIGTRAP, Signal::SIGSYS];
    let jobs = [Signal::SIGTSTP, Signal::SIGTTIN, Signal::SIGTTOU, Signal::SIGCONT];
    let harmless = [Signal::SIGCHLD, Signal::SIGURG, Signal::SIGWINCH, Signal::SIGABRT];
    faults.into_iter().chain(jobs).chain(harmless).for_each(|signal| set.remove(signal));
    set
}

/// Whether the process was started with this signal ignored.
fn is_ignored(signal: Signal) -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| u64::from_str_radix(line.strip_prefix("SigIgn:")?.trim(), 16).ok());
    mask.is_some_and(|mask| mask & 1 << (signal as u32 - 1) != 0)
}
