//! Handshakes: no client, device or listening socket can keep clients out.

use std::{
    fs::File,
    io::{self, Read, Write},
    net::{TcpListener, TcpStream},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::net::{UnixListener, UnixStream},
    },
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use blkdev::{
    Device, Info, Mapping, Queue,
    fault::{Bug, Fault, Faults},
    memory::Memory,
};
use nbd_proto::{
    Cookie, Mode, WireError,
    client::{Encoder, Negotiation, Step, Wish},
    wire::{CommandFlags, CommandKind},
};
use nbd_server_core::{Limits, Listener, Removal, Server};
use nix::sys::{
    resource::{Resource, getrlimit, setrlimit},
    socket::{Shutdown, shutdown},
};

use crate::{Client, PATIENCE, Running, changes::eventually, export, start};

/// A device with another way to return its size.
struct Odd<F>(Memory, F);

impl<F: Fn(u64) -> u64 + Send + Sync + 'static> Odd<F> {
    fn new(size: F) -> Arc<Self> {
        Arc::new(Self(Memory::new(1 << 20), size))
    }
}

impl<F: Fn(u64) -> u64 + Send + Sync + 'static> Device for Odd<F> {
    fn info(&self) -> &Info {
        self.0.info()
    }

    fn capacity(&self) -> u64 {
        (self.1)(self.0.capacity())
    }

    fn register(&self, mapping: &Arc<Mapping>) -> io::Result<()> {
        self.0.register(mapping)
    }

    fn open_queue(&self, depth: u16) -> io::Result<Box<dyn Queue>> {
        self.0.open_queue(depth)
    }
}

fn is_door() -> bool {
    thread::current().name() == Some("door")
}

fn is_worker() -> bool {
    thread::current().name().is_some_and(|name| name.starts_with("worker"))
}

fn disk() -> Arc<dyn Device> {
    Arc::new(Memory::new(1 << 20))
}

fn is_served(client: &mut Client) {
    client.encoder.read(&mut client.out, Cookie(7), 0, 512);
    client.send();
    assert_eq!(client.reply(7).unwrap().len(), 512);
}

#[test]
fn an_extended_reply_repeats_the_offset_of_every_request() {
    const AT: u64 = 8192;
    let server = Running::start(vec![("", disk())], |_| {});
    let mut socket = server.connect();
    let wish = Wish { mode: Mode::Extended, contexts: vec!["base:allocation".into()], ..Wish::default() };
    let (mut course, mut out, mut staging) = (Negotiation::new(wish), Vec::new(), [0; 4096]);
    loop {
        let got = socket.read(&mut staging).unwrap();
        let step = course.next(&mut &staging[..got], &mut out).unwrap();
        socket.write_all(&out).unwrap();
        out.clear();
        if let Step::Done(_) = step {
            break;
        }
    }
    let encoder = Encoder::new(Mode::Extended);
    // All commands except DISC, and two unknown ones; valid and invalid flags; ranges that fit, are empty, and end past the
    // export. The payload of a status selects one context.
    let payload = [&512u64.to_be_bytes()[..], &[0; 4]].concat();
    for kind in [0u16, 1, 3, 4, 5, 6, 7, 8, 99] {
        for flags in [0u16, 1, 4, 0x8000, 0x20] {
            for len in [0u64, 512, 1 << 20, 1 << 40] {
                let payload = match (kind, flags) {
                    // The test does not send such a long payload.
                    (1, _) | (_, 0x20) if len > 1 << 20 => continue,
                    (7, 0x20) => payload.clone(),
                    (1, _) | (_, 0x20) => vec![1; len as usize],
                    _ => Vec::new(),
                };
                let said = if payload.is_empty() { len } else { payload.len() as u64 };
                encoder.request(&mut out, Cookie(1), CommandKind(kind), CommandFlags(flags), AT, said);
                out.extend_from_slice(&payload);
                socket.write_all(&out).unwrap();
                out.clear();
                loop {
                    let mut head = [0; 32];
                    socket.read_exact(&mut head).unwrap();
                    let number = |at: usize| u64::from_be_bytes(head[at..at + 8].try_into().unwrap());
                    assert_eq!((number(8), number(16)), (1, AT), "command {kind}, flags {flags:x}, {len} bytes");
                    socket.read_exact(&mut vec![0; number(24) as usize]).unwrap();
                    if head[5] & 1 == 1 {
                        break;
                    }
                }
            }
        }
    }
}

#[test]
fn a_client_may_ask_about_each_of_many_exports() {
    let names: Vec<String> = (0..300).map(|n| format!("export number {n}")).collect();
    let exports = names.iter().map(|name| export(name, Arc::new(Memory::new(512)), &[])).collect();
    let (mut socket, theirs) = UnixStream::pair().unwrap();
    let listener = Listener::Connected { socket: theirs.into(), over: mpsc::channel().0 };
    let mut limits = Limits::default();
    (limits.workers, limits.memory) = (1, 1 << 20);
    let _server = Server::start(exports, vec![listener], None, limits).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket.read_exact(&mut [0; 18]).unwrap();
    socket.write_all(&3u32.to_be_bytes()).unwrap();
    // Number of replies before the last one, which must be an ACK.
    let mut ask = |option: u32, data: &[u8]| {
        let head = [&b"IHAVEOPT"[..], &option.to_be_bytes(), &(data.len() as u32).to_be_bytes()].concat();
        socket.write_all(&[&head, data].concat()).unwrap();
        for count in 0.. {
            let mut head = [0; 20];
            socket.read_exact(&mut head).unwrap();
            let number = |at: usize| u32::from_be_bytes(head[at..at + 4].try_into().unwrap());
            socket.read_exact(&mut vec![0; number(16) as usize]).unwrap();
            if number(12) == 1 {
                return count;
            }
            assert!(number(12) < 1 << 31, "option {option} is refused with {:x}", number(12));
        }
        unreachable!("it ends before numbers do")
    };
    assert_eq!(ask(8, b""), 0);
    assert_eq!(ask(3, b""), 300);
    for name in &names {
        let name = [&(name.len() as u32).to_be_bytes(), name.as_bytes()].concat();
        let contexts = [&name[..], &[0, 0, 0, 1, 0, 0, 0, 15], b"base:allocation"].concat();
        assert_eq!((ask(10, &contexts), ask(9, &contexts)), (1, 1));
        assert_eq!((ask(6, &[&name[..], &[0; 2]].concat()), ask(9, &[&name[..], &[0; 4]].concat())), (1, 1));
    }
}

#[test]
fn a_change_does_not_wait_for_a_handshake_and_the_handshake_does_not_lose() {
    struct Gate {
        shut: Mutex<bool>,
        changed: Condvar,
        waiting: AtomicBool,
    }
    let gate = Arc::new(Gate { shut: Mutex::new(false), changed: Condvar::new(), waiting: AtomicBool::new(false) });
    let behind = Arc::clone(&gate);
    let device = Odd::new(move |size| {
        let mut shut = behind.shut.lock().unwrap();
        while *shut && is_door() {
            behind.waiting.store(true, Ordering::Relaxed);
            shut = behind.changed.wait(shut).unwrap();
        }
        size
    });
    let watched: std::sync::Weak<dyn Device> = Arc::<_>::downgrade(&(device.clone() as Arc<dyn Device>));
    let server = Running::start(vec![("x", device), ("stays", disk())], |limits| limits.workers = 2);
    *gate.shut.lock().unwrap() = true;
    let open = || {
        *gate.shut.lock().unwrap() = false;
        gate.changed.notify_all();
    };
    thread::scope(|scope| {
        let client = scope.spawn(|| server.client("x"));
        eventually(|| gate.waiting.load(Ordering::Relaxed));
        let (done, changed) = mpsc::channel();
        let server = &server.server;
        scope.spawn(move || {
            server.remove("x", Removal::Hide).unwrap();
            server.add(export("new", disk(), &[])).unwrap();
            done.send(server.exports().len()).unwrap();
        });
        let changed = changed.recv_timeout(PATIENCE);
        // A pause, for servers that might give up too early.
        thread::sleep(Duration::from_millis(100));
        open();
        let mut client = client.join().unwrap();
        assert_eq!(changed, Ok(3), "the change has waited for the handshake");
        // The server reported that the export exists, so the client gets it.
        is_served(&mut client);
    });
    eventually(|| watched.strong_count() == 0);
    eventually(|| server.server.exports().len() == 2);
    is_served(&mut server.client("new"));
}

#[test]
fn a_device_that_panics_in_a_handshake_costs_one_client_and_not_the_door() {
    let server = Running::start(
        vec![
            ("odd", Odd::new(|size| if is_door() { panic!("asked by the door, on purpose") } else { size })),
            ("x", disk()),
        ],
        |_| {},
    );
    for _ in 0..3 {
        let refused = catch_unwind(AssertUnwindSafe(|| server.try_client("odd")));
        assert!(refused.is_err(), "it was served");
        is_served(&mut server.client("x"));
    }
}

/// A driver that panics on a worker, in a queue or when asked for its size, causes errors for its own clients. All others
/// continue.
#[test]
fn a_driver_that_panics_ends_its_export_and_no_other() {
    let panics = Arc::new(AtomicBool::new(false));
    let when = Arc::clone(&panics);
    let of_device = Odd::new(move |size| {
        assert!(!(is_worker() && when.load(Ordering::Relaxed)), "a panic of the device, on purpose");
        size
    });
    let bug = Some((5, Bug::Panic));
    let of_queue = Arc::new(Fault::new(Memory::new(1 << 20), Faults { bug, ..Faults::new(1) }));
    let exports = || vec![("device", of_device.clone() as Arc<dyn Device>), ("queue", of_queue.clone()), ("x", disk())];
    let server = Running::start(exports(), |limits| limits.workers = 1);
    let mut healthy = server.client("x");
    for name in ["device", "queue"] {
        let mut client = server.client(name);
        is_served(&mut client);
        panics.store(true, Ordering::Relaxed);
        // Some requests may succeed before a queue panics.
        let fails = |client: &mut Client, cookie| {
            client.encoder.read(&mut client.out, Cookie(cookie), 0, 512);
            client.send();
            client.reply(cookie) == Err(WireError::Io)
        };
        let first = (0..1000).find(|cookie| fails(&mut client, *cookie)).expect("the driver is faulty");
        assert!((first..first + 10).all(|cookie| fails(&mut client, cookie)), "{name}: it stays dead");
        assert!(fails(&mut server.client(name), 0), "{name}: for new clients, too");
        is_served(&mut healthy);
        is_served(&mut server.client("x"));
    }
    server.server.remove("device", Removal::Soft).unwrap();
    server.server.add(export("new", disk(), &[])).unwrap();
    is_served(&mut server.client("new"));
}

/// Panics when a worker logs a request with this magic. So a test can make a worker panic through a bug of its own.
struct Trap;

const TRAP: u32 = 0x0bad_b07e;

impl log::Log for Trap {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        assert!(!(is_worker() && record.args().to_string().contains(&format!("{TRAP:#x}")[2..])), "on purpose");
    }

    fn flush(&self) {}
}

fn make_worker_panic(client: &mut Client) {
    let _ = log::set_logger(&Trap);
    log::set_max_level(log::LevelFilter::Info);
    client.out.extend_from_slice(&TRAP.to_be_bytes());
    client.out.extend_from_slice(&[0; 28]);
    client.send();
    assert!(client.next_reply().is_none(), "its connection is closed");
}

#[test]
fn a_worker_panic_is_a_failure_and_the_worker_gets_no_more_clients() {
    let server = Running::start(vec![("x", disk())], |limits| limits.workers = 1);
    make_worker_panic(&mut server.client("x"));
    let end = server.server.end();
    let text = end.wait().expect("a failure, not a stop");
    assert!(text.contains("worker 0") && text.contains("on purpose"), "{text}");
    assert_eq!(server.server.wait().to_string(), text);
    let refused = catch_unwind(AssertUnwindSafe(|| is_served(&mut server.client("x"))));
    assert!(refused.is_err(), "no worker can serve it");
    let error = server.server.add(export("new", disk(), &[])).unwrap_err().to_string();
    assert!(error.contains("\"new\"") && error.contains("all workers"), "{error}");
}

#[test]
fn clients_of_a_dead_worker_go_to_the_living() {
    let server = Running::start(vec![("x", disk())], |limits| limits.workers = 2);
    make_worker_panic(&mut server.client("x"));
    server.server.end().wait().unwrap();
    let mut crowd: Vec<Client> = (0..6).map(|_| server.client("x")).collect();
    crowd.iter_mut().for_each(is_served);
    server.server.add(export("new", disk(), &[])).unwrap();
    let mut crowd: Vec<Client> = (0..6).map(|_| server.client("new")).collect();
    crowd.iter_mut().for_each(is_served);
}

#[test]
fn a_server_that_is_stopped_has_not_failed() {
    let server = Running::start(vec![("", disk())], |_| {});
    let end = server.server.end();
    let waiter = thread::spawn(move || end.wait());
    is_served(&mut server.client(""));
    drop(server);
    assert_eq!(waiter.join().unwrap(), None);
}

#[test]
fn a_listening_socket_that_was_shut_down_is_closed_and_the_others_go_on() {
    let path = std::env::temp_dir().join(format!("nbd-door-{}.sock", std::process::id()));
    for how in [Shutdown::Both, Shutdown::Read] {
        let _ = std::fs::remove_file(&path);
        let unix = UnixListener::bind(&path).unwrap();
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = tcp.local_addr().unwrap();
        let mut ours = [OwnedFd::from(unix.try_clone().unwrap()), tcp.try_clone().unwrap().into()].into_iter();
        let server = start(vec![("", disk())], vec![unix.into(), tcp.into()], |_| {}).unwrap();
        let mut shut_down_next = || {
            let socket = ours.next().unwrap();
            let name = std::fs::read_link(format!("/proc/self/fd/{}", socket.as_raw_fd())).unwrap();
            shutdown(socket.as_raw_fd(), how).unwrap();
            drop(socket);
            let is_open = || {
                let all = std::fs::read_dir("/proc/self/fd").unwrap();
                all.filter_map(|fd| std::fs::read_link(fd.ok()?.path()).ok()).any(|found| found == name)
            };
            eventually(|| !is_open());
        };
        let mut client = Client::enter(UnixStream::connect(&path).unwrap(), "");
        shut_down_next();
        let mut greeting = [0; 18];
        TcpStream::connect(address).unwrap().read_exact(&mut greeting).unwrap();
        assert!(greeting.starts_with(b"NBDMAGIC"));
        shut_down_next();
        let text = server.end().wait().expect("nothing is left to listen on");
        assert!(text.contains("no listening socket is left"), "{text}");
        // Connected clients are still served.
        is_served(&mut client);
    }
    std::fs::remove_file(path).unwrap();
}

#[test]
fn a_client_that_cannot_be_polled_is_rejected_and_the_next_one_served() {
    let file: OwnedFd = File::open("/proc/self/exe").unwrap().into();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (first, end) = mpsc::channel();
    let (second, other_end) = mpsc::channel();
    let listeners = vec![
        // epoll does not accept regular files.
        Listener::Connected { socket: file, over: first },
        Listener::Connected { socket: theirs.into(), over: second },
    ];
    let server = start(vec![("", disk())], listeners, |_| {}).unwrap();
    assert_eq!(end.recv_timeout(PATIENCE), Err(mpsc::RecvTimeoutError::Disconnected));
    is_served(&mut Client::enter(ours, ""));
    assert_eq!(other_end.recv_timeout(PATIENCE), Err(mpsc::RecvTimeoutError::Disconnected));
    drop(server);
}

#[test]
fn silent_connections_do_not_keep_clients_out() {
    const CROWD: usize = 1100;
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    assert!(most > 3 * CROWD as u64, "this takes more descriptors than {most}");
    setrlimit(Resource::RLIMIT_NOFILE, most, most).unwrap();
    let server = Running::start(vec![("", disk())], |limits| limits.handshake_timeout = 4 * PATIENCE);
    let start = Instant::now();
    let mut crowd: Vec<UnixStream> = (0..CROWD).map(|_| server.connect()).collect();
    for _ in 0..20 {
        is_served(&mut server.client(""));
        // A client that was disconnected connects again at once.
        crowd.drain(..20);
        crowd.extend((0..40).map(|_| server.connect()));
    }
    assert!(start.elapsed() < 2 * PATIENCE, "they got in before the others had to leave");
}

#[test]
fn silent_clients_make_room_when_connections_are_short() {
    let server = Running::start(vec![("", disk())], |limits| {
        (limits.connections, limits.handshake_timeout) = (6, 10 * PATIENCE);
    });
    let mut served = [(); 2].map(|()| server.client(""));
    served.iter_mut().for_each(is_served);
    let silent: Vec<UnixStream> = (0..4).map(|_| server.connect()).collect();
    silent.iter().for_each(|mut socket| socket.read_exact(&mut [0; 18]).unwrap());
    // Not before its second is over: it may be about to send something.
    let mut early = server.connect();
    let greeted = early.read(&mut [0; 18]).unwrap_or(0);
    thread::sleep(Duration::from_millis(1200));
    let mut late: Vec<Client> = (0..3).map(|_| server.client("")).collect();
    late.iter_mut().chain(&mut served).for_each(is_served);
    drop((silent, greeted));
}

#[test]
fn clients_that_send_stay_longer_than_silent_ones() {
    let server = Running::start(vec![("", disk())], |limits| {
        (limits.handshakes, limits.handshake_timeout) = (4, 10 * PATIENCE);
    });
    let mut talking = server.connect();
    talking.read_exact(&mut [0; 18]).unwrap();
    talking.write_all(&3u32.to_be_bytes()).unwrap();
    let mut crowd = Vec::new();
    for _ in 0..20 {
        let mut silent = server.connect();
        silent.read_exact(&mut [0; 18]).unwrap();
        crowd.push(silent);
        // An unknown option, and the reply to it.
        talking.write_all(b"IHAVEOPT\0\0\0\x63\0\0\0\0").unwrap();
        let mut head = [0; 20];
        talking.read_exact(&mut head).unwrap();
        let len = u32::from_be_bytes(head[16..].try_into().unwrap());
        talking.read_exact(&mut vec![0; len as usize]).unwrap();
    }
    let mut gone =
        crowd.into_iter().map(|mut silent| silent.set_nonblocking(true).and_then(|()| silent.read(&mut [0; 1])));
    assert!(gone.next().unwrap().is_ok_and(|got| got == 0), "silent clients had to leave");
}
