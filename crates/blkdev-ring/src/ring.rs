//! [`Ring`]: slots that own what the kernel works on.
#![allow(unsafe_code)]

use std::{
    fmt, io, mem,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    sync::Arc,
    time::{Duration, Instant},
};

use blkdev::{Buf, Mapping};
use io_uring::{EnterFlags, IoUring, Probe, Submitter, opcode, squeue, types};

/// Something that a [`Ring`] can carry: an owner of memory that says what to do with it.
pub trait Operation: Send {
    /// What the kernel is to do. Asked when the operation is pushed, and again when [`Ring::reap`]'s closure gives it
    /// back.
    fn command(&self) -> Command<'_>;

    /// The memory that [`command`](Self::command) names, if any. When the kernel cannot be waited for, it is
    /// [abandoned](Buf::abandon).
    fn buf_mut(&mut self) -> Option<&mut Buf>;
}

/// What the kernel can be asked to do with the ring's file. Offsets and lengths are bytes.
#[derive(Clone, Copy, Debug)]
pub enum Command<'a> {
    /// Fills `buf` from its byte `skip` on, with what the file has from `at + skip` on.
    Read {
        /// Where the buffer's first byte is in the file.
        at: u64,
        /// The whole buffer.
        buf: &'a Buf,
        /// Bytes that are done already.
        skip: u32,
    },
    /// Writes `buf` from its byte `skip` on, to the file's byte `at + skip` and on.
    Write {
        /// Where the buffer's first byte goes to in the file.
        at: u64,
        /// The whole buffer.
        buf: &'a Buf,
        /// Bytes that are done already.
        skip: u32,
        /// Durable before it completes (`RWF_DSYNC`).
        durable: bool,
    },
    /// Makes what was written durable, with the metadata that is needed to find it (`fdatasync`).
    Sync,
    /// `fallocate`. Kernel 5.6.
    Allocate {
        /// `FALLOC_FL_*`.
        mode: i32,
        /// First byte.
        at: u64,
        /// Length.
        len: u64,
    },
    /// Reads ahead into the page cache (`POSIX_FADV_WILLNEED`). Kernel 5.6.
    Prefetch {
        /// First byte.
        at: u64,
        /// Length; the interface has 32 bits for it.
        len: u32,
    },
    /// Discards on a block device (`BLOCK_URING_CMD_DISCARD`). Kernel 6.12; before that it fails with `EOPNOTSUPP`.
    Discard {
        /// First byte.
        at: u64,
        /// Length.
        len: u64,
    },
    /// Waits until another descriptor is readable, and moves nothing: with it, other threads wake the ring's owner.
    Poll(BorrowedFd<'a>),
}

/// How long [`Ring`]'s `drop` waits for the kernel. A request that takes longer belongs to a disk or file system that hangs.
const DRAIN_MAX: Duration = Duration::from_secs(10);

/// An io_uring for one file, with the operations that are in it.
///
/// The ring holds a reference to the file. A ring that is dropped with nothing in flight gives it back at once; otherwise
/// the kernel gives it back some time after the last operation has ended.
pub struct Ring<T: Operation> {
    ring: IoUring,
    slots: Box<[Option<T>]>,
    /// Slots that are free, last used on top.
    free: Vec<u16>,
    /// Every mapping that an operation's memory was in, alive as long as the kernel may write there.
    mappings: Vec<Arc<Mapping>>,
    state: State,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Alive,
    /// The kernel refuses to be entered.
    Broken,
    GivenUp,
}

impl<T: Operation> Ring<T> {
    /// A ring for at most `depth` operations at a time (1 to 32768) on `file`, of which the kernel keeps a reference.
    ///
    /// # Errors
    /// The kernel has no io_uring that will do, forbids it, or is out of memory; the text says what to do.
    pub fn new(depth: u16, file: BorrowedFd<'_>) -> io::Result<Self> {
        let depth = depth.clamp(1, 32768);
        let ring = setup(depth).map_err(|e| explain(&e))?;
        let submitter = ring.submitter();
        let mut probe = Probe::new();
        submitter.register_probe(&mut probe).map_err(|e| explain(&e))?;
        let needed = [
            opcode::Read::CODE,
            opcode::Write::CODE,
            opcode::Fsync::CODE,
            opcode::Fallocate::CODE,
            opcode::Fadvise::CODE,
            opcode::PollAdd::CODE,
        ];
        if !ring.params().is_feature_nodrop() || needed.iter().any(|&code| !probe.is_supported(code)) {
            let why = "the kernel's io_uring is too old: Linux 5.6 or later is needed";
            return Err(io::Error::new(io::ErrorKind::Unsupported, why));
        }
        submitter.register_files(&[file.as_raw_fd()]).map_err(|e| explain(&e))?;
        Ok(Self {
            ring,
            slots: (0..depth).map(|_| None).collect(),
            free: (0..depth).rev().collect(),
            mappings: Vec::new(),
            state: State::Alive,
        })
    }

    /// Operations that can be in the ring at a time.
    pub fn depth(&self) -> usize {
        self.slots.len()
    }

    /// Operations that are in the ring: pushed and not yet given back.
    #[inline]
    pub fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Takes an operation. The kernel hears of it at the next [`kick`](Self::kick).
    ///
    /// # Errors
    /// All slots are taken, or the ring was [given up](Self::give_up): the operation comes back.
    #[inline]
    pub fn push(&mut self, op: T) -> Result<(), T> {
        if self.state == State::GivenUp {
            return Err(op);
        }
        let Some(slot) = self.free.pop() else { return Err(op) };
        let op = self.slots[usize::from(slot)].insert(op);
        let entry = entry(op, &mut self.mappings).user_data(slot.into());
        // SAFETY: the memory that the entry points at belongs to a Buf that the operation in `slots[slot]` owns or
        // borrows for longer (`command` takes `&self`), in a mapping that `mappings` keeps. The operation leaves the
        // slot only when its completion was seen (`reap`); where that cannot be waited for, `give_up` abandons the Buf
        // and leaks `mappings`.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        assert!(pushed.is_ok(), "the submission queue has an entry for each slot");
        Ok(())
    }

    /// Hands what was pushed to the kernel, with one system call, or none when nothing was. What the kernel has no
    /// memory for at the moment stays, and is tried again by `kick`, `reap` and [`arm`](Self::arm).
    #[inline]
    pub fn kick(&mut self) {
        if self.state == State::Alive && !self.ring.submission().is_empty() {
            // Whatever the outcome, an entry counts as seen by the kernel: only a completion frees its slot.
            if let Err(error) = self.ring.submit() {
                let passing = [libc::EAGAIN, libc::EBUSY, libc::EINTR, libc::ENOMEM];
                if !error.raw_os_error().is_some_and(|errno| passing.contains(&errno)) {
                    self.state = State::Broken;
                }
            }
        }
    }

    /// Whether the kernel refuses the ring for good (a seccomp filter that came later): [give it up](Self::give_up).
    #[inline]
    pub fn is_broken(&self) -> bool {
        self.state == State::Broken
    }

    /// Hands every operation that has finished to `each`, with the count of bytes or the errno (positive). An operation
    /// that `each` gives back goes to the kernel again, with the [`command`](Operation::command) that it has then.
    #[inline]
    pub fn reap(&mut self, mut each: impl FnMut(T, Result<u32, i32>) -> Option<T>) {
        if self.state == State::GivenUp {
            return;
        }
        let (submitter, mut sq, mut cq) = self.ring.split();
        if cq.is_empty() && (sq.taskrun() || sq.cq_overflow()) {
            fetch(&submitter);
            cq.sync();
        }
        for done in &mut cq {
            let slot = done.user_data() as usize;
            let op = self.slots[slot].take().expect("a completion names a slot in use, once");
            let result = u32::try_from(done.result()).map_err(|_| -done.result());
            match each(op, result) {
                None => self.free.push(slot as u16),
                Some(op) => {
                    let op = self.slots[slot].insert(op);
                    let entry = entry(op, &mut self.mappings).user_data(slot as u64);
                    // SAFETY: as in `push`.
                    let pushed = unsafe { sq.push(&entry) };
                    assert!(pushed.is_ok(), "the submission queue has an entry for each slot");
                }
            }
        }
        drop((sq, cq));
        self.kick();
    }

    /// Whether it is right to sleep now until the descriptor is readable. `false`: completions wait, or something could
    /// not be submitted yet; reap first.
    pub fn arm(&mut self) -> bool {
        self.kick();
        let (submitter, sq, mut cq) = self.ring.split();
        if cq.is_empty() && (sq.taskrun() || sq.cq_overflow()) {
            fetch(&submitter);
            cq.sync();
        }
        // TASKRUN may still be set, for a thread that submitted earlier. When that one brings its completions here, or
        // when this one goes to sleep and finds more of its own, the descriptor becomes readable.
        self.state == State::Alive && sq.is_empty() && cq.is_empty()
    }

    /// Hands every operation that is in flight to `each`, unfinished, its memory [abandoned](Buf::abandon) and leaked:
    /// the kernel may still write there. Nothing can be pushed any more.
    pub fn give_up(&mut self, mut each: impl FnMut(T)) {
        self.state = State::GivenUp;
        if self.in_flight() > 0 {
            self.mappings.drain(..).for_each(mem::forget);
        }
        for slot in &mut self.slots {
            if let Some(mut op) = slot.take() {
                if let Some(buf) = op.buf_mut() {
                    buf.abandon();
                }
                each(op);
            }
        }
        self.free = (0..self.slots.len() as u16).collect();
    }

    /// Waits until everything in flight has finished and drops it, but not past `deadline`. `false`: something is left.
    fn drain(&mut self, deadline: Instant) -> bool {
        loop {
            self.kick();
            self.reap(|_, _| None);
            if self.in_flight() == 0 {
                return true;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || self.state != State::Alive {
                return false;
            }
            let mut fd = libc::pollfd { fd: self.ring.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            // In steps: an entry that the kernel had no memory for completes only after another kick.
            let step = left.min(Duration::from_millis(100)).as_millis().max(1) as i32;
            // SAFETY: one pollfd on the stack, for the length of the call. EINTR is one more turn.
            unsafe { libc::poll(&raw mut fd, 1, step) };
        }
    }
}

/// Readable while completions wait.
impl<T: Operation> AsFd for Ring<T> {
    #[inline]
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the ring owns its descriptor and lives as long as the borrow.
        unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) }
    }
}

impl<T: Operation> fmt::Debug for Ring<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ring")
            .field("depth", &self.depth())
            .field("in_flight", &self.in_flight())
            .finish_non_exhaustive()
    }
}

/// Waits for what is in flight, at most 10 seconds; what is left then is [abandoned](Ring::give_up).
impl<T: Operation> Drop for Ring<T> {
    fn drop(&mut self) {
        if self.state == State::GivenUp {
            return;
        }
        if !self.drain(Instant::now() + DRAIN_MAX) {
            return self.give_up(drop);
        }
        // The kernel takes a closed ring apart later, on a thread of its own, and until then the ring's file stays open: its
        // file system is busy, and a program cannot be executed ("text file busy"). So the file leaves the ring first. Only
        // here, where nothing is in flight: kernels before 6.13 wait for operations that use the file.
        let submitter = self.ring.submitter();
        // If a kernel worker completed an operation, the task that submitted it releases the file.
        fetch(&submitter);
        let _ = submitter.unregister_files();
    }
}

/// The newest kind of ring that the kernel has, of those that work from any thread.
fn setup(depth: u16) -> io::Result<IoUring> {
    IoUring::builder().setup_submit_all().setup_coop_taskrun().setup_taskrun_flag().build(depth.into()).or_else(|e| {
        match e.raw_os_error() {
            Some(libc::EINVAL) => IoUring::builder().build(depth.into()),
            _ => Err(e),
        }
    })
}

/// Completions are ready in the kernel, but not yet in the ring: brings them there.
#[cold]
fn fetch(submitter: &Submitter<'_>) {
    // SAFETY: nothing is submitted and no argument is passed. A failure leaves them where they are.
    let _ = unsafe { submitter.enter::<libc::sigset_t>(0, 0, EnterFlags::GETEVENTS.bits(), None) };
}

fn explain(error: &io::Error) -> io::Error {
    let remedy = match error.raw_os_error() {
        Some(libc::ENOSYS) => "this kernel has no io_uring; Linux 5.6 or later is needed",
        Some(libc::EPERM | libc::EACCES) => {
            "io_uring is forbidden here; see the sysctl kernel.io_uring_disabled and the container's seccomp profile"
        }
        Some(libc::ENOMEM) => "too little locked memory is allowed; raise RLIMIT_MEMLOCK (ulimit -l)",
        Some(libc::EMFILE | libc::ENFILE) => "too many open files; raise RLIMIT_NOFILE (ulimit -n)",
        _ => return io::Error::new(error.kind(), format!("setting up an io_uring: {error}")),
    };
    io::Error::new(error.kind(), format!("setting up an io_uring: {error}: {remedy}"))
}

/// The ring's file in its table of registered files.
const FILE: types::Fixed = types::Fixed(0);

/// `_IO(0x12, 0)` of linux/blkdev.h.
const BLOCK_URING_CMD_DISCARD: u32 = 0x1200;

/// What the kernel is told of `op`; the mapping that its memory lies in joins `mappings`.
#[inline]
fn entry<T: Operation>(op: &T, mappings: &mut Vec<Arc<Mapping>>) -> squeue::Entry {
    let mut window = |buf: &Buf, skip: u32| {
        let len = (buf.len() as u32).checked_sub(skip).expect("no more was done than there is to do");
        if !mappings.iter().any(|known| Arc::ptr_eq(known, buf.mapping())) {
            mappings.push(Arc::clone(buf.mapping()));
        }
        (buf.as_ptr().wrapping_add(skip as usize), len)
    };
    match op.command() {
        Command::Read { at, buf, skip } => {
            let (ptr, len) = window(buf, skip);
            opcode::Read::new(FILE, ptr, len).offset(at + u64::from(skip)).build()
        }
        Command::Write { at, buf, skip, durable } => {
            let (ptr, len) = window(buf, skip);
            let flags = if durable { libc::RWF_DSYNC } else { 0 };
            opcode::Write::new(FILE, ptr, len).offset(at + u64::from(skip)).rw_flags(flags).build()
        }
        Command::Poll(fd) => opcode::PollAdd::new(types::Fd(fd.as_raw_fd()), libc::POLLIN as u32).build(),
        Command::Sync => opcode::Fsync::new(FILE).flags(types::FsyncFlags::DATASYNC).build(),
        Command::Allocate { mode, at, len } => opcode::Fallocate::new(FILE, len).offset(at).mode(mode).build(),
        Command::Prefetch { at, len } => {
            opcode::Fadvise::new(FILE, len.into(), libc::POSIX_FADV_WILLNEED).offset(at).build()
        }
        Command::Discard { at, len } => {
            let mut cmd = [0; 16];
            cmd[..8].copy_from_slice(&len.to_ne_bytes());
            opcode::UringCmd16::new(FILE, BLOCK_URING_CMD_DISCARD).addr(Some(at)).cmd(cmd).build()
        }
    }
}
