//! The limits of the codec, each with its reason. They bound the data that a peer can make us read, keep or write.

/// Longest string of the protocol, in bytes: export name, description, query, error text (proto.md, "Values": MUST be at most
/// 4096 bytes).
pub const NAME_MAX: usize = 4096;

/// Largest payload that every client may use without negotiated block sizes (proto.md, "Block size constraints"): 32 MiB.
pub const PAYLOAD_MAX: u32 = 32 << 20;

/// Longest header of the transmission phase: an extended request or an extended reply chunk, 32 bytes.
pub const HEADER_MAX: usize = 32;

/// Longest header that [`Replier`](crate::Replier) puts before a payload: an extended chunk header and its offset, 40 bytes.
pub const HEAD_MAX: usize = HEADER_MAX + 8;

/// Longest refused payload that is discarded in step, 64 MiB. A longer one ends the connection, because its sender ignores every
/// limit. It is twice [`PAYLOAD_MAX`], so that a client that exceeds the limit by a header or by a factor of two gets an error
/// and stays connected.
pub const SWALLOW_MAX: u32 = 64 << 20;

/// Largest option data that is kept in memory and parsed, 64 KiB: an INFO for the longest name, or some hundred context queries.
/// A longer INFO, GO or META_CONTEXT gets `ERR_TOO_BIG`.
pub const OPTION_MAX: usize = 64 << 10;

/// Longest option data that is skipped in step, whatever the reply; longer data ends the connection. 32 MiB: nowhere else does
/// the protocol let a server treat less than that as an attack.
pub const OPTION_SKIP_MAX: u32 = 32 << 20;

/// Most options that a client may send before GO, unless [`Offer::options_max`](crate::Offer::options_max) says otherwise. libnbd
/// needs at most ten for one export; a client that sends more than this will never start transmission.
pub const OPTIONS_MAX: u32 = 256;

/// Most bytes of options that a client may send before GO in total, with [`OPTIONS_MAX`]: two of the longest that are skipped.
pub const OPTION_BYTES_MAX: u64 = 64 << 20;

/// The same limit for another `options_max`: each further option may contain an export name, and queries of the same length.
pub const fn option_bytes_max(options_max: u32) -> u64 {
    OPTION_BYTES_MAX + options_max.saturating_sub(OPTIONS_MAX) as u64 * 2 * NAME_MAX as u64
}

/// Most bytes of lists that one handshake may cause, with [`OPTIONS_MAX`]: 4 MiB. A LIST or context option beyond it gets
/// `ERR_TOO_BIG`. Otherwise a sixteen-byte option, sent two hundred times, could fill the server's memory.
pub const REPLIES_MAX: usize = 4 << 20;

/// The same limit for another `options_max`: each further option may return a context, 39 bytes.
pub const fn replies_max(options_max: u32) -> usize {
    REPLIES_MAX + options_max.saturating_sub(OPTIONS_MAX) as usize * 64
}

/// Most metadata contexts of one export that can be negotiated: one bit each in a [`ContextSet`](crate::ContextSet).
pub const CONTEXTS_MAX: usize = 64;

/// Most metadata contexts that a client accepts from a server: one query may match several, and each name may have
/// [`NAME_MAX`] bytes. More than any server offers, 1 MiB in all.
pub const SELECTED_MAX: usize = 256;

/// Most extents in one status chunk (proto.md, "NBD_REPLY_TYPE_BLOCK_STATUS": SHOULD be at most 2²⁰).
pub const EXTENTS_MAX: usize = 1 << 20;

/// Largest export, in bytes. Clients keep offsets in signed 64-bit integers (CVE-2021-20286), so a larger one is refused at GO.
pub const SIZE_MAX: u64 = i64::MAX as u64;

const _: () =
    assert!(SWALLOW_MAX > PAYLOAD_MAX && OPTION_MAX >= 6 + NAME_MAX && OPTION_BYTES_MAX >= OPTION_SKIP_MAX as u64);
