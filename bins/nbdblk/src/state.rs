//! [`State`]: what a server passes on to the program that replaces it, and its form in a sealed memory file.
//!
//! The file has a mark, the version of the form, and the length of a JSON document; then the document, and the bytes of clients to
//! which the document refers. Descriptors are numbers: the new program inherits them.

use std::{
    ffi::OsString,
    fs::File,
    io::Write,
    os::{
        fd::{AsRawFd, OwnedFd, RawFd},
        unix::fs::FileExt,
    },
    path::PathBuf,
    sync::Arc,
};

use anyhow::{Context, bail, ensure};
use nbd_server_core::{
    Connection, Continuation, Greeted, Handover, KernelTls, Read as Waiting, Unsent,
    nbd_proto::{
        BlockSizes, Cookie, Mode, Position, Rejection, Terms, Tls, WireError,
        wire::{CommandKind, TransmissionFlags},
    },
};
use nix::{
    fcntl::{FcntlArg, SealFlag, fcntl},
    sys::memfd::{MFdFlags, memfd_create},
};
use serde::{Deserialize, Serialize};

use crate::{activation, uri::Address};

/// The version of the form. A program refuses a state with a higher one.
pub(crate) const VERSION: u32 = 2;

/// The first bytes of the file.
const MARK: [u8; 8] = *b"nbdblk\0U";

/// Mark, version and length of the document.
const HEAD: usize = 20;

/// Longest document, and longest piece of bytes. Both are far beyond what the limits of a server allow.
const LEN_MAX: u64 = 1 << 30;

/// What the new program needs, apart from its arguments and its configuration.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct State {
    /// The version of the program that wrote it.
    pub(crate) program: String,
    /// When clients began to wait: CLOCK_MONOTONIC, in nanoseconds.
    pub(crate) paused_at: u64,
    /// Number of clients that are not passed on.
    pub(crate) leaving: usize,
    /// The addresses of the listening sockets, for people.
    pub(crate) addresses: Vec<Place>,
    /// Files to remove at exit.
    pub(crate) files: Vec<OldFile>,
    /// The listening control socket.
    pub(crate) control: Option<RawFd>,
    /// Clients of the control socket that wait for the result.
    pub(crate) askers: Vec<RawFd>,
    /// The command of `--run`.
    pub(crate) child: Option<i32>,
    /// Names of the listening sockets that the service manager keeps.
    pub(crate) kept: Vec<String>,
    listeners: Vec<RawFd>,
    guests: Vec<OldGuest>,
    connections: Vec<OldConnection>,
}

/// An [`Address`].
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Place {
    Unix(OsString),
    Tcp(String, u16),
    Vsock(u32),
}

/// A file of the server.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct OldFile {
    pub(crate) path: OsString,
    pub(crate) dev: u64,
    pub(crate) ino: u64,
}

/// A piece of the bytes behind the document.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Piece {
    at: u64,
    len: u64,
}

#[derive(Debug, Serialize, Deserialize)]
struct OldGuest {
    socket: RawFd,
    tls: OldTls,
    heard: Piece,
    unsent: Piece,
}

#[derive(Debug, Serialize, Deserialize)]
enum OldTls {
    Off,
    Optional,
    Required,
}

#[derive(Debug, Serialize, Deserialize)]
struct OldConnection {
    socket: RawFd,
    /// TLS in the kernel: the suite, and the records that were sent with the present key. Since version 2.
    #[serde(default)]
    tls: Option<(String, u64)>,
    export: String,
    terms: OldTerms,
    /// Cookie, offset, length, and NBD_CMD_FLAG_DF.
    reads: Vec<(u64, u64, u32, bool)>,
    skip: u32,
    /// Cookie, command, offset and error.
    reject: Option<(u64, u16, u64, u32)>,
    over: bool,
    input: Piece,
    output: Vec<OldUnsent>,
}

#[derive(Debug, Serialize, Deserialize)]
struct OldTerms {
    /// 0: simple, 1: structured, 2: extended.
    mode: u8,
    flags: u16,
    size: u64,
    block_min: u32,
    block_preferred: u32,
    payload_max: u32,
    enforce_alignment: bool,
    contexts: Vec<u32>,
}

#[derive(Debug, Serialize, Deserialize)]
enum OldUnsent {
    Bytes(Piece),
    Content { at: u64, len: u64 },
}

/// The reason of an error that another program has found.
const BEFORE: &str = "the request was refused before the server was replaced";

impl State {
    /// Adds the sockets and the clients, and writes all of it to a sealed memory file.
    pub(crate) fn write(mut self, handover: &Handover) -> anyhow::Result<File> {
        let mut bytes = Vec::new();
        let mut keep = |piece: &[u8]| {
            bytes.extend_from_slice(piece);
            Piece { at: (bytes.len() - piece.len()) as u64, len: piece.len() as u64 }
        };
        self.listeners = handover.listeners.iter().map(|socket| socket.as_raw_fd()).collect();
        self.guests = handover.guests.iter().map(|guest| OldGuest::new(guest, &mut keep)).collect();
        self.connections = handover.connections.iter().map(|one| OldConnection::new(one, &mut keep)).collect();
        let document = serde_json::to_vec(&self)?;
        let file = memfd_create(c"nbdblk-state", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
        let mut file = File::from(file);
        file.write_all(&MARK)?;
        file.write_all(&VERSION.to_le_bytes())?;
        file.write_all(&(document.len() as u64).to_le_bytes())?;
        file.write_all(&document)?;
        file.write_all(&bytes)?;
        fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::all()))?;
        Ok(file)
    }

    /// Exports with clients, and the longest request that their clients may send, in bytes.
    pub(crate) fn needs(&self) -> (Vec<&str>, u32) {
        let mut names: Vec<_> = self.connections.iter().map(|connection| connection.export.as_str()).collect();
        names.sort_unstable();
        names.dedup();
        (names, self.connections.iter().map(|connection| connection.terms.payload_max).max().unwrap_or_default())
    }

    /// Number of clients that are passed on.
    pub(crate) fn clients(&self) -> usize {
        self.guests.len() + self.connections.len()
    }

    /// Takes over the sockets and the clients.
    pub(crate) fn take_handover(&mut self, file: &StateFile) -> anyhow::Result<Handover> {
        let socket = |fd: RawFd| take(fd).map(Arc::new);
        let listeners = self.listeners.drain(..).map(socket).collect::<anyhow::Result<_>>()?;
        let guests = self.guests.drain(..).map(|guest| guest.restore(file));
        let guests = guests.collect::<anyhow::Result<_>>()?;
        let connections = self.connections.drain(..).map(|connection| connection.restore(file));
        Ok(Handover { listeners, guests, connections: connections.collect::<anyhow::Result<_>>()? })
    }
}

/// Takes over a descriptor that the state names.
pub(crate) fn take(fd: RawFd) -> anyhow::Result<OwnedFd> {
    activation::take(fd).context("a descriptor of the replaced server")
}

/// A file with a state.
#[derive(Debug)]
pub(crate) struct StateFile {
    file: File,
    /// Where the bytes behind the document begin.
    start: u64,
    len: u64,
}

impl StateFile {
    /// Reads the document.
    pub(crate) fn open(file: File) -> anyhow::Result<(Self, State)> {
        let mut head = [0; HEAD];
        file.read_exact_at(&mut head, 0).context("the state is shorter than its head")?;
        let (mark, rest) = head.split_at(8);
        ensure!(mark == MARK, "this is not the state of a server");
        let (version, len) = rest.split_at(4);
        let version = u32::from_le_bytes(version.try_into()?);
        check_version(version)?;
        let len = u64::from_le_bytes(len.try_into()?);
        let all = file.metadata()?.len();
        ensure!(len <= LEN_MAX && HEAD as u64 + len <= all, "the state is incomplete");
        let mut document = vec![0; len as usize];
        file.read_exact_at(&mut document, HEAD as u64)?;
        let state = serde_json::from_slice(&document).context("the state is malformed")?;
        let start = HEAD as u64 + len;
        Ok((Self { file, start, len: all - start }, state))
    }

    fn bytes(&self, piece: Piece) -> anyhow::Result<Vec<u8>> {
        let end = piece.at.checked_add(piece.len).filter(|end| *end <= self.len && piece.len <= LEN_MAX);
        ensure!(end.is_some(), "the state is incomplete: no {} bytes at {}", piece.len, piece.at);
        let mut bytes = vec![0; piece.len as usize];
        self.file.read_exact_at(&mut bytes, self.start + piece.at)?;
        Ok(bytes)
    }
}

/// Fails if this program is too old for a state.
pub(crate) fn check_version(version: u32) -> anyhow::Result<()> {
    ensure!(
        (1..=VERSION).contains(&version),
        "this program, nbdblk {}, understands the state of a server up to version {VERSION}, and this is version {version}",
        env!("CARGO_PKG_VERSION")
    );
    Ok(())
}

impl From<&Address> for Place {
    fn from(address: &Address) -> Self {
        match address {
            Address::Unix(path) => Self::Unix(path.clone().into()),
            Address::Tcp(host, port) => Self::Tcp(host.clone(), *port),
            Address::Vsock(port) => Self::Vsock(*port),
        }
    }
}

impl From<Place> for Address {
    fn from(place: Place) -> Self {
        match place {
            Place::Unix(path) => Self::Unix(PathBuf::from(path)),
            Place::Tcp(host, port) => Self::Tcp(host, port),
            Place::Vsock(port) => Self::Vsock(port),
        }
    }
}

impl OldGuest {
    fn new(guest: &Greeted, keep: &mut impl FnMut(&[u8]) -> Piece) -> Self {
        let tls = match guest.tls {
            Tls::Off => OldTls::Off,
            Tls::Optional => OldTls::Optional,
            Tls::Required => OldTls::Required,
        };
        Self { socket: guest.socket.as_raw_fd(), tls, heard: keep(&guest.heard), unsent: keep(&guest.unsent) }
    }

    fn restore(self, file: &StateFile) -> anyhow::Result<Greeted> {
        let tls = match self.tls {
            OldTls::Off => Tls::Off,
            OldTls::Optional => Tls::Optional,
            OldTls::Required => Tls::Required,
        };
        let (heard, unsent) = (file.bytes(self.heard)?, file.bytes(self.unsent)?);
        Ok(Greeted { socket: Arc::new(take(self.socket)?), tls, heard, unsent })
    }
}

impl OldConnection {
    fn new(connection: &Connection, keep: &mut impl FnMut(&[u8]) -> Piece) -> Self {
        let Continuation { terms, reads, position, input, output } = &connection.state;
        let reject = position.reject.map(|(cookie, what)| (cookie.0, what.kind.0, what.at, what.error.code()));
        let output = output.iter().map(|unsent| match unsent {
            Unsent::Bytes(bytes) => OldUnsent::Bytes(keep(bytes)),
            Unsent::Content { at, len } => OldUnsent::Content { at: *at, len: *len as u64 },
        });
        let output = output.collect();
        Self {
            socket: connection.socket.as_raw_fd(),
            tls: connection.tls.as_ref().map(|tls| (tls.suite.clone(), tls.records)),
            export: connection.export.clone(),
            terms: OldTerms::new(terms),
            reads: reads.iter().map(|read| (read.cookie.0, read.at, read.len, read.df)).collect(),
            skip: position.skip,
            reject,
            over: position.over,
            input: keep(input),
            output,
        }
    }

    fn restore(self, file: &StateFile) -> anyhow::Result<Connection> {
        let reject = self.reject.map(|(cookie, kind, at, code)| {
            let error = WireError::from_code(code).context("the state has an error without a number")?;
            anyhow::Ok((Cookie(cookie), Rejection { kind: CommandKind(kind), at, error, text: BEFORE }))
        });
        let position = Position { skip: self.skip, reject: reject.transpose()?, taken: Vec::new(), over: self.over };
        let reads = self.reads.into_iter();
        let reads = reads.map(|(cookie, at, len, df)| Waiting { cookie: Cookie(cookie), at, len, df }).collect();
        let output = self.output.into_iter().map(|unsent| match unsent {
            OldUnsent::Bytes(piece) => file.bytes(piece).map(Unsent::Bytes),
            OldUnsent::Content { at, len } => Ok(Unsent::Content { at, len: usize::try_from(len)? }),
        });
        let output = output.collect::<anyhow::Result<_>>()?;
        let state =
            Continuation { terms: self.terms.restore()?, reads, position, input: file.bytes(self.input)?, output };
        let tls = self.tls.map(|(suite, records)| KernelTls { suite, records });
        Ok(Connection { socket: Arc::new(take(self.socket)?), tls, export: self.export, state })
    }
}

impl OldTerms {
    fn new(terms: &Terms) -> Self {
        Self {
            mode: match terms.mode {
                Mode::Simple => 0,
                Mode::Structured => 1,
                Mode::Extended => 2,
            },
            flags: terms.flags.0,
            size: terms.size,
            block_min: terms.block.min,
            block_preferred: terms.block.preferred,
            payload_max: terms.block.payload_max,
            enforce_alignment: terms.enforce_alignment,
            contexts: terms.contexts.iter().collect(),
        }
    }

    fn restore(self) -> anyhow::Result<Terms> {
        Ok(Terms {
            mode: match self.mode {
                0 => Mode::Simple,
                1 => Mode::Structured,
                2 => Mode::Extended,
                other => bail!("the state has an unknown mode, {other}"),
            },
            flags: TransmissionFlags(self.flags),
            size: self.size,
            block: BlockSizes { min: self.block_min, preferred: self.block_preferred, payload_max: self.payload_max },
            enforce_alignment: self.enforce_alignment,
            contexts: self.contexts.into_iter().collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::os::{fd::IntoRawFd, unix::net::UnixStream};

    use nbd_server_core::nbd_proto::ContextSet;
    use nix::unistd::dup;

    use super::*;

    /// An end of a socket pair that a new program would inherit.
    fn socket() -> Arc<OwnedFd> {
        Arc::new(dup(UnixStream::pair().expect("a socket").0).expect("a descriptor"))
    }

    fn handover() -> Handover {
        let terms = Terms {
            mode: Mode::Extended,
            flags: TransmissionFlags(0x123),
            size: 1 << 40,
            block: BlockSizes { min: 512, preferred: 4096, payload_max: 1 << 20 },
            enforce_alignment: false,
            contexts: [0, 7].into_iter().collect::<ContextSet>(),
        };
        let reject = Rejection { kind: CommandKind::WRITE, at: 9, error: WireError::NoSpc, text: BEFORE };
        let position = Position { skip: 77, reject: Some((Cookie(u64::MAX), reject)), taken: Vec::new(), over: false };
        let reads = vec![Waiting { cookie: Cookie(3), at: 1 << 35, len: 5, df: true }];
        let output = vec![Unsent::Bytes(vec![1; 30]), Unsent::Content { at: 8, len: 4096 }, Unsent::Bytes(vec![2])];
        let state = Continuation { terms, reads, position, input: b"rest".to_vec(), output };
        let plain = Terms { mode: Mode::Simple, contexts: ContextSet::EMPTY, ..terms };
        let over = Position { over: true, ..Position::default() };
        let other = Continuation { terms: plain, reads: vec![], position: over, input: vec![], output: vec![] };
        let tls = KernelTls { suite: "TLS 1.3 with AES-128-GCM".into(), records: 1 << 20 };
        let guest = |tls| Greeted { socket: socket(), tls, heard: b"option".to_vec(), unsent: b"reply".to_vec() };
        Handover {
            listeners: vec![socket()],
            guests: [Tls::Off, Tls::Optional, Tls::Required].map(guest).into(),
            connections: vec![
                Connection { socket: socket(), tls: None, export: "an export".into(), state },
                Connection { socket: socket(), tls: Some(tls), export: String::new(), state: other },
            ],
        }
    }

    /// The state, as a new program gets it.
    fn written(handover: &Handover) -> File {
        let file = OldFile { path: "/a".into(), dev: 1, ino: 2 };
        State { child: Some(7), files: vec![file], ..State::default() }.write(handover).expect("it can be written")
    }

    #[test]
    fn a_state_is_read_as_it_was_written() {
        let before = handover();
        let (file, mut state) = StateFile::open(written(&before)).expect("it is whole");
        assert_eq!((state.child, state.clients()), (Some(7), 5));
        assert_eq!(state.needs(), (vec!["", "an export"], 1 << 20));
        // The new program owns the descriptors.
        let text = |handover: &Handover| {
            let guests = handover.guests.iter().map(|g| format!("{:?} {:?} {:?}", g.tls, g.heard, g.unsent));
            let connections = handover.connections.iter().map(|c| format!("{} {:?} {:?}", c.export, c.tls, c.state));
            guests.chain(connections).collect::<Vec<_>>()
        };
        let expected = text(&before);
        for socket in before.listeners.into_iter().chain(before.guests.into_iter().map(|guest| guest.socket)) {
            let _ = Arc::into_inner(socket).expect("the only owner").into_raw_fd();
        }
        for connection in before.connections {
            let _ = Arc::into_inner(connection.socket).expect("the only owner").into_raw_fd();
        }
        let after = state.take_handover(&file).expect("all descriptors are open");
        assert_eq!(text(&after), expected);
        assert_eq!(after.listeners.len(), 1);
    }

    #[test]
    fn an_invalid_state_is_an_error() {
        let whole = written(&handover());
        let mut bytes = vec![0; whole.metadata().unwrap().len() as usize];
        whole.read_exact_at(&mut bytes, 0).unwrap();
        let open = |bytes: &[u8]| {
            let mut file = File::from(memfd_create(c"state", MFdFlags::MFD_CLOEXEC).unwrap());
            file.write_all(bytes).unwrap();
            StateFile::open(file).map(|_| ()).map_err(|error| format!("{error:#}"))
        };
        assert_eq!(open(&bytes), Ok(()));
        let len = u64::from_le_bytes(bytes[12..HEAD].try_into().unwrap()) as usize;
        for cut in 0..HEAD + len {
            assert!(open(&bytes[..cut]).is_err(), "the first {cut} bytes");
        }
        let changed = |at: usize, byte: u8| {
            let mut bytes = bytes.clone();
            bytes[at] = byte;
            open(&bytes).unwrap_err()
        };
        assert!(changed(0, b'N').contains("not the state of a server"));
        assert!(changed(8, 3).contains("up to version 2, and this is version 3"));
        assert!(changed(8, 0).contains("this is version 0"));
        assert!(changed(19, 255).contains("incomplete"));
        assert!(changed(HEAD, b'[').contains("malformed"));
        // Pieces that are not there.
        let (file, _) = StateFile::open(whole).unwrap();
        for piece in [Piece { at: file.len, len: 1 }, Piece { at: u64::MAX, len: 2 }, Piece { at: 0, len: u64::MAX }] {
            assert!(file.bytes(piece).is_err(), "{piece:?}");
        }
    }
}
