//! Constants of the protocol: magics, codes and flags, with the numbers and names of proto.md.

use std::fmt;

/// First eight bytes of a server's greeting: `NBDMAGIC`.
pub const INIT_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// `IHAVEOPT`: the second eight bytes of a newstyle greeting, and the prefix of every option.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// The second eight bytes of an oldstyle greeting. The server never sends it; the client recognises it for its error message.
pub const OLDSTYLE_MAGIC: u64 = 0x0000_4202_8186_1253;
/// Prefix of every option reply.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Compact request, 28 bytes.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Extended request, 32 bytes.
pub const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
/// Simple reply, 16 bytes.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// Structured reply chunk, 20 bytes and its payload.
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
/// Extended reply chunk, 32 bytes and its payload.
pub const EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;

/// Length of a compact request.
pub const REQUEST_LEN: usize = 28;
/// Length of an extended request.
pub const EXTENDED_REQUEST_LEN: usize = 32;
/// Length of a simple reply.
pub const SIMPLE_REPLY_LEN: usize = 16;
/// Length of the header of a structured reply chunk.
pub const STRUCTURED_REPLY_LEN: usize = 20;
/// Length of the header of an extended reply chunk.
pub const EXTENDED_REPLY_LEN: usize = 32;
/// Zero bytes after the answer to EXPORT_NAME, unless both sides agreed on NO_ZEROES.
pub const EXPORT_NAME_ZEROES: usize = 124;

/// Defines an open set of codes: any number is valid, known ones have names.
macro_rules! codes {
    ($(#[$doc:meta])* $name:ident: $int:ty { $($(#[$item_doc:meta])* $item:ident = $value:expr,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub $int);

        impl $name {
            $($(#[$item_doc])* pub const $item: Self = Self($value);)*
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                match *self {
                    $(Self::$item => f.write_str(stringify!($item)),)*
                    Self(other) => write!(f, "{}({other:#x})", stringify!($name)),
                }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(self, f)
            }
        }
    };
}

/// Defines a set of bits: unknown bits are kept, known ones have names.
macro_rules! flags {
    ($(#[$doc:meta])* $name:ident: $int:ty { $($(#[$item_doc:meta])* $item:ident = $bit:expr,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
        pub struct $name(pub $int);

        impl $name {
            /// No flag.
            pub const NONE: Self = Self(0);
            $($(#[$item_doc])* pub const $item: Self = Self(1 << $bit);)*
            /// Every flag that has a name.
            pub const KNOWN: Self = Self(0 $(| Self::$item.0)*);

            /// Whether all flags of `other` are set.
            #[inline]
            pub const fn contains(self, other: Self) -> bool {
                self.0 & other.0 == other.0
            }
            /// Adds the flags of `other`.
            #[inline]
            #[must_use]
            pub const fn with(self, other: Self) -> Self {
                Self(self.0 | other.0)
            }
            /// Removes the flags of `other`.
            #[inline]
            #[must_use]
            pub const fn without(self, other: Self) -> Self {
                Self(self.0 & !other.0)
            }
            /// Adds the flags of `other` if `on`.
            #[inline]
            #[must_use]
            pub const fn with_if(self, on: bool, other: Self) -> Self {
                if on { self.with(other) } else { self }
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(stringify!($name))?;
                f.write_str("(")?;
                let mut bar = "";
                $(if self.contains(Self::$item) {
                    write!(f, "{bar}{}", stringify!($item))?;
                    bar = "|";
                })*
                let rest = self.without(Self::KNOWN).0;
                if rest != 0 {
                    write!(f, "{bar}{rest:#x}")?;
                }
                f.write_str(")")
            }
        }
    };
}

codes! {
    /// An option: a client's request during the handshake.
    Opt: u32 {
        /// Starts transmission. An error can only end the connection.
        EXPORT_NAME = 1,
        /// Ends the connection in an orderly way.
        ABORT = 2,
        /// Lists the exports.
        LIST = 3,
        /// Removed from the protocol.
        PEEK_EXPORT = 4,
        /// Starts TLS.
        STARTTLS = 5,
        /// Requests information about an export.
        INFO = 6,
        /// Requests information about an export and starts transmission.
        GO = 7,
        /// Requests structured replies.
        STRUCTURED_REPLY = 8,
        /// Lists metadata contexts.
        LIST_META_CONTEXT = 9,
        /// Selects metadata contexts.
        SET_META_CONTEXT = 10,
        /// Requests extended headers.
        EXTENDED_HEADERS = 11,
    }
}

codes! {
    /// Type of an option reply.
    Rep: u32 {
        /// The option succeeded, or its list is complete.
        ACK = 1,
        /// One export of a list.
        SERVER = 2,
        /// One piece of information about an export.
        INFO = 3,
        /// One metadata context.
        META_CONTEXT = 4,
        /// The option is unknown, or not offered.
        ERR_UNSUP = ERROR + 1,
        /// The server's policy forbids it.
        ERR_POLICY = ERROR + 2,
        /// The option is malformed, or not valid now.
        ERR_INVALID = ERROR + 3,
        /// The server's platform cannot do it.
        ERR_PLATFORM = ERROR + 4,
        /// TLS must be started first.
        ERR_TLS_REQD = ERROR + 5,
        /// There is no such export.
        ERR_UNKNOWN = ERROR + 6,
        /// The server is shutting down.
        ERR_SHUTDOWN = ERROR + 7,
        /// The client must request the block sizes.
        ERR_BLOCK_SIZE_REQD = ERROR + 8,
        /// The request or its reply is too large.
        ERR_TOO_BIG = ERROR + 9,
        /// Extended headers are needed.
        ERR_EXT_HEADER_REQD = ERROR + 10,
    }
}

/// Bit that marks an option reply as an error.
const ERROR: u32 = 1 << 31;

impl Rep {
    /// Whether this reply reports an error.
    pub const fn is_error(self) -> bool {
        self.0 & ERROR != 0
    }
}

codes! {
    /// Kind of information in the replies to INFO and GO.
    InfoKind: u16 {
        /// Size and transmission flags.
        EXPORT = 0,
        /// The canonical name.
        NAME = 1,
        /// A description for people.
        DESCRIPTION = 2,
        /// Minimum, preferred and maximum block sizes.
        BLOCK_SIZE = 3,
    }
}

codes! {
    /// Kind of a request in the transmission phase.
    CommandKind: u16 {
        /// Reads a range.
        READ = 0,
        /// Writes a range.
        WRITE = 1,
        /// Ends the connection after all requests. Has no reply.
        DISC = 2,
        /// Makes every completed write durable.
        FLUSH = 3,
        /// Hints that a range is not needed any more.
        TRIM = 4,
        /// Requests that a range is read into a cache.
        CACHE = 5,
        /// Makes a range read as zeroes.
        WRITE_ZEROES = 6,
        /// Requests the status of a range, in every selected context.
        BLOCK_STATUS = 7,
        /// Changes the size: an unfinished experiment of the protocol, always refused here.
        RESIZE = 8,
    }
}

codes! {
    /// Type of a structured or extended reply chunk.
    ChunkKind: u16 {
        /// No content: ends a reply.
        NONE = 0,
        /// Data at an offset.
        OFFSET_DATA = 1,
        /// A range of zeroes at an offset.
        OFFSET_HOLE = 2,
        /// Status of a range, 32-bit.
        BLOCK_STATUS = 5,
        /// Status of a range, 64-bit; with extended headers only.
        BLOCK_STATUS_EXT = 6,
        /// An error and its text.
        ERROR = ERROR_CHUNK + 1,
        /// An error, its text and its offset.
        ERROR_OFFSET = ERROR_CHUNK + 2,
    }
}

/// Bit that marks a chunk as an error.
const ERROR_CHUNK: u16 = 1 << 15;

impl ChunkKind {
    /// Whether this chunk is an error, of a known type or not.
    pub const fn is_error(self) -> bool {
        self.0 & ERROR_CHUNK != 0
    }
}

flags! {
    /// Handshake flags of the server.
    HandshakeFlags: u16 {
        /// Options get replies.
        FIXED_NEWSTYLE = 0,
        /// The 124 zeroes may be omitted.
        NO_ZEROES = 1,
    }
}

flags! {
    /// The client's flags in its reply to the greeting.
    ClientFlags: u32 {
        /// The client understands option replies.
        FIXED_NEWSTYLE = 0,
        /// The 124 zeroes must be omitted.
        NO_ZEROES = 1,
    }
}

flags! {
    /// Transmission flags: the capabilities of an export.
    TransmissionFlags: u16 {
        /// Always set.
        HAS_FLAGS = 0,
        /// Writes are refused.
        READ_ONLY = 1,
        /// FLUSH may be sent.
        SEND_FLUSH = 2,
        /// The FUA flag may be sent, with any command.
        SEND_FUA = 3,
        /// Seeks are slow: the client may want to sort its requests.
        ROTATIONAL = 4,
        /// TRIM may be sent.
        SEND_TRIM = 5,
        /// WRITE_ZEROES may be sent.
        SEND_WRITE_ZEROES = 6,
        /// The DF flag may be sent. Only with structured or extended replies.
        SEND_DF = 7,
        /// FLUSH and FUA on one connection cover all connections.
        CAN_MULTI_CONN = 8,
        /// RESIZE may be sent. Never set here.
        SEND_RESIZE = 9,
        /// CACHE may be sent.
        SEND_CACHE = 10,
        /// The FAST_ZERO flag may be sent. Only with SEND_WRITE_ZEROES.
        SEND_FAST_ZERO = 11,
        /// BLOCK_STATUS may have a payload that names contexts. Only with extended headers and a selected context.
        BLOCK_STATUS_PAYLOAD = 12,
    }
}

flags! {
    /// Flags of a request.
    CommandFlags: u16 {
        /// NBD_CMD_FLAG_FUA: durable before the reply.
        FUA = 0,
        /// WRITE_ZEROES must not make a hole.
        NO_HOLE = 1,
        /// The reply to READ must be one chunk.
        DF = 2,
        /// The reply to BLOCK_STATUS has one extent.
        REQ_ONE = 3,
        /// WRITE_ZEROES must fail if it is not faster than writing.
        FAST_ZERO = 4,
        /// The length is that of a payload. Only with extended headers.
        PAYLOAD_LEN = 5,
    }
}

flags! {
    /// Flags of a reply chunk.
    ChunkFlags: u16 {
        /// The last chunk of its reply.
        DONE = 0,
    }
}

flags! {
    /// Status of an extent in the context `base:allocation`. 0, allocated data, is always a safe reply.
    AllocationFlags: u64 {
        /// Nothing is allocated: a write may run out of space.
        HOLE = 0,
        /// Reads as zeroes.
        ZERO = 1,
    }
}

/// The context that most clients use: allocated, unallocated and zero ranges.
pub const BASE_ALLOCATION: &str = "base:allocation";

/// Identifies the request that a reply belongs to: chosen by the client, opaque to the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Cookie(pub u64);

/// The form of replies, and for extended headers also of requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum Mode {
    /// Compact requests, simple replies.
    #[default]
    Simple,
    /// Compact requests; READ and BLOCK_STATUS get chunks.
    Structured,
    /// Extended requests with 64-bit lengths; all replies are extended chunks.
    Extended,
}

/// An error of the transmission phase: the eight numbers that are valid on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum WireError {
    /// EPERM: the export is read-only.
    Perm = 1,
    /// EIO: the device failed.
    Io = 5,
    /// ENOMEM. Do not send it; use back-pressure.
    NoMem = 12,
    /// EINVAL: a malformed request.
    Inval = 22,
    /// ENOSPC: past the end of the export, or no space left.
    NoSpc = 28,
    /// EOVERFLOW: too long for a single chunk.
    Overflow = 75,
    /// ENOTSUP: not supported, or not fast.
    NotSup = 95,
    /// ESHUTDOWN: the server is shutting down.
    Shutdown = 108,
}

impl WireError {
    /// The number on the wire.
    #[inline]
    pub const fn code(self) -> u32 {
        self as u32
    }

    /// Converts a number from the wire: 0 is no error, and an unknown one counts as EINVAL (proto.md, "Error values").
    #[inline]
    pub const fn from_code(code: u32) -> Option<Self> {
        Some(match code {
            0 => return None,
            1 => Self::Perm,
            5 => Self::Io,
            12 => Self::NoMem,
            28 => Self::NoSpc,
            75 => Self::Overflow,
            95 => Self::NotSup,
            108 => Self::Shutdown,
            _ => Self::Inval,
        })
    }
}

impl fmt::Display for WireError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Perm => "operation not permitted",
            Self::Io => "input/output error",
            Self::NoMem => "cannot allocate memory",
            Self::Inval => "invalid argument",
            Self::NoSpc => "no space left on device",
            Self::Overflow => "value too large",
            Self::NotSup => "operation not supported",
            Self::Shutdown => "server is shutting down",
        })
    }
}

impl std::error::Error for WireError {}
