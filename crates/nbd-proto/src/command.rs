//! Validates one request: from its header and the terms to a parsed command, or to a reason for refusal.

use crate::limits::CONTEXTS_MAX;
use crate::terms::{ContextSet, Terms};
use crate::wire::{CommandFlags, CommandKind, Mode, TransmissionFlags, WireError};

/// A valid request, without outstanding payload; its flags are parsed into fields. Ranges lie within the export. `len` can be 0,
/// except for a status. The protocol leaves this unspecified; do nothing and report success.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Command {
    /// NBD_CMD_READ: reply with the data.
    Read {
        /// First byte.
        at: u64,
        /// Length in bytes, at most `payload_max`.
        len: u32,
        /// NBD_CMD_FLAG_DF: reply in one chunk. A reply by [`Replier::read_head`](crate::Replier::read_head) always is one chunk.
        df: bool,
    },
    /// NBD_CMD_FLUSH: make every completed write durable.
    Flush {
        /// The offset of the request. It is reserved and has no meaning, but an extended reply repeats it.
        at: u64,
    },
    /// NBD_CMD_TRIM: the range is not needed any more.
    Trim {
        /// First byte.
        at: u64,
        /// Length in bytes.
        len: u64,
        /// NBD_CMD_FLAG_FUA: durable before the reply.
        fua: bool,
    },
    /// NBD_CMD_CACHE: read the range into a cache.
    Cache {
        /// First byte.
        at: u64,
        /// Length in bytes.
        len: u64,
    },
    /// NBD_CMD_WRITE_ZEROES: make the range read as zeroes.
    Zero {
        /// First byte.
        at: u64,
        /// Length in bytes.
        len: u64,
        /// The space may be deallocated: NBD_CMD_FLAG_NO_HOLE was not set.
        unmap: bool,
        /// NBD_CMD_FLAG_FAST_ZERO: fail with [`WireError::NotSup`] at once if it is not faster than writing. Without the flag,
        /// never fail so.
        fast: bool,
        /// NBD_CMD_FLAG_FUA: durable before the reply.
        fua: bool,
    },
    /// NBD_CMD_BLOCK_STATUS: reply with the status of the range, one chunk for each context.
    Status {
        /// First byte.
        at: u64,
        /// Length in bytes, more than 0.
        len: u64,
        /// NBD_CMD_FLAG_REQ_ONE: one extent, which does not exceed the range.
        one: bool,
        /// The contexts of the reply, at least one: all negotiated ones, or those that the client named in a payload.
        contexts: ContextSet,
    },
}

impl Command {
    /// The command's number on the wire.
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

/// A valid WRITE whose payload follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Write {
    /// First byte.
    pub at: u64,
    /// Length in bytes, at most `payload_max`. Can be 0.
    pub len: u32,
    /// NBD_CMD_FLAG_FUA: durable before the reply.
    pub fua: bool,
}

/// A refused request: reply with [`Replier::error`](crate::Replier::error). Its payload has already left the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Rejection {
    /// The requested command.
    pub kind: CommandKind,
    /// The offset of the request, which an extended reply repeats.
    pub at: u64,
    /// The error for the client.
    pub error: WireError,
    /// The reason, for people.
    pub text: &'static str,
}

/// The fields of a request as they are on the wire.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Header {
    pub(crate) flags: CommandFlags,
    pub(crate) kind: CommandKind,
    pub(crate) cookie: u64,
    pub(crate) at: u64,
    pub(crate) len: u64,
}

impl Header {
    /// Bytes after the header. An extended WRITE has a payload even without the flag PAYLOAD_LEN, which is mandatory: `len`
    /// cannot mean anything else, and some clients omit the flag.
    #[inline]
    pub(crate) fn payload(&self, mode: Mode) -> u64 {
        match mode {
            _ if self.kind == CommandKind::WRITE => self.len,
            Mode::Extended if self.flags.contains(CommandFlags::PAYLOAD_LEN) => self.len,
            _ => 0,
        }
    }
}

/// Longest READ, even with a larger `payload_max`: data and its offset must fit the 32-bit length of one structured chunk.
const READ_MAX: u32 = u32::MAX - 8;

/// A validated request.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Request {
    Command(Command),
    Write(Write),
    /// A status whose payload, of `len` bytes, names the contexts. [`status`] validates it when the payload is there.
    Selection {
        one: bool,
    },
}

/// The reason why a request is refused.
pub(crate) type Reason = (WireError, &'static str);

/// Validates a request, except DISC. If it has several errors, the first of these counts: an unknown command, a flag, a write to
/// a read-only export, a command that was not advertised, the range, the alignment, the length.
#[inline]
pub(crate) fn judge(terms: &Terms, header: &Header) -> Result<Request, Reason> {
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
        Kind::READ => read(terms, at, len, flags.contains(CommandFlags::DF)),
        Kind::WRITE => {
            // With extended headers the client MUST set PAYLOAD_LEN, but QEMU (10.0) never does. So the flag is not required.
            writable(terms)?;
            range(terms, at, len, WireError::NoSpc)?;
            let Some(len) = payload(terms, len) else {
                return Err((WireError::Inval, "write longer than the maximum payload"));
            };
            Ok(Request::Write(Write { at, len, fua }))
        }
        Kind::FLUSH => {
            // Offset and length are reserved, and all servers in use but one ignore them (nbd.md, 2.1). So do we; the reply
            // repeats the offset.
            advertised(terms, TransmissionFlags::SEND_FLUSH)?;
            Ok(Request::Command(Command::Flush { at }))
        }
        Kind::TRIM => {
            writable(terms)?;
            advertised(terms, TransmissionFlags::SEND_TRIM)?;
            range(terms, at, len, WireError::Inval)?;
            Ok(Request::Command(Command::Trim { at, len, fua }))
        }
        Kind::CACHE => {
            advertised(terms, TransmissionFlags::SEND_CACHE)?;
            range(terms, at, len, WireError::Inval)?;
            Ok(Request::Command(Command::Cache { at, len }))
        }
        Kind::WRITE_ZEROES => {
            writable(terms)?;
            advertised(terms, TransmissionFlags::SEND_WRITE_ZEROES)?;
            range(terms, at, len, WireError::NoSpc)?;
            let unmap = !flags.contains(CommandFlags::NO_HOLE);
            let fast = flags.contains(CommandFlags::FAST_ZERO);
            Ok(Request::Command(Command::Zero { at, len, unmap, fast, fua }))
        }
        Kind::BLOCK_STATUS => {
            let one = flags.contains(CommandFlags::REQ_ONE);
            match flags.contains(CommandFlags::PAYLOAD_LEN) {
                true => selection(len, one),
                false => status(terms, at, len, one, terms.contexts).map(Request::Command),
            }
        }
        _ => Err((WireError::Inval, "unknown command")),
    }
}

/// Validates a READ. If the maximum payload is the only reason against it, the error depends on `df`.
#[inline]
fn read(terms: &Terms, at: u64, len: u64, df: bool) -> Result<Request, Reason> {
    range(terms, at, len, WireError::Inval)?;
    let Some(len) = payload(terms, len).filter(|&len| len <= READ_MAX) else {
        let error = if df { WireError::Overflow } else { WireError::Inval };
        return Err((error, "read longer than the maximum payload"));
    };
    Ok(Request::Command(Command::Read { at, len, df }))
}

/// Validates the length of a payload that names contexts: 8 bytes, and 4 for each context.
fn selection(len: u64, one: bool) -> Result<Request, Reason> {
    let ids = len.wrapping_sub(8);
    match ids.is_multiple_of(4) && ids <= 4 * CONTEXTS_MAX as u64 {
        true => Ok(Request::Selection { one }),
        false => Err((WireError::Inval, "block status payload of a wrong length")),
    }
}

/// Validates a status request once its contexts are known.
pub(crate) fn status(terms: &Terms, at: u64, len: u64, one: bool, contexts: ContextSet) -> Result<Command, Reason> {
    if contexts.is_empty() {
        return Err((WireError::Inval, "block status without a negotiated context"));
    }
    range(terms, at, len, WireError::Inval)?;
    // Extents may not be empty, so there is no valid reply.
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
fn writable(terms: &Terms) -> Result<(), Reason> {
    match terms.flags.contains(TransmissionFlags::READ_ONLY) {
        false => Ok(()),
        true => Err((WireError::Perm, "the export is read-only")),
    }
}

#[inline]
fn advertised(terms: &Terms, flag: TransmissionFlags) -> Result<(), Reason> {
    match terms.flags.contains(flag) {
        true => Ok(()),
        false => Err((WireError::Inval, "command was not advertised")),
    }
}

#[inline]
fn range(terms: &Terms, at: u64, len: u64, past_end: WireError) -> Result<(), Reason> {
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
