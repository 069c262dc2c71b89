//! An NBD client made of plain bytes, for everything that well-behaved clients would never send.
//!
//! It knows nothing of the server's codec on purpose: numbers are written out as the protocol document has them.

use std::collections::HashMap;
use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use crate::{Address, DEADLINE};

/// Options of the handshake.
pub mod opt {
    #![expect(missing_docs, reason = "the names are the protocol's")]
    pub const EXPORT_NAME: u32 = 1;
    pub const ABORT: u32 = 2;
    pub const LIST: u32 = 3;
    pub const PEEK_EXPORT: u32 = 4;
    pub const STARTTLS: u32 = 5;
    pub const INFO: u32 = 6;
    pub const GO: u32 = 7;
    pub const STRUCTURED_REPLY: u32 = 8;
    pub const LIST_META_CONTEXT: u32 = 9;
    pub const SET_META_CONTEXT: u32 = 10;
    pub const EXTENDED_HEADERS: u32 = 11;
}

/// Replies to options.
pub mod rep {
    #![expect(missing_docs, reason = "the names are the protocol's")]
    pub const ACK: u32 = 1;
    pub const SERVER: u32 = 2;
    pub const INFO: u32 = 3;
    pub const META_CONTEXT: u32 = 4;
    pub const ERR: u32 = 1 << 31;
    pub const ERR_UNSUP: u32 = ERR + 1;
    pub const ERR_POLICY: u32 = ERR + 2;
    pub const ERR_INVALID: u32 = ERR + 3;
    pub const ERR_UNKNOWN: u32 = ERR + 6;
    pub const ERR_TOO_BIG: u32 = ERR + 9;
}

/// Commands of the transmission phase.
pub mod cmd {
    #![expect(missing_docs, reason = "the names are the protocol's")]
    pub const READ: u16 = 0;
    pub const WRITE: u16 = 1;
    pub const DISC: u16 = 2;
    pub const FLUSH: u16 = 3;
    pub const TRIM: u16 = 4;
    pub const CACHE: u16 = 5;
    pub const WRITE_ZEROES: u16 = 6;
    pub const BLOCK_STATUS: u16 = 7;
}

/// Flags of commands.
pub mod flag {
    #![expect(missing_docs, reason = "the names are the protocol's")]
    pub const FUA: u16 = 1;
    pub const NO_HOLE: u16 = 2;
    pub const DF: u16 = 4;
    pub const REQ_ONE: u16 = 8;
    pub const FAST_ZERO: u16 = 16;
}

/// Errors of commands.
pub mod errno {
    #![expect(missing_docs, reason = "the names are the protocol's")]
    pub const EPERM: u32 = 1;
    pub const EIO: u32 = 5;
    pub const EINVAL: u32 = 22;
    pub const ENOSPC: u32 = 28;
    pub const EOVERFLOW: u32 = 75;
    pub const ENOTSUP: u32 = 95;
    pub const ESHUTDOWN: u32 = 108;
}

const OPTION_MAGIC: &[u8; 8] = b"IHAVEOPT";
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
const CHUNK_MAGIC: u32 = 0x668e_33ef;

/// How a client gets into the transmission phase.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// EXPORT_NAME, simple replies.
    Plain,
    /// GO, simple replies.
    Simple,
    /// GO, structured replies, base:allocation under id [`Raw::context`].
    Structured,
}

impl Mode {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Plain, Self::Simple, Self::Structured];
}

trait Stream: Read + Write + Send {}
impl Stream for TcpStream {}
impl Stream for UnixStream {}

/// One connection.
pub struct Raw {
    stream: Box<dyn Stream>,
    mode: Mode,
    cookie: u64,
    /// READs without an answer, by cookie: offset and length.
    reads: HashMap<u64, (u64, u32)>,
    /// Answers whose last chunk has not come.
    parts: HashMap<u64, Answer>,
    /// Size of the export, bytes.
    pub size: u64,
    /// Transmission flags.
    pub flags: u16,
    /// The id of base:allocation, when it was negotiated.
    pub context: Option<u32>,
}

impl std::fmt::Debug for Raw {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Raw").field("mode", &self.mode).field("size", &self.size).finish_non_exhaustive()
    }
}

/// The whole answer to one command.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Answer {
    /// Of which command.
    pub cookie: u64,
    /// 0, or why not.
    pub error: u32,
    /// Of a READ: the data, holes filled in.
    pub data: Vec<u8>,
    /// Of BLOCK_STATUS: length and flags of each extent.
    pub extents: Vec<(u32, u32)>,
}

impl Raw {
    /// Connects and reads the server's greeting.
    pub fn connect(address: &Address) -> Self {
        let stream: Box<dyn Stream> = match address {
            Address::Unix(path) => {
                let stream = UnixStream::connect(path).expect("the server listens");
                stream.set_read_timeout(Some(DEADLINE)).expect("a deadline can be set");
                stream.set_write_timeout(Some(DEADLINE)).expect("a deadline can be set");
                Box::new(stream)
            }
            Address::Tcp(address) => {
                let stream = TcpStream::connect_timeout(address, Duration::from_secs(30)).expect("the server listens");
                stream.set_read_timeout(Some(DEADLINE)).expect("a deadline can be set");
                stream.set_write_timeout(Some(DEADLINE)).expect("a deadline can be set");
                stream.set_nodelay(true).expect("TCP knows TCP_NODELAY");
                Box::new(stream)
            }
        };
        let (reads, parts) = (HashMap::new(), HashMap::new());
        let mut raw = Self { stream, mode: Mode::Simple, cookie: 0, reads, parts, size: 0, flags: 0, context: None };
        assert_eq!(raw.receive(16), b"NBDMAGICIHAVEOPT", "the greeting");
        assert_eq!(raw.u16(), 3, "FIXED_NEWSTYLE and NO_ZEROES, and no others");
        raw
    }

    /// Connects and says that it is a modern client.
    pub fn greeted(address: &Address) -> Self {
        let mut raw = Self::connect(address);
        raw.send(&3_u32.to_be_bytes());
        raw
    }

    /// Connects and goes through the handshake of `mode`.
    pub fn enter(address: &Address, mode: Mode, name: &str) -> Self {
        let mut raw = Self::greeted(address);
        raw.mode = mode;
        if mode == Mode::Plain {
            raw.option(opt::EXPORT_NAME, name.as_bytes());
            raw.size = raw.u64();
            raw.flags = raw.u16();
            return raw;
        }
        if mode == Mode::Structured {
            raw.negotiate_structured();
            raw.negotiate_context(name);
        }
        raw.go(name);
        raw
    }

    /// Asks for structured replies.
    pub fn negotiate_structured(&mut self) {
        assert_eq!(self.ask(opt::STRUCTURED_REPLY, b""), [(rep::ACK, vec![])], "STRUCTURED_REPLY");
        self.mode = Mode::Structured;
    }

    /// Asks for base:allocation.
    pub fn negotiate_context(&mut self, name: &str) {
        let replies = self.ask(opt::SET_META_CONTEXT, &meta_query(name, &["base:allocation"]));
        assert_eq!(replies.len(), 2, "base:allocation is there: {replies:?}");
        assert_eq!((replies[0].0, &replies[0].1[4..]), (rep::META_CONTEXT, &b"base:allocation"[..]));
        self.context = Some(be32(&replies[0].1));
    }

    /// GO, which must succeed.
    pub fn go(&mut self, name: &str) {
        let replies = self.ask(opt::GO, &info_query(name, &[]));
        assert_eq!(replies.last().map(|reply| reply.0), Some(rep::ACK), "GO {name:?}: {replies:?}");
        let export = replies.iter().find(|(kind, data)| *kind == rep::INFO && data[..2] == [0, 0]);
        let (_, data) = export.expect("INFO_EXPORT comes before the ACK");
        self.size = u64::from_be_bytes(data[2..10].try_into().expect("12 bytes"));
        self.flags = u16::from_be_bytes(data[10..12].try_into().expect("12 bytes"));
    }

    /// Sends an option.
    pub fn option(&mut self, option: u32, data: &[u8]) {
        self.send(&option_bytes(option, data));
    }

    /// Sends an option and collects the replies up to the last one: an ACK or an error.
    pub fn ask(&mut self, option: u32, data: &[u8]) -> Vec<(u32, Vec<u8>)> {
        self.option(option, data);
        self.replies(option)
    }

    /// Collects the replies to an option up to the last one: an ACK or an error.
    pub fn replies(&mut self, option: u32) -> Vec<(u32, Vec<u8>)> {
        let mut replies = Vec::new();
        loop {
            assert_eq!(self.u64(), OPTION_REPLY_MAGIC, "after {replies:?}");
            assert_eq!(self.u32(), option, "a reply to another option, after {replies:?}");
            let (kind, len) = (self.u32(), self.u32());
            assert!(len <= 1 << 16, "an option reply of {len} bytes");
            let data = self.receive(len as usize);
            replies.push((kind, data));
            if kind == rep::ACK || kind >= rep::ERR {
                return replies;
            }
        }
    }

    /// Sends an option; answers the kind of the last reply.
    pub fn ask_kind(&mut self, option: u32, data: &[u8]) -> u32 {
        self.ask(option, data).pop().expect("there is a last reply").0
    }

    /// Sends a command without waiting for the answer; answers its cookie.
    pub fn request(&mut self, flags: u16, command: u16, at: u64, len: u32, payload: &[u8]) -> u64 {
        let mut bytes = self.header(flags, command, at, len);
        bytes.extend_from_slice(payload);
        self.send(&bytes);
        self.cookie
    }

    /// Sends a READ for each `(offset, length)`, all of them in one piece, so that even a server that stops reading
    /// gets them; answers the first cookie, the others follow by ones.
    pub fn request_reads(&mut self, reads: &[(u64, u32)]) -> u64 {
        let first = self.cookie + 1;
        let bytes: Vec<u8> = reads.iter().flat_map(|&(at, len)| self.header(0, cmd::READ, at, len)).collect();
        self.send(&bytes);
        first
    }

    fn header(&mut self, flags: u16, command: u16, at: u64, len: u32) -> Vec<u8> {
        self.cookie += 1;
        if command == cmd::READ {
            self.reads.insert(self.cookie, (at, len));
        }
        request_bytes(flags, command, self.cookie, at, len)
    }

    /// Sends a command and waits for its answer, which must be the next.
    pub fn call(&mut self, flags: u16, command: u16, at: u64, len: u32, payload: &[u8]) -> Answer {
        let cookie = self.request(flags, command, at, len, payload);
        let answer = self.answer();
        assert_eq!(answer.cookie, cookie, "an answer to another command: {:?}", answer.error);
        answer
    }

    /// Reads `len` bytes at `at`, which must succeed.
    pub fn read(&mut self, at: u64, len: u32) -> Vec<u8> {
        let answer = self.call(0, cmd::READ, at, len, b"");
        assert_eq!(answer.error, 0, "READ {len}@{at}");
        answer.data
    }

    /// Writes, which must succeed.
    pub fn write(&mut self, at: u64, data: &[u8]) {
        assert_eq!(self.call(0, cmd::WRITE, at, data.len() as u32, data).error, 0, "WRITE {}@{at}", data.len());
    }

    /// Waits for the next whole answer, to whichever command.
    pub fn answer(&mut self) -> Answer {
        loop {
            match self.u32() {
                SIMPLE_REPLY_MAGIC => {
                    let (error, cookie) = (self.u32(), self.u64());
                    let read = self.reads.remove(&cookie);
                    // A READ must not be answered by a simple reply once structured replies are on.
                    assert!(read.is_none() || self.mode != Mode::Structured, "a simple reply to a READ: {error}");
                    let len = read.map_or(0, |(_, len)| if error == 0 { len } else { 0 });
                    return Answer { cookie, error, data: self.receive(len as usize), extents: vec![] };
                }
                CHUNK_MAGIC if self.mode == Mode::Structured => {
                    if let Some(answer) = self.chunk() {
                        return answer;
                    }
                }
                magic => panic!("the server is out of step: {magic:#x} where a reply begins"),
            }
        }
    }

    fn chunk(&mut self) -> Option<Answer> {
        let (flags, kind, cookie, len) = (self.u16(), self.u16(), self.u64(), self.u32());
        assert!(flags <= 1, "unknown chunk flags {flags:#x}");
        assert!(len <= 1 << 27, "a chunk of {len} bytes");
        let body = self.receive(len as usize);
        let read = self.reads.get(&cookie).copied();
        let answer = self.parts.entry(cookie).or_insert_with(|| Answer {
            cookie,
            data: vec![0; read.map_or(0, |(_, len)| len as usize)],
            ..Answer::default()
        });
        let place = |body: &[u8]| {
            let at = u64::from_be_bytes(body[..8].try_into().expect("8 bytes"));
            (at - read.expect("a content chunk answers a READ").0) as usize
        };
        match kind {
            0 => assert_eq!((len, flags), (0, 1), "NONE is empty and last"),
            1 => {
                assert!(len > 8, "an empty OFFSET_DATA");
                answer.data[place(&body)..][..body.len() - 8].copy_from_slice(&body[8..]);
            }
            2 => {
                assert!(len == 12 && be32(&body[8..]) > 0, "a bad OFFSET_HOLE");
                answer.data[place(&body)..][..be32(&body[8..]) as usize].fill(0);
            }
            5 => {
                assert_eq!(Some(be32(&body)), self.context, "a context that was not asked for");
                assert!(body.len() > 4 && body.len() % 8 == 4, "a bad BLOCK_STATUS");
                answer.extents.extend(body[4..].chunks(8).map(|extent| (be32(extent), be32(&extent[4..]))));
            }
            0x8001 | 0x8002 => {
                answer.error = be32(&body);
                let text = usize::from(u16::from_be_bytes(body[4..6].try_into().expect("2 bytes")));
                let offset = if kind == 0x8002 { 8 } else { 0 };
                assert!(answer.error != 0 && text <= 4096 && body.len() == 6 + text + offset, "a bad error chunk");
                assert!(std::str::from_utf8(&body[6..6 + text]).is_ok(), "an error text that is not UTF-8");
            }
            kind => panic!("unknown chunk type {kind:#x}"),
        }
        if flags == 0 {
            return None;
        }
        self.reads.remove(&cookie);
        self.parts.remove(&cookie)
    }

    /// Sends bytes as they are.
    pub fn send(&mut self, bytes: &[u8]) {
        self.try_send(bytes).expect("the server takes what it is sent");
    }

    /// Sends bytes as they are; the server may have closed the connection.
    pub fn try_send(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.stream.write_all(bytes)
    }

    /// Receives exactly `len` bytes.
    pub fn receive(&mut self, len: usize) -> Vec<u8> {
        self.try_receive(len).expect("the server answers, and keeps the connection")
    }

    /// Receives exactly `len` bytes; the server may have closed the connection.
    pub fn try_receive(&mut self, len: usize) -> std::io::Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        self.stream.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    /// Waits until the server closes the connection; answers what it still said.
    ///
    /// # Panics
    /// If it does not within the deadline.
    pub fn await_close(mut self) -> Vec<u8> {
        let mut rest = Vec::new();
        match self.stream.read_to_end(&mut rest) {
            Ok(_) => {}
            Err(error) if matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe) => {}
            Err(error) => panic!("the server keeps the connection: {error}"),
        }
        rest
    }

    fn u16(&mut self) -> u16 {
        u16::from_be_bytes(self.receive(2).try_into().expect("2 bytes"))
    }

    fn u32(&mut self) -> u32 {
        be32(&self.receive(4))
    }

    fn u64(&mut self) -> u64 {
        u64::from_be_bytes(self.receive(8).try_into().expect("8 bytes"))
    }
}

/// An option as it goes over the wire.
pub fn option_bytes(option: u32, data: &[u8]) -> Vec<u8> {
    let len = data.len() as u32;
    [OPTION_MAGIC, &option.to_be_bytes()[..], &len.to_be_bytes(), data].concat()
}

/// The data of INFO and GO.
pub fn info_query(name: &str, infos: &[u16]) -> Vec<u8> {
    info_query_bytes(name.as_bytes(), infos)
}

/// The data of INFO and GO, for a name that may not be text.
pub fn info_query_bytes(name: &[u8], infos: &[u16]) -> Vec<u8> {
    let mut data = (name.len() as u32).to_be_bytes().to_vec();
    data.extend_from_slice(name);
    data.extend_from_slice(&(infos.len() as u16).to_be_bytes());
    infos.iter().for_each(|info| data.extend_from_slice(&info.to_be_bytes()));
    data
}

/// The data of LIST_META_CONTEXT and SET_META_CONTEXT.
pub fn meta_query(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = (name.len() as u32).to_be_bytes().to_vec();
    data.extend_from_slice(name.as_bytes());
    data.extend_from_slice(&(queries.len() as u32).to_be_bytes());
    for query in queries {
        data.extend_from_slice(&(query.len() as u32).to_be_bytes());
        data.extend_from_slice(query.as_bytes());
    }
    data
}

/// The header of a command as it goes over the wire.
pub fn request_bytes(flags: u16, command: u16, cookie: u64, at: u64, len: u32) -> Vec<u8> {
    let mut bytes = REQUEST_MAGIC.to_be_bytes().to_vec();
    bytes.extend_from_slice(&flags.to_be_bytes());
    bytes.extend_from_slice(&command.to_be_bytes());
    bytes.extend_from_slice(&cookie.to_be_bytes());
    bytes.extend_from_slice(&at.to_be_bytes());
    bytes.extend_from_slice(&len.to_be_bytes());
    bytes
}

fn be32(bytes: &[u8]) -> u32 {
    u32::from_be_bytes(bytes[..4].try_into().expect("4 bytes"))
}
