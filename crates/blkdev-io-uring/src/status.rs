//! Where a file is allocated: asked on a thread of the device's, since `lseek` may take long.
//!
//! To look for the end of a full image on tmpfs takes the kernel hundreds of milliseconds. So a queue hands each `Status` to
//! the device's [`Helper`], and finds the answer in its [`Mailbox`], whose eventfd the queue's ring polls.

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
    thread,
    time::{Duration, Instant},
};

use blkdev::{Error, Extent, ExtentKind};
use nix::{
    errno::Errno,
    sys::eventfd::{EfdFlags, EventFd},
    unistd::{Whence, lseek},
};

/// Most extents that one `Status` gets: each costs a system call or two.
const EXTENTS_MAX: usize = 64;

/// How long one `Status` may go on to the next extent. So a client that asks much does not delay the others of the device.
const TIME_MAX: Duration = Duration::from_millis(5);

/// Where a queue finds its answers.
#[derive(Debug)]
pub(crate) struct Mailbox {
    /// Readable when there are answers.
    bell: EventFd,
    answers: Mutex<Vec<Answer>>,
}

/// What a range holds, or why that is not known.
#[derive(Debug)]
pub(crate) struct Answer {
    /// That of the question.
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
        // It never blocks. A counter that is full is readable.
        let _ = self.bell.write(1);
    }

    pub(crate) fn put(&self, answer: Answer) {
        self.answers.lock().unwrap_or_else(|e| e.into_inner()).push(answer);
        self.ring();
    }

    /// All answers that have come. First the bell, so that a later answer rings it again.
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

/// Something that the helper does.
type Job = Box<dyn FnOnce() + Send>;

/// The device's thread, which the first question starts, and which ends with the device.
#[derive(Default)]
pub(crate) struct Helper {
    /// Jobs that are not done: bounded, as the depth of a queue is.
    open: AtomicU32,
    thread: Mutex<Option<mpsc::Sender<Job>>>,
}

impl Helper {
    /// Whether a call may be at work. It holds the file's lock, so that a write waits for it.
    #[inline]
    pub(crate) fn is_busy(&self) -> bool {
        self.open.load(Ordering::Relaxed) > 0
    }

    /// Makes the device's thread do a job, which calls [`is_done`](Self::is_done).
    ///
    /// # Errors
    /// No thread can be started.
    pub(crate) fn ask(&self, job: impl FnOnce() + Send + 'static) -> io::Result<()> {
        let mut thread = self.thread.lock().unwrap_or_else(|e| e.into_inner());
        let sender = match &*thread {
            Some(sender) => sender,
            None => {
                let (sender, jobs) = mpsc::channel::<Job>();
                // It keeps nothing of the device between two jobs, so it ends when the device is dropped.
                let work = move || jobs.into_iter().for_each(|job| job());
                thread::Builder::new().name("block status".into()).spawn(work)?;
                thread.insert(sender)
            }
        };
        self.open.fetch_add(1, Ordering::Relaxed);
        sender.send(Box::new(job)).map_err(|_| {
            self.is_done();
            io::Error::other("the thread for block status has ended")
        })
    }

    /// A job has been done.
    pub(crate) fn is_done(&self) {
        self.open.fetch_sub(1, Ordering::Relaxed);
    }
}

impl fmt::Debug for Helper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Helper").field("open", &self.open).finish_non_exhaustive()
    }
}

/// Where the range is allocated, for a part of it if that takes long.
pub(crate) fn extents(file: &File, at: u64, len: u64) -> Result<Vec<Extent>, i32> {
    let (started, end) = (Instant::now(), at.saturating_add(len));
    let (mut here, mut extents) = (at, Vec::new());
    while here < end && extents.len() < EXTENTS_MAX && (extents.is_empty() || started.elapsed() < TIME_MAX) {
        let data = seek(file, here, Whence::SeekData, end)?;
        if data > here {
            extents.push(Extent { at: here, len: data - here, kind: ExtentKind::Hole });
            here = data;
        } else {
            // Never empty, even should the file change in between: what is data once is data enough.
            let next = here.saturating_add(1).checked_next_multiple_of(512).unwrap_or(end);
            let hole = seek(file, here, Whence::SeekHole, end)?.max(next).min(end);
            extents.push(Extent { at: here, len: hole - here, kind: ExtentKind::Data });
            here = hole;
        }
    }
    Ok(extents)
}

/// The whole range as data, which is always a safe answer.
pub(crate) fn all_data(at: u64, len: u64) -> Extent {
    Extent { at, len, kind: ExtentKind::Data }
}

/// The next byte from `at` on that is data or hole, at most `end`.
fn seek(file: &File, at: u64, what: Whence, end: u64) -> Result<u64, i32> {
    let Ok(from) = i64::try_from(at) else { return Err(Error::OutOfRange.errno()) };
    match lseek(file, from, what) {
        // A file system that answers with something before `at` is not believed.
        Ok(found) => Ok(u64::try_from(found).unwrap_or(at).clamp(at, end)),
        // No data any more up to the end of the file.
        Err(Errno::ENXIO) => Ok(end),
        Err(errno) => Err(errno as i32),
    }
}
