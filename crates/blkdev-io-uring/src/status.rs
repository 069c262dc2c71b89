//! Queries which parts of a file are allocated, on a thread of the device, because `lseek` may take long.
//!
//! On tmpfs the kernel needs hundreds of milliseconds to find the end of a full image. So a queue passes each `Status` to the
//! device's [`Helper`], and gets the reply from its [`Mailbox`], whose eventfd the queue's ring polls.

use std::{
    fmt,
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
        mpsc,
    },
    time::{Duration, Instant},
};

use blkdev::{
    Error, Extent, ExtentKind,
    thread::{Role, spawn},
};
use nix::{
    errno::Errno,
    sys::eventfd::{EfdFlags, EventFd},
    unistd::{Whence, lseek},
};

/// Most extents in one reply: each costs a system call or two.
const EXTENTS_MAX: usize = 64;

/// A `Status` starts no further extent after this time, so that a client with many queries does not delay the device's other
/// clients.
const TIME_MAX: Duration = Duration::from_millis(5);

/// Receives the replies for a queue.
#[derive(Debug)]
pub(crate) struct Mailbox {
    /// Readable when there are replies.
    bell: EventFd,
    answers: Mutex<Vec<Answer>>,
}

/// The extents of a range, or an errno.
#[derive(Debug)]
pub(crate) struct Answer {
    /// Number of the query.
    pub(crate) number: u64,
    pub(crate) result: Result<Vec<Extent>, i32>,
}

impl Mailbox {
    pub(crate) fn new() -> io::Result<Arc<Self>> {
        let bell = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        Ok(Arc::new(Self { bell, answers: Mutex::new(Vec::new()) }))
    }

    /// Makes the descriptor readable.
    pub(crate) fn ring(&self) {
        // This never blocks. If the counter is full, the descriptor is readable.
        let _ = self.bell.write(1);
    }

    pub(crate) fn put(&self, answer: Answer) {
        self.answers.lock().unwrap_or_else(|e| e.into_inner()).push(answer);
        self.ring();
    }

    /// Returns all replies so far. Resets the eventfd first, so that a later reply makes it readable again.
    pub(crate) fn take(&self) -> Vec<Answer> {
        let _ = self.bell.read();
        std::mem::take(&mut *self.answers.lock().unwrap_or_else(|e| e.into_inner()))
    }
}

impl AsFd for Mailbox {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }
}

/// A task for the helper.
type Job = Box<dyn FnOnce() + Send>;

/// The device's helper thread. The first job starts it, and it ends with the device.
#[derive(Default)]
pub(crate) struct Helper {
    /// Number of unfinished jobs: bounded by the depth of the queues.
    open: AtomicU32,
    thread: Mutex<Option<mpsc::Sender<Job>>>,
}

impl Helper {
    /// Whether a query may be in progress. It holds the file's lock, so a write would wait for it.
    #[inline]
    pub(crate) fn is_busy(&self) -> bool {
        self.open.load(Ordering::Relaxed) > 0
    }

    /// Runs a job on the device's thread. The job calls [`is_done`](Self::is_done).
    ///
    /// # Errors
    /// The thread cannot be started.
    pub(crate) fn ask(&self, job: impl FnOnce() + Send + 'static) -> io::Result<()> {
        let mut thread = self.thread.lock().unwrap_or_else(|e| e.into_inner());
        let sender = match &*thread {
            Some(sender) => sender,
            None => {
                let (sender, jobs) = mpsc::channel::<Job>();
                // Between jobs the thread holds no reference to the device, so it ends when the device is dropped.
                let work = move || jobs.into_iter().for_each(|job| job());
                spawn(Role::Helper, "block status", work)?;
                thread.insert(sender)
            }
        };
        self.open.fetch_add(1, Ordering::Relaxed);
        sender.send(Box::new(job)).map_err(|_| {
            self.is_done();
            io::Error::other("the thread for block status has ended")
        })
    }

    /// Called at the end of a job.
    pub(crate) fn is_done(&self) {
        self.open.fetch_sub(1, Ordering::Relaxed);
    }
}

impl fmt::Debug for Helper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Helper").field("open", &self.open).finish_non_exhaustive()
    }
}

/// The allocated parts of the range, or of a prefix of it if that takes long.
pub(crate) fn extents(file: &File, at: u64, len: u64) -> Result<Vec<Extent>, i32> {
    let (started, end) = (Instant::now(), at.saturating_add(len));
    let (mut here, mut extents) = (at, Vec::new());
    while here < end && extents.len() < EXTENTS_MAX && (extents.is_empty() || started.elapsed() < TIME_MAX) {
        let data = seek(file, here, Whence::SeekData, end)?;
        if data > here {
            extents.push(Extent { at: here, len: data - here, kind: ExtentKind::Hole });
            here = data;
        } else {
            // Never empty, even if the file changes in between: a range that was data once may be reported as data.
            let next = here.saturating_add(1).checked_next_multiple_of(512).unwrap_or(end);
            let hole = seek(file, here, Whence::SeekHole, end)?.max(next).min(end);
            extents.push(Extent { at: here, len: hole - here, kind: ExtentKind::Data });
            here = hole;
        }
    }
    Ok(extents)
}

/// The whole range as data, which is always correct.
pub(crate) fn all_data(at: u64, len: u64) -> Extent {
    Extent { at, len, kind: ExtentKind::Data }
}

/// The next data or hole (`what`) from `at` on, at most `end`.
fn seek(file: &File, at: u64, what: Whence, end: u64) -> Result<u64, i32> {
    let Ok(from) = i64::try_from(at) else { return Err(Error::OutOfRange.errno()) };
    match lseek(file, from, what) {
        // A result before `at` is invalid; clamp it.
        Ok(found) => Ok(u64::try_from(found).unwrap_or(at).clamp(at, end)),
        // No data up to the end of the file.
        Err(Errno::ENXIO) => Ok(end),
        Err(errno) => Err(errno as i32),
    }
}
