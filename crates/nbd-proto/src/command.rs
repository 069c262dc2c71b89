//! Judges one request: its header and the terms in, a parsed command or a reason to refuse it out.

use crate::limits::CONTEXTS_MAX;
use crate::terms::{ContextSet, Terms};
use crate::wire::{CommandFlags, CommandKind, Mode, TransmissionFlags, WireError};

/// A request without data on its way: judged, its flags parsed into fields. Ranges lie within the export. `len` can be
/// 0, except for a status: the protocol leaves it unspecified, and the answer is to do nothing and say that it is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Command {
    /// Answer with the data.
    Read {
        /// Where, in bytes.
        at: u64,
        /// How much, at most `payload_max`.
        len: u32,
        /// In one piece. A reply by [`Replier::read_head`](crate::Replier::read_head) always is.
        df: bool,
    },
    /// Make durable every write that was replied to.
    Flush {
        /// The offset of the request. It is reserved and means nothing, but an extended reply repeats it.
        at: u64,
    },
    /// The range is not needed any more.
    Trim {
        /// Where, in bytes.
        at: u64,
        /// How much.
        len: u64,
        /// Durable before the reply.
        fua: bool,
    },
    /// Read the range into a cache.
    Cache {
        /// Where, in bytes.
        at: u64,
        /// How much.
        len: u64,
    },
    /// Make the range read as zeroes.
    Zero {
        /// Where, in bytes.
        at: u64,
        /// How much.
        len: u64,
        /// A hole may be made: NO_HOLE was not set.
        unmap: bool,
        /// Fail with [`WireError::NotSup`] at once when it is not faster than writing; without it never fail so.
        fast: bool,
        /// Durable before the reply.
        fua: bool,
    },
    /// Answer with the status of the range, one chunk for each of the contexts.
    Status {
        /// Where, in bytes.
        at: u64,
        /// How much; more than 0.
        len: u64,
        /// One extent, and not past the range.
        one: bool,
        /// The contexts to answer, at least one: all negotiated ones, or those that the client picked in a payload.
        contexts: ContextSet,
    },
}

impl Command {
    /// The word of the protocol for it.
    pub const fn kind(&self) -> CommandKind {
        match self {
            Self::Read { .. } => CommandKind::READ,
            Self::Flush { .. } => CommandKind::FLUSH,
            Self::Trim { .. } => CommandKind::TRIM,
            Self::Cache { .. } => CommandKind::CACHE,
            Self::Zero { .. } => CommandKind::WRITE_ZEROES,
            Self::Status { .. } => CommandKind::BLOCK_STATUS,
        }
    }

    /// The offset of the request, which an extended reply repeats.
    pub const fn at(&self) -> u64 {
        match *self {
            Self::Read { at, .. }
            | Self::Flush { at }
            | Self::Trim { at, .. }
            | Self::Cache { at, .. }
            | Self::Zero { at, .. }
            | Self::Status { at, .. } => at,
        }
    }
}

/// A judged WRITE whose payload follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Write {
    /// Where, in bytes.
    pub at: u64,
    /// How much, at most `payload_max`. Can be 0.
    pub len: u32,
    /// Durable before the reply.
    pub fua: bool,
}

/// A refused request: answer it with [`Replier::error`](crate::Replier::error). Its payload is gone from the stream
/// already.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Rejection {
    /// What was asked.
    pub kind: CommandKind,
    /// The offset of the request, which an extended reply repeats.
    pub at: u64,
    /// Why not, for the client.
    pub error: WireError,
    /// Why not, for people.
    pub text: &'static str,
}

/// The fields of a request as they stood on the wire.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Header {
    pub(crate) flags: CommandFlags,
    pub(crate) kind: CommandKind,
    pub(crate) cookie: u64,
    pub(crate) at: u64,
    pub(crate) len: u64,
}

impl Header {
    /// Bytes after the header. An extended WRITE has a payload even without the flag that it must have: what else could
    /// `len` be, and there are clients that forget it.
    #[inline]
    pub(crate) fn payload(&self, mode: Mode) -> u64 {
        match mode {
            _ if self.kind == CommandKind::WRITE => self.len,
            Mode::Extended if self.flags.contains(CommandFlags::PAYLOAD_LEN) => self.len,
            _ => 0,
        }
    }
}

/// Longest READ, whatever `payload_max` says: data and its offset must fit the 32-bit length of one structured chunk.
const READ_MAX: u32 = u32::MAX - 8;

/// A judged request.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Judged {
    Command(Command),
    Write(Write),
    /// A status whose payload, of `len` bytes, names the contexts: to be judged by [`status`] when it is there.
    Selection {
        one: bool,
    },
}

/// Why a request is refused.
pub(crate) type Refused = (WireError, &'static str);

/// Judges a request, everything but DISC. What is refused first when several things are wrong: an unknown command, a
/// flag, a write to a read-only export, a command that was not advertised, the range, the alignment, the length.
#[inline]
pub(crate) fn judge(terms: &Terms, header: &Header) -> Result<Judged, Refused> {
    use CommandKind as Kind;
    let Header { flags, kind, at, len, .. } = *header;
    let fua = flags.contains(CommandFlags::FUA);
    if kind.0 > Kind::BLOCK_STATUS.0 {
        return Err((WireError::Inval, "unknown command"));
    }
    let wrong = flags.without(valid_flags(terms, kind));
    if wrong != CommandFlags::NONE {
        return Err((WireError::Inval, wrong_flag(wrong)));
    }
    match kind {
        Kind::READ => {
            range(terms, at, len, WireError::Inval)?;
            let df = flags.contains(CommandFlags::DF);
            let Some(len) = payload(terms, len).filter(|&len| len <= READ_MAX) else {
                let error = if df { WireError::Overflow } else { WireError::Inval };
                return Err((error, "read longer than the maximum payload"));
            };
            Ok(Judged::Command(Command::Read { at, len, df }))
        }
        Kind::WRITE => {
            // With extended headers the client MUST set PAYLOAD_LEN, but qemu's (10.0) never does: it is not asked for.
            writable(terms)?;
            range(terms, at, len, WireError::NoSpc)?;
            let Some(len) = payload(terms, len) else {
                return Err((WireError::Inval, "write longer than the maximum payload"));
            };
            Ok(Judged::Write(Write { at, len, fua }))
        }
        Kind::FLUSH => {
            // Offset and length are reserved, and every server in use but one ignores them (nbd.md, 2.1): so do we,
            // but for repeating the offset.
            advertised(terms, TransmissionFlags::SEND_FLUSH)?;
            Ok(Judged::Command(Command::Flush { at }))
        }
        Kind::TRIM => {
            writable(terms)?;
            advertised(terms, TransmissionFlags::SEND_TRIM)?;
            range(terms, at, len, WireError::Inval)?;
            Ok(Judged::Command(Command::Trim { at, len, fua }))
        }
        Kind::CACHE => {
            advertised(terms, TransmissionFlags::SEND_CACHE)?;
            range(terms, at, len, WireError::Inval)?;
            Ok(Judged::Command(Command::Cache { at, len }))
        }
        Kind::WRITE_ZEROES => {
            writable(terms)?;
            advertised(terms, TransmissionFlags::SEND_WRITE_ZEROES)?;
            range(terms, at, len, WireError::NoSpc)?;
            let unmap = !flags.contains(CommandFlags::NO_HOLE);
            let fast = flags.contains(CommandFlags::FAST_ZERO);
            Ok(Judged::Command(Command::Zero { at, len, unmap, fast, fua }))
        }
        Kind::BLOCK_STATUS => {
            let one = flags.contains(CommandFlags::REQ_ONE);
            if flags.contains(CommandFlags::PAYLOAD_LEN) {
                let ids = len.wrapping_sub(8);
                return match ids % 4 == 0 && ids <= 4 * CONTEXTS_MAX as u64 {
                    true => Ok(Judged::Selection { one }),
                    false => Err((WireError::Inval, "block status payload of a wrong length")),
                };
            }
            status(terms, at, len, one, terms.contexts).map(Judged::Command)
        }
        _ => Err((WireError::Inval, "unknown command")),
    }
}

/// Judges a status once its contexts are known.
pub(crate) fn status(terms: &Terms, at: u64, len: u64, one: bool, contexts: ContextSet) -> Result<Command, Refused> {
    if contexts.is_empty() {
        return Err((WireError::Inval, "block status without a negotiated context"));
    }
    range(terms, at, len, WireError::Inval)?;
    // No extent may be empty, so there is no way to answer.
    if len == 0 {
        return Err((WireError::Inval, "block status of no bytes"));
    }
    Ok(Command::Status { at, len, one, contexts })
}

#[inline]
fn valid_flags(terms: &Terms, kind: CommandKind) -> CommandFlags {
    use CommandFlags as Flag;
    // FUA is valid with every command once it is advertised (proto.md, "Command flags"), and clients do set it.
    let fua = Flag::NONE.with_if(terms.flags.contains(TransmissionFlags::SEND_FUA), Flag::FUA);
    match kind {
        CommandKind::READ => fua.with_if(terms.flags.contains(TransmissionFlags::SEND_DF), Flag::DF),
        CommandKind::WRITE => fua.with_if(terms.mode == Mode::Extended, Flag::PAYLOAD_LEN),
        CommandKind::WRITE_ZEROES => {
            fua.with(Flag::NO_HOLE).with_if(terms.flags.contains(TransmissionFlags::SEND_FAST_ZERO), Flag::FAST_ZERO)
        }
        CommandKind::BLOCK_STATUS => fua
            .with(Flag::REQ_ONE)
            .with_if(terms.flags.contains(TransmissionFlags::BLOCK_STATUS_PAYLOAD), Flag::PAYLOAD_LEN),
        _ => fua,
    }
}

#[cold]
fn wrong_flag(wrong: CommandFlags) -> &'static str {
    match wrong {
        CommandFlags::FUA => "flag FUA was not advertised",
        CommandFlags::NO_HOLE => "flag NO_HOLE is not valid here",
        CommandFlags::DF => "flag DF is not valid here",
        CommandFlags::REQ_ONE => "flag REQ_ONE is not valid here",
        CommandFlags::FAST_ZERO => "flag FAST_ZERO is not valid here",
        CommandFlags::PAYLOAD_LEN => "payload is not valid here",
        _ if wrong.without(CommandFlags::KNOWN) != CommandFlags::NONE => "unknown flag",
        _ => "several flags are not valid here",
    }
}

#[inline]
fn writable(terms: &Terms) -> Result<(), Refused> {
    match terms.flags.contains(TransmissionFlags::READ_ONLY) {
        false => Ok(()),
        true => Err((WireError::Perm, "the export is read-only")),
    }
}

#[inline]
fn advertised(terms: &Terms, flag: TransmissionFlags) -> Result<(), Refused> {
    match terms.flags.contains(flag) {
        true => Ok(()),
        false => Err((WireError::Inval, "command was not advertised")),
    }
}

#[inline]
fn range(terms: &Terms, at: u64, len: u64, past_end: WireError) -> Result<(), Refused> {
    if len > terms.size || at > terms.size - len {
        return Err((past_end, "range ends past the export"));
    }
    if terms.enforce_alignment && (at | len) & u64::from(terms.block.min - 1) != 0 {
        return Err((WireError::Inval, "range is not aligned to the minimum block size"));
    }
    Ok(())
}

#[inline]
fn payload(terms: &Terms, len: u64) -> Option<u32> {
    u32::try_from(len).ok().filter(|&len| len <= terms.block.payload_max)
}
