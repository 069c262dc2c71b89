//! Lines on stderr: log records (warnings and errors always, more with `-v`), and what the program reports itself.
//!
//! While a server runs, a thread of its own writes them from a bounded queue. So a stderr that blocks, such as a full pipe,
//! delays no thread that serves. Lines that find the queue full are dropped and counted. A warning or an error that repeats
//! is written a few times, then only counted.

use std::{
    collections::{HashMap, VecDeque},
    env, io,
    io::Write,
    os::fd::AsFd,
    panic,
    sync::{
        Condvar, LazyLock, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use blkdev::thread::{Role, enter};
use log::{Level, LevelFilter, Log, Metadata, Record};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        signal::{SigSet, SigmaskHow},
        stat::fstat,
    },
};
use serde_json::json;

use crate::cli::LogFormat;

/// Lines and bytes that may wait for stderr.
const LINES_MAX: usize = 1024;
const BYTES_MAX: usize = 1 << 20;

/// A warning or an error from one place in the code is written this often in a [`PERIOD`].
const BURST: u32 = 10;
const PERIOD: Duration = Duration::from_secs(10);

/// How long the end of the process may wait for stderr.
pub(crate) const PATIENCE: Duration = Duration::from_secs(1);

/// What is logged, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Detail {
    /// The number of `-v`: information, debugging, everything.
    pub(crate) verbose: u8,
    pub(crate) format: LogFormat,
}

impl Detail {
    /// Applies to all lines from here on.
    pub(crate) fn apply(self) {
        IS_JSON.store(self.format == LogFormat::Json, Ordering::Relaxed);
        log::set_max_level(match self.verbose {
            0 => LevelFilter::Warn,
            1 => LevelFilter::Info,
            2 => LevelFilter::Debug,
            _ => LevelFilter::Trace,
        });
    }
}

/// Starts logging. From [`detach`] on, a thread writes the lines; before it, the logging thread does.
pub(crate) fn start(detail: Detail) {
    log::set_logger(&Stderr).expect("the logger is set once, at the start");
    detail.apply();
}

/// From here on, a thread writes to stderr, and no other thread waits for it. Panics are logged in the same way.
pub(crate) fn detach() {
    let write = || {
        let mut state = lock();
        loop {
            let now = Instant::now();
            state.end_periods(now, false);
            if std::mem::take(&mut state.confine) {
                // Without the lock, because that may log.
                drop(state);
                enter(Role::Service);
                state = lock();
                continue;
            }
            let Some(line) = state.next() else {
                let pause = state.wait(now);
                state = WAKE.wait_timeout(state, pause).unwrap_or_else(PoisonError::into_inner).0;
                continue;
            };
            state.writing = true;
            drop(state);
            put(line.as_bytes());
            state = lock();
            state.writing = false;
            IDLE.notify_all();
        }
    };
    // Held until the thread is known to run, so that no line is queued without a thread.
    let mut state = lock();
    // Signals are for the thread that reads them, and SIGXFSZ from a log file must not kill the server. The new thread inherits
    // this mask. If it blocked the signals itself, one could come first.
    let mask = SigSet::all().thread_swap_mask(SigmaskHow::SIG_BLOCK);
    state.detached = thread::Builder::new().name("log".into()).spawn(write).is_ok();
    if let Ok(mask) = mask {
        let _ = mask.thread_set_mask();
    }
    drop(state);
    panic::set_hook(Box::new(|panic| {
        let name = thread::current().name().unwrap_or("?").to_owned();
        log::error!("thread '{name}' {panic}");
    }));
}

/// Confines the thread that writes, which starts before the sandbox.
pub(crate) fn confine() {
    lock().confine = true;
    WAKE.notify_all();
}

/// One line. It has no label, unlike log records.
pub(crate) fn say(level: Level, text: &str) {
    lock().take(line(level, "", text));
}

/// Waits until everything is written, but not for long: [`PATIENCE`] at most.
pub(crate) fn flush(patience: Duration) {
    let deadline = Instant::now() + patience;
    let mut state = lock();
    state.end_periods(Instant::now(), true);
    while state.detached && (state.writing || !state.is_empty()) {
        WAKE.notify_all();
        let Some(rest) = deadline.checked_duration_since(Instant::now()) else { return };
        state = IDLE.wait_timeout(state, rest).unwrap_or_else(PoisonError::into_inner).0;
    }
}

struct Stderr;

impl Log for Stderr {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        let level = record.level();
        let label = match level {
            Level::Error => "error: ".into(),
            Level::Warn => "warning: ".into(),
            Level::Info => String::new(),
            Level::Debug | Level::Trace => format!("{}: ", record.target()),
        };
        let line = line(level, &label, &record.args().to_string());
        let mut state = lock();
        // Messages for -v are all written.
        if level > Level::Warn || state.admit((record.file_static(), record.line()), level, &line, Instant::now()) {
            state.take(line);
        }
    }

    fn flush(&self) {
        flush(PATIENCE);
    }
}

static STATE: LazyLock<Mutex<State>> = LazyLock::new(Mutex::default);
/// The format is JSON.
static IS_JSON: AtomicBool = AtomicBool::new(false);
static WAKE: Condvar = Condvar::new();
static IDLE: Condvar = Condvar::new();

fn lock() -> MutexGuard<'static, State> {
    STATE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A place in the code that logs.
type Origin = (Option<&'static str>, Option<u32>);

#[derive(Debug, Default)]
struct State {
    /// A thread writes.
    detached: bool,
    /// A thread is writing a line that has left the queue.
    writing: bool,
    /// The thread must confine itself before it writes the next line.
    confine: bool,
    queue: VecDeque<String>,
    bytes: usize,
    dropped: u64,
    repeats: HashMap<Origin, Repeat>,
}

/// What one place in the code has logged recently.
#[derive(Debug)]
struct Repeat {
    since: Instant,
    count: u32,
    left_out: u64,
    level: Level,
    last: String,
}

impl State {
    /// Whether to write a line; `false`: it is suppressed.
    fn admit(&mut self, origin: Origin, level: Level, line: &str, now: Instant) -> bool {
        self.end_periods(now, false);
        let new = || Repeat { since: now, count: 0, left_out: 0, level, last: String::new() };
        let repeat = self.repeats.entry(origin).or_insert_with(new);
        repeat.count += 1;
        if repeat.count <= BURST {
            return true;
        }
        repeat.left_out += 1;
        repeat.last = line.trim_end().to_owned();
        if repeat.left_out == 1 {
            // Wakes the thread, which must wait for the end of the period.
            WAKE.notify_all();
        }
        false
    }

    /// Reports the suppressed messages of periods that are over, or of all.
    fn end_periods(&mut self, now: Instant, all: bool) {
        let over = |repeat: &Repeat| all || now.saturating_duration_since(repeat.since) >= PERIOD;
        let ended: Vec<Repeat> = self.repeats.extract_if(|_, repeat| over(repeat)).map(|(_, repeat)| repeat).collect();
        for Repeat { left_out, level, last, .. } in ended.into_iter().filter(|repeat| repeat.left_out > 0) {
            let (_, last) = last.split_once("nbdblk: ").unwrap_or(("", &last));
            let text = format!("{left_out} more messages of this kind were left out, the last one: {last}");
            self.take(line(level, "", &text));
        }
    }

    fn take(&mut self, line: String) {
        if !self.detached {
            put(line.as_bytes());
        } else if self.queue.len() >= LINES_MAX || (self.bytes + line.len() > BYTES_MAX && !self.queue.is_empty()) {
            self.dropped += 1;
        } else {
            self.bytes += line.len();
            self.queue.push_back(line);
            WAKE.notify_all();
        }
    }

    fn next(&mut self) -> Option<String> {
        if let Some(line) = self.queue.pop_front() {
            self.bytes -= line.len();
            return Some(line);
        }
        let dropped = std::mem::take(&mut self.dropped);
        let text = || format!("{dropped} lines were dropped: stderr was not read in time");
        (dropped > 0).then(|| line(Level::Warn, "warning: ", &text()))
    }

    fn is_empty(&self) -> bool {
        self.queue.is_empty() && self.dropped == 0
    }

    /// Time until the next work, unless another line comes.
    fn wait(&self, now: Instant) -> Duration {
        let waited = self.repeats.values().filter(|repeat| repeat.left_out > 0);
        let end = waited.map(|repeat| (repeat.since + PERIOD).saturating_duration_since(now)).min();
        end.unwrap_or(Duration::from_secs(3600))
    }
}

/// Formats a line. `label` starts the message in the text format.
fn line(level: Level, label: &str, text: &str) -> String {
    static JOURNAL: LazyLock<bool> = LazyLock::new(is_journal);
    let priority = match level {
        _ if !*JOURNAL => "",
        Level::Error => "<3>",
        Level::Warn => "<4>",
        Level::Info => "<6>",
        Level::Debug | Level::Trace => "<7>",
    };
    let text = text.trim_end();
    if IS_JSON.load(Ordering::Relaxed) {
        let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let time = (time.as_secs_f64() * 1e6).round() / 1e6;
        let object = json!({ "time": time, "level": level.as_str().to_lowercase(), "message": text });
        return format!("{priority}{object}\n");
    }
    format!("{priority}nbdblk: {label}{}\n", text.replace('\n', "; "))
}

/// Whether stderr is the journal's socket (systemd.exec(5), `$JOURNAL_STREAM`), and not a file that replaced it.
fn is_journal() -> bool {
    let Ok(stream) = env::var("JOURNAL_STREAM") else { return false };
    fstat(io::stderr()).is_ok_and(|stat| stream == format!("{}:{}", stat.st_dev, stat.st_ino))
}

/// Writes all of it, whether stderr blocks or not. If stderr is closed or full, the error cannot be reported.
fn put(mut bytes: &[u8]) {
    while !bytes.is_empty() {
        match io::stderr().write(bytes) {
            Ok(0) => return,
            Ok(written) => bytes = &bytes[written..],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                let stderr = io::stderr();
                let _ = poll(&mut [PollFd::new(stderr.as_fd(), PollFlags::POLLOUT)], PollTimeout::NONE);
            }
            Err(_) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn detached() -> State {
        State { detached: true, ..State::default() }
    }

    fn drain(state: &mut State) -> Vec<String> {
        std::iter::from_fn(|| state.next()).collect()
    }

    #[test]
    fn a_full_queue_drops_and_counts() {
        let mut state = detached();
        for n in 0..LINES_MAX + 5 {
            state.take(format!("{n}\n"));
        }
        let lines = drain(&mut state);
        assert_eq!((lines.len(), lines[LINES_MAX - 1].as_str()), (LINES_MAX + 1, "1023\n"));
        assert!(lines[LINES_MAX].contains("warning: 5 lines were dropped"), "{}", lines[LINES_MAX]);
        assert!(state.is_empty() && state.bytes == 0);
        // A line may be longer than the queue, if it is alone.
        state.take("x".repeat(2 * BYTES_MAX));
        state.take("y".into());
        assert_eq!(drain(&mut state).len(), 2);
    }

    #[test]
    fn repeated_warnings_are_counted() {
        let mut state = detached();
        let start = Instant::now();
        let (here, there) = ((Some("here"), Some(1)), (Some("there"), Some(1)));
        let admitted = (0..700).filter(|n| state.admit(here, Level::Warn, &format!("nbdblk: warning: {n}\n"), start));
        assert_eq!(admitted.count(), BURST as usize);
        assert!(state.admit(there, Level::Warn, "another\n", start));
        assert!(state.wait(start) <= PERIOD);
        assert_eq!(drain(&mut state), Vec::<String>::new());
        state.end_periods(start + PERIOD, false);
        let lines = drain(&mut state);
        assert_eq!(lines, ["nbdblk: 690 more messages of this kind were left out, the last one: warning: 699\n"]);
        assert!(state.admit(here, Level::Warn, "again\n", start + PERIOD));
        assert!(state.wait(start) > PERIOD);
    }
}
