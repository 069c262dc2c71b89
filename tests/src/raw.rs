//! An NBD client at the level of bytes, for input that well-behaved clients never send.
//!
//! It does not use the server's codec on purpose: numbers are written as in the protocol document.

use std::collections::HashMap;
use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustls::{ClientConnection, StreamOwned};

use crate::forger::forged;
use crate::{Address, Pki, Version, deadline};

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
    pub const ERR_TLS_REQD: u32 = ERR + 5;
    pub const ERR_UNKNOWN: u32 = ERR + 6;
    pub const ERR_BLOCK_SIZE_REQD: u32 = ERR + 8;
    pub const ERR_TOO_BIG: u32 = ERR + 9;
    pub const ERR_EXT_HEADER_REQD: u32 = ERR + 10;
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
    pub const PAYLOAD_LEN: u16 = 32;
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
const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
const EXTENDED_CHUNK_MAGIC: u32 = 0x6e8a_278c;

/// Longest string of the protocol, in bytes.
const TEXT_MAX: usize = 4096;

/// The way of a client into the transmission phase.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// EXPORT_NAME, simple replies.
    Plain,
    /// GO, simple replies.
    Simple,
    /// GO, structured replies, base:allocation under id [`Raw::context`].
    Structured,
    /// As `Structured`, with extended headers.
    Extended,
}

impl Mode {
    /// All modes.
    pub const ALL: [Self; 4] = [Self::Plain, Self::Simple, Self::Structured, Self::Extended];

    /// A request as on the wire: its header and the payload. With extended headers, a payload needs the flag `PAYLOAD_LEN`.
    pub fn request(self, flags: u16, command: u16, cookie: u64, at: u64, len: u64, payload: &[u8]) -> Vec<u8> {
        let flags = match self {
            Self::Extended if command == cmd::WRITE || !payload.is_empty() => flags | flag::PAYLOAD_LEN,
            _ => flags,
        };
        [&self.header(flags, command, cookie, at, len), payload].concat()
    }

    /// The header of a request, without changes to the arguments.
    ///
    /// # Panics
    /// If it has no room for the length.
    pub fn header(self, flags: u16, command: u16, cookie: u64, at: u64, len: u64) -> Vec<u8> {
        let magic = if self == Self::Extended { EXTENDED_REQUEST_MAGIC } else { REQUEST_MAGIC };
        let mut bytes = magic.to_be_bytes().to_vec();
        bytes.extend_from_slice(&flags.to_be_bytes());
        bytes.extend_from_slice(&command.to_be_bytes());
        bytes.extend_from_slice(&cookie.to_be_bytes());
        bytes.extend_from_slice(&at.to_be_bytes());
        match self {
            Self::Extended => bytes.extend_from_slice(&len.to_be_bytes()),
            _ => bytes.extend_from_slice(&u32::try_from(len).expect("compact lengths have 32 bits").to_be_bytes()),
        }
        bytes
    }

    /// Whether replies come in chunks.
    fn has_chunks(self) -> bool {
        matches!(self, Self::Structured | Self::Extended)
    }
}

trait Stream: Read + Write + Send {
    /// Changes the keys of the client's direction, if there are any.
    fn change_keys(&mut self) {}

    /// Sends one record with a wrong bit, if there are records.
    fn corrupt(&mut self, _bytes: &[u8]) -> std::io::Result<()> {
        Ok(())
    }

    /// Limits how long sending may wait, if possible.
    fn limit_sending(&mut self, _limit: Option<Duration>) {}
}
impl Stream for TcpStream {
    fn limit_sending(&mut self, limit: Option<Duration>) {
        self.set_write_timeout(limit).expect("a deadline can be set");
    }
}
impl Stream for UnixStream {
    fn limit_sending(&mut self, limit: Option<Duration>) {
        self.set_write_timeout(limit).expect("a deadline can be set");
    }
}
impl Stream for StreamOwned<ClientConnection, Box<dyn Stream>> {
    fn change_keys(&mut self) {
        self.conn.refresh_traffic_keys().expect("TLS 1.3 can change keys");
    }

    fn corrupt(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        let mut records = Vec::new();
        self.conn.writer().write_all(bytes)?;
        self.conn.write_tls(&mut records)?;
        *records.last_mut().expect("there is a record") ^= 1;
        self.sock.write_all(&records)
    }
}

/// One connection.
pub struct Raw {
    stream: Box<dyn Stream>,
    mode: Mode,
    cookie: u64,
    /// READs without a reply, by cookie: offset and length.
    reads: HashMap<u64, (u64, u32)>,
    /// Replies whose last chunk has not come.
    parts: HashMap<u64, Answer>,
    /// Size of the export, in bytes.
    pub size: u64,
    /// Transmission flags.
    pub flags: u16,
    /// The id of base:allocation, if negotiated.
    pub context: Option<u32>,
}

impl std::fmt::Debug for Raw {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Raw").field("mode", &self.mode).field("size", &self.size).finish_non_exhaustive()
    }
}

/// The whole reply to one command.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Answer {
    /// The cookie of the command.
    pub cookie: u64,
    /// 0, or the error.
    pub error: u32,
    /// The error text, if the reply has chunks.
    pub text: String,
    /// For READ: the data, including holes.
    pub data: Vec<u8>,
    /// For READ in chunks: offset and length of each hole.
    pub holes: Vec<(u64, u32)>,
    /// Number of chunks; 0 for a simple reply.
    pub chunks: u32,
    /// For BLOCK_STATUS: length and flags of each extent.
    pub extents: Vec<(u64, u64)>,
}

impl Raw {
    /// Connects and reads the server's greeting.
    pub fn connect(address: &Address) -> Self {
        let stream: Box<dyn Stream> = match address {
            Address::Unix(path) => {
                let stream = UnixStream::connect(path).expect("the server listens");
                stream.set_read_timeout(Some(deadline())).expect("a deadline can be set");
                stream.set_write_timeout(Some(deadline())).expect("a deadline can be set");
                Box::new(stream)
            }
            Address::Tcp(address) => {
                let stream = TcpStream::connect_timeout(address, Duration::from_secs(30)).expect("the server listens");
                stream.set_read_timeout(Some(deadline())).expect("a deadline can be set");
                stream.set_write_timeout(Some(deadline())).expect("a deadline can be set");
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

    /// Connects and sends the client flags.
    pub fn greeted(address: &Address) -> Self {
        let mut raw = Self::connect(address);
        raw.send(&3_u32.to_be_bytes());
        raw
    }

    /// Starts TLS, with the client's certificate.
    pub fn start_tls(mut self, pki: &Pki, version: Version) -> Self {
        assert_eq!(self.ask(opt::STARTTLS, b""), [(rep::ACK, vec![])], "STARTTLS");
        self.stream = Box::new(StreamOwned::new(pki.connection(version), self.stream));
        self.mode = Mode::Simple;
        self
    }

    /// Changes the keys of the client's direction (TLS 1.3).
    pub fn change_keys(&mut self) {
        self.stream.change_keys();
    }

    /// Sends a TLS record with the type `kind`.
    pub fn send_record(&mut self, kind: u8, text: &[u8]) -> std::io::Result<()> {
        self.try_send(&forged(kind, text))
    }

    /// Sends bytes as one TLS record, of which one bit is wrong.
    pub fn send_corrupted(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.stream.corrupt(bytes)
    }

    /// Connects and does the handshake of `mode`.
    pub fn enter(address: &Address, mode: Mode, name: &str) -> Self {
        Self::greeted(address).entered(mode, name)
    }

    /// Does the handshake of `mode`, from the options on.
    pub fn entered(self, mode: Mode, name: &str) -> Self {
        let mut raw = self;
        raw.mode = mode;
        if mode == Mode::Plain {
            raw.option(opt::EXPORT_NAME, name.as_bytes());
            raw.size = raw.u64();
            raw.flags = raw.u16();
            return raw;
        }
        raw.negotiate(mode);
        if mode.has_chunks() {
            raw.negotiate_context(name);
        }
        raw.go(name);
        raw
    }

    /// Negotiates the replies of `mode`.
    pub fn negotiate(&mut self, mode: Mode) {
        match mode {
            Mode::Plain | Mode::Simple => {}
            Mode::Structured => self.negotiate_structured(),
            Mode::Extended => {
                assert_eq!(self.ask(opt::EXTENDED_HEADERS, b""), [(rep::ACK, vec![])], "EXTENDED_HEADERS");
                self.mode = mode;
            }
        }
    }

    /// Negotiates structured replies.
    pub fn negotiate_structured(&mut self) {
        assert_eq!(self.ask(opt::STRUCTURED_REPLY, b""), [(rep::ACK, vec![])], "STRUCTURED_REPLY");
        self.mode = Mode::Structured;
    }

    /// Negotiates base:allocation.
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
            if kind >= rep::ERR {
                assert!(data.len() <= TEXT_MAX && std::str::from_utf8(&data).is_ok(), "a bad error text: {data:?}");
            }
            replies.push((kind, data));
            if kind == rep::ACK || kind >= rep::ERR {
                return replies;
            }
        }
    }

    /// Sends an option. Returns the kind of the last reply.
    pub fn ask_kind(&mut self, option: u32, data: &[u8]) -> u32 {
        self.ask(option, data).pop().expect("there is a last reply").0
    }

    /// Sends a command without waiting for the reply. Returns its cookie.
    pub fn request(&mut self, flags: u16, command: u16, at: u64, len: u32, payload: &[u8]) -> u64 {
        self.request_long(flags, command, at, len.into(), payload)
    }

    /// Sends a command of any length without waiting for the reply. Returns its cookie.
    ///
    /// # Panics
    /// For more than 32 bits without extended headers.
    pub fn request_long(&mut self, flags: u16, command: u16, at: u64, len: u64, payload: &[u8]) -> u64 {
        let cookie = self.expect_answer(command, at, len);
        self.send(&self.mode.request(flags, command, cookie, at, len, payload));
        cookie
    }

    /// Sends a READ for each `(offset, length)`, all at once, so that even a server that stops reading gets them. Returns the
    /// first cookie; the others are consecutive.
    pub fn request_reads(&mut self, reads: &[(u64, u32)]) -> u64 {
        let (first, mode) = (self.cookie + 1, self.mode);
        let read = |&(at, len): &(u64, u32)| {
            mode.header(0, cmd::READ, self.expect_answer(cmd::READ, at, len.into()), at, len.into())
        };
        let bytes: Vec<u8> = reads.iter().flat_map(read).collect();
        self.send(&bytes);
        first
    }

    /// Returns a cookie for a request that the caller sends with [`send`](Self::send).
    pub fn expect_answer(&mut self, command: u16, at: u64, len: u64) -> u64 {
        self.cookie += 1;
        if command == cmd::READ {
            self.reads.insert(self.cookie, (at, len as u32));
        }
        self.cookie
    }

    /// Sends a command and waits for its reply, which must be the next.
    pub fn call(&mut self, flags: u16, command: u16, at: u64, len: u32, payload: &[u8]) -> Answer {
        self.call_long(flags, command, at, len.into(), payload)
    }

    /// As [`call`](Self::call), for any length.
    ///
    /// # Panics
    /// For more than 32 bits without extended headers.
    pub fn call_long(&mut self, flags: u16, command: u16, at: u64, len: u64, payload: &[u8]) -> Answer {
        let cookie = self.request_long(flags, command, at, len, payload);
        self.answer_to(cookie)
    }

    /// Waits for the reply to a request, which must be the next.
    pub fn answer_to(&mut self, cookie: u64) -> Answer {
        let answer = self.answer();
        assert_eq!(answer.cookie, cookie, "an answer to another command: {:?}", answer.error);
        answer
    }

    /// Reads `len` bytes at `at`, which must succeed.
    pub fn read(&mut self, at: u64, len: u32) -> Vec<u8> {
        let answer = self.call(0, cmd::READ, at, len, b"");
        assert_eq!(answer.error, 0, "READ {len}@{at}: {}", answer.text);
        answer.data
    }

    /// Writes, which must succeed.
    pub fn write(&mut self, at: u64, data: &[u8]) {
        assert_eq!(self.call(0, cmd::WRITE, at, data.len() as u32, data).error, 0, "WRITE {}@{at}", data.len());
    }

    /// Waits for the next whole reply, to any command.
    pub fn answer(&mut self) -> Answer {
        loop {
            match self.u32() {
                // Forbidden with extended headers, for any command.
                SIMPLE_REPLY_MAGIC if self.mode != Mode::Extended => {
                    let (error, cookie) = (self.u32(), self.u64());
                    let read = self.reads.remove(&cookie);
                    // A READ must not get a simple reply once structured replies are negotiated.
                    assert!(read.is_none() || self.mode != Mode::Structured, "a simple reply to a READ: {error}");
                    let len = read.map_or(0, |(_, len)| if error == 0 { len } else { 0 });
                    return Answer { cookie, error, data: self.receive(len as usize), ..Answer::default() };
                }
                CHUNK_MAGIC if self.mode == Mode::Structured => {
                    if let Some(answer) = self.chunk() {
                        return answer;
                    }
                }
                EXTENDED_CHUNK_MAGIC if self.mode == Mode::Extended => {
                    if let Some(answer) = self.chunk() {
                        return answer;
                    }
                }
                magic => panic!("the server is out of step: {magic:#x} where a reply begins"),
            }
        }
    }

    fn chunk(&mut self) -> Option<Answer> {
        let (flags, kind, cookie) = (self.u16(), self.u16(), self.u64());
        let len = match self.mode {
            Mode::Extended => {
                let at = self.u64();
                // Each chunk repeats the offset of the request.
                assert!(self.reads.get(&cookie).is_none_or(|read| read.0 == at), "a chunk for another offset: {at}");
                self.u64()
            }
            _ => self.u32().into(),
        };
        assert!(flags <= 1, "unknown chunk flags {flags:#x}");
        assert!(len <= 1 << 27, "a chunk of {len} bytes");
        let body = self.receive(len as usize);
        let read = self.reads.get(&cookie).copied();
        let answer = self.parts.entry(cookie).or_insert_with(|| Answer {
            cookie,
            data: vec![0; read.map_or(0, |(_, len)| len as usize)],
            ..Answer::default()
        });
        answer.chunks += 1;
        let place = |body: &[u8]| {
            let at = be64(body);
            (at, (at - read.expect("a content chunk answers a READ").0) as usize)
        };
        match kind {
            0 => assert_eq!((len, flags), (0, 1), "NONE is empty and last"),
            1 => {
                assert!(len > 8, "an empty OFFSET_DATA");
                answer.data[place(&body).1..][..body.len() - 8].copy_from_slice(&body[8..]);
            }
            2 => {
                assert!(len == 12 && be32(&body[8..]) > 0, "a bad OFFSET_HOLE");
                let (at, place) = place(&body);
                answer.data[place..][..be32(&body[8..]) as usize].fill(0);
                answer.holes.push((at, be32(&body[8..])));
            }
            5 => {
                assert_eq!(self.mode, Mode::Structured, "BLOCK_STATUS with extended headers");
                assert_eq!(Some(be32(&body)), self.context, "a context that was not asked for");
                assert!(body.len() > 4 && body.len() % 8 == 4, "a bad BLOCK_STATUS");
                let extent = |extent: &[u8]| (be32(extent).into(), be32(&extent[4..]).into());
                answer.extents.extend(body[4..].chunks(8).map(extent));
            }
            6 => {
                assert_eq!(self.mode, Mode::Extended, "BLOCK_STATUS_EXT without extended headers");
                assert_eq!(Some(be32(&body)), self.context, "a context that was not asked for");
                let count = be32(&body[4..]) as usize;
                assert!(count > 0 && body.len() == 8 + 16 * count, "a bad BLOCK_STATUS_EXT");
                answer.extents.extend(body[8..].chunks(16).map(|extent| (be64(extent), be64(&extent[8..]))));
            }
            0x8001 | 0x8002 => {
                answer.error = be32(&body);
                let text = usize::from(u16::from_be_bytes(body[4..6].try_into().expect("2 bytes")));
                let offset = if kind == 0x8002 { 8 } else { 0 };
                let fits = text <= TEXT_MAX && body.len() == 6 + text + offset;
                assert!(answer.error != 0 && fits, "a bad error chunk");
                answer.text = String::from_utf8(body[6..6 + text].to_vec()).expect("error texts are UTF-8");
            }
            kind => panic!("unknown chunk type {kind:#x}"),
        }
        if flags == 0 {
            return None;
        }
        self.reads.remove(&cookie);
        self.parts.remove(&cookie)
    }

    /// Sends bytes unchanged.
    pub fn send(&mut self, bytes: &[u8]) {
        self.try_send(bytes).expect("the server takes what it is sent");
    }

    /// Sends bytes unchanged; the server may have closed the connection.
    pub fn try_send(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.stream.write_all(bytes)
    }

    /// Sends as many of these bytes as the server takes within a moment.
    pub fn flood(&mut self, bytes: &[u8]) {
        self.stream.limit_sending(Some(Duration::from_millis(200)));
        let _ = self.stream.write_all(bytes);
        self.stream.limit_sending(Some(deadline()));
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

    /// Waits until the server closes the connection. Returns its last output.
    ///
    /// # Panics
    /// If the server does not close it within the deadline.
    pub fn await_close(mut self) -> Vec<u8> {
        let mut rest = Vec::new();
        match self.stream.read_to_end(&mut rest) {
            Ok(_) => {}
            // TLS returns this error for an end without a closure alert.
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => {}
            Err(error) if matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe) => {}
            Err(error) => panic!("the server keeps the connection: {error}"),
        }
        rest
    }

    /// Waits until the server closes the connection.
    ///
    /// # Errors
    /// Under TLS: the alert, or the lack of one.
    pub fn await_end(mut self) -> std::io::Result<()> {
        self.stream.read_to_end(&mut Vec::new()).map(drop)
    }

    fn u16(&mut self) -> u16 {
        u16::from_be_bytes(self.receive(2).try_into().expect("2 bytes"))
    }

    fn u32(&mut self) -> u32 {
        be32(&self.receive(4))
    }

    fn u64(&mut self) -> u64 {
        be64(&self.receive(8))
    }
}

/// An option as on the wire.
pub fn option_bytes(option: u32, data: &[u8]) -> Vec<u8> {
    let len = data.len() as u32;
    [OPTION_MAGIC, &option.to_be_bytes()[..], &len.to_be_bytes(), data].concat()
}

/// The data of INFO and GO.
pub fn info_query(name: &str, infos: &[u16]) -> Vec<u8> {
    info_query_bytes(name.as_bytes(), infos)
}

/// The data of INFO and GO, for a name that may not be valid text.
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

fn be32(bytes: &[u8]) -> u32 {
    u32::from_be_bytes(bytes[..4].try_into().expect("4 bytes"))
}

fn be64(bytes: &[u8]) -> u64 {
    u64::from_be_bytes(bytes[..8].try_into().expect("8 bytes"))
}
