//! The client against servers that break the protocol, or close at any byte: it reports that, and never panics or hangs.

mod common;

use std::{
    io::{Read, Write},
    net::Shutdown,
    os::unix::net::{UnixListener, UnixStream},
    thread,
    time::Duration,
};

use common::{MODES, PATIENCE, Seed, options};
use nbd_client::{Address, BASE_ALLOCATION, Client, Completion, Engine, Error, Mode, Request, Uri, WireError, list};
use nbd_proto::{
    BlockSizes, Catalog, Export, Handshake, Offer, Refusal, Step,
    client::{Negotiation, Step as ClientStep, Wish},
    wire::TransmissionFlags,
};

/// Bytes of the export.
const SIZE: u64 = 1 << 30;

/// Where the requests of these tests begin, and their length.
const AT: u64 = 8192;
const LEN: usize = 4096;

struct Disk;

impl Catalog for Disk {
    fn list(&self, each: &mut dyn FnMut(&str, &str)) -> Result<(), Refusal> {
        each("disk", "");
        Ok(())
    }

    fn find(&self, _: &str) -> Result<Export, Refusal> {
        Ok(Export {
            name: "disk".into(),
            description: String::new(),
            size: SIZE,
            flags: TransmissionFlags(0x1fff).without(TransmissionFlags::READ_ONLY),
            block: BlockSizes { min: 1, preferred: 4096, payload_max: 32 << 20 },
            contexts: vec![BASE_ALLOCATION.into(), "x-test:y".into()],
            block_size_required: false,
        })
    }
}

/// What a server sends; it closes after so many bytes.
struct Mouth {
    socket: UnixStream,
    left: usize,
}

impl Mouth {
    /// `None`: it has closed.
    fn say(&mut self, bytes: &[u8]) -> Option<()> {
        let most = bytes.len().min(self.left);
        self.left -= most;
        // The client may have closed first.
        self.socket.write_all(&bytes[..most]).ok()?;
        (most == bytes.len()).then_some(())
    }

    fn hear(&mut self, buf: &mut [u8]) -> Option<()> {
        self.socket.read_exact(buf).ok()
    }

    /// A well-behaved handshake.
    fn shake(&mut self) -> Option<()> {
        let mut out = Vec::new();
        let mut handshake = Handshake::new(Offer::default(), &mut out);
        loop {
            self.say(&std::mem::take(&mut out))?;
            let mut byte = [0];
            self.hear(&mut byte)?;
            if let Step::Done(_) = handshake.next(&mut byte.as_slice(), &Disk, &mut out).ok()? {
                return self.say(&out);
            }
        }
    }

    /// Takes a request with its payload, and returns its cookie.
    fn request(&mut self, mode: Mode, payload: usize) -> Option<u64> {
        let mut head = vec![0; if mode == Mode::Extended { 32 } else { 28 } + payload];
        self.hear(&mut head)?;
        Some(u64::from_be_bytes(head[8..16].try_into().unwrap()))
    }

    /// Closes, and waits until the client does: a socket with unread bytes would report a reset.
    fn close(mut self) {
        let _ = self.socket.shutdown(Shutdown::Write);
        let _ = self.socket.read_to_end(&mut Vec::new());
    }
}

/// Replies as they go over the wire.
struct Said {
    mode: Mode,
    cookie: u64,
    bytes: Vec<u8>,
}

const DONE: u16 = 1;

impl Said {
    fn simple(mut self, error: u32) -> Self {
        self.bytes.extend_from_slice(&0x6744_6698_u32.to_be_bytes());
        self.bytes.extend_from_slice(&error.to_be_bytes());
        self.bytes.extend_from_slice(&self.cookie.to_be_bytes());
        self
    }

    fn head(mut self, flags: u16, kind: u16, len: u64) -> Self {
        let magic: u32 = if self.mode == Mode::Extended { 0x6e8a_278c } else { 0x668e_33ef };
        self.bytes.extend_from_slice(&magic.to_be_bytes());
        self.bytes.extend_from_slice(&flags.to_be_bytes());
        self.bytes.extend_from_slice(&kind.to_be_bytes());
        self.bytes.extend_from_slice(&self.cookie.to_be_bytes());
        if self.mode == Mode::Extended {
            self.bytes.extend_from_slice(&AT.to_be_bytes());
            self.bytes.extend_from_slice(&len.to_be_bytes());
        } else {
            self.bytes.extend_from_slice(&(len as u32).to_be_bytes());
        }
        self
    }

    fn chunk(self, flags: u16, kind: u16, body: &[u8]) -> Self {
        self.head(flags, kind, body.len() as u64).raw(body)
    }

    fn data(self, flags: u16, at: u64, len: usize) -> Self {
        self.chunk(flags, 1, &[&at.to_be_bytes()[..], &vec![7; len]].concat())
    }

    fn hole(self, flags: u16, at: u64, len: u32) -> Self {
        self.chunk(flags, 2, &[&at.to_be_bytes()[..], &len.to_be_bytes()].concat())
    }

    fn none(self) -> Self {
        self.chunk(DONE, 0, &[])
    }

    fn status(self, flags: u16, context: u32, lens: &[u32]) -> Self {
        let mut body = context.to_be_bytes().to_vec();
        if self.mode == Mode::Extended {
            body.extend_from_slice(&(lens.len() as u32).to_be_bytes());
            lens.iter().for_each(|len| body.extend_from_slice(&(u128::from(*len) << 64 | 3).to_be_bytes()));
            return self.chunk(flags, 6, &body);
        }
        lens.iter().for_each(|len| body.extend_from_slice(&(u64::from(*len) << 32 | 3).to_be_bytes()));
        self.chunk(flags, 5, &body)
    }

    fn error(self, flags: u16, at: Option<u64>) -> Self {
        let mut body = b"\0\0\0\x05\0\x03why".to_vec();
        body.extend(at.iter().flat_map(|at| at.to_be_bytes()));
        self.chunk(flags, if at.is_some() { 0x8002 } else { 0x8001 }, &body)
    }

    fn cookie(self, cookie: u64) -> Self {
        Self { cookie, ..self }
    }

    fn raw(mut self, bytes: &[u8]) -> Self {
        self.bytes.extend_from_slice(bytes);
        self
    }
}

/// Sends a request to a server that answers with these bytes and then closes.
fn outcome(mode: Mode, request: Request, answer: impl FnOnce(Said) -> Said + Send) -> Result<Completion, Error> {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let payload = if let Request::Write { data, .. } = &request { data.len() } else { 0 };
    thread::scope(|scope| {
        scope.spawn(move || {
            let mut mouth = Mouth { socket: theirs, left: usize::MAX };
            mouth.shake();
            if let Some(cookie) = mouth.request(mode, payload) {
                let _ = mouth.say(&answer(Said { mode, cookie, bytes: Vec::new() }).bytes);
            }
            mouth.close();
        });
        client(ours, mode)?.call(request)
    })
}

fn client(socket: UnixStream, mode: Mode) -> Result<Client, Error> {
    Client::over(socket.into(), &options().mode(mode).context(BASE_ALLOCATION).context("x-test:y"))
}

fn read() -> Request {
    Request::read(AT, LEN)
}

fn write() -> Request {
    Request::write(AT, vec![1; LEN])
}

fn status(one: bool) -> Request {
    Request::Status { at: AT, len: LEN as u64, one }
}

/// The client ends the connection because of the reply.
fn broken(mode: Mode, request: Request, answer: impl FnOnce(Said) -> Said + Send, text: &str) {
    let what = format!("{mode:?}: {request}: {text}");
    match outcome(mode, request, answer) {
        Err(error @ Error::Protocol(_)) => assert!(error.to_string().contains(text), "{what}, not: {error}"),
        other => panic!("{what}, not: {other:?}"),
    }
}

/// The client ends the connection, in every mode with chunks.
fn broken_chunks(request: &Request, answer: impl Fn(Said) -> Said + Send + Copy, text: &str) {
    for mode in [Mode::Structured, Mode::Extended] {
        broken(mode, request.clone(), answer, text);
    }
}

#[test]
fn replies_that_are_right() {
    for mode in [Mode::Structured, Mode::Extended] {
        let parts = |said: Said| said.data(0, AT + 4000, 96).hole(0, AT, 1000).data(DONE, AT + 1000, 3000);
        let Request::Read { buffer, .. } = outcome(mode, read(), parts).unwrap().request else { panic!("a READ") };
        assert!(buffer[..1000].iter().all(|byte| *byte == 0) && buffer[1000..].iter().all(|byte| *byte == 7));
        outcome(mode, read(), |said| said.hole(0, AT, 4096).none()).unwrap();
        outcome(mode, write(), Said::none).unwrap();
        let beyond = |said: Said| said.status(0, 1, &[1, 1 << 20]).status(DONE, 0, &[7]);
        let all = outcome(mode, status(false), beyond).unwrap().status;
        assert_eq!(
            all.iter().map(|status| (&*status.context, status.extents.len())).collect::<Vec<_>>(),
            [("x-test:y", 2), (BASE_ALLOCATION, 1)]
        );
        // A server may mix these.
        if mode == Mode::Structured {
            outcome(mode, write(), |said| said.simple(0)).unwrap();
        }
    }
    outcome(Mode::Simple, read(), |said| said.simple(0).raw(&[7; LEN])).unwrap();
    outcome(Mode::Simple, write(), |said| said.simple(0)).unwrap();
}

#[test]
fn errors_of_requests() {
    for mode in [Mode::Structured, Mode::Extended] {
        let several = |said: Said| said.error(0, Some(AT + 5)).data(0, AT, 9).error(0, None).none();
        match outcome(mode, read(), several).unwrap_err() {
            Error::Server { error: WireError::Io, at: Some(at), text, request } => {
                assert_eq!((at, text.as_str(), request.as_str()), (AT + 5, "why", "READ of 4096 bytes at 8192"));
            }
            other => panic!("{other:?}"),
        }
        let alone = outcome(mode, write(), |said| said.error(DONE, None)).unwrap_err();
        assert_eq!(alone.to_string(), "WRITE of 4096 bytes at 8192: server reported: input/output error (why)");
    }
    let full = outcome(Mode::Simple, write(), |said| said.simple(28)).unwrap_err();
    assert!(matches!(full, Error::Server { error: WireError::NoSpc, .. }), "{full:?}");
}

#[test]
fn replies_to_no_request() {
    for mode in MODES {
        let done = move |said: Said| if mode == Mode::Simple { said.simple(0) } else { said.none() };
        for other in [0, 1, 1 << 32 | 1, 2 << 32, u64::MAX] {
            broken(mode, write(), |said| done(said.cookie(other)), "which no request in flight has");
        }
        broken(mode, write(), |said| said.raw(&[0x67; 32]), "another magic");
    }
    // A second reply, before the next request.
    let (ours, theirs) = UnixStream::pair().unwrap();
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut mouth = Mouth { socket: theirs, left: usize::MAX };
            mouth.shake();
            let cookie = mouth.request(Mode::Simple, 0).unwrap();
            let said = Said { mode: Mode::Simple, cookie, bytes: Vec::new() };
            mouth.say(&said.simple(0).bytes);
            mouth.request(Mode::Simple, 0).unwrap();
            let said = Said { mode: Mode::Simple, cookie, bytes: Vec::new() };
            mouth.say(&said.simple(0).bytes);
            mouth.close();
        });
        let mut client = client(ours, Mode::Simple).unwrap();
        client.flush().unwrap();
        assert!(matches!(client.flush(), Err(Error::Protocol(_))));
        assert!(matches!(client.flush(), Err(Error::Closed)));
    });
}

#[test]
fn data_in_the_wrong_place() {
    let read = read();
    let outside = "is outside of it";
    broken_chunks(&read, |said| said.data(DONE, AT - 1, 1), outside);
    broken_chunks(&read, |said| said.data(DONE, AT, LEN + 1), outside);
    broken_chunks(&read, |said| said.data(DONE, AT + LEN as u64, 1), outside);
    broken_chunks(&read, |said| said.data(DONE, u64::MAX, 1), outside);
    broken_chunks(&read, |said| said.data(DONE, 0, 1), outside);
    broken_chunks(&read, |said| said.hole(DONE, AT, LEN as u32 + 1), outside);
    broken_chunks(&read, |said| said.hole(DONE, AT + 1, u32::MAX), outside);
    broken_chunks(&read, |said| said.hole(DONE, u64::MAX, u32::MAX), outside);
    let huge = |said: Said| said.head(DONE, 1, u32::MAX.into()).raw(&AT.to_be_bytes());
    broken_chunks(&read, huge, outside);
    let overlap = "overlaps another chunk";
    broken_chunks(&read, |said| said.data(0, AT, 100).data(0, AT + 99, 1), overlap);
    broken_chunks(&read, |said| said.data(0, AT + 99, 1).data(0, AT, 100), overlap);
    broken_chunks(&read, |said| said.hole(0, AT, LEN as u32).data(DONE, AT, LEN), overlap);
    broken_chunks(&read, |said| said.data(0, AT, LEN).hole(DONE, AT + 7, 1), overlap);
    let early = "the reply ended before all data had come";
    broken_chunks(&read, Said::none, early);
    broken_chunks(&read, |said| said.data(DONE, AT, LEN - 1), early);
    broken_chunks(&read, |said| said.data(0, AT + 1, LEN - 1).none(), early);
    broken_chunks(&read, |said| said.hole(DONE, AT, 1), early);
    let df = Request::Read { at: AT, buffer: vec![0; LEN], df: true };
    broken_chunks(&df, |said| said.data(0, AT, 1).data(0, AT + 1, LEN - 1), "in spite of the flag DF");
    broken_chunks(&write(), |said| said.data(DONE, AT, 1), "a chunk with data came");
    broken_chunks(&status(false), |said| said.hole(DONE, AT, 1), "a chunk with data came");
    let simple = "a simple reply came, but the replies to READ are chunks";
    broken(Mode::Structured, read.clone(), |said| said.simple(0), simple);
    broken(Mode::Structured, read.clone(), |said| said.simple(5), "a simple reply came");
    broken(Mode::Structured, read, |said| said.data(0, AT, 1).simple(5), "a simple reply came after chunks");
}

#[test]
fn chunks_that_cannot_be() {
    broken(Mode::Simple, write(), Said::none, "another magic");
    broken(Mode::Extended, write(), |said| said.simple(0).raw(&[0; 16]), "another magic");
    let compact = |said: Said| Said { mode: Mode::Structured, ..said }.none().raw(&[0; 12]);
    broken(Mode::Extended, write(), compact, "another magic");
    broken_chunks(&write(), |said| said.chunk(DONE, 3, &[]), "a chunk of an unknown kind");
    broken_chunks(&write(), |said| said.chunk(0, 0, &[]), "a malformed chunk");
    broken(Mode::Extended, read(), |said| said.head(DONE, 1, 1 << 40).raw(&AT.to_be_bytes()), "a malformed chunk");
    // A chunk that repeats the offset of another request.
    let flush = outcome(Mode::Extended, Request::Flush, Said::none);
    assert!(
        matches!(&flush, Err(Error::Protocol(text)) if text == "FLUSH: a chunk repeats another offset"),
        "{flush:?}"
    );
}

#[test]
fn status_that_cannot_be() {
    let all = status(false);
    broken_chunks(&all, |said| said.status(DONE, 2, &[1]), "of a context came that was not selected");
    broken_chunks(
        &all,
        |said| said.status(0, 0, &[1]).status(DONE, 0, &[1]),
        "the status of base:allocation came twice",
    );
    broken_chunks(&all, |said| said.status(DONE, 0, &[1]), "before the status of all contexts had come");
    broken_chunks(&all, Said::none, "before the status of all contexts had come");
    let beyond = "the extents of base:allocation go past the request";
    broken_chunks(&all, |said| said.status(DONE, 0, &[LEN as u32, 1]), beyond);
    broken_chunks(&all, |said| said.status(DONE, 0, &[u32::MAX, u32::MAX, 1]), beyond);
    broken_chunks(&status(true), |said| said.status(DONE, 0, &[1, 1]), beyond);
    broken_chunks(&status(true), |said| said.status(DONE, 0, &[LEN as u32 + 1]), beyond);
    broken_chunks(&read(), |said| said.status(DONE, 0, &[1]), "a chunk with block status came");
    broken(Mode::Structured, all, |said| said.simple(0), "before the status of all contexts had come");
}

#[test]
fn replies_without_an_end() {
    let errors = |said: Said| (0..2000).fold(said, |said, _| said.error(0, None));
    broken_chunks(&read(), errors, "more than 1024 errors came");
    broken_chunks(&read(), |said| said.error(DONE, Some(AT + LEN as u64)), "an error at 12288 is outside of it");
    let crumbs = |said: Said| (0..5000).fold(said, |said, n| said.hole(0, AT + 2 * n, 1));
    broken_chunks(&Request::read(AT, 10_000), crumbs, "is one of too many pieces out of order");
}

/// The bytes of a server's handshake in this mode.
fn handshake(mode: Mode) -> Vec<u8> {
    let (mut said, mut all, mut to_server) = (Vec::new(), Vec::new(), Vec::new());
    let mut server = Handshake::new(Offer::default(), &mut said);
    let contexts = vec![BASE_ALLOCATION.into(), "x-test:y".into()];
    let mut client = Negotiation::new(Wish { mode, contexts, ..Wish::default() });
    loop {
        all.extend_from_slice(&said);
        if let ClientStep::Done(_) = client.next(&mut std::mem::take(&mut said).as_slice(), &mut to_server).unwrap() {
            return all;
        }
        server.next(&mut std::mem::take(&mut to_server).as_slice(), &Disk, &mut said).unwrap();
    }
}

/// Three requests with their replies, by a server that closes after so many bytes, or after a reply
/// of which `change` returns true. Returns whether it said all.
fn three(mode: Mode, left: usize, change: impl Fn(&mut Vec<u8>) -> bool + Send) -> (bool, Result<(), Error>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    thread::scope(|scope| {
        let server = scope.spawn(move || {
            let mut mouth = Mouth { socket: theirs, left };
            let mut converse = || {
                mouth.shake()?;
                for payload in [0, LEN, 0] {
                    let cookie = mouth.request(mode, payload)?;
                    let said = Said { mode, cookie, bytes: Vec::new() };
                    let mut said = match (mode, payload) {
                        (Mode::Simple, 0) => said.simple(0).raw(&[7; 64]),
                        (Mode::Simple, _) => said.simple(0),
                        (_, 0) => said.hole(0, AT, 20).data(0, AT + 30, 34).data(DONE, AT + 20, 10),
                        _ => said.none(),
                    };
                    let is_last = change(&mut said.bytes);
                    mouth.say(&said.bytes)?;
                    if is_last {
                        return None;
                    }
                }
                Some(())
            };
            let is_whole = converse().is_some();
            mouth.close();
            is_whole
        });
        let converse = || {
            let mut client = client(ours, mode)?;
            client.call(Request::read(AT, 64))?;
            client.call(write())?;
            client.call(Request::read(AT, 64))?;
            Ok(())
        };
        let result = converse();
        (server.join().unwrap(), result)
    })
}

#[test]
fn a_drop_says_goodbye() {
    for mode in MODES {
        let (ours, theirs) = UnixStream::pair().unwrap();
        thread::scope(|scope| {
            scope.spawn(|| drop(client(ours, mode).unwrap()));
            let mut mouth = Mouth { socket: theirs, left: usize::MAX };
            mouth.shake().unwrap();
            let mut last = Vec::new();
            mouth.socket.read_to_end(&mut last).unwrap();
            assert_eq!(last.len(), if mode == Mode::Extended { 32 } else { 28 });
            assert_eq!(last[4..8], [0, 0, 0, 2], "DISC");
        });
    }
}

#[test]
fn a_server_that_closes_at_any_byte() {
    for mode in MODES {
        let mut left = 0;
        loop {
            match three(mode, left, |_| false) {
                (true, result) => {
                    result.unwrap();
                    break;
                }
                (false, result) => assert!(matches!(result, Err(Error::Closed)), "{mode:?}, {left} bytes: {result:?}"),
            }
            left += 1;
        }
        assert!(left > handshake(mode).len() + 3 * 16, "the server has said something: {left}");
    }
}

#[test]
fn replies_with_changed_bits() {
    for n in 0..1500 {
        let mode = MODES[n as usize % 3];
        // Each reply has its own change, made of the seed and its length.
        let change = |said: &mut Vec<u8>| {
            let mut seed = Seed(n << 16 | said.len() as u64);
            let count = seed.below(4);
            for _ in 0..count {
                let place = seed.below(said.len() as u64) as usize;
                said[place] ^= 1 << seed.below(8);
            }
            // The client may wait for more of it.
            count > 0
        };
        let (_, result) = three(mode, usize::MAX, change);
        assert!(!matches!(result, Err(Error::Timeout { .. })), "{n}: {result:?}");
    }
}

#[test]
fn handshakes_with_changed_bits() {
    for n in 0..3000 {
        let mode = MODES[n as usize % 3];
        let (mut seed, mut said) = (Seed(n), handshake(mode));
        for _ in 0..=seed.below(3) {
            let place = seed.below(said.len() as u64) as usize;
            said[place] ^= 1 << seed.below(8);
        }
        said.truncate(said.len() - seed.below(2) as usize * seed.below(said.len() as u64) as usize);
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(&said).unwrap();
        theirs.shutdown(Shutdown::Write).unwrap();
        let result = client(ours, mode).and_then(|mut client| client.flush());
        assert!(matches!(&result, Err(error) if !matches!(error, Error::Timeout { .. })), "{n}: {result:?}");
    }
}

#[test]
fn exports_that_cannot_be() {
    let info = |body: &[u8]| {
        let len = (body.len() as u32).to_be_bytes();
        [&0x0003_e889_0455_65a9_u64.to_be_bytes()[..], b"\0\0\0\x07\0\0\0\x03", &len, body].concat()
    };
    let sizes = |min: u32, preferred: u32, max: u32| {
        info(&[b"\0\x03", &min.to_be_bytes()[..], &preferred.to_be_bytes(), &max.to_be_bytes()].concat())
    };
    let ack = [&0x0003_e889_0455_65a9_u64.to_be_bytes()[..], b"\0\0\0\x07\0\0\0\x01\0\0\0\0"].concat();
    let with = |infos: &[Vec<u8>]| {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(&[b"NBDMAGICIHAVEOPT\0\x03".to_vec(), infos.concat(), ack.clone()].concat()).unwrap();
        Engine::over(ours.into(), &options().mode(Mode::Simple)).map(|engine| engine.export().clone())
    };
    let export = |size: u64| info(&[b"\0\0", &size.to_be_bytes()[..], b"\0\x01"].concat());
    for (min, preferred, max) in
        [(0, 0, 0), (0, 512, 512), (3, 512, 512), (1 << 17, 1 << 17, 1 << 20), (512, 256, 1024), (512, 512, 1)]
    {
        let outcome = with(&[export(1 << 20), sizes(min, preferred, max)]);
        assert!(
            matches!(&outcome, Err(Error::Protocol(text)) if text.contains("impossible block sizes")),
            "{outcome:?}"
        );
    }
    let sound = with(&[export(1 << 20), sizes(1, 4096, u32::MAX)]).unwrap();
    assert_eq!((sound.size(), sound.block_sizes().payload_max), (1 << 20, u32::MAX));
    for outcome in [with(&[export(1 << 63)]), with(&[]), with(&[export(1 << 20), b"\0".to_vec()])] {
        assert!(matches!(outcome, Err(Error::Protocol(_))), "{outcome:?}");
    }
    // A server without flags: nothing is allowed but READ and WRITE.
    let old = with(&[info(&[b"\0\0", &(1_u64 << 20).to_be_bytes()[..], &[0xff, 0xfe]].concat())]).unwrap();
    assert!(old.can_write() && !old.can_flush() && !old.can_trim() && !old.can_fua());
}

/// Listens at a path of its own, and says this to the first client until it has enough.
fn listening(name: &str, first: &[u8], for_ever: &[u8]) -> (Uri, thread::JoinHandle<()>) {
    let path = std::env::temp_dir().join(format!("nbd-client-{name}-{}.sock", std::process::id()));
    let _ = std::fs::remove_file(&path);
    let listener = UnixListener::bind(&path).unwrap();
    let (first, for_ever) = (first.to_vec(), for_ever.to_vec());
    let uri = Uri::new(Address::Unix(path.clone()));
    let server = thread::spawn(move || {
        let (mut socket, _) = listener.accept().unwrap();
        std::fs::remove_file(path).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket.write_all(&first).unwrap();
        while socket.write_all(&for_ever).is_ok() && !for_ever.is_empty() {}
    });
    (uri, server)
}

#[test]
fn a_handshake_without_an_end() {
    let magic = 0x0003_e889_0455_65a9_u64.to_be_bytes();
    let description = [&magic[..], b"\0\0\0\x07\0\0\0\x03\0\0\0\x03\0\x02x"].concat();
    let (uri, server) = listening("endless", b"NBDMAGICIHAVEOPT\0\x03", &description.repeat(1000));
    let options = options().mode(Mode::Simple).handshake_timeout(Some(Duration::from_millis(50)));
    let outcome = Client::connect(&uri, &options);
    assert!(matches!(outcome, Err(Error::Timeout { .. })), "{outcome:?}");
    server.join().unwrap();
}

#[test]
fn a_list_without_an_end() {
    let entry = [&4000_u32.to_be_bytes()[..], &[b'x'; 4000]].concat();
    let magic = 0x0003_e889_0455_65a9_u64.to_be_bytes();
    let reply = [&magic[..], b"\0\0\0\x03\0\0\0\x02", &(entry.len() as u32).to_be_bytes(), &entry].concat();
    let (uri, server) = listening("list", b"NBDMAGICIHAVEOPT\0\x03", &reply);
    let error = list(&uri, &options()).unwrap_err();
    assert_eq!(error.to_string(), "protocol error: the answer to LIST has more than 16777216 bytes");
    server.join().unwrap();
    let (uri, server) = listening("old", b"NBDMAGICIHAVEOPT\0\0", b"");
    let error = list(&uri, &options()).unwrap_err();
    assert_eq!(error.to_string(), "protocol error: the server is too old to be asked (no fixed newstyle)");
    server.join().unwrap();
}
