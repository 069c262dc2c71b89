//! Input and results of the handshake: exports, block sizes, contexts, and the terms of the transmission phase.

use std::fmt;

use crate::limits::{CONTEXTS_MAX, OPTIONS_MAX, PAYLOAD_MAX};
use crate::wire::{Mode, Opt, Rep, TransmissionFlags};

/// Block size constraints (proto.md, "Block size constraints"), in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BlockSizes {
    /// Offsets and lengths must be multiples of it. A power of two, at most 64 KiB.
    pub min: u32,
    /// Requests of this size and alignment are fast. A power of two, at least 512 and at least `min`.
    pub preferred: u32,
    /// Longest READ and WRITE, at least `preferred` and a multiple of `min`; `u32::MAX`: no limit.
    pub payload_max: u32,
}

impl Default for BlockSizes {
    /// The default of the protocol, for clients that got no block sizes: 1, 4096, 32 MiB.
    fn default() -> Self {
        Self { min: 1, preferred: 4096, payload_max: PAYLOAD_MAX }
    }
}

impl BlockSizes {
    /// Returns the nearest sizes that the protocol allows. `min` and `preferred` are rounded up to powers of two within their
    /// limits; `payload_max` is raised to `preferred` and rounded down to a multiple of `min`.
    pub fn nearest(min: u32, preferred: u32, payload_max: u32) -> Self {
        let min = min.clamp(1, 1 << 16).next_power_of_two();
        let preferred = preferred.clamp(min.max(512), 1 << 31).next_power_of_two();
        let payload_max = match payload_max.max(preferred) {
            u32::MAX => u32::MAX,
            other => other & !(min - 1),
        };
        Self { min, preferred, payload_max }
    }
}

/// An export, as the server describes it to the handshake.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Export {
    /// The canonical name, for clients that request it. At most [`NAME_MAX`](crate::limits::NAME_MAX) bytes.
    pub name: String,
    /// A description for people; empty: none. At most [`NAME_MAX`](crate::limits::NAME_MAX) bytes.
    pub description: String,
    /// Size in bytes, at most [`SIZE_MAX`](crate::limits::SIZE_MAX).
    pub size: u64,
    /// All capabilities of the export. The handshake removes flags that the negotiated mode does not allow ([`Negotiated::terms`]
    /// has the rest): DF without structured replies, FAST_ZERO without WRITE_ZEROES, status payloads without extended headers and
    /// a context, RESIZE always. It adds HAS_FLAGS.
    pub flags: TransmissionFlags,
    /// Sent to clients that request them; `payload_max` is enforced in any case.
    pub block: BlockSizes,
    /// Metadata contexts, such as `base:allocation`. The position in this list is the context's id on the wire. Only the first
    /// [`CONTEXTS_MAX`] are offered.
    pub contexts: Vec<String>,
    /// As [`Offer::block_size_required`], for this export only.
    pub block_size_required: bool,
}

/// The exports of a server, for the handshake. The handshake calls it for every option, so the exports may change in between; and
/// the owner may pass another catalog after TLS was started.
pub trait Catalog {
    /// Calls `each` with the name and the description (may be empty) of every export that may be listed.
    fn list(&self, each: &mut dyn FnMut(&str, &str)) -> Result<(), Refusal>;

    /// Returns the export with this name; the empty name is the default export. Must have no expensive side effect: INFO and the
    /// context options call it too, for clients that may never start transmission.
    fn find(&self, name: &str) -> Result<Export, Refusal>;
}

/// The error reply to an option.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// One of `Rep::ERR_*`. `ERR_TLS_REQD` is for exports that require TLS, under [`Tls::Optional`]; where the protocol does not
    /// allow it, the client gets `ERR_POLICY`.
    pub code: Rep,
    /// A text for people; cut at [`NAME_MAX`](crate::limits::NAME_MAX) bytes.
    pub text: String,
}

impl Refusal {
    /// Returns a refusal with a text.
    pub fn new(code: Rep, text: impl Into<String>) -> Self {
        Self { code, text: text.into() }
    }

    /// No export has this name: `ERR_UNKNOWN`.
    pub fn unknown(name: &str) -> Self {
        Self::new(Rep::ERR_UNKNOWN, format!("no export named {name:?}"))
    }
}

/// Whether TLS is offered (proto.md, "TLS versions": NOTLS, SELECTIVETLS, FORCEDTLS).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Tls {
    /// NOTLS: not offered.
    #[default]
    Off,
    /// SELECTIVETLS: the client may start TLS; some exports may require it.
    Optional,
    /// FORCEDTLS: all other options get an error before TLS is started.
    Required,
}

/// The features that a server offers in its handshake.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Offer {
    /// Structured replies.
    pub structured: bool,
    /// Extended headers.
    pub extended: bool,
    /// TLS.
    pub tls: Tls,
    /// Refuse clients that do not request the block sizes of an export whose minimum is more than a byte. A server that can serve
    /// unaligned requests SHOULD NOT do so by default.
    pub block_size_required: bool,
    /// Refuse unaligned requests with EINVAL instead of returning them.
    pub enforce_alignment: bool,
    /// Most options that a client may send before GO. A client that asks about every export sends some for each, so scale this
    /// with the number of exports. The limits for bytes of options and of lists grow with it.
    pub options_max: u32,
}

impl Default for Offer {
    /// All features except TLS; nothing is required.
    fn default() -> Self {
        Self {
            structured: true,
            extended: true,
            tls: Tls::Off,
            block_size_required: false,
            enforce_alignment: false,
            options_max: OPTIONS_MAX,
        }
    }
}

/// A set of metadata contexts, by their ids, which are below [`CONTEXTS_MAX`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct ContextSet(u64);

impl ContextSet {
    /// The empty set.
    pub const EMPTY: Self = Self(0);

    /// Adds a context. `false`: it is already in the set, or the id is too large.
    #[inline]
    pub const fn insert(&mut self, id: u32) -> bool {
        if id as usize >= CONTEXTS_MAX || self.contains(id) {
            return false;
        }
        self.0 |= 1 << id;
        true
    }

    /// Whether the set contains the context.
    #[inline]
    pub const fn contains(self, id: u32) -> bool {
        (id as usize) < CONTEXTS_MAX && self.0 & (1 << id) != 0
    }

    /// Whether the set is empty.
    #[inline]
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Number of contexts.
    #[inline]
    pub const fn len(self) -> u32 {
        self.0.count_ones()
    }

    /// The ids in ascending order.
    #[inline]
    pub fn iter(self) -> impl Iterator<Item = u32> {
        let mut left = self.0;
        std::iter::from_fn(move || {
            let id = (left != 0).then(|| left.trailing_zeros())?;
            left &= left - 1;
            Some(id)
        })
    }
}

impl FromIterator<u32> for ContextSet {
    fn from_iter<I: IntoIterator<Item = u32>>(ids: I) -> Self {
        let mut set = Self::EMPTY;
        for id in ids {
            set.insert(id);
        }
        set
    }
}

/// The terms of one connection's transmission phase, for [`Receiver`](crate::Receiver) and [`Replier`](crate::Replier).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Terms {
    /// The form of requests and replies.
    pub mode: Mode,
    /// The transmission flags that the client got.
    pub flags: TransmissionFlags,
    /// Size of the export in bytes.
    pub size: u64,
    /// Block sizes of the export. `payload_max` limits every READ and WRITE.
    pub block: BlockSizes,
    /// Refuse requests that are not multiples of `block.min`.
    pub enforce_alignment: bool,
    /// The contexts of BLOCK_STATUS replies.
    pub contexts: ContextSet,
}

impl Terms {
    /// Removes flags and contexts that the mode does not allow: the result is sent to the client.
    #[must_use]
    pub fn told(self) -> Self {
        use TransmissionFlags as Flag;
        let mut flags = self.flags.with(Flag::HAS_FLAGS).without(Flag::SEND_RESIZE);
        let mut contexts = self.contexts;
        if self.mode == Mode::Simple {
            flags = flags.without(Flag::SEND_DF);
            contexts = ContextSet::EMPTY;
        }
        if !flags.contains(Flag::SEND_WRITE_ZEROES) {
            flags = flags.without(Flag::SEND_FAST_ZERO);
        }
        if self.mode != Mode::Extended || contexts.is_empty() {
            flags = flags.without(Flag::BLOCK_STATUS_PAYLOAD);
        }
        let block = BlockSizes { min: self.block.min.max(1), ..self.block };
        Self { flags, contexts, block, ..self }
    }
}

/// The results of a finished handshake.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Negotiated {
    /// The export, as the catalog returned it.
    pub export: Export,
    /// The name that the client sent; empty for the default export.
    pub name: String,
    /// The selected contexts with their ids and names, as the client got them. The export may have changed since they were
    /// selected: for a context that the owner does not know any more, the status 0 is always safe.
    pub contexts: Vec<(u32, String)>,
    /// Whether the client requested the block sizes, and so must obey them.
    pub block_size_asked: bool,
    /// Whether TLS was started.
    pub secure: bool,
    /// The terms of the transmission phase.
    pub terms: Terms,
}

/// Why a connection must be dropped at once: the peer violated a MUST, desynchronised the stream, or exceeded a limit that no
/// honest client reaches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Fatal {
    /// The client set a flag that was not offered.
    ClientFlags(u32),
    /// An option without the option magic.
    OptionMagic(u64),
    /// An option longer than [`OPTION_SKIP_MAX`](crate::limits::OPTION_SKIP_MAX).
    OptionLength(Opt, u32),
    /// More options than [`Offer::options_max`], or more bytes of options than
    /// [`option_bytes_max`](crate::limits::option_bytes_max).
    Options(u32),
    /// An option that a client without FIXED_NEWSTYLE must not send, because it does not understand the reply.
    NotFixed(Opt),
    /// An EXPORT_NAME that fails, with the error that GO would have got.
    ExportName(Rep),
    /// Called again after the end of the handshake.
    Over,
    /// A request without the request magic.
    RequestMagic(u32),
    /// A payload longer than [`SWALLOW_MAX`](crate::limits::SWALLOW_MAX) and than `payload_max`.
    PayloadLength(u64),
    /// A greeting, option reply or reply of a server that violates the protocol. From the client side only.
    Server(&'static str, u64),
}

impl fmt::Display for Fatal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::ClientFlags(flags) => write!(f, "client flags {flags:#x} were not offered"),
            Self::OptionMagic(magic) => write!(f, "option with magic {magic:#018x}"),
            Self::OptionLength(opt, len) => write!(f, "option {opt} of {len} bytes"),
            Self::Options(count) => write!(f, "no export chosen after {count} options"),
            Self::NotFixed(opt) => write!(f, "option {opt} from a client without fixed newstyle"),
            Self::ExportName(code) => write!(f, "export name refused with {code}"),
            Self::Over => f.write_str("the handshake is over"),
            Self::RequestMagic(magic) => write!(f, "request with magic {magic:#010x}"),
            Self::PayloadLength(len) => write!(f, "request with a payload of {len} bytes"),
            Self::Server(what, value) => write!(f, "server sent {what} ({value:#x})"),
        }
    }
}

impl std::error::Error for Fatal {}
