//! Back ends for the tests: qemu-storage-daemon, and a model device with injected faults.
#![allow(dead_code, unreachable_pub, reason = "each test uses a part of it")]

use std::{
    collections::{BTreeMap, BTreeSet},
    env, fs,
    io::{self, IoSlice, IoSliceMut, Read, Write},
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    process::{self, Child, Command, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use blkdev::{Completion, Queue};
use blkdev_virtio::model::{Addresses, Model, Running};
use nix::{
    cmsg_space,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        eventfd::{EfdFlags, EventFd},
        socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg},
    },
};

/// A directory that is removed after the test.
pub struct Dir(PathBuf);

impl Dir {
    pub fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = env::temp_dir().join(format!("vhost-user-{}-{count}", process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    pub fn join(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A qemu-storage-daemon with one vhost-user-blk export.
pub struct Qemu {
    pub socket: PathBuf,
    child: Child,
    _dir: Dir,
}

impl Qemu {
    /// An export of a file of `len` zero bytes; see `disk()`.
    pub fn file(len: u64, export: &str) -> Self {
        let dir = Dir::new();
        fs::File::create(dir.join("disk")).unwrap().set_len(len).unwrap();
        let node = format!("driver=file,node-name=n,discard=unmap,filename={}", dir.join("disk").display());
        Self::start(dir, &node, export)
    }

    pub fn null(len: u64, export: &str) -> Self {
        Self::start(Dir::new(), &format!("driver=null-co,node-name=n,read-zeroes=on,size={len}"), export)
    }

    fn start(dir: Dir, node: &str, export: &str) -> Self {
        let (socket, pid_file) = (dir.join("socket"), dir.join("pid"));
        let child = Command::new("qemu-storage-daemon")
            .arg("--pidfile")
            .arg(&pid_file)
            .args(["--object", "iothread,id=io0", "--blockdev", node, "--export"])
            .arg(format!("type=vhost-user-blk,id=e,node-name=n,addr.type=unix,addr.path={},{export}", socket.display()))
            .stdin(Stdio::null())
            .spawn()
            .expect("qemu-storage-daemon starts (is it installed?)");
        let end = Instant::now() + Duration::from_secs(20);
        // The socket file appears shortly before the listen; the pid file appears after both.
        while !pid_file.exists() {
            assert!(Instant::now() < end, "qemu-storage-daemon listens");
            thread::sleep(Duration::from_millis(5));
        }
        Self { socket, child, _dir: dir }
    }

    pub fn disk(&self) -> PathBuf {
        self._dir.join("disk")
    }

    /// Sends SIGKILL.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Waits for `count` completions through the wake-up descriptor; panics after `patience`.
pub fn collect(queue: &mut dyn Queue, count: usize, patience: Duration) -> Vec<Completion> {
    let end = Instant::now() + patience;
    let mut done = Vec::new();
    loop {
        queue.reap(&mut done);
        if done.len() >= count {
            return done;
        }
        if queue.arm() {
            let fd = queue.wake_fd().unwrap();
            let woken = poll(&mut [PollFd::new(fd.as_fd(), PollFlags::POLLIN)], PollTimeout::from(10_000u16));
            assert_eq!(woken, Ok(1), "{} of {count} requests completed, but no wake-up came", done.len());
        }
        assert!(Instant::now() < end, "only {} of {count} requests completed in time", done.len());
    }
}

/// Protocol feature bits.
pub const MQ: u64 = 1 << 0;
pub const REPLY_ACK: u64 = 1 << 3;
pub const CONFIG: u64 = 1 << 9;
pub const MEM_SLOTS: u64 = 1 << 15;
pub const BACKEND_REQ: u64 = 1 << 5;
pub const ALL: u64 = MQ | REPLY_ACK | CONFIG | MEM_SLOTS | BACKEND_REQ;

/// Replies of a back end to GET_CONFIG.
#[derive(Clone, Copy)]
pub enum Answer {
    /// As many bytes as requested.
    Asked,
    /// This many bytes, whatever was requested.
    Always(usize),
    /// An empty configuration for a request of more bytes than this.
    AtMost(usize),
    /// This offset, this length, and this many bytes.
    Nonsense(u32, u32, usize),
    /// A part of a header.
    Short,
}

#[derive(Clone)]
pub struct Quirks {
    pub protocol: u64,
    pub config: Answer,
    /// Messages that get no reply.
    pub mute: Vec<u32>,
    /// Messages that get an error reply, if they have an acknowledgement.
    pub refuse: Vec<u32>,
    /// Messages that get two replies.
    pub twice: Vec<u32>,
    /// The message at which the back end closes the connection.
    pub hang_up_at: Option<u32>,
    /// Delay of each reply.
    pub delay: Duration,
    /// Number of memory slots.
    pub slots: u64,
    /// Replies to these messages carry this many duplicates of a descriptor.
    pub attach: Option<(Arc<OwnedFd>, usize, Vec<u32>)>,
    /// The first started ring, counted from 0, whose kicks are ignored; later ones are ignored, too.
    pub deaf_from: usize,
    /// The first started ring whose eventfds are filled and made blocking; later ones are, too.
    pub block_from: usize,
}

impl Default for Quirks {
    fn default() -> Self {
        Self {
            protocol: ALL,
            config: Answer::Asked,
            mute: Vec::new(),
            refuse: Vec::new(),
            twice: Vec::new(),
            hang_up_at: None,
            delay: Duration::ZERO,
            slots: 32,
            attach: None,
            deaf_from: usize::MAX,
            block_from: usize::MAX,
        }
    }
}

/// A back end made of a [`Model`]. It serves one front end at a time.
pub struct Backend {
    pub socket: PathBuf,
    pub model: Arc<Model>,
    pub seen: Arc<Mutex<BTreeSet<u32>>>,
    /// Faults; they can be changed at any time.
    pub quirks: Arc<Mutex<Quirks>>,
    /// Descriptors that a hostile back end keeps.
    pub loot: Arc<Mutex<Loot>>,
    /// The channel for back-end requests.
    requests: Arc<Mutex<Option<UnixStream>>>,
    stop: Arc<AtomicBool>,
    client: Arc<Mutex<Option<UnixStream>>>,
    thread: Option<JoinHandle<()>>,
    _dir: Dir,
}

/// Descriptors shared by the front end.
#[derive(Default)]
pub struct Loot {
    pub memory: Vec<OwnedFd>,
    pub kicks: Vec<OwnedFd>,
    pub calls: Vec<OwnedFd>,
    /// Number of rings started and of configuration reads.
    pub rings: usize,
    pub configs: usize,
}

/// Makes an eventfd blocking and full.
pub fn attack(eventfd: &OwnedFd) {
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    fcntl(eventfd, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
    // Empty the counter first; it can be empty already.
    let _ = nix::unistd::read(eventfd, &mut [0; 8]);
    let _ = nix::unistd::write(eventfd, &(u64::MAX - 1).to_ne_bytes());
    fcntl(eventfd, FcntlArg::F_SETFL(OFlag::empty())).unwrap();
}

impl Backend {
    pub fn new(model: Arc<Model>, quirks: Quirks) -> Self {
        let dir = Dir::new();
        let socket = dir.join("socket");
        let listener = UnixListener::bind(&socket).unwrap();
        let (stop, client) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(None)));
        let seen = Arc::<Mutex<BTreeSet<u32>>>::default();
        let requests = Arc::<Mutex<Option<UnixStream>>>::default();
        let (quirks, loot) = (Arc::new(Mutex::new(quirks)), Arc::<Mutex<Loot>>::default());
        let thread = {
            let (model, stop, client, seen) = (model.clone(), stop.clone(), client.clone(), seen.clone());
            let (requests, quirks, loot) = (requests.clone(), quirks.clone(), loot.clone());
            thread::spawn(move || {
                while let Ok((stream, _)) = listener.accept() {
                    if stop.load(Ordering::Relaxed) {
                        return;
                    }
                    *client.lock().unwrap() = Some(stream.try_clone().unwrap());
                    let mut session = Session {
                        stream,
                        model: &model,
                        quirks: &quirks,
                        ack: false,
                        rings: BTreeMap::new(),
                        seen: &seen,
                        loot: &loot,
                        requests: &requests,
                    };
                    while session.message().is_ok() {}
                    drop(session);
                    model.unmap_all();
                }
            })
        };
        Self { socket, model, seen, quirks, loot, requests, stop, client, thread: Some(thread), _dir: dir }
    }

    /// Changes the size of the disk, in bytes, and reports it to the front end.
    pub fn resize(&self, capacity: u64) {
        self.model.resize(capacity);
        let message = [2u32, 1 | 8, 0].map(u32::to_ne_bytes).concat();
        let mut requests = self.requests.lock().unwrap();
        let requests = requests.as_mut().expect("the front end has opened a request channel");
        requests.write_all(&message).unwrap();
        let mut answer = [0; 20];
        requests.read_exact(&mut answer).unwrap();
        assert_eq!(answer[12..], [0; 8], "the front end acknowledged the change");
    }

    /// The channel for back-end requests.
    pub fn requests(&self) -> UnixStream {
        let requests = self.requests.lock().unwrap();
        requests.as_ref().expect("the front end has opened a request channel").try_clone().unwrap()
    }

    /// Closes the connection, without ending the back end.
    pub fn hang_up(&self) {
        if let Some(client) = self.client.lock().unwrap().take() {
            let _ = client.shutdown(std::net::Shutdown::Both);
        }
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.hang_up();
        let _ = UnixStream::connect(&self.socket);
        if let Some(Err(panic)) = self.thread.take().map(JoinHandle::join)
            && !thread::panicking()
        {
            std::panic::resume_unwind(panic);
        }
    }
}

struct Session<'a> {
    stream: UnixStream,
    model: &'a Arc<Model>,
    quirks: &'a Mutex<Quirks>,
    ack: bool,
    rings: BTreeMap<u32, Vring>,
    seen: &'a Mutex<BTreeSet<u32>>,
    loot: &'a Mutex<Loot>,
    requests: &'a Mutex<Option<UnixStream>>,
}

#[derive(Default)]
struct Vring {
    addresses: Addresses,
    kick: Option<OwnedFd>,
    call: Option<OwnedFd>,
    running: Option<Running>,
}

impl Session<'_> {
    fn message(&mut self) -> io::Result<()> {
        let mut header = [0; 12];
        let mut space = cmsg_space!([std::os::fd::RawFd; 8]);
        let mut fds = Vec::new();
        let got = {
            let mut parts = [IoSliceMut::new(&mut header)];
            let message =
                recvmsg::<()>(self.stream.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)?;
            for control in message.cmsgs()? {
                if let ControlMessageOwned::ScmRights(raw) = control {
                    fds.extend(raw.into_iter().map(own));
                }
            }
            message.bytes
        };
        if got == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.stream.read_exact(&mut header[got..])?;
        let word = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap());
        let (request, flags) = (word(0), word(4));
        let mut payload = vec![0; word(8) as usize];
        self.stream.read_exact(&mut payload)?;
        self.seen.lock().unwrap().insert(request);
        let quirks = self.quirks.lock().unwrap().clone();
        if quirks.hang_up_at == Some(request) {
            let _ = self.stream.shutdown(std::net::Shutdown::Both);
            return Err(io::ErrorKind::ConnectionAborted.into());
        }
        if quirks.mute.contains(&request) {
            return Ok(());
        }
        let ack = self.ack && flags & 8 != 0;
        if quirks.refuse.contains(&request) {
            assert!(ack, "message {request} has an acknowledgement");
            return self.answer(&quirks, request, 1_u64.to_ne_bytes().to_vec());
        }

        let number = |at: usize| u64::from_ne_bytes(payload[at..at + 8].try_into().unwrap());
        let half = |at: usize| u32::from_ne_bytes(payload[at..at + 4].try_into().unwrap());
        let mut answer: Option<Vec<u8>> = None;
        let protocol = quirks.protocol;
        match request {
            1 => answer = Some((self.model.spec().features | 1 << 30 | 1 << 26).to_ne_bytes().to_vec()),
            2 => {
                assert_eq!(number(0) & 1 << 26, 0, "LOG_ALL is never accepted");
                self.model.accept(number(0));
            }
            3 | 14 => {}
            5 => {
                assert_eq!(protocol & MEM_SLOTS, 0, "a back end with memory slots gets no memory table");
                assert!(self.rings.values().all(|r| r.running.is_none()), "the table changes while nothing uses it");
                self.model.unmap_all();
                self.loot.lock().unwrap().memory.extend(fds.iter().map(|fd| fd.try_clone().unwrap()));
                assert_eq!(half(0) as usize, fds.len());
                for (n, fd) in fds.iter().enumerate() {
                    self.map(&payload[8 + 32 * n..], fd)?;
                }
            }
            8 => self.ring(half(0)).addresses.size = half(4) as u16,
            9 => {
                let (descriptors, device, driver) = (number(8), number(16), number(24));
                let addresses = &mut self.ring(half(0)).addresses;
                *addresses = Addresses { descriptors, device, driver, ..*addresses };
            }
            10 => self.ring(half(0)).addresses.base = half(4),
            11 => {
                let (index, ring) = (half(0), self.ring(half(0)));
                let base = ring.running.take().map_or(ring.addresses.base, Running::stop);
                answer = Some([index.to_ne_bytes(), base.to_ne_bytes()].concat());
            }
            12 => self.ring(number(0) as u32).kick = fds.pop(),
            13 => self.ring(number(0) as u32).call = fds.pop(),
            15 => answer = Some(protocol.to_ne_bytes().to_vec()),
            16 => {
                assert_eq!(number(0) & !protocol, 0, "only offered features are accepted");
                self.ack = number(0) & REPLY_ACK != 0;
            }
            17 => answer = Some(4u64.to_ne_bytes().to_vec()),
            18 => {
                let model = Arc::clone(self.model);
                let ring = self.ring(half(0));
                let (addresses, kick, call) = (ring.addresses, ring.kick.take().unwrap(), ring.call.take().unwrap());
                let mut loot = self.loot.lock().unwrap();
                loot.rings += 1;
                loot.kicks.push(kick.try_clone()?);
                loot.calls.push(call.try_clone()?);
                let deaf = loot.rings > quirks.deaf_from;
                let heard = if deaf { EventFd::from_flags(EfdFlags::EFD_NONBLOCK)?.into() } else { kick.try_clone()? };
                let running = model.start(addresses, heard, call.try_clone()?)?;
                if loot.rings > quirks.block_from {
                    attack(&kick);
                    attack(&call);
                }
                drop(loot);
                self.ring(half(0)).running = Some(running);
            }
            21 => *self.requests.lock().unwrap() = fds.pop().map(UnixStream::from),
            24 => {
                let config = self.model.config();
                let asked = half(4) as usize;
                self.loot.lock().unwrap().configs += 1;
                let len = match quirks.config {
                    Answer::Asked => asked,
                    Answer::Always(len) => len,
                    Answer::AtMost(most) if asked > most => 0,
                    Answer::AtMost(_) => asked,
                    Answer::Nonsense(_, _, len) => len,
                    Answer::Short => 0,
                };
                let (offset, size) = match quirks.config {
                    Answer::Nonsense(offset, size, _) => (offset, size),
                    _ => (0, len as u32),
                };
                let mut reply = Vec::new();
                if len > 0 {
                    reply.extend([offset, size, 0].iter().flat_map(|w| w.to_ne_bytes()));
                    reply.extend((0..len).map(|at| config.get(at).copied().unwrap_or(0)));
                } else if matches!(quirks.config, Answer::Short) {
                    reply.extend([0; 5]);
                }
                answer = Some(reply);
            }
            25 => self.model.write_config(half(0) as usize, &payload[12..]),
            36 => answer = Some(quirks.slots.to_ne_bytes().to_vec()),
            37 => {
                self.loot.lock().unwrap().memory.push(fds[0].try_clone()?);
                self.map(&payload[8..], &fds[0])?;
            }
            38 => assert!(self.model.unmap(number(8)), "a removed region was added before"),
            _ => panic!("this back end does not offer message {request}"),
        }
        match answer.or(ack.then(|| vec![0; 8])) {
            Some(body) => self.answer(&quirks, request, body),
            None => Ok(()),
        }
    }

    fn answer(&mut self, quirks: &Quirks, request: u32, body: Vec<u8>) -> io::Result<()> {
        thread::sleep(quirks.delay);
        let header = [request, 1 | 4, body.len() as u32].map(u32::to_ne_bytes).concat();
        let mut message = [header, body].concat();
        if quirks.twice.contains(&request) {
            message = message.repeat(2);
        }
        let mut fds = Vec::new();
        if let Some((fd, count, messages)) = &quirks.attach
            && messages.contains(&request)
        {
            fds = vec![fd.as_raw_fd(); *count];
        }
        let rights = [ControlMessage::ScmRights(&fds)];
        let rights = if fds.is_empty() { &[] } else { &rights[..] };
        let sent =
            sendmsg::<()>(self.stream.as_raw_fd(), &[IoSlice::new(&message)], rights, MsgFlags::MSG_NOSIGNAL, None)?;
        assert_eq!(sent, message.len(), "a short message is sent as a whole");
        Ok(())
    }

    fn ring(&mut self, index: u32) -> &mut Vring {
        self.rings.entry(index).or_default()
    }

    /// A region: guest address, length, user address, mmap offset.
    fn map(&self, region: &[u8], fd: &OwnedFd) -> io::Result<()> {
        let number = |at: usize| u64::from_ne_bytes(region[at..at + 8].try_into().unwrap());
        self.model.map(number(0), number(8) as usize, fd.as_fd(), number(24))
    }
}

#[allow(unsafe_code)]
fn own(raw: std::os::fd::RawFd) -> OwnedFd {
    // SAFETY: the kernel created this descriptor for us in recvmsg, and it has no other owner.
    unsafe { std::os::fd::FromRawFd::from_raw_fd(raw) }
}

/// Connects to `path` and sends nothing.
pub fn idle_client(path: &Path) -> UnixStream {
    UnixStream::connect(path).unwrap()
}
