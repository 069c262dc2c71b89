//! What the handshake is about and what comes out of it: exports, block sizes, contexts, and the terms of transmission.

use std::fmt;

use crate::limits::{CONTEXTS_MAX, OPTIONS_MAX, PAYLOAD_MAX};
use crate::wire::{Mode, Opt, Rep, TransmissionFlags};

/// Sizes that requests should keep to (proto.md, "Block size constraints"), in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BlockSizes {
    /// Offsets and lengths are multiples of it. A power of two, at most 64 KiB.
    pub min: u32,
    /// Requests of this size and alignment are fast. A power of two, at least 512 and at least `min`.
    pub preferred: u32,
    /// Longest READ and WRITE, at least `preferred` and a multiple of `min`; `u32::MAX` is no limit.
    pub payload_max: u32,
}

impl Default for BlockSizes {
    /// What a client assumes that was told nothing: 1, 4096, 32 MiB.
    fn default() -> Self {
        Self { min: 1, preferred: 4096, payload_max: PAYLOAD_MAX }
    }
}

impl BlockSizes {
    /// The nearest sizes that the protocol allows: `min` and `preferred` rounded up to powers of two and into their
    /// bounds, `payload_max` raised to `preferred` and rounded down to `min`.
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

/// An export as the server's owner describes it to the handshake.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Export {
    /// The canonical name, told to clients that ask for it. At most [`NAME_MAX`](crate::limits::NAME_MAX) bytes.
    pub name: String,
    /// A description for people; empty is none. At most [`NAME_MAX`](crate::limits::NAME_MAX) bytes.
    pub description: String,
    /// Bytes, at most [`SIZE_MAX`](crate::limits::SIZE_MAX).
    pub size: u64,
    /// All that the export can do. The handshake takes away what the negotiated mode does not allow
    /// ([`Negotiated::terms`] has the rest): DF without structured replies, FAST_ZERO without WRITE_ZEROES, status
    /// payloads without extended headers and a context, RESIZE always; and adds HAS_FLAGS.
    pub flags: TransmissionFlags,
    /// Told to clients that ask for them; `payload_max` is enforced in any case.
    pub block: BlockSizes,
    /// Metadata contexts, such as `base:allocation`; the place in this list is the context's id on the wire. Only the
    /// first [`CONTEXTS_MAX`] are offered.
    pub contexts: Vec<String>,
    /// As [`Offer::block_size_required`], for this export.
    pub block_size_required: bool,
}

/// What the handshake asks the server's owner. It is asked anew for every option, so it may change in between; and the
/// owner may pass another one once TLS has been started.
pub trait Catalog {
    /// Calls `each` with the name and the description (or an empty one) of every export that may be listed.
    fn list(&self, each: &mut dyn FnMut(&str, &str)) -> Result<(), Refusal>;

    /// The export of that name; the empty name is the default export. Must have no side effect that costs: it is called
    /// for INFO and for the context options too, by clients that may never get any further.
    fn find(&self, name: &str) -> Result<Export, Refusal>;
}

/// The answer to an option that cannot be granted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// One of `Rep::ERR_*`. `ERR_TLS_REQD` is for exports that are only served over TLS, under [`Tls::Optional`]; where
    /// the protocol does not allow it the client is told `ERR_POLICY`.
    pub code: Rep,
    /// Text for people; cut at [`NAME_MAX`](crate::limits::NAME_MAX) bytes.
    pub text: String,
}

impl Refusal {
    /// A refusal with its text.
    pub fn new(code: Rep, text: impl Into<String>) -> Self {
        Self { code, text: text.into() }
    }

    /// There is no export of that name.
    pub fn unknown(name: &str) -> Self {
        Self::new(Rep::ERR_UNKNOWN, format!("no export named {name:?}"))
    }
}

/// Whether TLS is offered (proto.md, "TLS versions": NOTLS, SELECTIVETLS, FORCEDTLS).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Tls {
    /// Not at all.
    #[default]
    Off,
    /// The client may; some exports may want it.
    Optional,
    /// Nothing is answered before it.
    Required,
}

/// What a server offers in its handshake.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Offer {
    /// Structured replies.
    pub structured: bool,
    /// Extended headers.
    pub extended: bool,
    /// TLS.
    pub tls: Tls,
    /// Refuse clients that do not ask for the block sizes of an export whose smallest is more than a byte. A server that
    /// can serve unaligned requests SHOULD NOT, unless it is told to.
    pub block_size_required: bool,
    /// Refuse unaligned requests with EINVAL instead of handing them out.
    pub enforce_alignment: bool,
    /// Options a client may send before GO. A client that asks about every export sends some for each, so this should grow
    /// with their number. Bytes of options and of lists have limits that grow with it.
    pub options_max: u32,
}

impl Default for Offer {
    /// Everything but TLS, nothing required.
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

/// A set of metadata contexts by their ids, each below [`CONTEXTS_MAX`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct ContextSet(u64);

impl ContextSet {
    /// No context.
    pub const EMPTY: Self = Self(0);

    /// Adds a context: false when it was there, or when there can be none of that id.
    #[inline]
    pub const fn insert(&mut self, id: u32) -> bool {
        if id as usize >= CONTEXTS_MAX || self.contains(id) {
            return false;
        }
        self.0 |= 1 << id;
        true
    }

    /// Whether the context is there.
    #[inline]
    pub const fn contains(self, id: u32) -> bool {
        (id as usize) < CONTEXTS_MAX && self.0 & (1 << id) != 0
    }

    /// Whether there is none.
    #[inline]
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// How many there are.
    #[inline]
    pub const fn len(self) -> u32 {
        self.0.count_ones()
    }

    /// The ids, rising.
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

/// The terms of one connection's transmission phase: all that [`Receiver`](crate::Receiver) and
/// [`Replier`](crate::Replier) need.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Terms {
    /// How requests and replies look.
    pub mode: Mode,
    /// The flags, as the client was told them.
    pub flags: TransmissionFlags,
    /// Bytes of the export.
    pub size: u64,
    /// Block sizes of the export. `payload_max` bounds every READ and WRITE.
    pub block: BlockSizes,
    /// Refuse what is not a multiple of `block.min`.
    pub enforce_alignment: bool,
    /// The contexts that BLOCK_STATUS answers.
    pub contexts: ContextSet,
}

impl Terms {
    /// The same terms without the flags and contexts that their mode does not allow: what a client is told.
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

/// A finished handshake.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Negotiated {
    /// The export, as the catalog gave it.
    pub export: Export,
    /// The name the client asked for; empty for the default export.
    pub name: String,
    /// The selected contexts: id and name, as the client was told them. They are those of the export when they were
    /// selected, and the export may have changed since: an owner that does not know one any more answers 0, which is
    /// always safe.
    pub contexts: Vec<(u32, String)>,
    /// Whether the client asked for the block sizes, and so must keep to them.
    pub block_size_asked: bool,
    /// Whether TLS was started.
    pub secure: bool,
    /// What the transmission phase needs.
    pub terms: Terms,
}

/// Why a connection must be dropped without another word: the peer broke a MUST, left the stream out of step, or asks
/// for more than any honest client does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Fatal {
    /// The client set a flag that was not offered.
    ClientFlags(u32),
    /// An option without its magic.
    OptionMagic(u64),
    /// An option longer than [`OPTION_SKIP_MAX`](crate::limits::OPTION_SKIP_MAX).
    OptionLength(Opt, u32),
    /// More options than [`Offer::options_max`], or more bytes of them than
    /// [`option_bytes_max`](crate::limits::option_bytes_max).
    Options(u32),
    /// An option that a client without FIXED_NEWSTYLE must not send, for it would not understand the answer.
    NotFixed(Opt),
    /// An EXPORT_NAME that cannot be met, and the reply that GO would have had.
    ExportName(Rep),
    /// Called again after the handshake was over.
    Over,
    /// A request without its magic.
    RequestMagic(u32),
    /// A payload longer than [`SWALLOW_MAX`](crate::limits::SWALLOW_MAX) and than `payload_max`.
    PayloadLength(u64),
    /// A server's greeting, option reply or reply that breaks the protocol. Only from the client half.
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
