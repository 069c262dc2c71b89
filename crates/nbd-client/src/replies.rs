//! [`Replies`]: bytes of the server become completions of the requests in flight. Knows no socket and no clock.
//!
//! Everything that a server sends is checked against the request that it answers. Memory is bounded: data goes into the
//! buffers of the caller, and all else has a limit for each request.

use std::sync::Arc;

use nbd_proto::{
    Cookie, Extent, Mode, WireError,
    client::{Chunk, Decoder, Event},
    limits::EXTENTS_MAX,
};

use crate::{
    error::Error,
    flights::{Flight, Flights},
    request::{Completion, Request, Status},
};

/// Error chunks in one reply: more would be a reply without an end.
const ERRORS_MAX: u32 = 1024;

/// Extents in one reply, of all contexts together: 64 MiB.
const EXTENTS_ALL_MAX: usize = 4 * EXTENTS_MAX;

/// The requests in flight, and the decoder of what the server says about them.
#[derive(Debug)]
pub(crate) struct Replies {
    decoder: Decoder,
    mode: Mode,
    contexts: Vec<(u32, Arc<str>)>,
    flights: Flights,
    /// The READ whose data comes next.
    reading: Option<Reading>,
}

#[derive(Clone, Copy, Debug)]
struct Reading {
    cookie: Cookie,
    /// Where in the buffer of the READ.
    place: usize,
    /// The reply ends with this data.
    last: bool,
}

impl Replies {
    /// `contexts`: the selected ones, with the ids that the server gave them.
    pub(crate) fn new(mode: Mode, contexts: Vec<(u32, Arc<str>)>) -> Self {
        Self { decoder: Decoder::new(mode), mode, contexts, flights: Flights::default(), reading: None }
    }

    /// Registers a request that will be sent. `is_sending`: its payload is not in it until [`sent`](Self::sent).
    pub(crate) fn expect(&mut self, request: Request, is_sending: bool) -> Cookie {
        self.flights.insert(request, is_sending)
    }

    /// Returns the payload of a WRITE to its request, now that it is sent.
    pub(crate) fn sent(&mut self, cookie: Cookie, payload: Vec<u8>, done: &mut Vec<Completion>) {
        let flight = self.flights.get(cookie).expect("a WRITE is in flight until its payload is sent");
        if let Request::Write { data, .. } = &mut flight.request {
            *data = payload;
        }
        flight.is_sending = false;
        self.flights.settle(cookie, done);
    }

    /// Requests in flight.
    pub(crate) fn len(&self) -> usize {
        self.flights.len()
    }

    /// Ends all requests with [`Error::Closed`].
    pub(crate) fn abandon(&mut self, done: &mut Vec<Completion>) {
        self.reading = None;
        self.flights.abandon(done);
    }

    /// Takes what the server has sent, in any pieces.
    ///
    /// # Errors
    /// [`Error::Protocol`]: close the connection.
    pub(crate) fn feed(&mut self, mut input: &[u8], done: &mut Vec<Completion>) -> Result<(), Error> {
        while let Some(event) = self.decoder.next(&mut input)? {
            match event {
                Event::Simple(cookie, result) => self.simple(cookie, result, done)?,
                Event::Chunk { cookie, at, done: last, chunk } => self.chunk(cookie, at, last, chunk, done)?,
                Event::Payload(bytes) => {
                    let place = self.place().expect("data follows its announcement");
                    place[..bytes.len()].copy_from_slice(bytes);
                    self.placed(bytes.len(), done)?;
                }
            }
        }
        Ok(())
    }

    /// The memory for the rest of the data that was announced: it may be received straight into it.
    pub(crate) fn landing(&mut self) -> Option<&mut [u8]> {
        let left = self.decoder.payload_left() as usize;
        self.place().map(|place| &mut place[..left])
    }

    /// Takes the first `n` bytes of [`landing`](Self::landing) as received.
    ///
    /// # Errors
    /// As [`feed`](Self::feed).
    pub(crate) fn landed(&mut self, n: usize, done: &mut Vec<Completion>) -> Result<(), Error> {
        self.decoder.payload_placed(u32::try_from(n).expect("a payload is shorter than 4 GiB"));
        self.placed(n, done)
    }

    fn place(&mut self) -> Option<&mut [u8]> {
        let Reading { cookie, place, .. } = self.reading?;
        match &mut self.flights.get(cookie)?.request {
            Request::Read { buffer, .. } => Some(&mut buffer[place..]),
            _ => None,
        }
    }

    fn placed(&mut self, n: usize, done: &mut Vec<Completion>) -> Result<(), Error> {
        let reading = self.reading.as_mut().expect("data follows its announcement");
        reading.place += n;
        if self.decoder.payload_left() > 0 {
            return Ok(());
        }
        let Reading { cookie, last, .. } = *reading;
        self.reading = None;
        if last { self.finish(cookie, done) } else { Ok(()) }
    }

    fn simple(
        &mut self,
        cookie: Cookie,
        result: Result<(), WireError>,
        done: &mut Vec<Completion>,
    ) -> Result<(), Error> {
        let mode = self.mode;
        let flight = self.flight(cookie)?;
        if flight.has_begun {
            return Err(broken(&flight.request, "a simple reply came after chunks"));
        }
        match (&flight.request, result) {
            (Request::Read { .. }, _) if mode != Mode::Simple => {
                Err(broken(&flight.request, "a simple reply came, but the replies to READ are chunks"))
            }
            (Request::Read { buffer, .. }, Ok(())) => {
                let len = buffer.len() as u64;
                let (at, _) = flight.request.range();
                flight.cover.add(at, at + len).expect("nothing has come before");
                self.decoder.expect_payload(u32::try_from(len).expect("a READ is shorter than 4 GiB"));
                self.reading = Some(Reading { cookie, place: 0, last: true });
                Ok(())
            }
            (_, Ok(())) => self.finish(cookie, done),
            (request, Err(error)) => {
                flight.error = Some(Error::server(request.to_string(), error, "", None));
                self.finish(cookie, done)
            }
        }
    }

    fn chunk(
        &mut self,
        cookie: Cookie,
        at: Option<u64>,
        last: bool,
        chunk: Chunk,
        done: &mut Vec<Completion>,
    ) -> Result<(), Error> {
        let flight = self.flight(cookie)?;
        if at.is_some_and(|at| at != flight.request.range().0) {
            return Err(broken(&flight.request, "a chunk repeats another offset"));
        }
        flight.has_begun = true;
        match chunk {
            Chunk::None => {}
            Chunk::Data { at, len } => {
                let place = flight.piece(at, len)?.start;
                self.reading = Some(Reading { cookie, place, last });
                // The reply goes on with the data.
                return Ok(());
            }
            Chunk::Hole { at, len } => {
                let place = flight.piece(at, len)?;
                if let Request::Read { buffer, .. } = &mut flight.request {
                    buffer[place].fill(0);
                }
            }
            Chunk::Status { context, extents } => {
                let known = self.contexts.iter().find(|(id, _)| *id == context).map(|(_, name)| Arc::clone(name));
                // Looked up again, because the contexts belong to `self` too.
                let flight = self.flights.get(cookie).expect("it was just there");
                flight.status(known, extents)?;
            }
            Chunk::Error { error, text, at } => flight.error(error, &text, at)?,
        }
        if last { self.finish(cookie, done) } else { Ok(()) }
    }

    /// The request that a reply is for.
    fn flight(&mut self, cookie: Cookie) -> Result<&mut Flight, Error> {
        let unknown =
            || Error::Protocol(format!("a reply with cookie {:#x}, which no request in flight has", cookie.0));
        let flight = self.flights.get(cookie).ok_or_else(unknown)?;
        if flight.result.is_some() {
            return Err(broken(&flight.request, "a second reply came"));
        }
        Ok(flight)
    }

    /// The reply is complete.
    fn finish(&mut self, cookie: Cookie, done: &mut Vec<Completion>) -> Result<(), Error> {
        let contexts = self.contexts.len();
        let flight = self.flight(cookie)?;
        let result = match flight.error.take() {
            Some(error) => Err(error),
            None => Ok(flight.check_whole(contexts)?),
        };
        flight.result = Some(result);
        self.flights.settle(cookie, done);
        Ok(())
    }
}

impl Flight {
    /// A chunk with data or a hole; returns its place in the buffer.
    fn piece(&mut self, at: u64, len: u32) -> Result<std::ops::Range<usize>, Error> {
        let Request::Read { at: start, buffer, df } = &self.request else {
            return Err(broken(&self.request, "a chunk with data came"));
        };
        let (start, size, df) = (*start, buffer.len() as u64, *df);
        let place = at.checked_sub(start).filter(|place| place.checked_add(len.into()).is_some_and(|end| end <= size));
        let Some(place) = place else {
            return Err(broken(&self.request, &format!("a chunk of {len} bytes at {at} is outside of it")));
        };
        if df && self.pieces > 0 {
            return Err(broken(&self.request, "two chunks with data came, in spite of the flag DF"));
        }
        self.pieces += 1;
        let added = self.cover.add(at, at + u64::from(len));
        added.map_err(|why| broken(&self.request, &format!("a chunk of {len} bytes at {at} {why}")))?;
        let place = usize::try_from(place).expect("it is within the buffer");
        Ok(place..place + len as usize)
    }

    /// The status of one context; `None`: no such context was selected.
    fn status(&mut self, context: Option<Arc<str>>, extents: Vec<Extent>) -> Result<(), Error> {
        let Request::Status { len, one, .. } = self.request else {
            return Err(broken(&self.request, "a chunk with block status came"));
        };
        let Some(context) = context else {
            return Err(broken(&self.request, "the status of a context came that was not selected"));
        };
        if self.status.iter().any(|status| status.context == context) {
            return Err(broken(&self.request, &format!("the status of {context} came twice")));
        }
        let before: usize = self.status.iter().map(|status| status.extents.len()).sum();
        if before + extents.len() > EXTENTS_ALL_MAX {
            return Err(broken(&self.request, &format!("more than {EXTENTS_ALL_MAX} extents came")));
        }
        // Only the last extent may go past the request; with REQ_ONE there is one, and it may not.
        let (last, others) = extents.split_last().expect("a status has an extent");
        let sum = others.iter().try_fold(0_u64, |sum, extent| sum.checked_add(extent.len)).filter(|sum| *sum < len);
        if sum.is_none() || (one && (!others.is_empty() || last.len > len)) {
            return Err(broken(&self.request, &format!("the extents of {context} go past the request")));
        }
        self.status.push(Status { context, extents });
        Ok(())
    }

    fn error(&mut self, error: WireError, text: &str, at: Option<u64>) -> Result<(), Error> {
        let (start, len) = self.request.range();
        self.errors += 1;
        if self.errors > ERRORS_MAX {
            return Err(broken(&self.request, &format!("more than {ERRORS_MAX} errors came")));
        }
        if let Some(at) = at.filter(|at| len > 0 && at.checked_sub(start).is_none_or(|place| place >= len)) {
            return Err(broken(&self.request, &format!("an error at {at} is outside of it")));
        }
        if self.error.is_none() {
            self.error = Some(Error::server(self.request.to_string(), error, text, at));
        }
        Ok(())
    }

    /// Whether a reply without an error has all that the request asked for.
    fn check_whole(&self, contexts: usize) -> Result<(), Error> {
        let (start, len) = self.request.range();
        match &self.request {
            Request::Read { .. } if !self.cover.is_whole(start, start + len) => {
                Err(broken(&self.request, "the reply ended before all data had come"))
            }
            Request::Status { .. } if self.status.len() != contexts => {
                Err(broken(&self.request, "the reply ended before the status of all contexts had come"))
            }
            _ => Ok(()),
        }
    }
}

#[cold]
fn broken(request: &Request, what: &str) -> Error {
    Error::Protocol(format!("{request}: {what}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const AT: u64 = 4096;

    fn replies(mode: Mode) -> Replies {
        Replies::new(mode, vec![(3, "base:allocation".into())])
    }

    /// A structured chunk.
    fn chunk(cookie: Cookie, flags: u16, kind: u16, body: &[u8]) -> Vec<u8> {
        let head = [0x668e_33ef_u32.to_be_bytes().as_slice(), &flags.to_be_bytes(), &kind.to_be_bytes()].concat();
        [&head, &cookie.0.to_be_bytes()[..], &(body.len() as u32).to_be_bytes(), body].concat()
    }

    /// A READ, a WRITE, a status and a READ that fails, with their replies in another order.
    fn conversation(replies: &mut Replies) -> Vec<u8> {
        let read = replies.expect(Request::read(AT, 20), false);
        let write = replies.expect(Request::write(AT, vec![1]), false);
        let status = replies.expect(Request::Status { at: AT, len: 20, one: false }, false);
        let failing = replies.expect(Request::read(0, 5), false);
        let at = |at: u64, rest: &[u8]| [&at.to_be_bytes()[..], rest].concat();
        [
            chunk(read, 0, 1, &at(AT + 12, b"eight by")),
            chunk(status, 1, 5, b"\0\0\0\x03\0\0\0\x08\0\0\0\0\0\0\0\x0c\0\0\0\x03"),
            chunk(failing, 0, 0x8002, &[b"\0\0\0\x05\0\x02no".as_slice(), &at(3, b"")].concat()),
            chunk(read, 0, 2, &at(AT + 4, &8_u32.to_be_bytes())),
            [&0x6744_6698_u32.to_be_bytes()[..], &[0; 4], &write.0.to_be_bytes()].concat(),
            chunk(failing, 1, 0, b""),
            chunk(read, 1, 1, &at(AT, b"four")),
        ]
        .concat()
    }

    /// Takes the bytes piece by piece, data straight into place where that is possible.
    fn outcome<'a>(pieces: impl Fn(&'a [u8]) -> Vec<&'a [u8]>, bytes: &'a [u8], is_direct: bool) -> Vec<String> {
        let (mut replies, mut done) = (replies(Mode::Structured), Vec::new());
        conversation(&mut replies);
        for mut piece in pieces(bytes) {
            while let Some(landing) = replies.landing().filter(|_| is_direct && !piece.is_empty()) {
                let n = landing.len().min(piece.len());
                landing[..n].copy_from_slice(&piece[..n]);
                piece = &piece[n..];
                replies.landed(n, &mut done).unwrap();
            }
            replies.feed(piece, &mut done).unwrap();
        }
        assert_eq!(replies.len(), 0);
        let text = |done: &Completion| match &done.request {
            Request::Read { buffer, .. } => format!("{done:?} {}", buffer.escape_ascii()),
            _ => format!("{done:?}"),
        };
        done.iter().map(text).collect()
    }

    #[test]
    fn cuts_change_nothing() {
        let bytes = conversation(&mut replies(Mode::Structured));
        let whole = outcome(|bytes| vec![bytes], &bytes, false);
        assert_eq!(whole.len(), 4);
        assert!(whole[3].ends_with(r"four\x00\x00\x00\x00\x00\x00\x00\x00eight by"), "{whole:?}");
        for is_direct in [false, true] {
            assert_eq!(outcome(|bytes| bytes.chunks(1).collect(), &bytes, is_direct), whole);
            for cut in 0..=bytes.len() {
                assert_eq!(outcome(|bytes| vec![&bytes[..cut], &bytes[cut..]], &bytes, is_direct), whole, "{cut}");
            }
        }
    }

    #[test]
    fn an_early_reply_waits_for_the_payload() {
        for (error, is_error) in [(0_u32, false), (28, true)] {
            let (mut replies, mut done) = (replies(Mode::Simple), Vec::new());
            let cookie = replies.expect(Request::write(AT, Vec::new()), true);
            let reply = [&0x6744_6698_u32.to_be_bytes()[..], &error.to_be_bytes(), &cookie.0.to_be_bytes()].concat();
            replies.feed(&reply, &mut done).unwrap();
            assert!(done.is_empty() && replies.len() == 1);
            assert!(replies.feed(&reply, &mut done).is_err(), "a second reply");
            replies.sent(cookie, b"data".into(), &mut done);
            assert_eq!(done[0].request, Request::write(AT, b"data".into()));
            assert_eq!((done.len(), done[0].result.is_err(), replies.len()), (1, is_error, 0));
        }
    }

    #[test]
    fn a_cookie_is_never_used_again() {
        let mut replies = replies(Mode::Simple);
        let mut seen = std::collections::HashSet::new();
        for _ in 0..1000 {
            let (cookie, mut done) = (replies.expect(Request::Flush, false), Vec::new());
            assert!(seen.insert(cookie));
            let reply = [&0x6744_6698_u32.to_be_bytes()[..], &[0; 4], &cookie.0.to_be_bytes()].concat();
            replies.feed(&reply, &mut done).unwrap();
            assert_eq!(done[0].cookie, cookie);
        }
    }
}
