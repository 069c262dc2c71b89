//! The event loop, over real sockets: waiting clients are served, clients that block others are disconnected, and stopping ends.

mod changes;
mod door;
mod pause;

use std::{
    io::{self, Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use blkdev::{
    Device, Info, Mapping, Queue,
    fault::{Fault, Faults},
    memory::Memory,
};
use nbd_proto::{
    Cookie, Mode, WireError,
    client::{Chunk, Decoder, Encoder, Event, Failure, Negotiation, Step, Wish},
    wire::{Opt, Rep},
};
use nbd_server_core::{Access, Export, Limits, Listener, Server};
use nix::unistd::geteuid;

/// Longest wait of these tests, unless something hangs.
const PATIENCE: Duration = Duration::from_secs(30);

const MIB: u32 = 1 << 20;

#[test]
fn clients_that_need_all_memory_get_it_in_turn() {
    let disk = Memory::new(64 << 20);
    let pattern: Vec<u8> = (0..MIB).map(|n| (n / 7) as u8).collect();
    disk.write(5, &pattern);
    let server = Running::start(vec![("", Arc::new(disk))], |limits| {
        limits.memory = 1 << 20;
        limits.workers = 1;
    });
    thread::scope(|scope| {
        for _ in 0..6 {
            scope.spawn(|| {
                let mut client = server.client("");
                // All at once: no two of them fit into the memory.
                for cookie in 0..10 {
                    client.encoder.read(&mut client.out, Cookie(cookie), 5, MIB);
                }
                client.send();
                for cookie in 0..10 {
                    assert!(client.reply(cookie).unwrap() == pattern);
                }
            });
        }
    });
}

#[test]
fn a_client_that_requests_more_than_fits_a_turn_gets_all_of_it() {
    const LEN: u32 = 100_000;
    let disk = Memory::new(16 << 20);
    let pattern: Vec<u8> = (0..MIB).map(|n| (n / 7) as u8).collect();
    disk.write(0, &pattern);
    let server = Running::start(vec![("", Arc::new(disk))], |limits| limits.workers = 1);
    thread::scope(|scope| {
        for n in 0..4u8 {
            let (server, pattern) = (&server, &pattern);
            scope.spawn(move || {
                let mut client = server.client("");
                let mine = u64::from(MIB) * (u64::from(n) + 1);
                // All at once: twenty times the memory of a turn, and some of it before the client reads any reply.
                for cookie in 0..60 {
                    client.encoder.read(&mut client.out, Cookie(2 * cookie), cookie * 1000, LEN);
                    client.encoder.write_head(&mut client.out, Cookie(2 * cookie + 1), mine + 2 * cookie, 2, false);
                    client.out.extend_from_slice(&[n, cookie as u8]);
                }
                client.send();
                thread::sleep(Duration::from_millis(20 * u64::from(n)));
                for cookie in 0..60 {
                    let at = 1000 * cookie as usize;
                    assert!(client.reply(2 * cookie).unwrap() == pattern[at..at + LEN as usize]);
                    client.reply(2 * cookie + 1).unwrap();
                }
                client.encoder.read(&mut client.out, Cookie(1000), mine, 120);
                client.send();
                let written: Vec<u8> = (0..60).flat_map(|cookie| [n, cookie]).collect();
                assert_eq!(client.reply(1000).unwrap(), written);
            });
        }
    });
}

#[test]
fn a_client_that_holds_memory_idly_is_disconnected_when_others_wait() {
    let server = Running::start(vec![("", Arc::new(Memory::new(64 << 20)))], |limits| {
        limits.memory = 1 << 20;
        limits.workers = 1;
        limits.stall_timeout = Duration::from_millis(200);
    });
    let mut idler = server.client("");
    idler.encoder.write_head(&mut idler.out, Cookie(1), 0, MIB, false);
    idler.out.extend_from_slice(&[1; 1000]);
    idler.send();
    let mut busy = server.client("");
    busy.encoder.read(&mut busy.out, Cookie(1), 0, MIB);
    busy.send();
    assert_eq!(busy.reply(1).unwrap(), vec![0; MIB as usize], "nothing of the unfinished write was written");
    assert_eq!(idler.socket.read(&mut [0; 1]).unwrap_or(0), 0, "the idle client's connection is closed");
    // Alone, a client may take its time.
    let mut slow = server.client("");
    slow.encoder.write_head(&mut slow.out, Cookie(1), 0, 4, false);
    slow.send();
    thread::sleep(Duration::from_millis(500));
    slow.out.extend_from_slice(b"slow");
    slow.send();
    slow.reply(1).unwrap();
}

#[test]
fn a_handshake_has_a_deadline_and_room_for_so_many() {
    let server = Running::start(vec![("", Arc::new(Memory::new(1 << 20)))], |limits| {
        limits.handshake_timeout = Duration::from_millis(300);
        limits.handshakes = 2;
    });
    let mut idlers: Vec<UnixStream> = (0..3).map(|_| server.connect()).collect();
    for idler in &mut idlers {
        idler.read_exact(&mut [0; 18]).unwrap();
    }
    for idler in &mut idlers {
        assert_eq!(idler.read(&mut [0; 1]).unwrap_or(0), 0, "one made room for another, the others were too slow");
    }
    let mut client = server.client("");
    client.encoder.flush(&mut client.out, Cookie(3));
    client.send();
    client.reply(3).unwrap();
}

#[test]
fn clients_without_block_sizes_are_refused_only_if_configured() {
    // The export with blocks, and one with a block size of one byte.
    for (required, name, refused) in [(false, "blocks", false), (true, "blocks", true), (true, "bytes", false)] {
        let blocks = Memory::new(1 << 20).with(|info| (info.block_size, info.preferred_block_size) = (4096, 4096));
        let devices = vec![("blocks", Arc::new(blocks) as Arc<dyn Device>), ("bytes", Arc::new(Memory::new(1 << 20)))];
        let server = Running::start(devices, |limits| limits.block_size_required = required);
        let mut socket = server.connect();
        let data = [&(name.len() as u32).to_be_bytes(), name.as_bytes(), b"\0\0"].concat();
        let go = [b"\0\0\0\x03IHAVEOPT\0\0\0\x07", &(data.len() as u32).to_be_bytes()[..], &data].concat();
        socket.write_all(&go).unwrap();
        // The greeting, then INFO (BLOCK_SIZE before a refusal, EXPORT otherwise), then the last reply.
        let info = if refused { 14 } else { 12 };
        let mut answers = vec![0; 18 + 20 + info + 20];
        socket.read_exact(&mut answers).unwrap();
        let last = &answers[18 + 20 + info + 12..][..4];
        assert_eq!(last, if refused { [0x80, 0, 0, 8] } else { [0, 0, 0, 1] }, "{name}, required: {required}");
        // A client that requests block sizes is served in any case, and may write a part of a block.
        let mut client = server.client(name);
        client.encoder.write_head(&mut client.out, Cookie(1), 7, 3, false);
        client.out.extend_from_slice(b"abc");
        client.send();
        client.reply(1).unwrap();
        client.encoder.read(&mut client.out, Cookie(2), 6, 5);
        client.send();
        assert_eq!(client.reply(2).unwrap(), b"\0abc\0");
    }
}

#[test]
fn nothing_reaches_the_device_before_a_client_is_served() {
    let device = Arc::new(Fault::new(Memory::new(1 << 20), Faults::new(1)));
    let server = Running::start(vec![("disk", Arc::<Fault<Memory>>::clone(&device) as Arc<dyn Device>)], |_| {});
    // LIST, INFO, contexts and a GO that fails: a client can get no further without being served.
    let info = b"\0\0\0\x04disk\0\x04\0\0\0\x01\0\x02\0\x03";
    let contexts = b"\0\0\0\x04disk\0\0\0\x01\0\0\0\x0fbase:allocation";
    let nothing = b"\0\0\0\x06nosuch\0\0";
    let options: [(u32, &[u8]); 6] = [(3, b""), (6, info), (8, b""), (10, contexts), (9, contexts), (7, nothing)];
    for _ in 0..20 {
        let mut socket = server.connect();
        socket.write_all(&3_u32.to_be_bytes()).unwrap();
        for (option, data) in options {
            socket.write_all(b"IHAVEOPT").unwrap();
            socket.write_all(&option.to_be_bytes()).unwrap();
            socket.write_all(&(data.len() as u32).to_be_bytes()).unwrap();
            socket.write_all(data).unwrap();
        }
        // The reply to ABORT comes after all of them.
        socket.write_all(b"IHAVEOPT\0\0\0\x02\0\0\0\0").unwrap();
        let mut answers = Vec::new();
        socket.read_to_end(&mut answers).unwrap();
        assert!(answers.ends_with(b"\0\0\0\x02\0\0\0\x01\0\0\0\0"), "{answers:x?}");
    }
    assert_eq!(device.requests(), 0);
    let mut client = server.client("disk");
    assert_eq!(device.requests(), 0, "not even then");
    client.encoder.read(&mut client.out, Cookie(1), 0, 512);
    client.send();
    client.reply(1).unwrap();
    assert_eq!(device.requests(), 1);
}

#[test]
fn a_device_that_loses_requests_hangs_neither_clients_nor_the_end() {
    let memory = Memory::new(1 << 20).with(|info| info.timeout = Some(Duration::from_millis(400)));
    let device = Arc::new(Fault::new(memory, Faults { lost: 0.5, ..Faults::new(3) }));
    let server = Running::start(vec![("", device)], |_| {});
    let mut client = server.client("");
    for cookie in 0..100 {
        client.encoder.read(&mut client.out, Cookie(cookie), 0, 512);
    }
    client.send();
    let failed = (0..100).filter(|_| client.any_reply().1.is_err_and(|e| e == WireError::Io)).count();
    assert!(failed > 0, "some were lost, and their clients get errors");
    let start = Instant::now();
    drop(server);
    assert!(start.elapsed() < PATIENCE);
}

#[test]
fn stopping_with_requests_at_a_silent_device_ends() {
    let device = Arc::new(Fault::new(Memory::new(1 << 20), Faults { lost: 1.0, ..Faults::new(3) }));
    let server = Running::start(vec![("", device)], |_| {});
    let mut client = server.client("");
    client.encoder.read(&mut client.out, Cookie(0), 0, 512);
    client.send();
    thread::sleep(Duration::from_millis(100));
    let start = Instant::now();
    drop(server);
    assert!(start.elapsed() < PATIENCE);
    assert_eq!(client.socket.read(&mut [0; 1]).unwrap_or(0), 0);
}

#[test]
fn exports_are_distinguished_and_devices_with_one_queue_are_served() {
    let disks: Vec<(&str, Arc<dyn Device>)> = ["a", "b", "c"]
        .into_iter()
        .map(|name| {
            let disk = Memory::new(1 << 20).with(|info| info.queues_max = 1);
            disk.write(0, name.as_bytes());
            (name, Arc::new(disk) as Arc<dyn Device>)
        })
        .collect();
    let server = Running::start(disks, |limits| limits.workers = 2);
    for (asked, expected) in [("a", b"a"), ("b", b"b"), ("c", b"c"), ("", b"a")] {
        let mut client = server.client(asked);
        client.encoder.read(&mut client.out, Cookie(9), 0, 1);
        client.send();
        assert_eq!(client.reply(9).unwrap(), expected);
    }
    let names = vec![("x", Arc::new(Memory::new(512)) as Arc<dyn Device>), ("x", Arc::new(Memory::new(512)))];
    assert!(start(names, Vec::new(), |_| {}).unwrap_err().to_string().contains("named \"x\""));
}

/// A disk that counts the requests for its size.
struct Counting(Memory, AtomicU32);

impl Device for Counting {
    fn info(&self) -> &Info {
        self.0.info()
    }

    fn capacity(&self) -> u64 {
        self.1.fetch_add(1, Ordering::Relaxed);
        self.0.capacity()
    }

    fn register(&self, mapping: &Arc<Mapping>) -> io::Result<()> {
        self.0.register(mapping)
    }

    fn open_queue(&self, depth: u16) -> io::Result<Box<dyn Queue>> {
        self.0.open_queue(depth)
    }
}

#[test]
fn a_forbidden_export_looks_like_a_missing_one_and_is_not_touched() {
    let disk = |size| Arc::new(Counting(Memory::new(size), AtomicU32::new(0)));
    let (secret, public) = (disk(1 << 20), disk(1 << 21));
    let exports = vec![
        export("secret", secret.clone(), &["uid=4000000000", "ip=0.0.0.0/0", "dn=CN=nobody"]),
        export("public", public.clone(), &["gid=4000000000", &format!("uid={}", geteuid())]),
    ];
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (over, end) = mpsc::channel();
    let listener = Listener::Connected { socket: theirs.into(), over };
    let _server = Server::start(exports, vec![listener], None, Limits::default()).unwrap();
    let asked = |disk: &Counting| disk.1.load(Ordering::Relaxed);
    let before = (asked(&secret), asked(&public));

    ours.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut socket = &ours;
    socket.read_exact(&mut [0; 18]).unwrap();
    socket.write_all(&3u32.to_be_bytes()).unwrap();
    // All replies to one option, as on the wire.
    let mut ask = |option: u32, data: &[u8]| {
        socket.write_all(b"IHAVEOPT").unwrap();
        socket.write_all(&option.to_be_bytes()).unwrap();
        socket.write_all(&(data.len() as u32).to_be_bytes()).unwrap();
        socket.write_all(data).unwrap();
        let mut all = Vec::new();
        loop {
            let mut head = [0; 20];
            socket.read_exact(&mut head).unwrap();
            let number = |at: usize| u32::from_be_bytes(head[at..at + 4].try_into().unwrap());
            let mut body = vec![0; number(16) as usize];
            socket.read_exact(&mut body).unwrap();
            all.extend_from_slice(&head);
            all.extend_from_slice(&body);
            if number(12) == 1 || number(12) >> 31 == 1 {
                return String::from_utf8_lossy(&all).into_owned();
            }
        }
    };
    let (list, structured, info, go, list_contexts, set_contexts) = (3, 8, 6, 7, 9, 10);
    ask(structured, b"");
    let mut query = |option, name: &str| {
        let mut data = (name.len() as u32).to_be_bytes().to_vec();
        data.extend_from_slice(name.as_bytes());
        data.extend_from_slice(if option == info || option == go { &[0; 2][..] } else { &[0; 4] });
        ask(option, &data).replace(&format!("{name:?}"), "NAME")
    };
    for option in [info, go, list_contexts, set_contexts] {
        let answer = query(option, "secret");
        assert!(answer.contains("no export named NAME"), "{answer:?}");
        assert_eq!(answer, query(option, "absent"), "option {option}");
        // The default export remains the secret one: a client that names no export does not get another one.
        assert!(query(option, "").contains("no export named"), "option {option}");
    }
    assert_eq!((asked(&secret), asked(&public)), before, "a device was asked for its size");
    assert!(!query(info, "public").contains("no export"));
    let names = ask(list, b"");
    assert!(names.contains("public") && !names.contains("secret"), "{names:?}");
    assert_eq!(asked(&secret), before.0);
    assert!(asked(&public) > before.1);

    // And the end of a connection is reported.
    assert_eq!(end.try_recv(), Err(mpsc::TryRecvError::Empty));
    drop(ours);
    assert_eq!(end.recv_timeout(PATIENCE), Err(mpsc::RecvTimeoutError::Disconnected));
}

#[test]
fn the_end_of_a_connection_is_reported_when_nothing_is_left_of_it() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (over, end) = mpsc::channel();
    let listener = Listener::Connected { socket: theirs.into(), over };
    let _server = start(vec![("", Arc::new(Memory::new(1 << 20)))], vec![listener], |_| {}).unwrap();
    let mut client = Client::enter(ours, "");
    client.encoder.read(&mut client.out, Cookie(1), 0, 512);
    client.send();
    client.reply(1).unwrap();
    assert_eq!(end.try_recv(), Err(mpsc::TryRecvError::Empty));
    client.encoder.disconnect(&mut client.out, Cookie(2));
    client.send();
    assert_eq!(end.recv_timeout(PATIENCE), Err(mpsc::RecvTimeoutError::Disconnected));
}

/// A server and the socket it listens on.
struct Running {
    server: Server,
    path: PathBuf,
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

impl Running {
    fn start(devices: Vec<(&str, Arc<dyn Device>)>, change: impl FnOnce(&mut Limits)) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("nbd-server-core-{}-{number}.sock", std::process::id()));
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(&path).unwrap();
        let server = start(devices, vec![listener.into()], change).unwrap();
        Self { server, path }
    }

    fn connect(&self) -> UnixStream {
        let socket = UnixStream::connect(&self.path).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket
    }

    fn client(&self, name: &str) -> Client {
        self.try_client(name).expect("the export is there")
    }

    /// `None`: there is no such export.
    fn try_client(&self, name: &str) -> Option<Client> {
        Client::try_enter(self.connect(), name)
    }
}

fn start(
    devices: Vec<(&str, Arc<dyn Device>)>,
    listeners: Vec<Listener>,
    change: impl FnOnce(&mut Limits),
) -> io::Result<Server> {
    let mut limits = Limits::default();
    change(&mut limits);
    Server::start(
        devices.into_iter().map(|(name, device)| export(name, device, &[])).collect(),
        listeners,
        None,
        limits,
    )
}

fn export(name: &str, device: Arc<dyn Device>, rules: &[&str]) -> Export {
    let mut export = Export::new(name, device);
    export.access = Access(rules.iter().map(|rule| rule.parse().unwrap()).collect());
    export
}

/// A client that waits for its replies.
struct Client {
    socket: UnixStream,
    size: u64,
    encoder: Encoder,
    decoder: Decoder,
    out: Vec<u8>,
    input: Vec<u8>,
}

impl Client {
    /// Does the handshake.
    fn enter(socket: UnixStream, name: &str) -> Self {
        Self::try_enter(socket, name).expect("the export is there")
    }

    /// `None`: there is no such export.
    fn try_enter(mut socket: UnixStream, name: &str) -> Option<Self> {
        let mut course = Negotiation::new(Wish { name: name.into(), mode: Mode::Structured, ..Wish::default() });
        let (mut out, mut staging) = (Vec::new(), [0; 4096]);
        loop {
            let got = socket.read(&mut staging).unwrap();
            assert!(got > 0, "the handshake continues");
            let step = match course.next(&mut &staging[..got], &mut out) {
                Err(Failure::Refused(Opt::GO, refusal)) if refusal.code == Rep::ERR_UNKNOWN => return None,
                step => step.unwrap(),
            };
            socket.write_all(&out).unwrap();
            out.clear();
            if let Step::Done(agreed) = step {
                let (mode, size) = (agreed.terms.mode, agreed.terms.size);
                let (encoder, decoder) = (Encoder::new(mode), Decoder::new(mode));
                return Some(Self { socket, size, encoder, decoder, out, input: Vec::new() });
            }
        }
    }

    fn send(&mut self) {
        self.try_send().unwrap();
    }

    fn try_send(&mut self) -> io::Result<()> {
        self.socket.write_all(&self.out)?;
        self.out.clear();
        Ok(())
    }

    /// The reply to that request, which must be the next one.
    fn reply(&mut self, cookie: u64) -> Result<Vec<u8>, WireError> {
        let (found, result) = self.any_reply();
        assert_eq!(found, cookie);
        result
    }

    fn any_reply(&mut self) -> (u64, Result<Vec<u8>, WireError>) {
        self.next_reply().expect("the server keeps the connection")
    }

    /// `None`: the server has closed the connection.
    fn next_reply(&mut self) -> Option<(u64, Result<Vec<u8>, WireError>)> {
        let (mut data, mut whose, mut coming, mut last) = (Vec::new(), 0, 0, false);
        loop {
            let mut input = &self.input[..];
            let event = self.decoder.next(&mut input).unwrap();
            let end = match event {
                Some(Event::Simple(cookie, result)) => Some((cookie.0, result.map(|()| Vec::new()))),
                Some(Event::Chunk { cookie, chunk: Chunk::Error { error, .. }, .. }) => Some((cookie.0, Err(error))),
                Some(Event::Chunk { cookie, chunk: Chunk::Data { len, .. }, done, .. }) => {
                    (whose, last) = (cookie.0, done);
                    coming += len as usize;
                    None
                }
                Some(Event::Chunk { cookie, chunk: Chunk::Hole { len, .. }, done, .. }) => {
                    (whose, last) = (cookie.0, done);
                    coming += len as usize;
                    data.resize(coming, 0);
                    None
                }
                Some(Event::Chunk { cookie, .. }) => Some((cookie.0, Ok(Vec::new()))),
                Some(Event::Payload(bytes)) => {
                    data.extend_from_slice(bytes);
                    None
                }
                None => {
                    let mut staging = vec![0; 1 << 20];
                    let got = match self.socket.read(&mut staging) {
                        Ok(0) => return None,
                        Err(e) if e.kind() == io::ErrorKind::ConnectionReset => return None,
                        got => got.unwrap(),
                    };
                    staging.truncate(got);
                    self.input = staging;
                    continue;
                }
            };
            let taken = self.input.len() - input.len();
            self.input.drain(..taken);
            if end.is_some() {
                return end;
            }
            if last && data.len() == coming {
                return Some((whose, Ok(data)));
            }
        }
    }
}
