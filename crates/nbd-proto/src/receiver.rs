//! Server side of the transmission phase: bytes in, commands out. It owns the count of every payload, so that whatever
//! becomes of a WRITE exactly its bytes leave the stream. Never does I/O, never allocates.

use crate::command::{self, Command, Header, Judged, Refused, Rejection, Write};
use crate::limits::SWALLOW_MAX;
use crate::reader::{Joint, part, take_up_to};
use crate::terms::{ContextSet, Fatal, Terms};
use crate::wire::{
    CommandFlags, CommandKind, Cookie, EXTENDED_REQUEST_LEN, EXTENDED_REQUEST_MAGIC, Mode, REQUEST_LEN, REQUEST_MAGIC,
    WireError,
};

/// What the client sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event<'a> {
    /// A command to be carried out and answered.
    Command(Cookie, Command),
    /// A WRITE. Its `len` bytes follow as [`Payload`](Self::Payload), or are received straight into place by the caller
    /// ([`Receiver::payload_left`]).
    Write(Cookie, Write),
    /// The next bytes of the WRITE that was announced; never empty.
    Payload(&'a [u8]),
    /// A request to be answered with an error. It comes when the payload of the request, if any, is past: clients do
    /// not expect the answer to a request that they still are sending.
    Reject(Cookie, Rejection),
    /// The client goes: finish what is outstanding, then close. Nothing comes after it.
    Disconnect,
}

/// The decoder of one connection's requests.
#[derive(Clone, Debug)]
pub struct Receiver {
    terms: Terms,
    state: State,
    /// Bytes of the current payload that are not past yet. 0 in `State::Header`.
    left: u32,
    joint: Joint,
    /// Of the last request with a payload, or without one but refused.
    cookie: Cookie,
    at: u64,
    /// In `State::Refuse`: what to say.
    kind: CommandKind,
    refused: Refused,
    /// In `State::Selection`: what is known so far.
    selection: Selection,
}

/// Where the stream stands. A byte, as it is looked at for every event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// At a request.
    Header,
    /// In the payload of a WRITE.
    Payload,
    /// In a payload that nobody wants.
    Skip,
    /// In a payload that nobody wants, after which a refusal is to be told.
    Refuse,
    /// In the payload of a BLOCK_STATUS: first its length, then ids.
    Selection,
    /// After DISC.
    Over,
}

#[derive(Clone, Copy, Debug, Default)]
struct Selection {
    one: bool,
    len: Option<u64>,
    ids: ContextSet,
    /// An id was not negotiated, or there twice.
    wrong: bool,
}

impl Receiver {
    /// A decoder at the first request.
    pub fn new(terms: Terms) -> Self {
        Self {
            terms: terms.told(),
            state: State::Header,
            left: 0,
            joint: Joint::default(),
            cookie: Cookie(0),
            at: 0,
            kind: CommandKind::WRITE,
            refused: (WireError::Inval, ""),
            selection: Selection::default(),
        }
    }

    /// Takes one event off the front of `input`; `None` when it needs more bytes, and then `input` is empty (save after
    /// DISC). Parts of headers are kept inside, so the caller never has to keep any. After an error the connection must
    /// be dropped.
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

    /// Bytes of the announced WRITE that the caller does not have yet; 0 outside of one. When it is more than 0 and
    /// `input` is used up, they may be received straight into place, and told by
    /// [`payload_placed`](Self::payload_placed).
    #[inline]
    pub fn payload_left(&self) -> u32 {
        if self.state == State::Payload { self.left } else { 0 }
    }

    /// Says that `n` bytes of the payload went past this decoder, straight into place.
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

    /// Gives up the rest of the announced WRITE's payload: the receiver swallows it, without an event. The caller
    /// answers the WRITE, and should do so no earlier than the payload is past;
    /// [`reject_payload`](Self::reject_payload) takes care of that.
    pub fn skip_payload(&mut self) {
        if self.state == State::Payload {
            self.state = State::Skip;
        }
    }

    /// Gives up the rest of the last announced WRITE's payload, and has [`next`](Self::next) say [`Event::Reject`] when
    /// it is past. Valid from [`Event::Write`] on until the last byte of its payload was taken, and for a WRITE of no
    /// bytes until the next call of `next`.
    pub fn reject_payload(&mut self, error: WireError, text: &'static str) {
        self.refuse(CommandKind::WRITE, (error, text));
    }

    /// The export has another size from now on.
    pub fn set_size(&mut self, size: u64) {
        self.terms.size = size;
    }

    /// The terms, as the client was told them.
    pub fn terms(&self) -> &Terms {
        &self.terms
    }

    /// Whether the stream stands between two requests: nothing is lost when it ends here.
    pub fn is_idle(&self) -> bool {
        self.joint.is_empty() && matches!(self.state, State::Header | State::Over)
    }

    /// Takes a header off `input`, or keeps what there is of it.
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

    /// What a request begins.
    #[inline]
    fn begin<'a>(&mut self, header: &Header, input: &mut &'a [u8]) -> Result<Option<Event<'a>>, Fatal> {
        // Whatever else stands in it: there is no answer to a DISC, and nothing can follow it.
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
            Ok(Judged::Command(command)) => Ok(Some(Event::Command(cookie, command))),
            Ok(Judged::Write(write)) => {
                self.enter(if left == 0 { State::Header } else { State::Payload }, left, header);
                Ok(Some(Event::Write(cookie, write)))
            }
            Ok(Judged::Selection { one }) => {
                self.enter(State::Selection, left, header);
                self.selection = Selection { one, ..Selection::default() };
                Ok(self.resume(input))
            }
            Err(refused) => {
                self.enter(State::Refuse, left, header);
                self.refuse(header.kind, refused);
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

    fn refuse(&mut self, kind: CommandKind, refused: Refused) {
        self.state = State::Refuse;
        self.kind = kind;
        self.refused = refused;
    }

    /// The next bytes of a wanted payload.
    #[inline]
    fn payload<'a>(&mut self, input: &mut &'a [u8]) -> Option<Event<'a>> {
        let piece = self.advance(input);
        if self.left == 0 {
            self.state = State::Header;
        }
        (!piece.is_empty()).then_some(Event::Payload(piece))
    }

    /// Goes on with any other payload. No event and `State::Header`: a payload that nobody wanted is past.
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
                told.then(|| self.rejection(self.kind, self.refused))
            }
        }
    }

    /// Takes what there is of the payload.
    #[inline]
    fn advance<'a>(&mut self, input: &mut &'a [u8]) -> &'a [u8] {
        let piece = take_up_to(input, self.left as usize);
        self.left -= u32::try_from(piece.len()).expect("a piece is no longer than the payload");
        piece
    }

    /// Reads on in a payload that names contexts: eight bytes of length, then ids of four.
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
        let judged = match wrong {
            true => Err((WireError::Inval, "block status of an unknown context, or of one twice")),
            false => command::status(&self.terms, self.at, len, one, ids),
        };
        Some(match judged {
            Ok(command) => Event::Command(self.cookie, command),
            Err(refused) => self.rejection(CommandKind::BLOCK_STATUS, refused),
        })
    }

    fn rejection(&self, kind: CommandKind, (error, text): Refused) -> Event<'static> {
        Event::Reject(self.cookie, Rejection { kind, at: self.at, error, text })
    }
}

#[inline]
fn expect(magic: u32, raw: &[u8]) -> Result<(), Fatal> {
    let found = u32::from_be_bytes(part(raw, 0));
    if found == magic { Ok(()) } else { Err(Fatal::RequestMagic(found)) }
}

/// The fields that stand in the same place in both kinds of header.
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
