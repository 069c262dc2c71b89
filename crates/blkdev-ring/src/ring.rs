//! [`Ring`]: an io_uring whose slots own the operations in flight.
#![allow(unsafe_code)]

use std::{
    fmt, io,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    sync::Arc,
    time::{Duration, Instant},
};

use blkdev::{Buf, Context, Mapping};
use io_uring::{Builder, EnterFlags, IoUring, Probe, Submitter, cqueue, register::Restriction, squeue::Flags};

use crate::{files::Files, kind::Kind, memory::Memory, passthrough::Passthrough};

/// An operation for a [`Ring`]: it owns the memory that it moves, and describes itself as a command.
pub trait Operation<K: Kind = Files>: Send {
    /// The command for the kernel. Called when the operation is pushed, and again when the closure of [`Ring::reap`] returns it
    /// for another submission.
    fn command(&self) -> K::Command<'_>;

    /// The memory that [`command`](Self::command) uses, if any. If the kernel cannot be waited for, the ring
    /// [abandons](Buf::abandon) it.
    fn buf_mut(&mut self) -> Option<&mut Buf>;

    /// [Abandons](Buf::abandon) all memory that [`command`](Self::command) names.
    fn abandon(&mut self) {
        if let Some(buf) = self.buf_mut() {
            buf.abandon();
        }
    }
}

/// An io_uring for one file, with its operations in flight.
///
/// The ring holds a reference to the file. If nothing is in flight, a drop releases it at once. Otherwise the kernel releases
/// it some time after the last operation has ended.
pub struct Ring<T: Operation<K>, K: Kind = Files> {
    ring: IoUring<K::Sqe, K::Cqe>,
    slots: Box<[Option<T>]>,
    /// Free slots, last used on top.
    free: Vec<u16>,
    memory: Memory,
    /// The kernel looks for completions only on request, and there are no interrupts: the descriptor is never readable.
    polled: bool,
    state: State,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Alive,
    /// The kernel no longer accepts `io_uring_enter`.
    Broken,
    GivenUp,
}

impl<T: Operation> Ring<T> {
    /// Creates a ring for at most `depth` operations in flight (1 to 32768) on `file`. The kernel keeps a reference to the
    /// file.
    ///
    /// # Errors
    /// The kernel has no suitable io_uring, forbids it, or is out of memory. The text names the remedy.
    pub fn new(depth: u16, file: BorrowedFd<'_>) -> io::Result<Self> {
        Self::open(depth, file, false, None)
    }
}

impl<T: Operation<Passthrough>> Ring<T, Passthrough> {
    /// A ring for at most `depth` NVMe commands at a time (1 to 32768) on `file`, a namespace's character device.
    ///
    /// `polled`: the kernel polls the device for completions (`IOPOLL`) whenever [`reap`](Self::reap) asks for some, and only
    /// then. `registered`: memory that commands will use mostly. Other memory works, too, a little slower. The kernel pins
    /// registered memory until the ring is dropped, and takes up to 1 GiB.
    ///
    /// # Errors
    /// As [`new`](Ring::new).
    pub fn passthrough(
        depth: u16,
        file: BorrowedFd<'_>,
        polled: bool,
        registered: Option<Arc<Mapping>>,
    ) -> io::Result<Self> {
        Self::open(depth, file, polled, registered)
    }
}

impl<T: Operation<K>, K: Kind> Ring<T, K> {
    fn open(depth: u16, file: BorrowedFd<'_>, polled: bool, registered: Option<Arc<Mapping>>) -> io::Result<Self> {
        let depth = depth.clamp(1, 32768);
        let explain = |e: io::Error| explain(e, K::TOO_OLD);
        let (ring, is_disabled) = setup::<K>(depth, polled).map_err(explain)?;
        let submitter = ring.submitter();
        let mut probe = Probe::new();
        submitter.register_probe(&mut probe).map_err(explain)?;
        if !ring.params().is_feature_nodrop() || K::NEEDED.iter().any(|&code| !probe.is_supported(code)) {
            return Err(io::Error::new(io::ErrorKind::Unsupported, K::TOO_OLD));
        }
        submitter.register_files(&[file.as_raw_fd()]).map_err(explain)?;
        let memory = register(&submitter, registered);
        if is_disabled {
            enable::<K>(&submitter, &probe).map_err(explain)?;
        }
        Ok(Self {
            slots: (0..depth).map(|_| None).collect(),
            free: (0..depth).rev().collect(),
            memory,
            polled,
            state: State::Alive,
            ring,
        })
    }

    /// Whether memory is registered with the kernel, which pins it.
    pub fn has_registered(&self) -> bool {
        self.memory.has_registered()
    }

    /// Most operations in flight.
    pub fn depth(&self) -> usize {
        self.slots.len()
    }

    /// Number of operations in flight: pushed and not yet reaped.
    #[inline]
    pub fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Takes an operation. The kernel sees it after the next [`kick`](Self::kick).
    ///
    /// # Errors
    /// All slots are in use, or the ring was [abandoned](Self::give_up). The operation comes back.
    #[inline]
    pub fn push(&mut self, op: T) -> Result<(), T> {
        if self.state == State::GivenUp {
            return Err(op);
        }
        let Some(slot) = self.free.pop() else { return Err(op) };
        let op = self.slots[usize::from(slot)].insert(op);
        let entry = K::entry(op.command(), &mut self.memory, slot.into());
        // SAFETY: the memory that the entry refers to belongs to the operation in `slots[slot]`, which owns it or borrows it
        // for longer (`command` takes `&self`); a Buf lies in a mapping that `memory` keeps. The operation leaves the slot
        // only when its completion was seen (`reap`); if that cannot be waited for, `give_up` abandons its memory and leaks
        // the mappings.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        assert!(pushed.is_ok(), "the submission queue has an entry for each slot");
        Ok(())
    }

    /// Submits all pushed operations to the kernel, with one system call, or none if nothing was pushed. Operations for which
    /// the kernel has no memory at the moment stay queued; `kick`, `reap` and [`arm`](Self::arm) try them again.
    #[inline]
    pub fn kick(&mut self) {
        if self.state == State::Alive && !self.ring.submission().is_empty() {
            // Whatever the outcome, the kernel may have seen the entry: only a completion frees its slot.
            if let Err(error) = self.ring.submit() {
                let passing = [libc::EAGAIN, libc::EBUSY, libc::EINTR, libc::ENOMEM];
                if !error.raw_os_error().is_some_and(|errno| passing.contains(&errno)) {
                    self.state = State::Broken;
                }
            }
        }
    }

    /// Whether the kernel refuses the ring permanently (for example by a seccomp filter that was installed later). The owner
    /// should then [give it up](Self::give_up).
    #[inline]
    pub fn is_broken(&self) -> bool {
        self.state == State::Broken
    }

    /// Calls `each` for every completed operation, with the number of bytes or the errno (positive). If `each` returns the
    /// operation, the ring submits it again, with its current [`command`](Operation::command).
    #[inline]
    pub fn reap(&mut self, mut each: impl FnMut(T, Result<u32, i32>) -> Option<T>) {
        if self.state == State::GivenUp {
            return;
        }
        let polls = self.polled && self.in_flight() > 0;
        let (submitter, mut sq, mut cq) = self.ring.split();
        if cq.is_empty() && (sq.taskrun() || sq.cq_overflow() || polls) {
            fetch(&submitter);
            cq.sync();
        }
        for done in &mut cq {
            let done: cqueue::Entry = done.into();
            let slot = done.user_data() as usize;
            let op = self.slots[slot].take().expect("a completion refers to a slot in use");
            let result = u32::try_from(done.result()).map_err(|_| -done.result());
            match each(op, result) {
                None => self.free.push(slot as u16),
                Some(op) => {
                    let op = self.slots[slot].insert(op);
                    let entry = K::entry(op.command(), &mut self.memory, slot as u64);
                    // SAFETY: as in `push`.
                    let pushed = unsafe { sq.push(&entry) };
                    assert!(pushed.is_ok(), "the submission queue has an entry for each slot");
                }
            }
        }
        drop((sq, cq));
        self.kick();
    }

    /// Whether the caller may sleep now until the descriptor is readable. `false`: completions are pending, or an operation
    /// could not be submitted yet, or the ring is polled; reap first.
    pub fn arm(&mut self) -> bool {
        self.kick();
        let (submitter, sq, mut cq) = self.ring.split();
        if cq.is_empty() && (sq.taskrun() || sq.cq_overflow()) {
            fetch(&submitter);
            cq.sync();
        }
        // TASKRUN may still be set for a thread that submitted earlier. The descriptor becomes readable when that thread moves
        // its completions into the ring, or when this one goes to sleep with completions of its own.
        let polls = self.polled && self.free.len() < self.slots.len();
        self.state == State::Alive && sq.is_empty() && cq.is_empty() && !polls
    }

    /// Calls `each` for every unfinished operation, with its memory [abandoned](Buf::abandon) and leaked: the kernel may still
    /// write to it. Nothing can be pushed any more.
    pub fn give_up(&mut self, mut each: impl FnMut(T)) {
        self.state = State::GivenUp;
        if self.in_flight() > 0 {
            self.memory.leak();
        }
        for slot in &mut self.slots {
            if let Some(mut op) = slot.take() {
                op.abandon();
                each(op);
            }
        }
        self.free = (0..self.slots.len() as u16).collect();
    }

    /// Waits until all operations in flight have completed and drops them, at most until `deadline`. `false`: some are still in
    /// flight.
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
            // In steps: entries for which the kernel had no memory need another kick.
            let step = if self.polled { 0 } else { left.min(Duration::from_millis(100)).as_millis().max(1) as i32 };
            // SAFETY: one pollfd on the stack, for the duration of the call. EINTR only repeats the loop.
            unsafe { libc::poll(&raw mut fd, 1, step) };
        }
    }
}

/// Readable while completions are pending.
impl<T: Operation<K>, K: Kind> AsFd for Ring<T, K> {
    #[inline]
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the ring owns its descriptor and lives as long as the borrow.
        unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) }
    }
}

impl<T: Operation<K>, K: Kind> fmt::Debug for Ring<T, K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ring")
            .field("depth", &self.depth())
            .field("in_flight", &self.in_flight())
            .finish_non_exhaustive()
    }
}

/// Waits at most 10 seconds for the operations in flight (30 for NVMe commands); the rest is [abandoned](Ring::give_up).
impl<T: Operation<K>, K: Kind> Drop for Ring<T, K> {
    fn drop(&mut self) {
        if self.state == State::GivenUp {
            return;
        }
        if !self.drain(Instant::now() + K::DRAIN_MAX) {
            return self.give_up(drop);
        }
        // The kernel destroys a closed ring later, on a thread of its own. Until then the ring's file stays open: its file
        // system is busy, and a program cannot be executed ("text file busy"). So unregister the file first. Only here, where
        // nothing is in flight: kernels before 6.13 wait for operations that use the file.
        let submitter = self.ring.submitter();
        // If a kernel worker completed an operation, the task that submitted it releases the file.
        fetch(&submitter);
        let _ = submitter.unregister_files();
        if self.memory.has_registered() {
            let _ = submitter.unregister_buffers();
        }
    }
}

type RingOf<K> = IoUring<<K as Kind>::Sqe, <K as Kind>::Cqe>;

/// Creates the newest kind of ring that the kernel supports, among those that work from any thread. Returns whether it is
/// disabled, which is so from 5.10 on.
fn setup<K: Kind>(depth: u16, polled: bool) -> io::Result<(RingOf<K>, bool)> {
    let mut builder: Builder<K::Sqe, K::Cqe> = IoUring::builder();
    if polled {
        builder.setup_iopoll();
    }
    let old = (builder.clone(), false);
    let disabled = (builder.setup_r_disabled().clone(), true);
    let newest = (builder.setup_submit_all().setup_coop_taskrun().setup_taskrun_flag().clone(), true);
    let mut failed = None;
    for (builder, is_disabled) in [newest, disabled, old] {
        match builder.build(depth.into()) {
            Ok(ring) => return Ok((ring, is_disabled)),
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => failed = Some(e),
            Err(e) => return Err(e),
        }
    }
    Err(failed.expect("one was tried"))
}

/// Restricts a disabled ring for good to the operations of its kind and to its end, and enables it. So code that takes over the
/// process cannot use the ring to open a file or to connect, past the filters for system calls.
fn enable<K: Kind>(submitter: &Submitter<'_>, probe: &Probe) -> io::Result<()> {
    let codes = K::NEEDED.iter().chain(K::OPTIONAL).filter(|&&code| probe.is_supported(code));
    let ends = [IORING_UNREGISTER_BUFFERS, IORING_UNREGISTER_FILES].map(Restriction::register_op);
    let flags = Restriction::sqe_flags_allowed(Flags::FIXED_FILE.bits());
    let mut all: Vec<_> = codes.map(|&code| Restriction::sqe_op(code)).chain(ends).chain([flags]).collect();
    submitter.register_restrictions(&mut all)?;
    submitter.register_enable_rings()
}

/// Operations of io_uring_register(2).
const IORING_UNREGISTER_BUFFERS: u8 = 1;
const IORING_UNREGISTER_FILES: u8 = 3;

/// Registers memory with the kernel, if the kernel accepts it.
fn register(submitter: &Submitter<'_>, memory: Option<Arc<Mapping>>) -> Memory {
    let Some(mapping) = memory else { return Memory::default() };
    let buffer = libc::iovec { iov_base: mapping.as_ptr().cast(), iov_len: mapping.len() };
    // SAFETY: the kernel pins the memory, which `Memory` keeps mapped as long as the ring exists.
    let is_registered = mapping.len() <= 1 << 30 && unsafe { submitter.register_buffers(&[buffer]) }.is_ok();
    Memory::new(mapping, is_registered)
}

/// Moves completions that are ready in the kernel into the ring.
#[cold]
fn fetch(submitter: &Submitter<'_>) {
    // SAFETY: nothing is submitted and no argument is passed. After a failure they stay in the kernel.
    let _ = unsafe { submitter.enter::<libc::sigset_t>(0, 0, EnterFlags::GETEVENTS.bits(), None) };
}

fn explain(error: io::Error, too_old: &str) -> io::Error {
    let remedy = match error.raw_os_error() {
        Some(libc::ENOSYS | libc::EINVAL) => {
            let text = format!("cannot create an io_uring: {error}: {too_old}");
            return Context::with_kind(io::ErrorKind::Unsupported, text, error);
        }
        Some(libc::EPERM | libc::EACCES) => {
            "io_uring is forbidden here; see the sysctl kernel.io_uring_disabled and the container's seccomp profile"
        }
        Some(libc::ENOMEM) => "the limit of locked memory is too low; raise RLIMIT_MEMLOCK (ulimit -l)",
        Some(libc::EMFILE | libc::ENFILE) => "too many open files; raise RLIMIT_NOFILE (ulimit -n)",
        _ => return Context::wrap(format!("cannot create an io_uring: {error}"), error),
    };
    Context::wrap(format!("cannot create an io_uring: {error}: {remedy}"), error)
}

#[cfg(test)]
mod tests {
    use std::{fs::File, os::fd::OwnedFd};

    use io_uring::{opcode, squeue, types};

    use super::*;
    use crate::files::Command;

    /// Syncs the file.
    struct Sync;

    impl Operation for Sync {
        fn command(&self) -> Command<'_> {
            Command::Sync
        }

        fn buf_mut(&mut self) -> Option<&mut Buf> {
            None
        }
    }

    /// The result of an entry that code in this process has put past the [`Ring`]'s methods.
    fn result(ring: &mut Ring<Sync>, entry: &squeue::Entry) -> i32 {
        // SAFETY: the memory of the entries below is static.
        unsafe { ring.ring.submission().push(entry) }.expect("it has room");
        ring.ring.submit_and_wait(1).expect("the kernel takes it");
        ring.ring.completion().next().expect("it has completed").result()
    }

    #[test]
    fn a_ring_carries_only_operations_of_its_kind() {
        let file = File::open("/proc/self/exe").expect("this program");
        let mut ring: Ring<Sync> = Ring::new(4, file.as_fd()).expect("the kernel has io_uring");
        let own = types::Fd(libc::AT_FDCWD);
        let others = [
            opcode::OpenAt::new(own, c"/etc/passwd".as_ptr()).build(),
            opcode::Socket::new(libc::AF_INET, libc::SOCK_STREAM, 0).build(),
            opcode::Nop::new().build(),
            // Of its kind, but linked.
            opcode::Fsync::new(types::Fixed(0)).build().flags(Flags::IO_LINK),
        ];
        for entry in &others {
            assert_eq!(result(&mut ring, entry), -libc::EACCES, "{entry:?}");
        }
        assert_eq!(result(&mut ring, &opcode::Fsync::new(types::Fixed(0)).build()), 0);
    }

    #[test]
    fn a_ring_takes_no_other_files_and_memory() {
        let file = File::open("/proc/self/exe").expect("this program");
        let ring: Ring<Sync> = Ring::new(4, file.as_fd()).expect("the kernel has io_uring");
        let other = OwnedFd::from(File::open("/dev/null").expect("it is there"));
        let submitter = ring.ring.submitter();
        let refused = submitter.register_files_update(0, &[other.as_raw_fd()]).map_err(|e| e.raw_os_error());
        assert_eq!(refused, Err(Some(libc::EACCES)));
        submitter.unregister_files().expect("the end of the ring needs it");
    }
}
