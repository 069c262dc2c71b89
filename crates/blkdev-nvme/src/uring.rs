//! The kernel's side of NVMe passthrough: an io_uring of 128-byte entries that owns its requests, and the ioctls.
#![allow(unsafe_code)]

use std::{
    fmt,
    fs::File,
    io, mem,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    sync::Arc,
    time::{Duration, Instant},
};

use blkdev::{Mapping, Op, Request};
use io_uring::{EnterFlags, IoUring, Probe, Submitter, cqueue, opcode, squeue, types};

use crate::spec::{Command, IDENTIFY_LEN, Status};

/// How long [`Ring`]'s `drop` waits for the kernel.
const DRAIN_MAX: Duration = Duration::from_secs(30);

/// An io_uring for one namespace's character device, with the requests that are in it.
pub(crate) struct Ring {
    ring: IoUring<squeue::Entry128, cqueue::Entry32>,
    slots: Box<[Option<Flight>]>,
    /// Slots that are free, last used on top.
    free: Vec<u16>,
    /// Mappings that requests' memory was in, alive as long as the kernel may write there.
    mappings: Vec<Arc<Mapping>>,
    /// How many of them, from the first one on, are registered: 0 or 1.
    fixed: usize,
    /// Completions are looked for by the kernel when it is asked, and raise no interrupt.
    polled: bool,
    given_up: bool,
    broken: bool,
    timeout_ms: u32,
}

/// A request that the kernel works on.
#[derive(Debug)]
struct Flight {
    request: Request,
    command: Command,
    /// What Dataset Management reads.
    ranges: Box<[[u64; 2]]>,
    /// It uses registered memory.
    fixed: bool,
}

/// How the kernel answered.
pub(crate) type Answer = Result<Status, i32>;

impl Ring {
    /// A ring for at most `depth` commands at a time (1 to 4096). `known` is memory that commands will use; other memory
    /// works, too, a little slower. No more is registered, as the kernel pins what is until the ring is dropped.
    pub(crate) fn new(
        depth: u16,
        file: BorrowedFd<'_>,
        known: Option<Arc<Mapping>>,
        polled: bool,
        timeout: Option<Duration>,
    ) -> io::Result<Self> {
        let ring = setup(depth, polled).map_err(|e| explain(&e))?;
        let submitter = ring.submitter();
        let mut probe = Probe::new();
        submitter.register_probe(&mut probe).map_err(|e| explain(&e))?;
        if !probe.is_supported(opcode::UringCmd80::CODE) {
            return Err(explain(&io::Error::from_raw_os_error(libc::EINVAL)));
        }
        submitter.register_files(&[file.as_raw_fd()]).map_err(|e| explain(&e))?;
        let buffers: Vec<_> =
            known.iter().map(|m| libc::iovec { iov_base: m.as_ptr().cast(), iov_len: m.len() }).collect();
        // The kernel takes buffers of up to 1 GiB. Without them everything works, a little slower.
        let fits = known.as_ref().is_some_and(|m| m.len() <= 1 << 30);
        // SAFETY: the kernel pins the memory, which `mappings` keeps mapped as long as the ring exists.
        let fixed = if fits && unsafe { submitter.register_buffers(&buffers) }.is_ok() { 1 } else { 0 };
        Ok(Self {
            ring,
            slots: (0..depth).map(|_| None).collect(),
            free: (0..depth).rev().collect(),
            mappings: known.into_iter().collect(),
            fixed,
            polled,
            given_up: false,
            broken: false,
            timeout_ms: timeout.map_or(u32::MAX, |t| u32::try_from(t.as_millis()).unwrap_or(u32::MAX).max(1)),
        })
    }

    /// Whether memory is registered with the kernel.
    pub(crate) fn is_fixed(&self) -> bool {
        self.fixed > 0
    }

    #[inline]
    pub(crate) fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Takes a request with the command for it, and what a discard's command reads. The kernel hears of it at the next
    /// [`kick`](Self::kick).
    #[inline]
    pub(crate) fn push(&mut self, request: Request, command: Command, ranges: Box<[[u64; 2]]>) -> Result<(), Request> {
        let Some(slot) = self.free.pop() else { return Err(request) };
        let flight = self.slots[usize::from(slot)].insert(Flight { request, command, ranges, fixed: false });
        let entry = entry(flight, &mut self.mappings, self.fixed, self.timeout_ms).user_data(slot.into());
        // SAFETY: the memory that the entry points at belongs to a Buf or a box that the flight in `slots[slot]` owns, the
        // Buf in a mapping that `mappings` keeps. The flight leaves the slot only when its completion was seen (`reap`);
        // where that cannot be waited for, `give_up` abandons the Buf, and leaks the box and `mappings`.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        assert!(pushed.is_ok(), "the submission queue has an entry for each slot");
        Ok(())
    }

    /// Hands what was pushed to the kernel. What it has no memory for at the moment stays.
    #[inline]
    pub(crate) fn kick(&mut self) {
        if !self.given_up && !self.broken && !self.ring.submission().is_empty() {
            // Whatever the outcome, an entry counts as seen by the kernel: only a completion frees its slot.
            if let Err(error) = self.ring.submit() {
                let passing = [libc::EAGAIN, libc::EBUSY, libc::EINTR, libc::ENOMEM];
                self.broken = !error.raw_os_error().is_some_and(|errno| passing.contains(&errno));
            }
        }
    }

    /// Whether the kernel refuses the ring for good.
    #[inline]
    pub(crate) fn is_broken(&self) -> bool {
        self.broken
    }

    /// Hands every request that has ended to `each`.
    #[inline]
    pub(crate) fn reap(&mut self, mut each: impl FnMut(Request, Answer)) {
        if self.given_up {
            return;
        }
        let in_flight = self.slots.len() - self.free.len();
        let (submitter, mut sq, mut cq) = self.ring.split();
        if cq.is_empty() && (sq.taskrun() || sq.cq_overflow() || self.polled && in_flight > 0) {
            fetch(&submitter);
            cq.sync();
        }
        for done in &mut cq {
            let slot = done.user_data() as usize;
            let flight = self.slots[slot].take().expect("a completion names a slot in use, once");
            if done.result() == -libc::EINVAL && flight.fixed {
                // Registered memory came with Linux 6.1: where it is not known, the command was not looked at.
                self.fixed = 0;
                let flight = self.slots[slot].insert(flight);
                let entry = entry(flight, &mut self.mappings, 0, self.timeout_ms).user_data(slot as u64);
                // SAFETY: as in `push`.
                let pushed = unsafe { sq.push(&entry) };
                assert!(pushed.is_ok(), "the submission queue has an entry for each slot");
                continue;
            }
            let answer = match done.result() {
                errno @ ..0 => Err(-errno),
                status => Ok(Status(status as u16)),
            };
            self.free.push(slot as u16);
            each(flight.request, answer);
        }
        drop((sq, cq));
        self.kick();
    }

    /// Whether it is right to sleep now until the descriptor is readable.
    pub(crate) fn arm(&mut self) -> bool {
        self.kick();
        let (submitter, sq, mut cq) = self.ring.split();
        if cq.is_empty() && (sq.taskrun() || sq.cq_overflow()) {
            fetch(&submitter);
            cq.sync();
        }
        !self.broken && sq.is_empty() && cq.is_empty()
    }

    /// Hands every request that is in flight to `each`, unfinished, its memory abandoned and leaked: the kernel may still
    /// use it. Nothing can be pushed any more.
    pub(crate) fn give_up(&mut self, mut each: impl FnMut(Request)) {
        self.given_up = true;
        if self.in_flight() > 0 {
            self.mappings.drain(..).for_each(mem::forget);
        }
        for slot in &mut self.slots {
            if let Some(Flight { mut request, ranges, .. }) = slot.take() {
                mem::forget(ranges);
                if let Op::Read { buf, .. } | Op::Write { buf, .. } = &mut request.op {
                    buf.abandon();
                }
                each(request);
            }
        }
        self.free = (0..self.slots.len() as u16).rev().collect();
    }

    /// Waits until everything in flight has ended and drops it, but not past `deadline`. `false`: something is left.
    fn drain(&mut self, deadline: Instant) -> bool {
        loop {
            self.kick();
            self.reap(|_, _| {});
            if self.in_flight() == 0 {
                return true;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || self.broken {
                return false;
            }
            let mut fd = libc::pollfd { fd: self.ring.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            // In steps: an entry that the kernel had no memory for completes only after another kick.
            let step = if self.polled { 0 } else { left.min(Duration::from_millis(100)).as_millis().max(1) as i32 };
            // SAFETY: one pollfd on the stack, for the length of the call. EINTR is one more turn.
            unsafe { libc::poll(&raw mut fd, 1, step) };
        }
    }
}

/// Readable while completions wait.
impl AsFd for Ring {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the ring owns its descriptor and lives as long as the borrow.
        unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) }
    }
}

impl fmt::Debug for Ring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ring")
            .field("depth", &self.slots.len())
            .field("in_flight", &self.in_flight())
            .field("fixed", &self.fixed)
            .finish_non_exhaustive()
    }
}

/// Waits for what is in flight, at most 30 seconds; what is left then is given up.
impl Drop for Ring {
    fn drop(&mut self) {
        if self.given_up {
            return;
        }
        if !self.drain(Instant::now() + DRAIN_MAX) {
            return self.give_up(drop);
        }
        // The kernel frees a ring's files and memory some time after the ring is closed. A caller that closes a device may
        // unbind it at once. Not above: with commands in flight the kernel would wait for them here.
        let submitter = self.ring.submitter();
        let _ = submitter.unregister_files();
        let _ = submitter.unregister_buffers();
    }
}

fn setup(depth: u16, polled: bool) -> io::Result<IoUring<squeue::Entry128, cqueue::Entry32>> {
    let mut builder = IoUring::builder();
    if polled {
        builder.setup_iopoll();
    }
    builder.clone().setup_submit_all().setup_coop_taskrun().setup_taskrun_flag().build(depth.into()).or_else(
        |e| match e.raw_os_error() {
            Some(libc::EINVAL) => builder.build(depth.into()),
            _ => Err(e),
        },
    )
}

/// Completions are ready in the kernel, but not yet in the ring: brings them there.
#[cold]
fn fetch(submitter: &Submitter<'_>) {
    // SAFETY: nothing is submitted and no argument is passed. A failure leaves them where they are.
    let _ = unsafe { submitter.enter::<libc::sigset_t>(0, 0, EnterFlags::GETEVENTS.bits(), None) };
}

fn explain(error: &io::Error) -> io::Error {
    let remedy = match error.raw_os_error() {
        Some(libc::ENOSYS | libc::EINVAL) => "NVMe passthrough by io_uring needs Linux 5.19 or later",
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

/// `_IOWR('N', 0x80, struct nvme_uring_cmd)`.
const NVME_URING_CMD_IO: u32 = 0xc048_4e80;

/// What the kernel is told of a request; the mapping that its memory lies in joins `mappings`.
#[inline]
fn entry(flight: &mut Flight, mappings: &mut Vec<Arc<Mapping>>, fixed: usize, timeout_ms: u32) -> squeue::Entry128 {
    let (address, len, index) = match &flight.request.op {
        Op::Read { buf, .. } | Op::Write { buf, .. } => {
            let index = mappings.iter().position(|known| Arc::ptr_eq(known, buf.mapping())).unwrap_or_else(|| {
                mappings.push(Arc::clone(buf.mapping()));
                mappings.len() - 1
            });
            (buf.as_ptr() as u64, buf.len() as u32, (index < fixed).then_some(index as u16))
        }
        _ => (flight.ranges.as_ptr() as u64, size_of_val(&*flight.ranges) as u32, None),
    };
    flight.fixed = index.is_some();
    let address = if len == 0 { 0 } else { address };
    let mut cmd = [0; 80];
    cmd[..PASSTHRU_LEN].copy_from_slice(&passthru(&flight.command, address, len, timeout_ms));
    let command = opcode::UringCmd80::new(FILE, NVME_URING_CMD_IO).cmd(cmd).buf_index(index);
    command.build()
}

const PASSTHRU_LEN: usize = 72;

/// `struct nvme_uring_cmd`, and `struct nvme_passthru_cmd`, whose last word is the result.
fn passthru(command: &Command, address: u64, len: u32, timeout_ms: u32) -> [u8; PASSTHRU_LEN] {
    let mut bytes = [0; PASSTHRU_LEN];
    let words = &command.0;
    bytes[0] = words[0] as u8;
    bytes[4..8].copy_from_slice(&words[1].to_ne_bytes());
    bytes[24..32].copy_from_slice(&address.to_ne_bytes());
    bytes[36..40].copy_from_slice(&len.to_ne_bytes());
    for (n, word) in words[10..].iter().enumerate() {
        bytes[40 + 4 * n..44 + 4 * n].copy_from_slice(&word.to_ne_bytes());
    }
    bytes[64..68].copy_from_slice(&timeout_ms.to_ne_bytes());
    bytes
}

/// `_IO('N', 0x40)`.
const NVME_IOCTL_ID: libc::Ioctl = 0x4e40;

/// `_IOWR('N', 0x41, struct nvme_passthru_cmd)`.
const NVME_IOCTL_ADMIN_CMD: u32 = 0xc048_4e41;

/// The namespace identifier of a namespace's device.
pub(crate) fn nsid(file: &File) -> io::Result<u32> {
    // SAFETY: no argument is read.
    let nsid = unsafe { libc::ioctl(file.as_raw_fd(), NVME_IOCTL_ID) };
    if nsid > 0 { Ok(nsid as u32) } else { Err(io::Error::last_os_error()) }
}

/// Identify. `Ok(Err)`: the controller refuses.
pub(crate) fn identify(file: &File, cns: u8, nsid: u32) -> io::Result<Result<[u8; IDENTIFY_LEN], Status>> {
    let mut answer = [0; IDENTIFY_LEN];
    let address = answer.as_mut_ptr() as u64;
    let mut command = passthru(&Command::identify(cns, nsid), address, IDENTIFY_LEN as u32, 0);
    // SAFETY: the structure has the size that the request's number tells, and the kernel writes as many bytes to `answer`
    // as `data_len` in it tells.
    let status = unsafe { libc::ioctl(file.as_raw_fd(), NVME_IOCTL_ADMIN_CMD as libc::Ioctl, command.as_mut_ptr()) };
    match status {
        0 => Ok(Ok(answer)),
        1.. => Ok(Err(Status(status as u16))),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_structure_is_that_of_the_kernel_s_header() {
        let command = Command::transfer(2, 7, 0x1_0000_0002, 8, false);
        let bytes = passthru(&command, 0x1234_5678_9abc_def0, 4096, 30_000);
        let word = |at: usize| u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap());
        assert_eq!((bytes[0], word(4), word(36), word(64), word(68)), (2, 7, 4096, 30_000, 0));
        assert_eq!(u64::from_ne_bytes(bytes[24..32].try_into().unwrap()), 0x1234_5678_9abc_def0);
        assert_eq!([word(40), word(44), word(48), word(52), word(60)], [2, 1, 7, 0, 0]);
    }
}
