//! [`Session`]: one connection's transmission phase. It turns client bytes into block requests and completions into replies. It
//! has no socket and no clock.

use std::collections::VecDeque;

use blkdev::{Buf, Channel, Done, Error, ExtentKind, Io, PAGE};
use nbd_proto::{
    Command, Cookie, Event, Fatal, Mode, Negotiated, Receiver, Replier, Terms, WireError, Write,
    wire::{AllocationFlags, CommandKind},
};

use crate::{
    continuation::{Continuation, Read, encode_command, encode_write},
    lines::{Grant, Part},
    observe::Traffic,
    outbox::Outbox,
    pace::Progress,
};

/// Most requests of one connection that are in flight, waiting, or have unsent replies. Further requests stay in the socket.
pub(crate) const CALLS_MAX: usize = 1024;

/// Most bytes of unsent reply headers. Beyond this, the session takes no more requests from a client that does not read replies.
const HEADS_MAX: usize = 64 << 10;

/// Bytes of payload memory that requests may take in a turn, if the [device has answered](Channel::is_prompt) by its end. Then
/// the replies are sent, and the next requests get the same memory again. With more, the data would have left the cache before it
/// is sent.
pub(crate) const TURN: usize = 256 << 10;

/// Longest descriptor of an extent in a reply, in bytes.
const EXTENT_LEN: usize = 16;

/// Most block status requests of one connection in flight: each holds a list of extents.
const STATUSES_MAX: usize = 16;

/// Cost in a turn, in addition to bytes of memory, of a request that makes a device search or change its map.
const SEARCH: usize = TURN / 16;

/// Longest part of a reply that is read again at a time after its memory was reclaimed: about what a socket buffers.
const REFILL: usize = 128 << 10;

/// Up to this fraction of a channel's memory, a client's share is not checked: one 64th, 1 MiB of the default 64.
const MODEST: usize = 64;

/// A client in the transmission phase.
///
/// The owner passes bytes from the client to [`take`](Self::take), passes completions that carry its number to
/// [`complete`](Self::complete), and sends its [`outbox`](Self::outbox).
#[derive(Debug)]
pub struct Session {
    /// Upper half of every tag, from which the owner finds the session of a completion.
    number: u32,
    receiver: Receiver,
    replier: Replier,
    calls: Calls,
    /// READs that wait for memory. Requests that need no memory overtake them.
    waiting: VecDeque<Read>,
    /// A parsed request that blocks all later ones: a WRITE that waits for memory, or a request that waits for an earlier one to
    /// end.
    stalled: Option<(Cookie, Request)>,
    /// The memory that the first waiting request needs.
    wants: Option<Part>,
    /// It waits until the client holds less memory instead: see [`is_held_back`](Self::is_held_back).
    held_back: bool,
    /// Why the last call of `take` stopped.
    stall: Option<Stall>,
    filling: Option<Filling>,
    /// Bytes of payload received since the connection began.
    landed: u64,
    outbox: Outbox,
    /// Bytes of payload memory in requests that receive their payload or are at the device.
    held: usize,
    /// Block status requests at the device.
    statuses: usize,
    /// Cost in this turn of requests without payload that take a prompt device long.
    spent: usize,
    /// A part of a reply is being read again.
    refilling: bool,
    /// A partly sent reply cannot be completed.
    broken: bool,
    /// The client has sent NBD_CMD_DISC.
    disconnecting: bool,
    /// The export is being removed: no further request begins.
    refusing: bool,
    /// See [`lose`](Self::lose).
    lost: bool,
    /// The connection is closed: replies are not needed.
    closed: bool,
    traffic: Traffic,
}

/// Why a session takes no more input now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stall {
    /// It needs payload memory.
    Memory,
    /// Its client has too many requests in flight: try again when one has ended or a reply is sent.
    Calls,
    /// Its client has sent NBD_CMD_DISC: no more input is taken.
    Disconnect,
    /// It has taken its memory for this turn: try again when the replies are sent.
    Turn,
}

/// A parsed request.
#[derive(Clone, Copy, Debug)]
enum Request {
    Command(Command),
    Write(Write),
}

/// A write whose payload is arriving.
#[derive(Debug)]
struct Filling {
    cookie: Cookie,
    write: Write,
    buf: Buf,
    have: usize,
}

impl Session {
    /// Returns a session with the results of a handshake. `number` becomes the upper half of the tags that it submits.
    pub fn new(negotiated: &Negotiated, number: u32) -> Self {
        Self::with(Receiver::new(negotiated.terms), negotiated.terms, number)
    }

    /// Returns a session that continues another one, and the input that it must [`take`](Self::take) first.
    pub fn resume(state: Continuation, number: u32) -> (Self, Vec<u8>) {
        let Continuation { terms, reads, position, input, output } = state;
        let mut session = Self::with(Receiver::continued(terms, &position), terms, number);
        session.waiting = reads.into();
        session.disconnecting = position.over;
        session.outbox = Outbox::resume(output);
        // Something may have to be done that does not depend on new input.
        session.stall = Some(Stall::Turn);
        (session, input)
    }

    /// Returns all that another session needs to continue this one; `input` was not taken yet. `None`: requests of it are at the
    /// device, or it is ending.
    pub fn suspend(&self, input: &[u8]) -> Option<Continuation> {
        if self.calls.in_use > 0 || self.refusing || self.broken || self.closed {
            return None;
        }
        let (terms, mut position, mut again) = (*self.terms(), self.receiver.position(), Vec::new());
        match self.stalled {
            Some((cookie, Request::Command(command))) => encode_command(&terms, cookie, command, &mut again),
            Some((cookie, Request::Write(write))) => encode_write(&terms, cookie, write, &mut again),
            None => {}
        }
        if let Some(Filling { cookie, write, buf, have }) = &self.filling {
            encode_write(&terms, *cookie, *write, &mut again);
            let head = again.len();
            again.resize(head + have, 0);
            buf.copy_to(0, &mut again[head..]);
        }
        again.append(&mut position.taken);
        again.extend_from_slice(input);
        let reads = self.waiting.iter().copied().collect();
        Some(Continuation { terms, reads, position, input: again, output: self.outbox.unsent() })
    }

    fn with(receiver: Receiver, terms: Terms, number: u32) -> Self {
        Self {
            number,
            receiver,
            replier: Replier::new(terms),
            calls: Calls::default(),
            waiting: VecDeque::new(),
            stalled: None,
            wants: None,
            held_back: false,
            stall: None,
            filling: None,
            landed: 0,
            statuses: 0,
            spent: 0,
            outbox: Outbox::default(),
            held: 0,
            refilling: false,
            broken: false,
            disconnecting: false,
            refusing: false,
            lost: false,
            closed: false,
            traffic: Traffic::default(),
        }
    }

    /// The results of the negotiation.
    pub fn terms(&self) -> &Terms {
        self.receiver.terms()
    }

    /// Returns the number of the session that submitted a request with this tag.
    #[inline]
    pub fn number_of(tag: u64) -> u32 {
        (tag >> 32) as u32
    }

    /// Takes requests from `input` and submits them to `channel`, until the input is used up or the session
    /// [stalls](Self::stall). `grant` limits the memory that it may take. Call it again, with the rest of the input or with none,
    /// when [`is_ready`](Self::is_ready) returns so, or, if it [wants](Self::wants) memory, when some is free.
    ///
    /// # Errors
    /// The client violated the protocol: drop the connection.
    #[inline]
    pub fn take(&mut self, input: &mut &[u8], channel: &mut Channel, grant: &mut Grant) -> Result<(), Fatal> {
        self.stall = self.take_all(input, channel, grant)?;
        Ok(())
    }

    fn take_all(
        &mut self,
        input: &mut &[u8],
        channel: &mut Channel,
        grant: &mut Grant,
    ) -> Result<Option<Stall>, Fatal> {
        (self.wants, self.held_back) = (None, false);
        if self.is_short()
            && let Some(stall) = self.refill(channel, grant)
        {
            return Ok(Some(stall));
        }
        if !self.waiting.is_empty() && self.serve_waiting(channel, grant) {
            return Ok(Some(Stall::Calls));
        }
        if self.disconnecting {
            return Ok(Some(Stall::Disconnect));
        }
        if let Some((cookie, request)) = self.stalled
            && let Some(stall) = self.begin(cookie, request, channel, grant)
        {
            return Ok(Some(stall));
        }
        if self.refusing {
            return self.refuse_all(input, channel);
        }
        let enough = if channel.is_prompt() { self.held + TURN } else { usize::MAX };
        self.spent = 0;
        while let Some(event) = self.receiver.next(input)? {
            let stall = match event {
                Event::Command(cookie, command) => {
                    if let Command::Status { .. } | Command::Zero { .. } | Command::Trim { .. } = command {
                        self.spent += SEARCH;
                    }
                    let stall = self.begin(cookie, Request::Command(command), channel, grant);
                    stall.or_else(|| (self.held + self.spent >= enough && !input.is_empty()).then_some(Stall::Turn))
                }
                Event::Write(cookie, write) => self.begin(cookie, Request::Write(write), channel, grant),
                Event::Payload(bytes) => {
                    self.fill(bytes, channel);
                    None
                }
                Event::Reject(cookie, refused) => {
                    self.decline(cookie, refused.at, refused.error, refused.text);
                    (!self.has_room()).then_some(Stall::Calls)
                }
                Event::Disconnect => {
                    self.disconnecting = true;
                    Some(Stall::Disconnect)
                }
            };
            if stall.is_some() {
                return Ok(stall);
            }
        }
        Ok(None)
    }

    /// Why the last [`take`](Self::take) stopped; `None`: the input was used up.
    #[inline]
    pub fn stall(&self) -> Option<Stall> {
        self.stall
    }

    /// Whether [`take`](Self::take) has something to do. `has_input`: the client has sent bytes that are not taken yet.
    /// `is_blocked`: the client takes no replies now. `has_ended`: one of its requests has ended since, or all replies are sent.
    ///
    /// Every such call makes progress: it submits or refuses a request, or the session then waits for something else.
    #[inline]
    pub fn is_ready(&self, has_input: bool, is_blocked: bool, has_ended: bool) -> bool {
        match self.stall {
            _ if self.closed => false,
            // A reply must be read again, and the client can take it.
            _ if self.is_short() && !is_blocked => self.wants != Some(Part::Reserve),
            // Also when blocked, so that replies are ready when there is room again; but not too many.
            Some(Stall::Turn) => self.outbox.held() < TURN,
            _ if is_blocked => false,
            _ if self.held_back && has_ended => true,
            None => has_input,
            // At its limit of requests, some of which wait for memory, it cannot begin another one.
            Some(Stall::Calls) => has_ended && (self.wants.is_none() || self.has_room()),
            Some(Stall::Memory | Stall::Disconnect) => false,
        }
    }

    /// Whether it waits for one of its own requests to end.
    #[inline]
    pub fn awaits_end(&self) -> bool {
        self.held_back || self.stall == Some(Stall::Calls)
    }

    /// Whether a request waits because its client already holds memory, and too little is free for more. Such a request stands in
    /// no line: it continues when one of the client's own requests has ended or its reply was sent.
    #[inline]
    pub fn is_held_back(&self) -> bool {
        self.held_back
    }

    /// Frees the memory of unsent replies. They are read again when the client continues.
    pub fn reclaim(&mut self) {
        self.outbox.reclaim();
    }

    /// Whether a reply must be read again before it can be sent. [`take`](Self::take) does that, with or without input.
    #[inline]
    pub fn is_short(&self) -> bool {
        self.outbox.missing().is_some() && !self.refilling
    }

    /// Whether the connection must be dropped: a partly sent reply could not be read again.
    #[inline]
    pub fn is_broken(&self) -> bool {
        self.broken
    }

    /// Reads a part of a reply again, into reserve memory, so that requests that wait for common memory do not delay it.
    #[cold]
    fn refill(&mut self, channel: &mut Channel, grant: &mut Grant) -> Option<Stall> {
        let (at, len) = self.outbox.missing()?;
        if channel.refuses() {
            self.broken = true;
            return None;
        }
        let len = len.min(REFILL - (at % REFILL as u64) as usize);
        let reserve = if grant.reserve { channel.alloc_reserved(at, len) } else { None };
        let Some(buf) = reserve.or_else(|| if grant.spill { channel.alloc(at, len) } else { None }) else {
            self.wants = Some(Part::Reserve);
            return Some(Stall::Memory);
        };
        grant.take();
        self.held += len;
        self.refilling = true;
        let call = Call { cookie: Cookie(0), at, len: len as u64, one: false, refill: true };
        let tag = self.tag(call);
        // The READ itself has ended.
        channel.submit_again(tag, Io::Read { at, buf });
        None
    }

    /// Takes a part that was read again, or drops the reply if the read failed.
    #[cold]
    fn refilled(&mut self, done: Done) {
        self.refilling = false;
        match (done.result, done.io) {
            _ if self.closed => {}
            (Ok(()), Io::Read { buf, .. }) => self.outbox.restore(buf),
            (result, _) => {
                log::info!("a client is disconnected: a partly sent reply could not be read again ({result:?})");
                self.broken = true;
            }
        }
    }

    /// Begins waiting READs, in order. Returns whether the client must take replies first.
    #[cold]
    fn serve_waiting(&mut self, channel: &mut Channel, grant: &mut Grant) -> bool {
        while let Some(&Read { cookie, at, len, df }) = self.waiting.front() {
            if self.refusing {
                self.decline(cookie, at, WireError::Shutdown, GOING);
            } else if self.has_its_share(channel, grant) {
                return true;
            } else {
                match self.command(cookie, Command::Read { at, len, df }, channel, grant) {
                    None => {}
                    Some(Stall::Memory) => return false,
                    Some(_) => return true,
                }
            }
            self.waiting.pop_front();
        }
        false
    }

    /// The part of memory that it waits for.
    #[inline]
    pub fn wants(&self) -> Option<Part> {
        self.wants
    }

    /// Whether one more request may begin, or one more reply may be queued.
    #[inline]
    fn has_room(&self) -> bool {
        self.calls.in_use + self.waiting.len() + self.outbox.len() < CALLS_MAX && self.outbox.heads() < HEADS_MAX
    }

    /// Whether it has its share of requests in flight, while more are in flight than the queue takes.
    #[inline]
    fn has_its_share(&self, channel: &Channel, grant: &Grant) -> bool {
        self.calls.in_use >= grant.calls && channel.is_full()
    }

    /// From now on, every request gets ESHUTDOWN, after which a client MUST disconnect (proto.md, "Terminating the transmission
    /// phase"). Requests that have begun continue.
    pub fn refuse(&mut self) {
        self.refusing = true;
    }

    /// The device has lost changes that the client knows to be done. Requests in flight end, and then the connection.
    pub fn lose(&mut self) {
        (self.refusing, self.lost) = (true, true);
    }

    /// As [`take`](Self::take), while the export is being removed.
    #[cold]
    fn refuse_all(&mut self, input: &mut &[u8], channel: &mut Channel) -> Result<Option<Stall>, Fatal> {
        // The replies need no payload memory, but their number must be limited as well.
        while self.has_room() {
            let (cookie, at) = match self.receiver.next(input)? {
                None => return Ok(None),
                Some(Event::Command(cookie, command)) => (cookie, command.at()),
                Some(Event::Write(..)) => {
                    // The error is reported after the payload.
                    self.receiver.reject_payload(WireError::Shutdown, GOING);
                    continue;
                }
                // Payload of a write that had begun.
                Some(Event::Payload(bytes)) => {
                    self.fill(bytes, channel);
                    continue;
                }
                Some(Event::Reject(cookie, refused)) => (cookie, refused.at),
                Some(Event::Disconnect) => {
                    self.disconnecting = true;
                    return Ok(Some(Stall::Disconnect));
                }
            };
            self.decline(cookie, at, WireError::Shutdown, GOING);
        }
        Ok(Some(Stall::Calls))
    }

    /// Answers a request that does not reach the device.
    #[cold]
    fn decline(&mut self, cookie: Cookie, at: u64, error: WireError, text: &'static str) {
        self.traffic.requests += 1;
        self.traffic.failed += 1;
        self.traffic.refused += 1;
        self.replier.error(&mut self.outbox, cookie, at, error, text);
    }

    /// The requests and bytes of the client so far.
    #[inline]
    pub fn traffic(&self) -> &Traffic {
        &self.traffic
    }

    /// Where the rest of a payload belongs: the buffer, and the offset of the next byte in it. After receiving bytes there, call
    /// [`landed`](Self::landed) before any other method takes input.
    #[inline]
    pub fn landing(&mut self) -> Option<(&mut Buf, usize)> {
        self.filling.as_mut().map(|f| (&mut f.buf, f.have))
    }

    /// Reports that `n` bytes were received where [`landing`](Self::landing) returned.
    pub fn landed(&mut self, n: usize, channel: &mut Channel) {
        if let Some(filling) = &mut self.filling {
            self.receiver.payload_placed(u32::try_from(n).expect("a payload is shorter than 4 GiB"));
            filling.have += n;
            self.landed += n as u64;
            self.write_if_filled(channel);
        }
    }

    /// The client's progress with the memory that it holds.
    pub fn progress(&self) -> Progress {
        Progress {
            sent: self.outbox.sent(),
            unsent: self.outbox.held(),
            landed: self.landed,
            filling: self.filling.as_ref().map_or(0, |filling| filling.buf.len()),
        }
    }

    /// Frees spare capacity after a burst.
    pub fn shrink(&mut self) {
        self.outbox.shrink();
        if self.calls.in_use == 0 {
            self.calls = Calls::default();
        }
        if self.waiting.is_empty() {
            self.waiting = VecDeque::new();
        }
    }

    /// Takes the completion of one of this session's requests, and puts the reply into the outbox.
    pub fn complete(&mut self, done: Done) {
        let Call { cookie, at, len, one, refill } = self.calls.end(done.tag as u32);
        if matches!(done.io, Io::Read { .. } | Io::Write { .. }) {
            self.held -= len as usize;
        }
        if matches!(done.io, Io::Status { .. }) {
            self.statuses -= 1;
        }
        if refill {
            return self.refilled(done);
        }
        self.note(&done, len);
        if self.closed {
            return;
        }
        let (replier, out) = (&self.replier, &mut self.outbox);
        match (done.result, done.io) {
            (Ok(()), Io::Read { buf, .. }) => {
                if buf.len() >= SPARSE && !one && replier.mode() != Mode::Simple {
                    return sparse(replier, out, cookie, at, buf);
                }
                replier.read_head(out, cookie, at, buf.len() as u32);
                out.payload(buf, at);
            }
            (Ok(()), Io::Status { extents, .. }) => {
                // Fewer extents than requested if much is unsent already: every request in flight may still add its reply.
                let room = HEADS_MAX.saturating_sub(out.heads()) / EXTENT_LEN + 1;
                let wanted = if one { 1 } else { extents.len().min(room) };
                let extents =
                    extents[..wanted].iter().map(|e| nbd_proto::Extent { len: e.len, flags: allocation(e.kind) });
                replier.status(out, cookie, at, ALLOCATION, extents, true);
            }
            (Ok(()), io) => replier.done(out, cookie, at, kind_of(&io)),
            (Err(error), io) => {
                let (code, text) = wire_error(error, &io);
                log::debug!("request for {len} bytes at {at} failed: {text}");
                replier.error(out, cookie, at, code, text);
            }
        }
    }

    #[inline]
    fn note(&mut self, done: &Done, len: u64) {
        self.traffic.requests += 1;
        match (&done.result, &done.io) {
            (Ok(()), Io::Read { .. }) => self.traffic.read += len,
            (Ok(()), Io::Write { .. }) => self.traffic.written += len,
            (Ok(()), _) => {}
            (Err(_), _) => self.traffic.failed += 1,
        }
    }

    /// Replies to send.
    #[inline]
    pub fn outbox(&mut self) -> &mut Outbox {
        &mut self.outbox
    }

    /// Requests at the device.
    #[inline]
    pub fn in_flight(&self) -> usize {
        self.calls.in_use
    }

    /// Cost of the last [`take`](Self::take) in this turn, in addition to memory.
    pub fn spent(&self) -> usize {
        self.spent
    }

    /// Bytes of payload memory in requests that have not ended.
    #[inline]
    pub fn held(&self) -> usize {
        self.held
    }

    /// Whether the client has sent NBD_CMD_DISC and got every reply.
    #[inline]
    pub fn is_over(&self) -> bool {
        let is_ending = self.lost || self.disconnecting && self.waiting.is_empty();
        is_ending && self.calls.in_use == 0 && self.outbox.is_empty()
    }

    /// Whether [`lose`](Self::lose) was called.
    pub fn is_lost(&self) -> bool {
        self.lost
    }

    /// Releases the resources of a closed connection. Requests at the device come back through `complete`.
    pub fn close(&mut self) {
        if let Some(filling) = self.filling.take() {
            self.held -= filling.buf.len();
        }
        self.stalled = None;
        self.waiting = VecDeque::new();
        (self.wants, self.held_back) = (None, false);
        self.outbox = Outbox::default();
        (self.disconnecting, self.closed) = (true, true);
    }

    /// Starts a request, or keeps it until it can start.
    #[inline]
    fn begin(&mut self, cookie: Cookie, request: Request, channel: &mut Channel, grant: &mut Grant) -> Option<Stall> {
        let stall = if !self.has_room() {
            Some(Stall::Calls)
        } else {
            match request {
                _ if self.has_its_share(channel, grant) => Some(Stall::Calls),
                Request::Command(Command::Read { at, len, df }) if !self.waiting.is_empty() => {
                    self.waiting.push_back(Read { cookie, at, len, df });
                    None
                }
                Request::Command(command) => match (self.command(cookie, command, channel, grant), command) {
                    (Some(Stall::Memory), Command::Read { at, len, df }) => {
                        self.waiting.push_back(Read { cookie, at, len, df });
                        None
                    }
                    (stall, _) => stall,
                },
                Request::Write(_) if !self.waiting.is_empty() && !self.refusing => Some(Stall::Memory),
                Request::Write(write) => self.write(cookie, write, channel, grant),
            }
        };
        self.stalled = stall.map(|_| (cookie, request));
        stall
    }

    #[inline]
    fn command(&mut self, cookie: Cookie, command: Command, channel: &mut Channel, grant: &mut Grant) -> Option<Stall> {
        let (at, len, io) = match command {
            Command::Read { at, .. } if channel.refuses() => {
                self.decline(cookie, at, WireError::Io, GONE);
                return None;
            }
            Command::Read { at, len, .. } => {
                let buf = match self.alloc(at, len as usize, channel, grant) {
                    Ok(buf) => buf,
                    Err(stall) => return Some(stall),
                };
                (at, len.into(), Io::Read { at, buf })
            }
            Command::Flush { at } => (at, 0, Io::Flush),
            Command::Trim { at, len, fua } => (at, len, Io::Discard { at, len, fua }),
            Command::Cache { at, len } => (at, len, Io::Prefetch { at, len }),
            Command::Zero { at, len, unmap, fast, fua } => (at, len, Io::Zero { at, len, fua, unmap, fast }),
            Command::Status { .. } if self.statuses == STATUSES_MAX => return Some(Stall::Calls),
            Command::Status { at, len, one: _, contexts: _ } => {
                self.statuses += 1;
                (at, len, Io::Status { at, len, extents: Vec::new() })
            }
        };
        let one = matches!(command, Command::Status { one: true, .. } | Command::Read { df: true, .. });
        self.submit(Call { cookie, at, len, one, refill: false }, io, channel);
        None
    }

    /// Allocates memory for a request, if the grant allows it and the client does not have its share already.
    ///
    /// A client that holds memory may hold at most as much as stays free. A client that holds none may have what it requests.
    /// Small requests of clients that hold little use a reserve; see [`Lines`](crate::Lines).
    #[inline(always)]
    fn alloc(&mut self, at: u64, len: usize, channel: &mut Channel, grant: &mut Grant) -> Result<Buf, Stall> {
        let small = self.held + self.outbox.held() + len <= channel.memory() / MODEST;
        if small
            && grant.reserve
            && let Some(buf) = channel.alloc_reserved(at, len)
        {
            grant.take();
            self.held += len;
            return Ok(buf);
        }
        self.alloc_common(at, len, small, channel, grant)
    }

    /// Allocates from the common part, for requests that the reserve cannot serve.
    #[inline(never)]
    fn alloc_common(
        &mut self,
        at: u64,
        len: usize,
        small: bool,
        channel: &mut Channel,
        grant: &mut Grant,
    ) -> Result<Buf, Stall> {
        let mine = self.held + self.outbox.held();
        let buf = if small {
            if grant.spill { channel.alloc(at, len) } else { None }
        } else {
            // Counting free memory takes a moment, which small requests do not justify.
            if mine > 0 && mine + 2 * len > channel.memory_free() {
                self.held_back = true;
                return Err(Stall::Memory);
            }
            if grant.common { channel.alloc(at, len) } else { None }
        };
        let Some(buf) = buf else {
            self.wants = Some(if small { Part::Reserve } else { Part::Common });
            return Err(Stall::Memory);
        };
        grant.take();
        self.held += len;
        Ok(buf)
    }

    fn write(&mut self, cookie: Cookie, write: Write, channel: &mut Channel, grant: &mut Grant) -> Option<Stall> {
        if self.refusing || channel.refuses() {
            let (error, text) = if self.refusing { (WireError::Shutdown, GOING) } else { (WireError::Io, GONE) };
            self.receiver.reject_payload(error, text);
            return None;
        }
        let buf = match self.alloc(write.at, write.len as usize, channel, grant) {
            Ok(buf) => buf,
            Err(stall) => return Some(stall),
        };
        self.filling = Some(Filling { cookie, write, buf, have: 0 });
        self.write_if_filled(channel);
        None
    }

    #[inline]
    fn fill(&mut self, bytes: &[u8], channel: &mut Channel) {
        let filling = self.filling.as_mut().expect("a write has its buffer before its payload arrives");
        filling.buf.copy_from(filling.have, bytes);
        filling.have += bytes.len();
        self.landed += bytes.len() as u64;
        self.write_if_filled(channel);
    }

    #[inline]
    fn write_if_filled(&mut self, channel: &mut Channel) {
        if let Some(Filling { cookie, write, buf, .. }) = self.filling.take_if(|f| f.have == f.buf.len()) {
            let call = Call { cookie, at: write.at, len: write.len.into(), one: false, refill: false };
            self.submit(call, Io::Write { at: write.at, buf, fua: write.fua }, channel);
        }
    }

    #[inline]
    fn submit(&mut self, call: Call, io: Io, channel: &mut Channel) {
        let tag = self.tag(call);
        channel.submit(tag, io);
    }

    #[inline]
    fn tag(&mut self, call: Call) -> u64 {
        u64::from(self.number) << 32 | u64::from(self.calls.begin(call))
    }
}

/// The reason for errors while the export is being removed.
const GOING: &str = "the export is being removed";

/// The reason for errors of a dead or stalled device.
const GONE: &str = "the device is gone or does not answer";

/// Reads of at least this many bytes are searched for zeroes, in parts of this length. A part that is all zero becomes a hole.
///
/// The data is in memory, so searching it works on every device and cannot be wrong. It saves the copy through two sockets. A
/// query of the file's map (SEEK_HOLE) would save only the read, and would cost every read a system call that may wait for the
/// disk. For data, the search looks at one word in each 64 KiB, which cannot be measured: 102.5 µs of CPU for 256 KiB from the
/// page cache, with and without it (DF). For zeroes, it takes 80 µs instead of 112, and half the elapsed time. Shorter reads are
/// not searched.
const SPARSE: usize = 64 << 10;

/// Replies to a read with data chunks and hole chunks.
fn sparse(replier: &Replier, out: &mut Outbox, cookie: Cookie, at: u64, mut buf: Buf) {
    let mut part = at;
    loop {
        // Parts end at page boundaries of memory, so that each part can own its pages.
        let step = |from: usize| (SPARSE - (buf.offset() + from) % PAGE).min(buf.len() - from);
        let mut len = step(0);
        let hole = buf.is_zero(0, len);
        while len < buf.len() && buf.is_zero(len, step(len)) == hole {
            len += step(len);
        }
        let rest = (len < buf.len()).then(|| buf.split_off(len));
        if hole {
            replier.hole_chunk(out, cookie, at, part, len as u32, rest.is_none());
        } else {
            replier.data_chunk(out, cookie, at, part, len as u32, rest.is_none());
            out.payload(buf, part);
        }
        let Some(rest) = rest else { return };
        (buf, part) = (rest, part + len as u64);
    }
}

/// The id of base:allocation, the first and only metadata context.
const ALLOCATION: u32 = 0;

fn allocation(kind: ExtentKind) -> u64 {
    let flags = match kind {
        ExtentKind::Data => AllocationFlags::NONE,
        ExtentKind::Hole => AllocationFlags::HOLE.with(AllocationFlags::ZERO),
        ExtentKind::Zero => AllocationFlags::ZERO,
    };
    flags.0
}

fn kind_of(io: &Io) -> CommandKind {
    match io {
        Io::Read { .. } => CommandKind::READ,
        Io::Write { .. } => CommandKind::WRITE,
        Io::Zero { .. } => CommandKind::WRITE_ZEROES,
        Io::Discard { .. } => CommandKind::TRIM,
        Io::Flush => CommandKind::FLUSH,
        Io::Status { .. } => CommandKind::BLOCK_STATUS,
        Io::Prefetch { .. } => CommandKind::CACHE,
    }
}

/// The error value and text for the client (proto.md, "Error values").
fn wire_error(error: Error, io: &Io) -> (WireError, &'static str) {
    match (error, io) {
        (Error::ReadOnly, _) => (WireError::Perm, "the device is read-only"),
        (Error::NoSpace, _) => (WireError::NoSpc, "no space left on the device"),
        (Error::OutOfRange, Io::Write { .. } | Io::Zero { .. }) => (WireError::NoSpc, "past the end of the device"),
        (Error::OutOfRange, _) => (WireError::Inval, "past the end of the device"),
        (Error::NotSupported, Io::Zero { fast: true, .. }) => {
            (WireError::NotSup, "the device would have to write zeroes")
        }
        (Error::NotSupported, _) => (WireError::Inval, "the device cannot do this"),
        (Error::Invalid, _) => (WireError::Inval, "invalid request"),
        (Error::Gone, _) => (WireError::Io, GONE),
        (Error::Io | Error::Cancelled, _) => (WireError::Io, "the device reported an error"),
    }
}

/// Requests at the device, indexed by the lower half of their tags.
#[derive(Debug, Default)]
struct Calls {
    list: Vec<Call>,
    /// Unused numbers in `list`.
    free: Vec<u32>,
    in_use: usize,
}

/// The properties of a request that its reply needs.
#[derive(Clone, Copy, Debug)]
struct Call {
    cookie: Cookie,
    at: u64,
    len: u64,
    /// The reply must be a single piece: one extent (NBD_CMD_FLAG_REQ_ONE), or one chunk (NBD_CMD_FLAG_DF).
    one: bool,
    /// It reads a part of a reply again: the request itself has ended.
    refill: bool,
}

impl Calls {
    #[inline]
    fn begin(&mut self, call: Call) -> u32 {
        self.in_use += 1;
        if let Some(number) = self.free.pop() {
            self.list[number as usize] = call;
            return number;
        }
        self.list.push(call);
        self.list.len() as u32 - 1
    }

    #[inline]
    fn end(&mut self, number: u32) -> Call {
        self.in_use -= 1;
        self.free.push(number);
        self.list[number as usize]
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use blkdev::{
        Device, Plan,
        fault::{Fault, Faults},
        null::Null,
    };
    use nbd_proto::{
        BlockSizes, ContextSet, Export,
        client::Encoder,
        wire::{CommandFlags, TransmissionFlags},
    };

    use super::*;

    const SIZE: u64 = 1 << 20;

    fn session() -> Session {
        let (flags, block) = (TransmissionFlags::HAS_FLAGS, BlockSizes::default());
        let terms = Terms {
            mode: Mode::Simple,
            flags,
            size: SIZE,
            block,
            enforce_alignment: false,
            contexts: ContextSet::EMPTY,
        };
        let export = Export {
            name: String::new(),
            description: String::new(),
            size: SIZE,
            flags,
            block,
            contexts: Vec::new(),
            block_size_required: false,
        };
        let contexts = Vec::new();
        Session::new(
            &Negotiated { export, name: String::new(), contexts, block_size_asked: false, secure: false, terms },
            0,
        )
    }

    /// How many of ten READs of 100 kB a session takes in a turn, for three turns.
    fn turns(device: impl Device + 'static) -> Vec<usize> {
        const LEN: usize = 100_000;
        let device: Arc<dyn Device> = Arc::new(device);
        let mut channel = Plan::default().open(&device, 1).unwrap().remove(0);
        let (mut session, mut wire, mut done) = (session(), Vec::new(), Vec::new());
        let encoder = Encoder::new(Mode::Simple);
        for n in 0..10 {
            encoder.request(&mut wire, Cookie(n), CommandKind::READ, CommandFlags::NONE, 0, LEN as u64);
        }
        let mut turns = Vec::new();
        for _ in 0..3 {
            let mut input = &wire[..];
            while {
                session.take(&mut input, &mut channel, &mut Grant::ALL.clone()).unwrap();
                let stall = session.stall();
                assert_eq!(stall, (!input.is_empty()).then_some(Stall::Turn));
                turns.push(session.in_flight());
                channel.kick();
                channel.reap(&mut done);
                done.drain(..).for_each(|done| session.complete(done));
                stall.is_some()
            } {}
            while session.in_flight() > 0 {
                channel.reap(&mut done);
                done.drain(..).for_each(|done| session.complete(done));
            }
            let sent = session.outbox().read(&mut vec![0; 10 * (LEN + 16)]);
            assert_eq!(sent, 10 * (LEN + 16), "every request is answered");
        }
        turns
    }

    #[test]
    fn only_a_prompt_device_limits_a_turn_to_the_cache() {
        assert_eq!(turns(Null::new(SIZE)), [10, 3, 3, 3, 1, 3, 3, 3, 1]);
        assert_eq!(turns(Fault::new(Null::new(SIZE), Faults { delay_max: 1000, ..Faults::new(1) })), [10, 10, 10]);
    }
}
