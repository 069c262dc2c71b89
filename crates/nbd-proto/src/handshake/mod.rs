//! Server side of the handshake: options in, replies out, and finally the terms of transmission. It keeps at most one option in
//! memory.

mod meta;
mod option;
mod reply;

use crate::limits::{NAME_MAX, OPTION_MAX, OPTION_SKIP_MAX, SIZE_MAX, option_bytes_max, replies_max};
use crate::reader::{Reader, string, take_up_to};
use crate::terms::{Catalog, ContextSet, Export, Fatal, Negotiated, Offer, Refusal, Terms, Tls};
use crate::wire::{
    ClientFlags, EXPORT_NAME_ZEROES, HandshakeFlags, INIT_MAGIC, InfoKind, Mode, OPTION_MAGIC, Opt, Rep,
};
use option::InfoRequest;
use reply::Replies;

/// The result of [`Handshake::next`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// `input` is used up: send `out`, read more, call again.
    More,
    /// The client may start TLS: send `out`, do the TLS handshake, and continue with this [`Handshake`] and the decrypted data.
    /// The earlier results of the negotiation are cleared. The rest of `input` belongs to TLS, and must never be used as plain
    /// text (CVE-2021-3716 and similar ones). A client must wait for our reply, so it is safest to close the connection if there
    /// is any.
    StartTls,
    /// Send `out`; then the transmission phase begins, with the rest of `input`.
    Done(Box<Negotiated>),
    /// The client ended the handshake with ABORT: send `out`, then close.
    Closed,
}

/// The server side of one connection's handshake.
#[derive(Clone, Debug)]
pub struct Handshake {
    offer: Offer,
    client: ClientFlags,
    secure: bool,
    choices: Choices,
    state: State,
    /// The available part of the current header or option, if it arrives in pieces. Never longer than [`OPTION_MAX`].
    have: Vec<u8>,
    options: u32,
    bytes: u64,
    /// Bytes of lists that the rest of this handshake may cause.
    budget: usize,
}

/// The choices of the client so far, which STARTTLS clears.
#[derive(Clone, Debug, Default)]
struct Choices {
    mode: Mode,
    /// The selected contexts, and their export.
    selection: Option<Selection>,
    /// The export whose block sizes an INFO reported.
    sized: Option<String>,
}

#[derive(Clone, Debug)]
struct Selection {
    name: String,
    contexts: Vec<(u32, String)>,
}

#[derive(Clone, Debug)]
enum State {
    Flags,
    Header,
    Data {
        opt: Opt,
        len: usize,
    },
    /// In the data of an option whose reply is known already. The reply is sent after the data.
    Skip {
        opt: Opt,
        left: u32,
        answer: Answer,
    },
    Over,
}

/// The result of an option whose data is not parsed.
type Answer = Result<(), Refusal>;

impl Handshake {
    /// Begins a connection: writes the greeting to `out`.
    pub fn new(offer: Offer, out: &mut Vec<u8>) -> Self {
        out.extend_from_slice(&INIT_MAGIC.to_be_bytes());
        out.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
        let flags = HandshakeFlags::FIXED_NEWSTYLE.with(HandshakeFlags::NO_ZEROES);
        out.extend_from_slice(&flags.0.to_be_bytes());
        Self {
            offer,
            client: ClientFlags::NONE,
            secure: false,
            choices: Choices::default(),
            state: State::Flags,
            have: Vec::new(),
            options: 0,
            bytes: 0,
            budget: replies_max(offer.options_max),
        }
    }

    /// Takes bytes from the front of `input` and appends replies to `out`, which must be sent whatever the result. Incomplete
    /// messages are kept inside. After an error the connection must be dropped.
    pub fn next(&mut self, input: &mut &[u8], catalog: &dyn Catalog, out: &mut Vec<u8>) -> Result<Step, Fatal> {
        let step = self.run(input, catalog, out);
        if !matches!(step, Ok(Step::More | Step::StartTls)) {
            self.state = State::Over;
        }
        step
    }

    /// Whether TLS was started.
    pub fn secure(&self) -> bool {
        self.secure
    }

    /// Number of options so far.
    pub fn options(&self) -> u32 {
        self.options
    }

    fn run(&mut self, input: &mut &[u8], catalog: &dyn Catalog, out: &mut Vec<u8>) -> Result<Step, Fatal> {
        loop {
            let end = match &mut self.state {
                State::Over => return Err(Fatal::Over),
                State::Skip { opt, left, answer } => {
                    let passed = take_up_to(input, *left as usize).len();
                    *left -= u32::try_from(passed).expect("no longer than what is left");
                    if *left > 0 {
                        return Ok(Step::More);
                    }
                    let (opt, answer) = (*opt, std::mem::replace(answer, Ok(())));
                    self.state = State::Header;
                    Replies::new(opt, out).finish(answer);
                    (opt == Opt::ABORT).then_some(Step::Closed)
                }
                State::Flags | State::Header | State::Data { .. } => {
                    let Some(message) = self.message(input) else { return Ok(Step::More) };
                    let end = self.take(&message, catalog, out)?;
                    self.have = message;
                    self.have.clear();
                    end
                }
            };
            if let Some(end) = end {
                return Ok(end);
            }
        }
    }

    /// Returns the next whole message, if it is complete.
    fn message(&mut self, input: &mut &[u8]) -> Option<Vec<u8>> {
        let want = match self.state {
            State::Flags => 4,
            State::Header => 16,
            State::Data { len, .. } => len,
            State::Skip { .. } | State::Over => unreachable!("nothing is gathered in this state"),
        };
        self.have.extend_from_slice(take_up_to(input, want - self.have.len()));
        (self.have.len() == want).then(|| std::mem::take(&mut self.have))
    }

    /// Handles one whole message.
    fn take(&mut self, message: &[u8], catalog: &dyn Catalog, out: &mut Vec<u8>) -> Result<Option<Step>, Fatal> {
        const WHOLE: &str = "the message is whole";
        let mut reader = Reader::new(message);
        match std::mem::replace(&mut self.state, State::Header) {
            State::Flags => {
                self.client = ClientFlags(reader.u32().expect(WHOLE));
                if self.client.without(ClientFlags::KNOWN) != ClientFlags::NONE {
                    return Err(Fatal::ClientFlags(self.client.0));
                }
                Ok(None)
            }
            State::Header => {
                let magic = reader.u64().expect(WHOLE);
                if magic != OPTION_MAGIC {
                    return Err(Fatal::OptionMagic(magic));
                }
                let (opt, len) = (Opt(reader.u32().expect(WHOLE)), reader.u32().expect(WHOLE));
                self.option(opt, len, catalog, out)
            }
            State::Data { opt, .. } => self.data(opt, message, catalog, out),
            State::Skip { .. } | State::Over => unreachable!("nothing is gathered in this state"),
        }
    }

    /// Handles the header of an option, as far as possible without its data.
    fn option(&mut self, opt: Opt, len: u32, catalog: &dyn Catalog, out: &mut Vec<u8>) -> Result<Option<Step>, Fatal> {
        self.options += 1;
        if self.options > self.offer.options_max {
            return Err(Fatal::Options(self.options));
        }
        if opt == Opt::EXPORT_NAME {
            return self.export_name_begins(len);
        }
        if !self.client.contains(ClientFlags::FIXED_NEWSTYLE) {
            return Err(Fatal::NotFixed(opt));
        }
        if len > OPTION_SKIP_MAX {
            return Err(Fatal::OptionLength(opt, len));
        }
        self.bytes += u64::from(len);
        if self.bytes > option_bytes_max(self.offer.options_max) {
            return Err(Fatal::Options(self.options));
        }
        if opt == Opt::SET_META_CONTEXT {
            // Clear the previous selection, whatever the result of this option (proto.md, "NBD_OPT_SET_META_CONTEXT").
            self.choices.selection = None;
        }
        let answer = match self.permit(opt, len) {
            Ok(()) if len > 0 && opt != Opt::ABORT => {
                self.state = State::Data { opt, len: len as usize };
                return Ok(None);
            }
            // An option without data; the data of ABORT is ignored.
            Ok(()) if len == 0 => return self.data(opt, &[], catalog, out),
            answer => answer,
        };
        self.state = State::Skip { opt, left: len, answer };
        Ok(None)
    }

    /// Whether the option is allowed now, so that its data will be parsed.
    fn permit(&self, opt: Opt, len: u32) -> Answer {
        let known = match opt {
            Opt::ABORT | Opt::LIST | Opt::STARTTLS | Opt::INFO | Opt::GO => true,
            Opt::STRUCTURED_REPLY => self.offer.structured,
            Opt::EXTENDED_HEADERS => self.offer.extended,
            Opt::LIST_META_CONTEXT | Opt::SET_META_CONTEXT => self.offer.structured || self.offer.extended,
            _ => false,
        };
        let has_data = matches!(opt, Opt::INFO | Opt::GO | Opt::LIST_META_CONTEXT | Opt::SET_META_CONTEXT);
        match opt {
            Opt::ABORT => Ok(()),
            _ if self.offer.tls == Tls::Required && !self.secure && opt != Opt::STARTTLS => {
                Err(Refusal::new(Rep::ERR_TLS_REQD, "TLS must be started first"))
            }
            _ if !known => Err(Refusal::new(Rep::ERR_UNSUP, format!("option {opt} is not supported"))),
            _ if !has_data && len > 0 => {
                Err(Refusal::new(Rep::ERR_INVALID, format!("option {opt} has no data, but {len} bytes of it came")))
            }
            _ if len as usize > OPTION_MAX => {
                let text = format!("option {opt} of {len} bytes is longer than {OPTION_MAX}");
                Err(Refusal::new(Rep::ERR_TOO_BIG, text))
            }
            _ => Ok(()),
        }
    }

    /// Handles a whole option with its data.
    fn data(&mut self, opt: Opt, data: &[u8], catalog: &dyn Catalog, out: &mut Vec<u8>) -> Result<Option<Step>, Fatal> {
        let mut replies = Replies::new(opt, out);
        let answer = match opt {
            Opt::EXPORT_NAME => return self.export_name(data, catalog, out).map(Some),
            Opt::ABORT => {
                replies.finish(Ok(()));
                return Ok(Some(Step::Closed));
            }
            Opt::GO => match self.go(data, catalog, &mut replies) {
                Ok(negotiated) => {
                    replies.finish(Ok(()));
                    return Ok(Some(Step::Done(Box::new(negotiated))));
                }
                Err(refusal) => Err(refusal),
            },
            Opt::INFO => self.info(data, catalog, &mut replies),
            Opt::LIST => self.list(catalog, &mut replies),
            Opt::STARTTLS => match self.start_tls() {
                Ok(()) => {
                    replies.finish(Ok(()));
                    return Ok(Some(Step::StartTls));
                }
                Err(refusal) => Err(refusal),
            },
            Opt::STRUCTURED_REPLY => self.raise(Mode::Structured),
            Opt::EXTENDED_HEADERS => self.raise(Mode::Extended),
            Opt::LIST_META_CONTEXT => self.list_contexts(data, catalog, &mut replies),
            Opt::SET_META_CONTEXT => self.set_contexts(data, catalog, &mut replies),
            _ => unreachable!("other options are not permitted"),
        };
        replies.finish(answer);
        Ok(None)
    }

    fn start_tls(&mut self) -> Answer {
        if self.secure {
            return Err(Refusal::new(Rep::ERR_INVALID, "TLS was started already"));
        }
        if self.offer.tls == Tls::Off {
            return Err(Refusal::new(Rep::ERR_POLICY, "TLS is not configured"));
        }
        self.secure = true;
        self.choices = Choices::default();
        Ok(())
    }

    fn raise(&mut self, mode: Mode) -> Answer {
        if mode == self.choices.mode {
            return Err(Refusal::new(Rep::ERR_INVALID, "negotiated already"));
        }
        if mode < self.choices.mode {
            return Err(Refusal::new(Rep::ERR_EXT_HEADER_REQD, "extended headers were negotiated already"));
        }
        self.choices.mode = mode;
        Ok(())
    }

    fn list(&mut self, catalog: &dyn Catalog, replies: &mut Replies<'_>) -> Answer {
        let mut full = false;
        let answer = catalog.list(&mut |name, description| {
            full |= !replies.within(self.budget);
            if !full && string(name.as_bytes()).is_some() {
                replies.server(name, description);
            }
        });
        self.spend(replies, full)?;
        answer.map_err(|refusal| self.refused(Opt::LIST, refusal))
    }

    /// Subtracts the replies from the budget; an error if they exceed it.
    fn spend(&mut self, replies: &Replies<'_>, full: bool) -> Answer {
        self.budget = self.budget.saturating_sub(replies.len());
        match full {
            false => Ok(()),
            true => {
                let max = replies_max(self.offer.options_max);
                Err(Refusal::new(Rep::ERR_TOO_BIG, format!("the lists are longer than {max} bytes")))
            }
        }
    }

    fn info(&mut self, data: &[u8], catalog: &dyn Catalog, replies: &mut Replies<'_>) -> Answer {
        let request = InfoRequest::parse(data)?;
        self.tell(&request, Opt::INFO, catalog, replies)?;
        if request.asks(InfoKind::BLOCK_SIZE) {
            self.choices.sized = Some(request.name.to_owned());
        }
        Ok(())
    }

    fn go(&mut self, data: &[u8], catalog: &dyn Catalog, replies: &mut Replies<'_>) -> Result<Negotiated, Refusal> {
        let request = InfoRequest::parse(data)?;
        self.tell(&request, Opt::GO, catalog, replies)
    }

    /// Replies to INFO and GO.
    fn tell(
        &self,
        request: &InfoRequest<'_>,
        opt: Opt,
        catalog: &dyn Catalog,
        replies: &mut Replies<'_>,
    ) -> Result<Negotiated, Refusal> {
        let mut negotiated = self.find(request.name, opt, catalog)?;
        negotiated.block_size_asked |= request.asks(InfoKind::BLOCK_SIZE);
        let Negotiated { export, terms, .. } = &negotiated;
        if self.must_ask(&negotiated) {
            replies.block_size(export.block);
            return Err(Refusal::new(Rep::ERR_BLOCK_SIZE_REQD, "the block sizes must be asked for"));
        }
        replies.export(export.size, terms.flags);
        if request.asks(InfoKind::NAME) {
            replies.text(InfoKind::NAME, &export.name);
        }
        if request.asks(InfoKind::DESCRIPTION) && !export.description.is_empty() {
            replies.text(InfoKind::DESCRIPTION, &export.description);
        }
        if request.asks(InfoKind::BLOCK_SIZE) {
            replies.block_size(export.block);
        }
        Ok(negotiated)
    }

    /// Whether the client is refused because it did not request the block sizes. If the minimum is one byte, it need not know
    /// them.
    fn must_ask(&self, negotiated: &Negotiated) -> bool {
        let Negotiated { export, block_size_asked, .. } = negotiated;
        (self.offer.block_size_required || export.block_size_required) && export.block.min > 1 && !block_size_asked
    }

    /// Returns the export with this name, under the terms negotiated so far.
    fn find(&self, name: &str, opt: Opt, catalog: &dyn Catalog) -> Result<Negotiated, Refusal> {
        let export = self.export(name, opt, catalog)?;
        let contexts = match &self.choices.selection {
            Some(selection) if selection.name == name => selection.contexts.clone(),
            _ => Vec::new(),
        };
        let terms = Terms {
            mode: self.choices.mode,
            flags: export.flags,
            size: export.size,
            block: export.block,
            enforce_alignment: self.offer.enforce_alignment,
            contexts: contexts.iter().map(|(id, _)| *id).collect::<ContextSet>(),
        };
        Ok(Negotiated {
            export,
            name: name.to_owned(),
            contexts,
            block_size_asked: self.choices.sized.as_deref() == Some(name),
            secure: self.secure,
            terms: terms.told(),
        })
    }

    fn export(&self, name: &str, opt: Opt, catalog: &dyn Catalog) -> Result<Export, Refusal> {
        let export = catalog.find(name).map_err(|refusal| self.refused(opt, refusal))?;
        if export.size > SIZE_MAX {
            let text = format!("the export is larger than {SIZE_MAX} bytes: {}", export.size);
            return Err(Refusal::new(Rep::ERR_PLATFORM, text));
        }
        Ok(export)
    }

    /// Converts the owner's refusal to an error that the protocol allows here (proto.md, "SELECTIVETLS mode").
    fn refused(&self, opt: Opt, refusal: Refusal) -> Refusal {
        let tls = self.offer.tls == Tls::Optional && !self.secure && matches!(opt, Opt::INFO | Opt::GO);
        match refusal.code {
            code if !code.is_error() || (code == Rep::ERR_TLS_REQD && !tls) => {
                Refusal { code: Rep::ERR_POLICY, ..refusal }
            }
            _ => refusal,
        }
    }

    /// EXPORT_NAME has no error reply: every failure ends the connection.
    fn export_name_begins(&mut self, len: u32) -> Result<Option<Step>, Fatal> {
        if self.offer.tls == Tls::Required && !self.secure {
            return Err(Fatal::ExportName(Rep::ERR_TLS_REQD));
        }
        // proto.md, "NBD_OPT_EXTENDED_HEADERS": MUST NOT be used once they are negotiated.
        if len as usize > NAME_MAX || self.choices.mode == Mode::Extended {
            return Err(Fatal::ExportName(Rep::ERR_INVALID));
        }
        self.state = State::Data { opt: Opt::EXPORT_NAME, len: len as usize };
        Ok(None)
    }

    fn export_name(&mut self, data: &[u8], catalog: &dyn Catalog, out: &mut Vec<u8>) -> Result<Step, Fatal> {
        let name = string(data).ok_or(Fatal::ExportName(Rep::ERR_INVALID))?;
        let negotiated =
            self.find(name, Opt::EXPORT_NAME, catalog).map_err(|refusal| Fatal::ExportName(refusal.code))?;
        if self.must_ask(&negotiated) {
            return Err(Fatal::ExportName(Rep::ERR_BLOCK_SIZE_REQD));
        }
        out.extend_from_slice(&negotiated.terms.size.to_be_bytes());
        out.extend_from_slice(&negotiated.terms.flags.0.to_be_bytes());
        if !self.client.contains(ClientFlags::NO_ZEROES) {
            out.extend_from_slice(&[0; EXPORT_NAME_ZEROES]);
        }
        Ok(Step::Done(Box::new(negotiated)))
    }
}
