//! [`Request`]: what can be asked of an export, and [`Completion`]: what came of it.

use std::{fmt, sync::Arc};

use nbd_proto::{
    Cookie, Extent, Mode,
    wire::{CommandFlags as Flag, CommandKind},
};

use crate::{error::Error, export::Export};

/// A request. `at` and `len` are in bytes; both must be multiples of the export's smallest block.
#[derive(Clone, PartialEq, Eq)]
pub enum Request {
    /// Reads as many bytes as the buffer has.
    Read {
        /// Where in the export.
        at: u64,
        /// The memory to read into. If the request fails, its content is undefined.
        buffer: Vec<u8>,
        /// The server must not answer in several pieces, which it may do at different times.
        df: bool,
    },
    /// Writes.
    Write {
        /// Where in the export.
        at: u64,
        /// What to write.
        data: Vec<u8>,
        /// Durable when it completes.
        fua: bool,
    },
    /// Makes a range read as zeroes.
    Zero {
        /// Where in the export.
        at: u64,
        /// How much.
        len: u64,
        /// Keep the range allocated.
        no_hole: bool,
        /// Fail with [`NotSup`](crate::WireError::NotSup) at once if this is not faster than writing.
        fast: bool,
        /// Durable when it completes.
        fua: bool,
    },
    /// Reports that a range is not needed any more. What it reads as then is undefined.
    Trim {
        /// Where in the export.
        at: u64,
        /// How much.
        len: u64,
        /// Durable when it completes.
        fua: bool,
    },
    /// Makes all writes durable that have completed.
    Flush,
    /// Asks the server to cache a range, since it will be read soon.
    Cache {
        /// Where in the export.
        at: u64,
        /// How much.
        len: u64,
    },
    /// Asks for the status of a range in every selected context.
    Status {
        /// Where in the export.
        at: u64,
        /// How much.
        len: u64,
        /// The first extent of each context is enough.
        one: bool,
    },
}

/// The status of a range in one context.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// The context's name.
    pub context: Arc<str>,
    /// Its extents, at least one, from the start of the request on. They may cover less than the request, and the last one
    /// more.
    pub extents: Vec<Extent>,
}

/// A request that is over.
#[derive(Debug)]
pub struct Completion {
    /// What [`Engine::submit`](crate::Engine::submit) returned.
    pub cookie: Cookie,
    /// The request with its memory; that of a successful READ has the data.
    pub request: Request,
    /// Of a successful [`Request::Status`]: one for each selected context. Empty otherwise.
    pub status: Vec<Status>,
    /// Whether it succeeded. [`Error::Closed`]: the connection ended, and the request may have been executed or not.
    pub result: Result<(), Error>,
}

/// A request that was not sent, with its memory.
#[derive(Debug)]
pub struct Rejection {
    /// Why.
    pub error: Error,
    /// The request.
    pub request: Request,
}

impl fmt::Display for Rejection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.error.fmt(f)
    }
}

impl std::error::Error for Rejection {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.error.source()
    }
}

impl From<Rejection> for Error {
    fn from(rejection: Rejection) -> Self {
        rejection.error
    }
}

impl Request {
    /// A READ of `len` bytes.
    pub fn read(at: u64, len: usize) -> Self {
        Self::Read { at, buffer: vec![0; len], df: false }
    }

    /// A WRITE.
    pub fn write(at: u64, data: Vec<u8>) -> Self {
        Self::Write { at, data, fua: false }
    }

    /// Offset and length; those of FLUSH are 0.
    pub(crate) fn range(&self) -> (u64, u64) {
        match self {
            Self::Read { at, buffer, .. } => (*at, buffer.len() as u64),
            Self::Write { at, data, .. } => (*at, data.len() as u64),
            Self::Zero { at, len, .. } | Self::Trim { at, len, .. } => (*at, *len),
            Self::Cache { at, len } | Self::Status { at, len, .. } => (*at, *len),
            Self::Flush => (0, 0),
        }
    }

    /// The command and its flags, as they go over the wire in `mode`.
    pub(crate) fn command(&self, mode: Mode) -> (CommandKind, Flag) {
        match self {
            Self::Read { df, .. } => (CommandKind::READ, Flag::NONE.with_if(*df, Flag::DF)),
            Self::Write { fua, .. } => {
                let flags = Flag::NONE.with_if(mode == Mode::Extended, Flag::PAYLOAD_LEN);
                (CommandKind::WRITE, flags.with_if(*fua, Flag::FUA))
            }
            Self::Zero { no_hole, fast, fua, .. } => {
                let flags = Flag::NONE.with_if(*no_hole, Flag::NO_HOLE).with_if(*fast, Flag::FAST_ZERO);
                (CommandKind::WRITE_ZEROES, flags.with_if(*fua, Flag::FUA))
            }
            Self::Trim { fua, .. } => (CommandKind::TRIM, Flag::NONE.with_if(*fua, Flag::FUA)),
            Self::Flush => (CommandKind::FLUSH, Flag::NONE),
            Self::Cache { .. } => (CommandKind::CACHE, Flag::NONE),
            Self::Status { one, .. } => (CommandKind::BLOCK_STATUS, Flag::NONE.with_if(*one, Flag::REQ_ONE)),
        }
    }

    /// Whether this may be sent to the export.
    ///
    /// # Errors
    /// [`Error::Invalid`] names the limit.
    pub(crate) fn check(&self, export: &Export) -> Result<(), Error> {
        let refuse = |why: String| Err(Error::Invalid(format!("{self}: {why}")));
        if let Some(missing) = self.missing(export) {
            return refuse(missing.into());
        }
        if matches!(self, Self::Flush) {
            return Ok(());
        }
        let ((at, len), size, block) = (self.range(), export.size(), export.block_sizes());
        if len == 0 {
            return refuse("the length is 0, which has no meaning in the protocol".into());
        }
        if at.checked_add(len).is_none_or(|end| end > size) {
            return refuse(format!("the export ends at {size}"));
        }
        let min = u64::from(block.min);
        if !at.is_multiple_of(min) || !len.is_multiple_of(min) {
            return refuse(format!("the server takes multiples of {min} bytes only"));
        }
        let has_payload = matches!(self, Self::Read { .. } | Self::Write { .. });
        if has_payload && len > u64::from(block.payload_max) {
            return refuse(format!("the server takes at most {} bytes in a READ or WRITE", block.payload_max));
        }
        if export.mode() != Mode::Extended && len > u64::from(u32::MAX) {
            return refuse("the server has no extended headers, so lengths end below 4 GiB".into());
        }
        Ok(())
    }

    /// What the export does not have of what this needs.
    fn missing(&self, export: &Export) -> Option<&'static str> {
        let fua = match self {
            Self::Write { fua, .. } | Self::Zero { fua, .. } | Self::Trim { fua, .. } => *fua,
            _ => false,
        };
        let changes = matches!(self, Self::Write { .. } | Self::Zero { .. } | Self::Trim { .. });
        if changes && !export.can_write() {
            return Some("the export is read-only");
        }
        if fua && !export.can_fua() {
            return Some("the export does not have FUA");
        }
        match self {
            Self::Read { df: true, .. } if !export.can_df() => Some("the export does not have the flag DF"),
            Self::Zero { .. } if !export.can_zero() => Some("the export does not have WRITE_ZEROES"),
            Self::Zero { fast: true, .. } if !export.can_fast_zero() => {
                Some("the export does not have the flag FAST_ZERO")
            }
            Self::Trim { .. } if !export.can_trim() => Some("the export does not have TRIM"),
            Self::Flush if !export.can_flush() => Some("the export does not have FLUSH"),
            Self::Cache { .. } if !export.can_cache() => Some("the export does not have CACHE"),
            Self::Status { .. } if export.contexts().is_empty() => Some("no metadata context was selected"),
            _ => None,
        }
    }
}

impl fmt::Debug for Request {
    /// Without the data.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (kind, flags) = self.command(Mode::Simple);
        let (at, len) = self.range();
        f.debug_struct("Request")
            .field("kind", &kind)
            .field("flags", &flags)
            .field("at", &at)
            .field("len", &len)
            .finish()
    }
}

impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (kind, _) = self.command(Mode::Simple);
        match self.range() {
            _ if matches!(self, Self::Flush) => write!(f, "{kind}"),
            (at, len) => write!(f, "{kind} of {len} bytes at {at}"),
        }
    }
}
