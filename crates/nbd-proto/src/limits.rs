//! The limits of the codec, together, each with its reason: what a peer can make us read, keep or write is bounded by
//! these.

/// Longest string of the protocol: export name, description, query, error text (proto.md, "Values": MUST be at most
/// 4096 bytes).
pub const NAME_MAX: usize = 4096;

/// Largest payload every client may rely on when no block sizes were agreed (proto.md, "Block size constraints"). 32
/// MiB.
pub const PAYLOAD_MAX: u32 = 32 << 20;

/// Longest header of the transmission phase: an extended request or an extended reply chunk, 32 bytes.
pub const HEADER_MAX: usize = 32;

/// Longest head that [`Replier`](crate::Replier) puts before a payload: an extended chunk header and its offset, 40
/// bytes.
pub const HEAD_MAX: usize = HEADER_MAX + 8;

/// A refused payload up to this length is swallowed in step; a longer one ends the connection, since whoever sends it
/// knows no limit. Twice [`PAYLOAD_MAX`], so that a client that is off by a header or by one doubling is refused rather
/// than cut off.
pub const SWALLOW_MAX: u32 = 64 << 20;

/// Largest option data that is kept in memory and parsed, 64 KiB: an INFO for the longest name, or some hundred context
/// queries. A longer INFO, GO or META_CONTEXT is answered with `ERR_TOO_BIG`.
pub const OPTION_MAX: usize = 64 << 10;

/// Option data up to this length is read past, in step, whatever the answer; longer data ends the connection. 32 MiB,
/// as the protocol does not let a server call less than that an attack anywhere else.
pub const OPTION_SKIP_MAX: u32 = 32 << 20;

/// Options a client may send before GO, unless [`Offer::options_max`](crate::Offer::options_max) says otherwise. libnbd's
/// longest course for one export takes ten; a client that asks for more never means to begin.
pub const OPTIONS_MAX: u32 = 256;

/// Bytes of options a client may send before GO, all together, under [`OPTIONS_MAX`]: two of the longest that are read past.
pub const OPTION_BYTES_MAX: u64 = 64 << 20;

/// The same when so many options are allowed: each further one may name an export, with as much again of queries.
pub const fn option_bytes_max(options_max: u32) -> u64 {
    OPTION_BYTES_MAX + options_max.saturating_sub(OPTIONS_MAX) as u64 * 2 * NAME_MAX as u64
}

/// Bytes of lists that one handshake may cause under [`OPTIONS_MAX`], 4 MiB. A LIST or a context option that would pass it is answered with
/// `ERR_TOO_BIG`, so that sixteen bytes asked two hundred times do not fill the server's memory.
pub const REPLIES_MAX: usize = 4 << 20;

/// The same when so many options are allowed: each further one may get a context, 39 bytes.
pub const fn replies_max(options_max: u32) -> usize {
    REPLIES_MAX + options_max.saturating_sub(OPTIONS_MAX) as usize * 64
}

/// Metadata contexts of one export that can be negotiated: so many fit the word of a [`ContextSet`](crate::ContextSet).
pub const CONTEXTS_MAX: usize = 64;

/// Extents in one status chunk (proto.md, "NBD_REPLY_TYPE_BLOCK_STATUS": SHOULD be at most 2²⁰).
pub const EXTENTS_MAX: usize = 1 << 20;

/// Largest export: clients keep offsets in signed 64-bit integers (CVE-2021-20286), so a larger one is refused at GO.
pub const SIZE_MAX: u64 = i64::MAX as u64;

const _: () =
    assert!(SWALLOW_MAX > PAYLOAD_MAX && OPTION_MAX >= 6 + NAME_MAX && OPTION_BYTES_MAX >= OPTION_SKIP_MAX as u64);
