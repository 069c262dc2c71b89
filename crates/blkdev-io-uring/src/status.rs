//! Where a file is allocated: asked on a thread of the device's, since `lseek` may take long.
//!
//! To look for the end of a full image on tmpfs takes the kernel hundreds of milliseconds. So a queue hands each `Status` to
//! the device's [`Helper`], and finds the answer in its [`Mailbox`], whose eventfd the queue's ring polls.

use std::{
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

use crate::device::Shared;

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
    /// That of the [`Question`].
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

    fn put(&self, answer: Answer) {
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

/// A range to look at.
pub(crate) struct Question {
    pub(crate) shared: Arc<Shared>,
    pub(crate) number: u64,
    pub(crate) at: u64,
    pub(crate) len: u64,
    pub(crate) mailbox: Arc<Mailbox>,
}

/// The device's thread, which is started by the first question and ends with the device.
#[derive(Debug, Default)]
pub(crate) struct Helper {
    /// What it has not answered yet: bounded, as the depth of a queue is.
    open: AtomicU32,
    thread: Mutex<Option<mpsc::Sender<Question>>>,
}

impl Helper {
    /// Whether a call may be at work. It holds the file's lock, so that a write waits for it.
    #[inline]
    pub(crate) fn is_busy(&self) -> bool {
        self.open.load(Ordering::Relaxed) > 0
    }

    /// Has the device's thread answer a question.
    ///
    /// # Errors
    /// No thread can be started.
    pub(crate) fn ask(question: Question) -> io::Result<()> {
        let shared = Arc::clone(&question.shared);
        let mut thread = shared.helper.thread.lock().unwrap_or_else(|e| e.into_inner());
        let sender = match &*thread {
            Some(sender) => sender,
            None => {
                let (sender, questions) = mpsc::channel();
                // It keeps nothing of the device between two questions, so it ends when the device is dropped.
                let work = move || questions.into_iter().for_each(answer);
                thread::Builder::new().name("block status".into()).spawn(work)?;
                thread.insert(sender)
            }
        };
        shared.helper.open.fetch_add(1, Ordering::Relaxed);
        sender.send(question).map_err(|_| {
            shared.helper.open.fetch_sub(1, Ordering::Relaxed);
            io::Error::other("the thread for block status has ended")
        })
    }
}

fn answer(question: Question) {
    let Question { shared, number, at, len, mailbox } = question;
    // Otherwise the queue is gone.
    let result = (Arc::strong_count(&mailbox) > 1).then(|| {
        let file = shared.handle.open_to_ask().map_err(|e| e.raw_os_error().unwrap_or(libc::EIO));
        file.and_then(|file| extents(&file, at, len))
    });
    shared.helper.open.fetch_sub(1, Ordering::Relaxed);
    // Before the answer: the receiver may close the device and expect the file to be closed.
    drop(shared);
    if let Some(result) = result {
        mailbox.put(Answer { number, result });
    }
}

/// Where the range is allocated, for a part of it if that takes long.
fn extents(file: &File, at: u64, len: u64) -> Result<Vec<Extent>, i32> {
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
