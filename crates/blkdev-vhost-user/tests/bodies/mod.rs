//! The body of the fuzz target, as a plain function: the fuzzer calls it, and an ordinary test replays the corpus through it.

use std::{
    io::{ErrorKind, Read, Write},
    os::fd::AsFd,
    os::unix::net::{UnixListener, UnixStream},
    path::PathBuf,
    sync::{LazyLock, Mutex, PoisonError, mpsc},
    thread,
    time::Duration,
};

use blkdev::{
    Device,
    fuzz::{Clock, Script},
};
use blkdev_vhost_user::{Options, VhostUser};
use nix::{
    poll::{PollFd, PollFlags, ppoll},
    sys::time::{TimeSpec, TimeValLike},
};

/// Message ids (vhost-user, "Front-end message types").
const GET_FEATURES: u32 = 1;
const GET_VRING_BASE: u32 = 11;
const GET_PROTOCOL_FEATURES: u32 = 15;
const GET_QUEUE_NUM: u32 = 17;
const GET_CONFIG: u32 = 24;
const GET_MAX_MEM_SLOTS: u32 = 36;

/// Features of a virtio-blk device: SEG_MAX, BLK_SIZE, FLUSH, MQ, the rings' features, protocol features, VERSION_1.
const FEATURES: u64 = 1 << 2 | 1 << 6 | 1 << 9 | 1 << 12 | 1 << 28 | 1 << 29 | 1 << 30 | 1 << 32;
/// MQ, REPLY_ACK, BACKEND_REQ, CONFIG, CONFIGURE_MEM_SLOTS.
const PROTOCOL: u64 = 1 << 0 | 1 << 3 | 1 << 5 | 1 << 9 | 1 << 15;

/// The front end, and a back end that says what the bytes say. It serves no request, so an open ends with an error at last. It
/// ends in bounded time, whatever the back end says.
pub(crate) fn conversation(data: &[u8]) {
    static OTHER: LazyLock<Mutex<Other>> = LazyLock::new(|| Mutex::new(Other::new()));
    let other = OTHER.lock().unwrap_or_else(PoisonError::into_inner);
    let (script, clock) = (Script::new(data), Clock::default());
    let _entered = clock.enter();
    let mut options = Options::new(&other.path);
    options.connect_timeout = TIMEOUT;
    options.virtio.timeout = Some(Duration::from_nanos(1));
    other.serve.send((script, clock.clone())).expect("the other thread runs");
    if let Ok(disk) = VhostUser::connect(&options) {
        assert!(disk.info().transfer_max >= 4096, "an open device keeps its promises");
    }
    other.served.recv().expect("the other thread has not panicked");
}

/// Longest time for a message, by the clock of the run.
const TIMEOUT: Duration = Duration::from_millis(20);

/// The back end's thread, which serves one connection after the other.
struct Other {
    path: PathBuf,
    serve: mpsc::Sender<(Script, Clock)>,
    served: mpsc::Receiver<()>,
}

impl Other {
    fn new() -> Self {
        let path = std::env::temp_dir().join(format!("vhost-user-fuzz-{}", std::process::id()));
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(&path).expect("a socket");
        let (serve, scripts) = mpsc::channel();
        let (done, served) = mpsc::channel();
        thread::spawn(move || {
            for (script, clock) in scripts {
                let (socket, _) = listener.accept().expect("the front end connects");
                // Its end: the front end, or the script, closes the connection.
                let _ = Backend::new(&script, &clock).serve(socket);
                done.send(()).expect("the first thread waits");
            }
        });
        Self { path, serve, served }
    }
}

/// Bytes of the front end that are not taken yet.
#[derive(Default)]
struct Received {
    bytes: Vec<u8>,
}

/// Length of a message's header, in bytes.
const HEADER: usize = 12;

impl Received {
    /// Waits for more. One call, because each takes as long as much of a run.
    fn read(&mut self, socket: &mut UnixStream) -> std::io::Result<()> {
        let mut more = [0; 512];
        match socket.read(&mut more)? {
            0 => Err(ErrorKind::UnexpectedEof.into()),
            len => {
                self.bytes.extend_from_slice(&more[..len]);
                Ok(())
            }
        }
    }

    /// Request, flags and payload length of the next message, if they are there.
    fn header(&self) -> Option<[u32; 3]> {
        (self.bytes.len() >= HEADER).then(|| [0, 4, 8].map(|at| word(&self.bytes, at)))
    }

    /// Takes the next message, and returns its payload of `len` bytes, if all of it is there.
    fn take(&mut self, len: usize) -> Option<Vec<u8>> {
        if self.bytes.len() < HEADER + len {
            return None;
        }
        self.bytes.drain(..HEADER);
        Some(self.bytes.drain(..len).collect())
    }
}

struct Backend<'a> {
    script: &'a Script,
    clock: &'a Clock,
    features: u64,
    protocol: u64,
    config: [u8; 60],
}

impl<'a> Backend<'a> {
    fn new(script: &'a Script, clock: &'a Clock) -> Self {
        let temper: u8 = script.any();
        let mut config = [0; 60];
        for (at, value) in [(0, 4096_u32), (12, 4), (20, 512), (32, 2 << 16)] {
            config[at..at + 4].copy_from_slice(&value.to_le_bytes());
        }
        if temper & 1 != 0 {
            let at = script.below(56) as usize;
            config[at..at + 4].copy_from_slice(&(script.number() as u32).to_le_bytes());
        }
        let mut backend = Self { script, clock, features: FEATURES, protocol: PROTOCOL, config };
        if temper & 2 != 0 {
            backend.features ^= script.any::<u64>() & (FEATURES | 1 << 34);
        }
        if temper & 4 != 0 {
            backend.protocol ^= script.any::<u64>() & PROTOCOL;
        }
        backend
    }

    /// Answers each message. Most answers are right.
    fn serve(&self, mut socket: UnixStream) -> std::io::Result<()> {
        let (mut is_odd, mut received) = (false, Received::default());
        loop {
            let Some([request, flags, len]) = received.header() else {
                self.receive(&mut socket, &mut received, is_odd)?;
                continue;
            };
            assert!(flags & 3 == 1 && flags & 4 == 0, "a message of version 1, and no reply");
            assert!(len <= 4096, "a message has a limit");
            let Some(payload) = received.take(len as usize) else {
                self.receive(&mut socket, &mut received, is_odd)?;
                continue;
            };
            let Some(mut reply) = self.reply(request, flags, &payload) else { continue };
            let mut head = [request, 5, reply.len() as u32];
            is_odd = self.script.one_in(8);
            if is_odd {
                match self.script.below(8) {
                    0 => head[self.script.below(3) as usize] = self.script.number() as u32,
                    1 => reply.iter_mut().for_each(|byte| *byte = self.script.any()),
                    2 => reply.truncate(self.script.below(reply.len() as u64 + 1) as usize),
                    3 => reply.extend((0..self.script.below(64)).map(|_| self.script.any::<u8>())),
                    4 => {
                        reply.resize(self.script.below(600) as usize, 0);
                        head[2] = reply.len() as u32;
                    }
                    5 => reply[..8].copy_from_slice(&self.script.number().to_ne_bytes()),
                    6 => return Ok(()),
                    // No answer.
                    _ => continue,
                }
            }
            let mut message = head.map(u32::to_ne_bytes).concat();
            message.extend(reply);
            let cut =
                if self.script.one_in(16) { self.script.below(message.len() as u64) as usize } else { message.len() };
            socket.write_all(&message[..cut])?;
            socket.write_all(&message[cut..])?;
        }
    }

    /// Waits for more bytes. If none come, the front end waits for more of an odd answer: then it has waited for long enough.
    fn receive(&self, socket: &mut UnixStream, received: &mut Received, is_odd: bool) -> std::io::Result<()> {
        let mut polled = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
        // Usually the front end has sent its next message, or sends it as soon as this thread sleeps.
        let patience = if is_odd { TimeSpec::microseconds(300) } else { TimeSpec::milliseconds(100) };
        if ppoll(&mut polled, Some(patience), None) == Ok(0) {
            let _entered = self.clock.enter();
            self.clock.pass(TIMEOUT);
            self.clock.turn();
        }
        received.read(socket)
    }

    /// The payload of the right reply, if the message has one.
    fn reply(&self, request: u32, flags: u32, payload: &[u8]) -> Option<Vec<u8>> {
        Some(match request {
            GET_FEATURES => self.features.to_ne_bytes().to_vec(),
            GET_PROTOCOL_FEATURES => self.protocol.to_ne_bytes().to_vec(),
            GET_QUEUE_NUM | GET_MAX_MEM_SLOTS => 4_u64.to_ne_bytes().to_vec(),
            GET_VRING_BASE => [word(payload, 0), 0].map(u32::to_ne_bytes).concat(),
            GET_CONFIG => {
                let mut reply = payload.to_vec();
                for (to, from) in reply[12..].iter_mut().zip(self.config) {
                    *to = from;
                }
                reply
            }
            // An acknowledgement.
            _ if flags & 8 != 0 => 0_u64.to_ne_bytes().to_vec(),
            _ => return None,
        })
    }
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}
