//! Server side of the transmission phase: bytes in, commands out. It counts every payload, so that exactly the bytes of a WRITE
//! leave the stream, whatever happens to the request. No I/O, no allocation.

use crate::client::encoder::Encoder;
use crate::command::{self, Command, Header, Reason, Rejection, Request, Write};
use crate::limits::SWALLOW_MAX;
use crate::reader::{Joint, part, take_up_to};
use crate::terms::{ContextSet, Fatal, Terms};
use crate::wire::{
    CommandFlags, CommandKind, Cookie, EXTENDED_REQUEST_LEN, EXTENDED_REQUEST_MAGIC, Mode, REQUEST_LEN, REQUEST_MAGIC,
    WireError,
};

/// An event from the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event<'a> {
    /// A command to execute and reply to.
    Command(Cookie, Command),
    /// A WRITE. Its `len` bytes follow as [`Payload`](Self::Payload), or the caller receives them directly into its buffer
    /// ([`Receiver::payload_left`]).
    Write(Cookie, Write),
    /// The next bytes of the current WRITE; never empty.
    Payload(&'a [u8]),
    /// A request that must get an error reply. It comes after the payload of the request, if any: clients do not expect the reply
    /// to a request that they are still sending.
    Reject(Cookie, Rejection),
    /// NBD_CMD_DISC: complete the requests in flight, then close. It is the last event.
    Disconnect,
}

/// Where a [`Receiver`] is in its stream, as plain data: another one can [continue](Receiver::continued) there.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Position {
    /// Bytes of a refused payload that are still to come, and are discarded.
    pub skip: u32,
    /// The rejection that follows them.
    pub reject: Option<(Cookie, Rejection)>,
    /// The part of a request that was taken, but caused no event yet. It must be taken again, before all other input.
    pub taken: Vec<u8>,
    /// NBD_CMD_DISC was taken.
    pub over: bool,
}

/// The decoder of one connection's requests.
#[derive(Clone, Debug)]
pub struct Receiver {
    terms: Terms,
    state: State,
    /// Unread bytes of the current payload. 0 in `State::Header`.
    left: u32,
    joint: Joint,
    /// The cookie of the last request with a payload, or of a refused one without.
    cookie: Cookie,
    at: u64,
    /// In `State::Refuse`: the parts of the rejection.
    kind: CommandKind,
    reason: Reason,
    /// In `State::Selection`: the contexts read so far.
    selection: Selection,
}

/// The position in the stream. One byte, because every event reads it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Before a request.
    Header,
    /// In the payload of a WRITE.
    Payload,
    /// In a payload that is discarded.
    Skip,
    /// In a payload that is discarded, and followed by a rejection.
    Refuse,
    /// In the payload of a BLOCK_STATUS: its length first, then ids.
    Selection,
    /// After DISC.
    Over,
}

#[derive(Clone, Copy, Debug, Default)]
struct Selection {
    one: bool,
    len: Option<u64>,
    ids: ContextSet,
    /// An id was not negotiated, or occurs twice.
    wrong: bool,
}

impl Receiver {
    /// Returns a decoder before its first request.
    pub fn new(terms: Terms) -> Self {
        Self {
            terms: terms.told(),
            state: State::Header,
            left: 0,
            joint: Joint::default(),
            cookie: Cookie(0),
            at: 0,
            kind: CommandKind::WRITE,
            reason: (WireError::Inval, ""),
            selection: Selection::default(),
        }
    }

    /// Takes one event from the front of `input`. `None`: it needs more bytes; then `input` is empty, except after DISC.
    /// Incomplete headers are kept inside, never by the caller. After an error the connection must be dropped.
    #[inline]
    pub fn next<'a>(&mut self, input: &mut &'a [u8]) -> Result<Option<Event<'a>>, Fatal> {
        match self.state {
            State::Header => {}
            State::Payload => return Ok(self.payload(input)),
            _ => {
                let event = self.resume(input);
                if event.is_some() || self.state != State::Header {
                    return Ok(event);
                }
            }
        }
        let Some(header) = self.header(input)? else { return Ok(None) };
        self.begin(&header, input)
    }

    /// Bytes of the current WRITE that the caller does not have yet; 0 if there is none. While it is more than 0 and `input` is
    /// used up, the caller may receive them directly into its buffer, and report them with
    /// [`payload_placed`](Self::payload_placed).
    #[inline]
    pub fn payload_left(&self) -> u32 {
        if self.state == State::Payload { self.left } else { 0 }
    }

    /// Reports that the caller received `n` bytes of the payload directly.
    ///
    /// # Panics
    ///
    /// If `n` is more than [`payload_left`](Self::payload_left).
    #[inline]
    pub fn payload_placed(&mut self, n: u32) {
        assert!(n <= self.payload_left(), "{n} bytes were placed of a payload of {}", self.payload_left());
        self.left -= n;
        if self.left == 0 {
            self.state = State::Header;
        }
    }

    /// Discards the rest of the current WRITE's payload, without an event. The caller replies to the WRITE, and should do so only
    /// after the payload; [`reject_payload`](Self::reject_payload) takes care of that.
    pub fn skip_payload(&mut self) {
        if self.state == State::Payload {
            self.state = State::Skip;
        }
    }

    /// Discards the rest of the current WRITE's payload; [`next`](Self::next) returns [`Event::Reject`] after it. Valid from
    /// [`Event::Write`] until the last byte of the payload was taken, and for a WRITE of no bytes until the next call of `next`.
    pub fn reject_payload(&mut self, error: WireError, text: &'static str) {
        self.refuse(CommandKind::WRITE, (error, text));
    }

    /// Returns the position in the stream. Of a WRITE whose payload is incomplete, only the caller has the parts: the position is
    /// behind it, so the caller must put the whole request in front of the other input.
    pub fn position(&self) -> Position {
        let mut position = Position { over: self.state == State::Over, ..Position::default() };
        match self.state {
            State::Skip => position.skip = self.left,
            State::Refuse => {
                position.skip = self.left;
                let (kind, at, (error, text)) = (self.kind, self.at, self.reason);
                position.reject = Some((self.cookie, Rejection { kind, at, error, text }));
            }
            State::Selection => position.taken = self.selection_again(),
            State::Header | State::Payload | State::Over => {}
        }
        position.taken.extend_from_slice(self.joint.bytes());
        position
    }

    /// Returns a decoder that continues at a position. Its first input must be [`Position::taken`].
    pub fn continued(terms: Terms, position: &Position) -> Self {
        let mut receiver = Self::new(terms);
        receiver.left = position.skip;
        receiver.state = match position {
            Position { over: true, .. } => State::Over,
            Position { reject: Some(_), .. } => State::Refuse,
            Position { skip: 1.., .. } => State::Skip,
            _ => State::Header,
        };
        if let Some((cookie, Rejection { kind, at, error, text })) = position.reject {
            (receiver.cookie, receiver.at, receiver.kind, receiver.reason) = (cookie, at, kind, (error, text));
        }
        receiver
    }

    /// The part of a BLOCK_STATUS with a payload that was taken, as it was on the wire, or with the same meaning.
    fn selection_again(&self) -> Vec<u8> {
        let Selection { one, len, ids, wrong } = self.selection;
        let mut payload = len.map_or(Vec::new(), |len| len.to_be_bytes().to_vec());
        payload.extend(ids.iter().flat_map(u32::to_be_bytes));
        if wrong {
            // No context has this id.
            payload.extend(u32::MAX.to_be_bytes());
        }
        let left = u64::from(self.left) + payload.len() as u64;
        let flags = CommandFlags::PAYLOAD_LEN.with_if(one, CommandFlags::REQ_ONE);
        let mut bytes = Vec::new();
        let encoder = Encoder::new(Mode::Extended);
        encoder.request(&mut bytes, self.cookie, CommandKind::BLOCK_STATUS, flags, self.at, left);
        bytes.append(&mut payload);
        bytes
    }

    /// Changes the size of the export, for later requests.
    pub fn set_size(&mut self, size: u64) {
        self.terms.size = size;
    }

    /// The negotiated terms.
    pub fn terms(&self) -> &Terms {
        &self.terms
    }

    /// Whether the stream is between two requests: a connection that ends here is not truncated.
    pub fn is_idle(&self) -> bool {
        self.joint.is_empty() && matches!(self.state, State::Header | State::Over)
    }

    /// Takes a header from `input`, or keeps the available part of it.
    #[inline]
    fn header(&mut self, input: &mut &[u8]) -> Result<Option<Header>, Fatal> {
        if self.terms.mode == Mode::Extended {
            let Some(raw) = self.joint.take::<EXTENDED_REQUEST_LEN>(input) else { return Ok(None) };
            expect(EXTENDED_REQUEST_MAGIC, &raw)?;
            Ok(Some(Header { len: u64::from_be_bytes(part(&raw, 24)), ..fields(&raw) }))
        } else {
            let Some(raw) = self.joint.take::<REQUEST_LEN>(input) else { return Ok(None) };
            expect(REQUEST_MAGIC, &raw)?;
            Ok(Some(Header { len: u64::from(u32::from_be_bytes(part(&raw, 24))), ..fields(&raw) }))
        }
    }

    /// Handles a request header.
    #[inline]
    fn begin<'a>(&mut self, header: &Header, input: &mut &'a [u8]) -> Result<Option<Event<'a>>, Fatal> {
        // Other fields do not matter: DISC has no reply, and nothing can follow it.
        if header.kind == CommandKind::DISC {
            self.state = State::Over;
            return Ok(Some(Event::Disconnect));
        }
        let cookie = Cookie(header.cookie);
        let payload = header.payload(self.terms.mode);
        let Some(left) = u32::try_from(payload).ok().filter(|&n| n <= SWALLOW_MAX.max(self.terms.block.payload_max))
        else {
            return Err(Fatal::PayloadLength(payload));
        };
        match command::judge(&self.terms, header) {
            Ok(Request::Command(command)) => Ok(Some(Event::Command(cookie, command))),
            Ok(Request::Write(write)) => {
                self.enter(if left == 0 { State::Header } else { State::Payload }, left, header);
                Ok(Some(Event::Write(cookie, write)))
            }
            Ok(Request::Selection { one }) => {
                self.enter(State::Selection, left, header);
                self.selection = Selection { one, ..Selection::default() };
                Ok(self.resume(input))
            }
            Err(reason) => {
                self.enter(State::Refuse, left, header);
                self.refuse(header.kind, reason);
                Ok(self.resume(input))
            }
        }
    }

    #[inline]
    fn enter(&mut self, state: State, left: u32, header: &Header) {
        self.state = state;
        self.left = left;
        self.cookie = Cookie(header.cookie);
        self.at = header.at;
    }

    fn refuse(&mut self, kind: CommandKind, reason: Reason) {
        self.state = State::Refuse;
        self.kind = kind;
        self.reason = reason;
    }

    /// Returns the next bytes of a payload that the caller wants.
    #[inline]
    fn payload<'a>(&mut self, input: &mut &'a [u8]) -> Option<Event<'a>> {
        let piece = self.advance(input);
        if self.left == 0 {
            self.state = State::Header;
        }
        (!piece.is_empty()).then_some(Event::Payload(piece))
    }

    /// Continues with any other payload. If it returns no event and the state is `State::Header`, a discarded payload has ended.
    #[cold]
    fn resume<'a>(&mut self, input: &mut &'a [u8]) -> Option<Event<'a>> {
        match self.state {
            State::Header | State::Payload | State::Over => None,
            State::Selection => self.select(input),
            State::Skip | State::Refuse => {
                self.advance(input);
                if self.left > 0 {
                    return None;
                }
                let told = self.state == State::Refuse;
                self.state = State::Header;
                told.then(|| self.rejection(self.kind, self.reason))
            }
        }
    }

    /// Takes the available bytes of the payload.
    #[inline]
    fn advance<'a>(&mut self, input: &mut &'a [u8]) -> &'a [u8] {
        let piece = take_up_to(input, self.left as usize);
        self.left -= u32::try_from(piece.len()).expect("a piece is no longer than the payload");
        piece
    }

    /// Continues in a payload that names contexts: eight bytes of length, then ids of four bytes.
    fn select<'a>(&mut self, input: &mut &'a [u8]) -> Option<Event<'a>> {
        let len = match self.selection.len {
            Some(len) => len,
            None => {
                let len = u64::from_be_bytes(self.joint.take(input)?);
                self.left -= 8;
                *self.selection.len.insert(len)
            }
        };
        while self.left > 0 {
            let id = u32::from_be_bytes(self.joint.take(input)?);
            self.left -= 4;
            self.selection.wrong |= !self.terms.contexts.contains(id) || !self.selection.ids.insert(id);
        }
        self.state = State::Header;
        let Selection { one, ids, wrong, .. } = self.selection;
        let request = match wrong {
            true => Err((WireError::Inval, "block status of an unknown context, or of one twice")),
            false => command::status(&self.terms, self.at, len, one, ids),
        };
        Some(match request {
            Ok(command) => Event::Command(self.cookie, command),
            Err(reason) => self.rejection(CommandKind::BLOCK_STATUS, reason),
        })
    }

    fn rejection(&self, kind: CommandKind, (error, text): Reason) -> Event<'static> {
        Event::Reject(self.cookie, Rejection { kind, at: self.at, error, text })
    }
}

#[inline]
fn expect(magic: u32, raw: &[u8]) -> Result<(), Fatal> {
    let found = u32::from_be_bytes(part(raw, 0));
    if found == magic { Ok(()) } else { Err(Fatal::RequestMagic(found)) }
}

/// The fields that both kinds of header have in the same place.
#[inline]
fn fields(raw: &[u8]) -> Header {
    Header {
        flags: CommandFlags(u16::from_be_bytes(part(raw, 4))),
        kind: CommandKind(u16::from_be_bytes(part(raw, 6))),
        cookie: u64::from_be_bytes(part(raw, 8)),
        at: u64::from_be_bytes(part(raw, 16)),
        len: 0,
    }
}
