//! Server side of the transmission phase: results in, headers of replies out. It does not handle the payload of a READ: the
//! caller sends it after the header, from any place.

use crate::limits::EXTENTS_MAX;
use crate::reader::cut;
use crate::terms::Terms;
use crate::wire::{
    ChunkFlags, ChunkKind, CommandKind, Cookie, EXTENDED_REPLY_MAGIC, Mode, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC,
    WireError,
};

/// Output for headers: a growing vector, or the fixed buffer of a connection. The header of a READ has at most
/// [`HEAD_MAX`](crate::limits::HEAD_MAX) bytes; an error has at most 4096 bytes of text in addition.
pub trait Put {
    /// Appends all bytes.
    fn put(&mut self, bytes: &[u8]);
}

impl Put for Vec<u8> {
    #[inline]
    fn put(&mut self, bytes: &[u8]) {
        self.extend_from_slice(bytes);
    }
}

/// One extent of a block status.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Extent {
    /// Length in bytes, more than 0.
    pub len: u64,
    /// The status; its meaning depends on the context, see [`AllocationFlags`](crate::wire::AllocationFlags).
    pub flags: u64,
}

/// The encoder of one connection's replies. In every method, `at` is the offset of the request, which an extended reply repeats.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Replier {
    mode: Mode,
    block_min: u32,
}

impl Replier {
    /// Returns the encoder for these terms.
    pub fn new(terms: Terms) -> Self {
        let terms = terms.told();
        Self { mode: terms.mode, block_min: terms.block.min }
    }

    /// The form of replies.
    #[inline]
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// The header of a complete, successful READ. Exactly `len` bytes of data must follow; the READ cannot fail any more. For 0
    /// bytes the reply is complete.
    #[inline]
    pub fn read_head(&self, out: &mut impl Put, cookie: Cookie, at: u64, len: u32) {
        match self.mode {
            Mode::Simple => simple(out, cookie, 0),
            _ if len == 0 => self.chunk(out, ChunkFlags::DONE, ChunkKind::NONE, cookie, at, 0),
            _ => self.data_chunk(out, cookie, at, at, len, true),
        }
    }

    /// The header of a part of a READ, at `part`. Exactly `len` bytes must follow, more than 0. `last` ends the reply.
    ///
    /// # Panics
    ///
    /// In simple mode, which has no parts; and if `len` is 0.
    #[inline]
    pub fn data_chunk(&self, out: &mut impl Put, cookie: Cookie, at: u64, part: u64, len: u32, last: bool) {
        assert!(len > 0, "a data chunk has data");
        // A single piece for the header, because every READ uses this code.
        let flags = done_if(last);
        let len = u64::from(len) + 8;
        match self.mode {
            Mode::Simple => panic!("simple replies have no chunks"),
            Mode::Structured => {
                // The receiver refuses READs that would not fit.
                let len = u32::try_from(len).expect("a structured chunk is shorter than 4 GiB");
                let mut head = [0; 28];
                head[..20].copy_from_slice(&structured(flags, ChunkKind::OFFSET_DATA, cookie, len));
                head[20..].copy_from_slice(&part.to_be_bytes());
                out.put(&head);
            }
            Mode::Extended => {
                let mut head = [0; 40];
                head[..32].copy_from_slice(&extended(flags, ChunkKind::OFFSET_DATA, cookie, at, len));
                head[32..].copy_from_slice(&part.to_be_bytes());
                out.put(&head);
            }
        }
    }

    /// A part of a READ that is all zeroes: `len` bytes at `part`, more than 0. `last` ends the reply.
    ///
    /// # Panics
    ///
    /// In simple mode, which has no parts; and if `len` is 0.
    pub fn hole_chunk(&self, out: &mut impl Put, cookie: Cookie, at: u64, part: u64, len: u32, last: bool) {
        assert!(len > 0, "a hole has a length");
        self.chunk(out, done_if(last), ChunkKind::OFFSET_HOLE, cookie, at, 12);
        out.put(&part.to_be_bytes());
        out.put(&len.to_be_bytes());
    }

    /// Reports success without (more) data: for any command except READ and BLOCK_STATUS; for those two, if their last chunk was
    /// not marked as such; and for a READ of 0 bytes.
    #[inline]
    pub fn done(&self, out: &mut impl Put, cookie: Cookie, at: u64, kind: CommandKind) {
        match self.mode {
            Mode::Simple => simple(out, cookie, 0),
            // READ and BLOCK_STATUS must get chunks. For other commands the simple reply is shorter.
            Mode::Structured if kind != CommandKind::READ && kind != CommandKind::BLOCK_STATUS => {
                simple(out, cookie, 0);
            }
            _ => self.chunk(out, ChunkFlags::DONE, ChunkKind::NONE, cookie, at, 0),
        }
    }

    /// Reports an error. The text is for people and is cut at 4096 bytes; simple replies do not contain it.
    pub fn error(&self, out: &mut impl Put, cookie: Cookie, at: u64, error: WireError, text: &str) {
        if self.mode == Mode::Simple {
            return simple(out, cookie, error.code());
        }
        self.error_chunk(out, ChunkKind::ERROR, cookie, at, error, text, &[]);
    }

    /// Reports that a READ failed at offset `part`, after chunks for the data before it.
    ///
    /// # Panics
    ///
    /// In simple mode, which has no parts.
    pub fn error_offset(&self, out: &mut impl Put, cookie: Cookie, at: u64, part: u64, error: WireError, text: &str) {
        self.error_chunk(out, ChunkKind::ERROR_OFFSET, cookie, at, error, text, &part.to_be_bytes());
    }

    /// The status of one context, from the start of the request on. `last` ends the reply: there must be one such chunk for each
    /// context of the [`Command::Status`](crate::Command::Status). Empty extents are omitted, and so are those after the first
    /// 2²⁰. In structured mode, an extent of 4 GiB or more is cut to less, to a multiple of the minimum block, and ends the list.
    ///
    /// # Panics
    ///
    /// In simple mode, and if all extents are empty.
    pub fn status<I>(&self, out: &mut impl Put, cookie: Cookie, at: u64, context: u32, extents: I, last: bool)
    where
        I: IntoIterator<Item = Extent>,
        I::IntoIter: Clone,
    {
        let extents = extents.into_iter().filter(|extent| extent.len > 0).take(EXTENTS_MAX);
        let flags = done_if(last);
        if self.mode == Mode::Extended {
            let count = counted(extents.clone());
            let len = u64::from(count) * 16 + 8;
            self.chunk(out, flags, ChunkKind::BLOCK_STATUS_EXT, cookie, at, len);
            out.put(&context.to_be_bytes());
            out.put(&count.to_be_bytes());
            for Extent { len, flags } in extents {
                out.put(&len.to_be_bytes());
                out.put(&flags.to_be_bytes());
            }
            return;
        }
        let longest = !(self.block_min - 1);
        let count = counted(compact(extents.clone(), longest));
        self.chunk(out, flags, ChunkKind::BLOCK_STATUS, cookie, at, u64::from(count) * 8 + 4);
        out.put(&context.to_be_bytes());
        for (len, flags) in compact(extents, longest) {
            out.put(&len.to_be_bytes());
            out.put(&flags.to_be_bytes());
        }
    }

    #[allow(clippy::too_many_arguments)]
    #[cold]
    fn error_chunk(
        &self,
        out: &mut impl Put,
        kind: ChunkKind,
        cookie: Cookie,
        at: u64,
        error: WireError,
        text: &str,
        tail: &[u8],
    ) {
        let text = cut(text);
        let text_len = u16::try_from(text.len()).expect("the text was cut");
        self.chunk(out, ChunkFlags::DONE, kind, cookie, at, 6 + u64::from(text_len) + tail.len() as u64);
        out.put(&error.code().to_be_bytes());
        out.put(&text_len.to_be_bytes());
        out.put(text.as_bytes());
        out.put(tail);
    }

    /// The header of a chunk, followed by `len` bytes.
    #[inline]
    fn chunk(&self, out: &mut impl Put, flags: ChunkFlags, kind: ChunkKind, cookie: Cookie, at: u64, len: u64) {
        match self.mode {
            Mode::Simple => panic!("simple replies have no chunks"),
            Mode::Structured => {
                let len = u32::try_from(len).expect("a structured chunk is shorter than 4 GiB");
                out.put(&structured(flags, kind, cookie, len));
            }
            Mode::Extended => out.put(&extended(flags, kind, cookie, at, len)),
        }
    }
}

/// Extents as 32-bit descriptors, up to the first that does not fit, which is cut.
fn compact(extents: impl Iterator<Item = Extent>, longest: u32) -> impl Iterator<Item = (u32, u32)> {
    let mut cut = false;
    extents.map_while(move |Extent { len, flags }| {
        // Clients would take the extents after a cut one to begin at the cut.
        let fits = u32::try_from(len).ok().filter(|&len| len <= longest);
        let past_cut = std::mem::replace(&mut cut, fits.is_none());
        // Contexts that need more than 32 bits of status are offered with extended headers only.
        let flags = u32::try_from(flags & u64::from(u32::MAX)).expect("masked to 32 bits");
        (!past_cut).then_some((fits.unwrap_or(longest), flags))
    })
}

fn counted<T>(extents: impl Iterator<Item = T>) -> u32 {
    let count = u32::try_from(extents.count()).expect("extents were limited");
    assert!(count > 0, "a status has an extent");
    count
}

#[inline]
fn done_if(last: bool) -> ChunkFlags {
    ChunkFlags::NONE.with_if(last, ChunkFlags::DONE)
}

#[inline]
fn simple(out: &mut impl Put, cookie: Cookie, error: u32) {
    let mut head = [0; 16];
    head[..4].copy_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
    head[4..8].copy_from_slice(&error.to_be_bytes());
    head[8..].copy_from_slice(&cookie.0.to_be_bytes());
    out.put(&head);
}

#[inline]
fn structured(flags: ChunkFlags, kind: ChunkKind, cookie: Cookie, len: u32) -> [u8; 20] {
    let mut head = [0; 20];
    head[..4].copy_from_slice(&STRUCTURED_REPLY_MAGIC.to_be_bytes());
    head[4..6].copy_from_slice(&flags.0.to_be_bytes());
    head[6..8].copy_from_slice(&kind.0.to_be_bytes());
    head[8..16].copy_from_slice(&cookie.0.to_be_bytes());
    head[16..].copy_from_slice(&len.to_be_bytes());
    head
}

#[inline]
fn extended(flags: ChunkFlags, kind: ChunkKind, cookie: Cookie, at: u64, len: u64) -> [u8; 32] {
    let mut head = [0; 32];
    head[..4].copy_from_slice(&EXTENDED_REPLY_MAGIC.to_be_bytes());
    head[4..6].copy_from_slice(&flags.0.to_be_bytes());
    head[6..8].copy_from_slice(&kind.0.to_be_bytes());
    head[8..16].copy_from_slice(&cookie.0.to_be_bytes());
    head[16..24].copy_from_slice(&at.to_be_bytes());
    head[24..].copy_from_slice(&len.to_be_bytes());
    head
}
