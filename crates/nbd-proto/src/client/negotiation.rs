//! The usual course of a handshake: TLS, extended headers or structured replies, contexts, then GO, with what older
//! servers do instead.

use std::fmt;

use super::handshake::{Answer, Ask, Handshake, Info};
use crate::limits::SELECTED_MAX;
use crate::terms::{BlockSizes, ContextSet, Fatal, Refusal, Terms};
use crate::wire::{HandshakeFlags, InfoKind, Mode, Opt, Rep, TransmissionFlags};

/// What a client would like to have.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Wish {
    /// The export; empty for the default one.
    pub name: String,
    /// The highest mode to ask for. A server may grant less.
    pub mode: Mode,
    /// Contexts to select. A server may grant less.
    pub contexts: Vec<String>,
    /// TLS, or nothing.
    pub tls: bool,
}

/// What a client got.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Agreement {
    /// The terms. `block` holds the defaults when the server did not tell.
    pub terms: Terms,
    /// The selected contexts: id and name. The server picks the ids; those of 64 and more are only here, not in
    /// `terms`.
    pub contexts: Vec<(u32, String)>,
    /// The canonical name, if told.
    pub name: Option<String>,
    /// For people, if told.
    pub description: Option<String>,
}

/// Where the course stands.
#[derive(Debug)]
pub enum Step {
    /// Send `out`, read more.
    More,
    /// The server has agreed to TLS, and `out` is empty. Do the TLS handshake, then go on with [`Upgrade::resume`]:
    /// everything after it goes through TLS.
    StartTls(Upgrade),
    /// Send `out`, then the transmission phase begins.
    Done(Box<Agreement>),
}

/// A negotiation that waits for the TLS handshake. It owns the questions that come next, so none of them can be sent in
/// plain text by mistake.
#[derive(Debug)]
#[must_use = "the negotiation goes on with `resume`"]
pub struct Upgrade(Box<Negotiation>);

impl Upgrade {
    /// Goes on after a successful TLS handshake. Appends the next question to `inside`, which must be sent through TLS.
    #[must_use = "only the returned negotiation goes on"]
    pub fn resume(self, inside: &mut Vec<u8>) -> Negotiation {
        let mut negotiation = *self.0;
        negotiation.go_on(inside);
        negotiation
    }
}

/// Why there will be no transmission phase.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Failure {
    /// The server broke the protocol.
    Fatal(Fatal),
    /// The server said no to an option that the wish cannot do without.
    Refused(Opt, Refusal),
    /// The caller called [`Negotiation::next`] after [`Step::StartTls`]. Only [`Upgrade::resume`] goes on from there.
    NotResumed,
}

impl From<Fatal> for Failure {
    fn from(fatal: Fatal) -> Self {
        Self::Fatal(fatal)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fatal(fatal) => fatal.fmt(f),
            Self::Refused(opt, Refusal { code, text }) => write!(f, "server refused {opt} with {code}: {text}"),
            Self::NotResumed => f.write_str("the negotiation waits for TLS: it goes on with Upgrade::resume"),
        }
    }
}

impl std::error::Error for Failure {}

/// The client's half of one connection's handshake, from the greeting to the transmission phase.
#[derive(Debug)]
pub struct Negotiation {
    wish: Wish,
    handshake: Handshake,
    asked: Question,
    mode: Mode,
    export: Option<(u64, TransmissionFlags)>,
    block: BlockSizes,
    contexts: Vec<(u32, String)>,
    name: Option<String>,
    description: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Question {
    Nothing,
    Tls,
    Extended,
    Structured,
    Contexts,
    Go,
    ExportName,
    /// None: an [`Upgrade`] has what was here.
    Gone,
}

impl Negotiation {
    /// Waits for a greeting.
    pub fn new(wish: Wish) -> Self {
        Self {
            wish,
            handshake: Handshake::new(),
            asked: Question::Nothing,
            mode: Mode::Simple,
            export: None,
            block: BlockSizes::default(),
            contexts: Vec::new(),
            name: None,
            description: None,
        }
    }

    /// Takes what it needs off the front of `input` and appends questions to `out`.
    ///
    /// # Errors
    ///
    /// Close the connection: the server broke the protocol or refused what the wish needs, or the caller did not go on
    /// with the [`Upgrade`] after [`Step::StartTls`].
    pub fn next(&mut self, input: &mut &[u8], out: &mut Vec<u8>) -> Result<Step, Failure> {
        if self.asked == Question::Gone {
            return Err(Failure::NotResumed);
        }
        while let Some(answer) = self.handshake.next(input, out)? {
            match answer {
                Answer::Greeted(flags) if flags.contains(HandshakeFlags::FIXED_NEWSTYLE) => self.go_on(out),
                // An old server, which knows EXPORT_NAME only.
                Answer::Greeted(_) if self.wish.tls => {
                    let refusal = Refusal::new(Rep::ERR_UNSUP, "the server has no fixed newstyle");
                    return Err(Failure::Refused(Opt::STARTTLS, refusal));
                }
                Answer::Greeted(_) => self.ask(Question::ExportName, out),
                Answer::Server { .. } => return Err(unexpected("an export nobody asked for")),
                Answer::Info(info) => self.learn(info),
                Answer::Context { id, name } if self.asked == Question::Contexts => self.select(id, name)?,
                Answer::Context { .. } => return Err(unexpected("a context nobody asked for")),
                Answer::Ack => match self.asked {
                    Question::Go => return self.done(),
                    Question::Tls if !input.is_empty() => {
                        return Err(unexpected("plain text after the answer to STARTTLS"));
                    }
                    Question::Tls => {
                        let gone = Self { asked: Question::Gone, ..Self::new(Wish::default()) };
                        return Ok(Step::StartTls(Upgrade(std::mem::replace(self, gone).into())));
                    }
                    Question::Extended => {
                        self.mode = Mode::Extended;
                        self.go_on(out);
                    }
                    Question::Structured => {
                        self.mode = Mode::Structured;
                        self.go_on(out);
                    }
                    _ => self.go_on(out),
                },
                Answer::Refused(refusal) => self.refused(refusal, out)?,
                Answer::Export { size, flags } => {
                    self.export = Some((size, flags));
                    return self.done();
                }
            }
        }
        Ok(Step::More)
    }

    /// Asks the next question that the wish has.
    fn go_on(&mut self, out: &mut Vec<u8>) {
        let simple = self.mode == Mode::Simple;
        let next = match self.asked {
            Question::Nothing if self.wish.tls => Question::Tls,
            asked if asked < Question::Extended && self.wish.mode == Mode::Extended => Question::Extended,
            asked if asked < Question::Structured && simple && self.wish.mode > Mode::Simple => Question::Structured,
            asked if asked < Question::Contexts && !simple && !self.wish.contexts.is_empty() => Question::Contexts,
            _ => Question::Go,
        };
        self.ask(next, out);
    }

    fn ask(&mut self, question: Question, out: &mut Vec<u8>) {
        const KINDS: [InfoKind; 3] = [InfoKind::NAME, InfoKind::DESCRIPTION, InfoKind::BLOCK_SIZE];
        self.asked = question;
        let name = self.wish.name.as_str();
        let queries: Vec<&str> = self.wish.contexts.iter().map(String::as_str).collect();
        let ask = match question {
            Question::Nothing | Question::Gone => unreachable!("these are no questions"),
            Question::Tls => Ask::StartTls,
            Question::Extended => Ask::ExtendedHeaders,
            Question::Structured => Ask::StructuredReply,
            Question::Contexts => Ask::SetContexts { name, queries: &queries },
            Question::Go => Ask::Go { name, kinds: &KINDS },
            Question::ExportName => Ask::ExportName(name),
        };
        self.handshake.ask(ask, out);
    }

    fn refused(&mut self, refusal: Refusal, out: &mut Vec<u8>) -> Result<(), Failure> {
        match self.asked {
            Question::Tls => Err(Failure::Refused(Opt::STARTTLS, refusal)),
            // EXPORT_NAME is all that old servers have, but MUST NOT be used with extended headers.
            Question::Go if refusal.code == Rep::ERR_UNSUP && self.mode != Mode::Extended => {
                self.ask(Question::ExportName, out);
                Ok(())
            }
            Question::Go => Err(Failure::Refused(Opt::GO, refusal)),
            Question::Contexts => {
                self.contexts.clear();
                self.go_on(out);
                Ok(())
            }
            _ => {
                self.go_on(out);
                Ok(())
            }
        }
    }

    /// Remembers a context that the server has selected.
    fn select(&mut self, id: u32, name: String) -> Result<(), Failure> {
        if self.contexts.iter().any(|(other, _)| *other == id) {
            return Err(Failure::Fatal(Fatal::Server("two contexts with one id", id.into())));
        }
        if self.contexts.len() == SELECTED_MAX {
            return Err(Failure::Fatal(Fatal::Server("too many contexts", SELECTED_MAX as u64 + 1)));
        }
        self.contexts.push((id, name));
        Ok(())
    }

    fn learn(&mut self, info: Info) {
        match info {
            Info::Export { size, flags } => self.export = Some((size, flags)),
            Info::Name(name) => self.name = Some(name),
            Info::Description(text) => self.description = Some(text),
            Info::BlockSize(block) => self.block = block,
            Info::Other(_) => {}
        }
    }

    fn done(&mut self) -> Result<Step, Failure> {
        let Some((size, flags)) = self.export else { return Err(unexpected("no size of the export")) };
        let contexts = std::mem::take(&mut self.contexts);
        let terms = Terms {
            mode: self.mode,
            flags,
            size,
            block: self.block,
            enforce_alignment: false,
            contexts: contexts.iter().map(|(id, _)| *id).collect::<ContextSet>(),
        };
        let (name, description) = (self.name.take(), self.description.take());
        Ok(Step::Done(Box::new(Agreement { terms, contexts, name, description })))
    }
}

fn unexpected(what: &'static str) -> Failure {
    Failure::Fatal(Fatal::Server(what, 0))
}
