//! One question at a time: options out, their answers in.

use crate::limits::OPTION_MAX;
use crate::reader::{Reader, string, take_up_to};
use crate::terms::{BlockSizes, Fatal, Refusal};
use crate::wire::{
    ClientFlags, EXPORT_NAME_ZEROES, HandshakeFlags, INIT_MAGIC, InfoKind, OLDSTYLE_MAGIC, OPTION_MAGIC,
    OPTION_REPLY_MAGIC, Opt, Rep, TransmissionFlags,
};

/// A question to the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ask<'a> {
    /// Begin transmission; the server closes when it cannot.
    ExportName(&'a str),
    /// Take leave.
    Abort,
    /// The exports.
    List,
    /// Go over to TLS.
    StartTls,
    /// About an export.
    Info {
        /// Its name; empty for the default one.
        name: &'a str,
        /// What to tell beside size and flags.
        kinds: &'a [InfoKind],
    },
    /// About an export, and begin transmission.
    Go {
        /// Its name; empty for the default one.
        name: &'a str,
        /// What to tell beside size and flags.
        kinds: &'a [InfoKind],
    },
    /// Structured replies.
    StructuredReply,
    /// Extended headers.
    ExtendedHeaders,
    /// The contexts of an export that match a query, or all.
    ListContexts {
        /// The export's name.
        name: &'a str,
        /// Such as `base:`; empty for all.
        queries: &'a [&'a str],
    },
    /// Select contexts of an export.
    SetContexts {
        /// The export's name.
        name: &'a str,
        /// Such as `base:allocation`; empty for none.
        queries: &'a [&'a str],
    },
    /// Any option with any data.
    Other(Opt, &'a [u8]),
}

/// An answer, or a part of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The server's greeting; the client's flags were put out. Now [`Handshake::ask`].
    Greeted(HandshakeFlags),
    /// An export of a list.
    Server {
        /// What to ask for it by.
        name: String,
        /// For people.
        description: String,
    },
    /// About an export.
    Info(Info),
    /// A context.
    Context {
        /// Its id in status chunks, when it was selected.
        id: u32,
        /// Its name.
        name: String,
    },
    /// The question is answered. After [`Ask::Go`]: the transmission phase begins. After [`Ask::StartTls`]: so does
    /// TLS.
    Ack,
    /// The question is answered: no.
    Refused(Refusal),
    /// To [`Ask::ExportName`]: the transmission phase begins.
    Export {
        /// Bytes.
        size: u64,
        /// What it can do.
        flags: TransmissionFlags,
    },
}

/// A piece of information about an export.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Info {
    /// What it is.
    Export {
        /// Bytes.
        size: u64,
        /// What it can do.
        flags: TransmissionFlags,
    },
    /// Its canonical name.
    Name(String),
    /// For people.
    Description(String),
    /// Its block sizes.
    BlockSize(BlockSizes),
    /// Of a kind that is not known here.
    Other(InfoKind),
}

/// The client's half of one connection's handshake.
#[derive(Debug, Default)]
pub struct Handshake {
    state: State,
    zeroes: bool,
    have: Vec<u8>,
}

#[derive(Clone, Copy, Debug, Default)]
enum State {
    #[default]
    Greeting,
    /// No question is open.
    Idle,
    /// At a reply to this option.
    Reply(Opt),
    Data {
        opt: Opt,
        rep: Rep,
        len: usize,
    },
    /// At the answer to EXPORT_NAME.
    Export,
    /// The handshake is over.
    Over,
}

impl Handshake {
    /// Waits for a greeting.
    pub fn new() -> Self {
        Self::default()
    }

    /// Puts a question into `out`.
    ///
    /// # Panics
    ///
    /// When a question is open: the protocol has one at a time. When a string or a list is longer than 2³² bytes.
    pub fn ask(&mut self, ask: Ask<'_>, out: &mut Vec<u8>) {
        assert!(matches!(self.state, State::Idle), "one question at a time, after the greeting, before the end");
        let mut data = Vec::new();
        let opt = match ask {
            Ask::ExportName(name) => {
                data.extend_from_slice(name.as_bytes());
                Opt::EXPORT_NAME
            }
            Ask::Abort => Opt::ABORT,
            Ask::List => Opt::LIST,
            Ask::StartTls => Opt::STARTTLS,
            Ask::StructuredReply => Opt::STRUCTURED_REPLY,
            Ask::ExtendedHeaders => Opt::EXTENDED_HEADERS,
            Ask::Info { name, kinds } => {
                put_info(&mut data, name, kinds);
                Opt::INFO
            }
            Ask::Go { name, kinds } => {
                put_info(&mut data, name, kinds);
                Opt::GO
            }
            Ask::ListContexts { name, queries } => {
                put_queries(&mut data, name, queries);
                Opt::LIST_META_CONTEXT
            }
            Ask::SetContexts { name, queries } => {
                put_queries(&mut data, name, queries);
                Opt::SET_META_CONTEXT
            }
            Ask::Other(opt, bytes) => {
                data.extend_from_slice(bytes);
                opt
            }
        };
        out.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
        out.extend_from_slice(&opt.0.to_be_bytes());
        out.extend_from_slice(&length(data.len()).to_be_bytes());
        out.extend_from_slice(&data);
        self.state = if opt == Opt::EXPORT_NAME { State::Export } else { State::Reply(opt) };
    }

    /// Takes one answer off the front of `input`; `None` when it needs more bytes, or a question. The greeting makes it
    /// put the client's flags into `out`.
    pub fn next(&mut self, input: &mut &[u8], out: &mut Vec<u8>) -> Result<Option<Answer>, Fatal> {
        loop {
            let want = match self.state {
                State::Greeting => 18,
                State::Reply(_) => 20,
                State::Data { len, .. } => len,
                State::Export if self.zeroes => 10 + EXPORT_NAME_ZEROES,
                State::Export => 10,
                State::Idle | State::Over => return Ok(None),
            };
            self.have.extend_from_slice(take_up_to(input, want - self.have.len()));
            if self.have.len() < want {
                return Ok(None);
            }
            let message = std::mem::take(&mut self.have);
            let answer = self.take(&message, out)?;
            self.have = message;
            self.have.clear();
            if answer.is_some() {
                return Ok(answer);
            }
        }
    }

    fn take(&mut self, message: &[u8], out: &mut Vec<u8>) -> Result<Option<Answer>, Fatal> {
        const WHOLE: &str = "the message is whole";
        let mut reader = Reader::new(message);
        match self.state {
            State::Greeting => self.greeted(&mut reader, out).map(Some),
            State::Reply(opt) => {
                let magic = reader.u64().expect(WHOLE);
                if magic != OPTION_REPLY_MAGIC {
                    return Err(Fatal::Server("an option reply with another magic", magic));
                }
                let about = reader.u32().expect(WHOLE);
                if about != opt.0 {
                    return Err(Fatal::Server("a reply to another option", about.into()));
                }
                let rep = Rep(reader.u32().expect(WHOLE));
                let len = reader.u32().expect(WHOLE) as usize;
                if len > OPTION_MAX {
                    return Err(Fatal::Server("an option reply that is too long", len as u64));
                }
                self.state = State::Data { opt, rep, len };
                Ok(None)
            }
            State::Data { opt, rep, .. } => {
                let answer = answer(rep, reader).ok_or(Fatal::Server("a malformed option reply", rep.0.into()))?;
                self.state = match answer {
                    Answer::Ack if opt == Opt::GO || opt == Opt::ABORT => State::Over,
                    Answer::Ack | Answer::Refused(_) => State::Idle,
                    _ => State::Reply(opt),
                };
                Ok(Some(answer))
            }
            State::Export => {
                self.state = State::Over;
                let size = reader.u64().expect(WHOLE);
                let flags = TransmissionFlags(reader.u16().expect(WHOLE));
                Ok(Some(Answer::Export { size, flags }))
            }
            State::Idle | State::Over => unreachable!("nothing is gathered in this state"),
        }
    }

    fn greeted(&mut self, reader: &mut Reader<'_>, out: &mut Vec<u8>) -> Result<Answer, Fatal> {
        let mut magic = || reader.u64().expect("the greeting is whole");
        let (init, style) = (magic(), magic());
        if init != INIT_MAGIC {
            return Err(Fatal::Server("a greeting that is not NBD's", init));
        }
        if style == OLDSTYLE_MAGIC {
            return Err(Fatal::Server("an oldstyle greeting", style));
        }
        if style != OPTION_MAGIC {
            return Err(Fatal::Server("a greeting of an unknown style", style));
        }
        let offered = HandshakeFlags(reader.u16().expect("the greeting is whole"));
        self.zeroes = !offered.contains(HandshakeFlags::NO_ZEROES);
        let flags = ClientFlags::NONE
            .with_if(offered.contains(HandshakeFlags::FIXED_NEWSTYLE), ClientFlags::FIXED_NEWSTYLE)
            .with_if(!self.zeroes, ClientFlags::NO_ZEROES);
        out.extend_from_slice(&flags.0.to_be_bytes());
        self.state = State::Idle;
        Ok(Answer::Greeted(offered))
    }
}

fn answer(rep: Rep, mut reader: Reader<'_>) -> Option<Answer> {
    Some(match rep {
        Rep::ACK => {
            reader.end()?;
            Answer::Ack
        }
        Rep::SERVER => {
            let name = string(reader.counted()?)?.to_owned();
            Answer::Server { name, description: lossy(reader.rest()) }
        }
        Rep::INFO => Answer::Info(info(InfoKind(reader.u16()?), reader)?),
        Rep::META_CONTEXT => Answer::Context { id: reader.u32()?, name: string(reader.rest())?.to_owned() },
        code if code.is_error() => Answer::Refused(Refusal::new(code, lossy(reader.rest()))),
        _ => return None,
    })
}

fn info(kind: InfoKind, mut reader: Reader<'_>) -> Option<Info> {
    let info = match kind {
        InfoKind::EXPORT => Info::Export { size: reader.u64()?, flags: TransmissionFlags(reader.u16()?) },
        InfoKind::BLOCK_SIZE => {
            Info::BlockSize(BlockSizes { min: reader.u32()?, preferred: reader.u32()?, payload_max: reader.u32()? })
        }
        InfoKind::NAME => return Some(Info::Name(string(reader.rest())?.to_owned())),
        InfoKind::DESCRIPTION => return Some(Info::Description(lossy(reader.rest()))),
        other => return Some(Info::Other(other)),
    };
    reader.end()?;
    Some(info)
}

fn lossy(text: &[u8]) -> String {
    String::from_utf8_lossy(text).into_owned()
}

fn put_info(data: &mut Vec<u8>, name: &str, kinds: &[InfoKind]) {
    put_string(data, name);
    data.extend_from_slice(&u16::try_from(kinds.len()).expect("a handful of kinds").to_be_bytes());
    for kind in kinds {
        data.extend_from_slice(&kind.0.to_be_bytes());
    }
}

fn put_queries(data: &mut Vec<u8>, name: &str, queries: &[&str]) {
    put_string(data, name);
    data.extend_from_slice(&length(queries.len()).to_be_bytes());
    for query in queries {
        put_string(data, query);
    }
}

fn put_string(data: &mut Vec<u8>, text: &str) {
    data.extend_from_slice(&length(text.len()).to_be_bytes());
    data.extend_from_slice(text.as_bytes());
}

fn length(len: usize) -> u32 {
    u32::try_from(len).expect("a length of the protocol has 32 bits")
}
