//! Questions about a server that need no transmission phase: [`list`] and [`info`].

use nbd_proto::{
    BlockSizes, Mode, Terms,
    client::{Answer, Ask, Handshake, Info},
    wire::{HandshakeFlags, InfoKind, Opt, Rep},
};

use crate::{
    deadline::Deadline,
    dial::dial,
    error::Error,
    export::Export,
    handshake::{PIECE, WHAT},
    options::Options,
    stream::Stream,
    target::Target,
    uri::Uri,
};

/// Longest list that is taken from a server, in bytes of its texts and [`ENTRY`] for each entry. 16 MiB.
const LIST_MAX: usize = 16 << 20;
const ENTRY: usize = 64;

/// An export of a list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// The name to ask for.
    pub name: String,
    /// The description for people; may be empty. It is the server's text, control characters included.
    pub description: String,
}

/// The exports of a server. The name of the export in the URI has no meaning here.
///
/// # Errors
/// As [`Engine::connect`](crate::Engine::connect). Many servers refuse this as a policy. A list of more than 16 MiB is an
/// error.
pub fn list(uri: &Uri, options: &Options) -> Result<Vec<Listed>, Error> {
    let mut talk = Talk::open(uri, options)?;
    let mut listed = Vec::new();
    talk.ask(Ask::List, Opt::LIST, |answer| match answer {
        Answer::Server { name, description } => {
            listed.push(Listed { name, description });
            true
        }
        _ => false,
    })?;
    talk.leave();
    Ok(listed)
}

/// What a server reports about an export, without opening it. [`Export::contexts`] has all contexts that it can select.
///
/// # Errors
/// As [`Engine::connect`](crate::Engine::connect). Old servers cannot answer this.
pub fn info(uri: &Uri, options: &Options) -> Result<Export, Error> {
    const KINDS: [InfoKind; 3] = [InfoKind::NAME, InfoKind::DESCRIPTION, InfoKind::BLOCK_SIZE];
    let mut talk = Talk::open(uri, options)?;
    let name = talk.target.export.clone();
    // What the server reports depends on the protocol.
    let mode = if options.mode == Mode::Extended && talk.grants(Ask::ExtendedHeaders, Opt::EXTENDED_HEADERS)? {
        Mode::Extended
    } else if options.mode > Mode::Simple && talk.grants(Ask::StructuredReply, Opt::STRUCTURED_REPLY)? {
        Mode::Structured
    } else {
        Mode::Simple
    };
    let mut contexts = Vec::new();
    if mode > Mode::Simple {
        let ask = Ask::ListContexts { name: &name, queries: &[] };
        let listed = talk.ask(ask, Opt::LIST_META_CONTEXT, |answer| match answer {
            Answer::Context { name, .. } => {
                contexts.push(name.into());
                true
            }
            _ => false,
        });
        granted(listed)?;
    }
    let (mut export, mut block, mut canonical, mut description) = (None, BlockSizes::default(), None, None);
    talk.ask(Ask::Info { name: &name, kinds: &KINDS }, Opt::INFO, |answer| {
        let Answer::Info(info) = answer else { return false };
        match info {
            Info::Export { size, flags } => export = Some((size, flags)),
            Info::BlockSize(sizes) => block = sizes,
            Info::Name(name) => canonical = Some(name),
            Info::Description(text) => description = Some(text),
            Info::Other(_) => {}
        }
        true
    })?;
    talk.leave();
    let (size, flags) = export.ok_or_else(|| Error::Protocol("server sent no size of the export".into()))?;
    let terms = Terms { mode, flags, size, block, enforce_alignment: false, contexts: [].into_iter().collect() };
    Export::new(terms, canonical, description, contexts)
}

/// A handshake, question by question.
struct Talk {
    stream: Stream,
    handshake: Handshake,
    target: Target,
    deadline: Deadline,
    /// What came and is not used yet; at most [`PIECE`] bytes.
    input: Vec<u8>,
    out: Vec<u8>,
}

impl Talk {
    /// Connects, is greeted, and starts TLS if it is wanted.
    fn open(uri: &Uri, options: &Options) -> Result<Self, Error> {
        let target = Target::new(Some(uri), options)?;
        let stream = Stream::from(dial(&uri.address, options.connect)?);
        let deadline = Deadline::after(options.handshake);
        let mut talk =
            Self { stream, handshake: Handshake::new(), target, deadline, input: Vec::new(), out: Vec::new() };
        match talk.hear()? {
            Answer::Greeted(flags) if flags.contains(HandshakeFlags::FIXED_NEWSTYLE) => {}
            _ => return Err(Error::Protocol("the server is too old to be asked (no fixed newstyle)".into())),
        }
        if let Some(tls) = talk.target.tls.clone() {
            talk.ask(Ask::StartTls, Opt::STARTTLS, |_| false)?;
            // Someone between us and the server may have put it there (CVE-2021-3716 is the server's side of this).
            if !talk.input.is_empty() {
                return Err(Error::Protocol("server sent plain text after the answer to STARTTLS".into()));
            }
            talk.stream.start_tls(&tls, &talk.target.host, deadline)?;
        }
        Ok(talk)
    }

    /// Asks, and gives each answer before the last to `take`, which returns whether it belongs here.
    fn ask(&mut self, ask: Ask<'_>, option: Opt, mut take: impl FnMut(Answer) -> bool) -> Result<(), Error> {
        self.handshake.ask(ask, &mut self.out);
        let mut taken = 0;
        loop {
            let answer = self.hear()?;
            taken += ENTRY
                + match &answer {
                    Answer::Ack => return Ok(()),
                    Answer::Server { name, description } => name.len() + description.len(),
                    Answer::Context { name, .. } => name.len(),
                    _ => 0,
                };
            if taken > LIST_MAX {
                return Err(Error::Protocol(format!("the answer to {option} has more than {LIST_MAX} bytes")));
            }
            match answer {
                Answer::Refused(refusal) => return Err(Error::refused(option, refusal)),
                answer => {
                    if !take(answer) {
                        return Err(Error::Protocol(format!("an answer to {option} that belongs to another option")));
                    }
                }
            }
        }
    }

    fn grants(&mut self, ask: Ask<'_>, option: Opt) -> Result<bool, Error> {
        let asked = self.ask(ask, option, |_| false);
        granted(asked)
    }

    /// Sends what is to be sent, and waits for an answer.
    fn hear(&mut self) -> Result<Answer, Error> {
        self.stream.send_by(&std::mem::take(&mut self.out), self.deadline, WHAT)?;
        loop {
            let mut input = self.input.as_slice();
            let answer = self.handshake.next(&mut input, &mut self.out)?;
            let used = self.input.len() - input.len();
            self.input.drain(..used);
            if let Some(answer) = answer {
                return Ok(answer);
            }
            let mut piece = [0; PIECE];
            let n = self.stream.receive_by(&mut piece, self.deadline, WHAT)?;
            self.input.extend_from_slice(&piece[..n]);
        }
    }

    /// Says goodbye. The server may have closed already.
    fn leave(mut self) {
        self.handshake.ask(Ask::Abort, &mut self.out);
        let _ = self.stream.send_by(&self.out, self.deadline, WHAT);
        self.stream.close();
    }
}

/// Whether an option was granted, where a refusal is an answer too.
fn granted(asked: Result<(), Error>) -> Result<bool, Error> {
    match asked {
        Ok(()) => Ok(true),
        Err(Error::Refused { code, .. }) if code != Rep::ERR_TLS_REQD && code != Rep::ERR_SHUTDOWN => Ok(false),
        Err(error) => Err(error),
    }
}
