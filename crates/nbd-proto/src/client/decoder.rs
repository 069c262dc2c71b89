//! Decodes replies: simple ones, structured and extended chunks. Like the receiver it owns the count of every payload.

use crate::limits::{EXTENTS_MAX, NAME_MAX, OPTION_MAX};
use crate::reader::{Joint, Reader, part, take_up_to};
use crate::replier::Extent;
use crate::terms::Fatal;
use crate::wire::{
    ChunkFlags, ChunkKind, Cookie, EXTENDED_REPLY_MAGIC, Mode, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC, WireError,
};

/// What the server sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event<'a> {
    /// A simple reply. When it is a success and answers a READ, its data follows, and the decoder must be told how
    /// much: [`Decoder::expect_payload`].
    Simple(Cookie, Result<(), WireError>),
    /// A chunk of a reply.
    Chunk {
        /// Of which request.
        cookie: Cookie,
        /// The offset of the request, as extended headers repeat it.
        at: Option<u64>,
        /// The last chunk of the reply.
        done: bool,
        /// What it says.
        chunk: Chunk,
    },
    /// The next bytes of the data that was announced; never empty.
    Payload(&'a [u8]),
}

/// What a chunk says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Chunk {
    /// Nothing.
    None,
    /// Data follows: `len` bytes as [`Event::Payload`], or straight into place.
    Data {
        /// Where in the export.
        at: u64,
        /// How much.
        len: u32,
    },
    /// Zeroes.
    Hole {
        /// Where in the export.
        at: u64,
        /// How much.
        len: u32,
    },
    /// The status of a context, from the start of the request on.
    Status {
        /// Which context.
        context: u32,
        /// Its extents, at least one.
        extents: Vec<Extent>,
    },
    /// An error.
    Error {
        /// For the program.
        error: WireError,
        /// For people.
        text: String,
        /// Where in the export, if told.
        at: Option<u64>,
    },
}

/// The decoder of one connection's replies.
#[derive(Debug)]
pub struct Decoder {
    mode: Mode,
    state: State,
    left: u32,
    joint: Joint,
    body: Vec<u8>,
}

#[derive(Clone, Copy, Debug)]
enum State {
    Header,
    /// At the length of a structured chunk.
    Length(Head),
    /// At the offset of a data chunk.
    Offset(Head),
    /// In a chunk that is gathered whole.
    Body(Head),
    Payload,
}

/// The header of a chunk.
#[derive(Clone, Copy, Debug)]
struct Head {
    cookie: Cookie,
    at: Option<u64>,
    done: bool,
    kind: ChunkKind,
    len: u64,
}

/// Longest chunk that is gathered: a status of [`EXTENTS_MAX`] extents, 16 MiB; and an error with its text, or one of a
/// kind that is not known here.
const STATUS_MAX: u64 = 8 + 16 * EXTENTS_MAX as u64;
const ERROR_MAX: u64 = OPTION_MAX as u64;

impl Decoder {
    /// A decoder at the first reply.
    pub fn new(mode: Mode) -> Self {
        Self { mode, state: State::Header, left: 0, joint: Joint::default(), body: Vec::new() }
    }

    /// Takes one event off the front of `input`; `None` when it needs more bytes, and then `input` is empty.
    #[inline]
    pub fn next<'a>(&mut self, input: &mut &'a [u8]) -> Result<Option<Event<'a>>, Fatal> {
        loop {
            match self.state {
                State::Header => {
                    if let Some(event) = self.header(input)? {
                        return Ok(Some(event));
                    }
                    if matches!(self.state, State::Header) {
                        return Ok(None);
                    }
                }
                State::Length(head) => {
                    let Some(raw) = self.joint.take::<4>(input) else { return Ok(None) };
                    self.state = begin(Head { len: u32::from_be_bytes(raw).into(), ..head })?;
                }
                State::Offset(head) => {
                    let Some(raw) = self.joint.take::<8>(input) else { return Ok(None) };
                    let at = u64::from_be_bytes(raw);
                    let len = u32::try_from(head.len - 8).map_err(|_| malformed(head.kind))?;
                    self.announce(len);
                    return Ok(Some(head.event(Chunk::Data { at, len })));
                }
                State::Body(head) => {
                    let missing = usize::try_from(head.len).expect("bodies are bounded") - self.body.len();
                    self.body.extend_from_slice(take_up_to(input, missing));
                    if self.body.len() as u64 != head.len {
                        return Ok(None);
                    }
                    let chunk = parse(head.kind, Reader::new(&self.body)).ok_or_else(|| malformed(head.kind))?;
                    self.body.clear();
                    self.state = State::Header;
                    return Ok(Some(head.event(chunk)));
                }
                State::Payload => {
                    let piece = take_up_to(input, self.left as usize);
                    self.left -= u32::try_from(piece.len()).expect("a piece is no longer than the payload");
                    if self.left == 0 {
                        self.state = State::Header;
                    }
                    return Ok((!piece.is_empty()).then_some(Event::Payload(piece)));
                }
            }
        }
    }

    /// Says that `len` bytes of data follow the simple reply that was just told.
    ///
    /// # Panics
    ///
    /// In the midst of something else.
    #[inline]
    pub fn expect_payload(&mut self, len: u32) {
        assert!(
            matches!(self.state, State::Header) && self.joint.is_empty(),
            "payload is expected after a simple reply"
        );
        self.announce(len);
    }

    /// Bytes of data that may be received straight into place.
    #[inline]
    pub fn payload_left(&self) -> u32 {
        if matches!(self.state, State::Payload) { self.left } else { 0 }
    }

    /// Says that `n` bytes of the data went past this decoder, straight into place.
    ///
    /// # Panics
    ///
    /// When that is more than [`payload_left`](Self::payload_left).
    #[inline]
    pub fn payload_placed(&mut self, n: u32) {
        assert!(n <= self.payload_left(), "{n} bytes were placed of a payload of {}", self.payload_left());
        self.left -= n;
        if self.left == 0 {
            self.state = State::Header;
        }
    }

    /// Takes a header: a simple reply is an event, a chunk is a state.
    #[inline]
    fn header<'a>(&mut self, input: &mut &'a [u8]) -> Result<Option<Event<'a>>, Fatal> {
        if self.mode == Mode::Extended {
            let Some(raw) = self.joint.take::<32>(input) else { return Ok(None) };
            let magic = u32::from_be_bytes(part(&raw, 0));
            if magic != EXTENDED_REPLY_MAGIC {
                return Err(Fatal::Server("a reply with another magic", magic.into()));
            }
            let at = u64::from_be_bytes(part(&raw, 16));
            self.state = begin(Head { at: Some(at), len: u64::from_be_bytes(part(&raw, 24)), ..Head::new(&raw) })?;
            return Ok(None);
        }
        // Simple replies and structured chunks may stand side by side: the longer begins as long as the shorter is.
        let Some(raw) = self.joint.take::<16>(input) else { return Ok(None) };
        match u32::from_be_bytes(part(&raw, 0)) {
            SIMPLE_REPLY_MAGIC => {
                let cookie = Cookie(u64::from_be_bytes(part(&raw, 8)));
                let error = WireError::from_code(u32::from_be_bytes(part(&raw, 4)));
                Ok(Some(Event::Simple(cookie, error.map_or(Ok(()), Err))))
            }
            STRUCTURED_REPLY_MAGIC if self.mode == Mode::Structured => {
                self.state = State::Length(Head::new(&raw));
                Ok(None)
            }
            magic => Err(Fatal::Server("a reply with another magic", magic.into())),
        }
    }

    #[inline]
    fn announce(&mut self, len: u32) {
        self.left = len;
        self.state = if len == 0 { State::Header } else { State::Payload };
    }
}

impl Head {
    /// The fields that stand in the same place in both kinds of header.
    #[inline]
    fn new(raw: &[u8]) -> Self {
        Self {
            done: ChunkFlags(u16::from_be_bytes(part(raw, 4))).contains(ChunkFlags::DONE),
            kind: ChunkKind(u16::from_be_bytes(part(raw, 6))),
            cookie: Cookie(u64::from_be_bytes(part(raw, 8))),
            at: None,
            len: 0,
        }
    }

    #[inline]
    fn event(self, chunk: Chunk) -> Event<'static> {
        Event::Chunk { cookie: self.cookie, at: self.at, done: self.done, chunk }
    }
}

/// What to do after the header of a chunk: lengths that cannot be are refused before anything is gathered.
#[inline]
fn begin(head: Head) -> Result<State, Fatal> {
    let extended = head.at.is_some();
    let fits = match head.kind {
        ChunkKind::OFFSET_DATA => {
            return match head.len {
                9.. => Ok(State::Offset(head)),
                _ => Err(malformed(head.kind)),
            };
        }
        ChunkKind::NONE => head.len == 0 && head.done,
        ChunkKind::OFFSET_HOLE => head.len == 12,
        ChunkKind::BLOCK_STATUS => !extended && head.len > 4 && head.len % 8 == 4 && head.len <= STATUS_MAX,
        ChunkKind::BLOCK_STATUS_EXT => extended && head.len > 8 && head.len % 16 == 8 && head.len <= STATUS_MAX,
        kind if kind.is_error() => (6..=ERROR_MAX).contains(&head.len),
        kind => return Err(Fatal::Server("a chunk of an unknown kind", kind.0.into())),
    };
    if fits { Ok(State::Body(head)) } else { Err(malformed(head.kind)) }
}

/// Takes apart a chunk that is whole.
fn parse(kind: ChunkKind, mut reader: Reader<'_>) -> Option<Chunk> {
    let chunk = match kind {
        ChunkKind::NONE => Chunk::None,
        ChunkKind::OFFSET_HOLE => {
            let (at, len) = (reader.u64()?, reader.u32()?);
            (len > 0).then_some(Chunk::Hole { at, len })?
        }
        ChunkKind::BLOCK_STATUS => {
            let context = reader.u32()?;
            let mut extents = Vec::with_capacity(reader.rest().len() / 8);
            while !reader.rest().is_empty() {
                extents.push(extent(reader.u32()?.into(), reader.u32()?.into())?);
            }
            Chunk::Status { context, extents }
        }
        ChunkKind::BLOCK_STATUS_EXT => {
            let (context, count) = (reader.u32()?, reader.u32()?);
            let mut extents = Vec::with_capacity(reader.rest().len() / 16);
            while !reader.rest().is_empty() {
                extents.push(extent(reader.u64()?, reader.u64()?)?);
            }
            (extents.len() == count as usize).then_some(Chunk::Status { context, extents })?
        }
        _ => {
            // An unknown code counts as EINVAL, but 0 is no error.
            let error = WireError::from_code(reader.u32()?)?;
            let len = usize::from(reader.u16()?);
            let text = String::from_utf8_lossy(reader.bytes(len).filter(|text| text.len() <= NAME_MAX)?).into_owned();
            let at = match kind {
                ChunkKind::ERROR_OFFSET => Some(reader.u64()?),
                ChunkKind::ERROR => None,
                // Of an unknown error only what all have in common is known.
                _ => return Some(Chunk::Error { error, text, at: None }),
            };
            Chunk::Error { error, text, at }
        }
    };
    reader.end()?;
    Some(chunk)
}

fn extent(len: u64, flags: u64) -> Option<Extent> {
    (len > 0).then_some(Extent { len, flags })
}

#[cold]
fn malformed(kind: ChunkKind) -> Fatal {
    Fatal::Server("a malformed chunk", kind.0.into())
}
