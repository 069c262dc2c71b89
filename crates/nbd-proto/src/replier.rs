//! Server side of the transmission phase: results in, heads of replies out. The payload of a READ is not seen here: the
//! caller sends it after the head, from wherever it is.

use crate::limits::EXTENTS_MAX;
use crate::reader::cut;
use crate::terms::Terms;
use crate::wire::{
    ChunkFlags, ChunkKind, CommandKind, Cookie, EXTENDED_REPLY_MAGIC, Mode, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC,
    WireError,
};

/// Where heads are put: a growing vector, or the fixed buffer of a connection. A head of a READ is at most
/// [`HEAD_MAX`](crate::limits::HEAD_MAX) bytes, an error that and 4096 bytes of text.
pub trait Put {
    /// Appends the bytes, all of them.
    fn put(&mut self, bytes: &[u8]);
}

impl Put for Vec<u8> {
    #[inline]
    fn put(&mut self, bytes: &[u8]) {
        self.extend_from_slice(bytes);
    }
}

/// One stretch of a block status.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Extent {
    /// Bytes, more than 0.
    pub len: u64,
    /// What it is: the meaning is the context's, see [`AllocationFlags`](crate::wire::AllocationFlags).
    pub flags: u64,
}

/// The encoder of one connection's replies. In every method `at` without another word is the offset of the request,
/// which an extended reply repeats.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Replier {
    mode: Mode,
    block_min: u32,
}

impl Replier {
    /// The encoder for these terms.
    pub fn new(terms: Terms) -> Self {
        let terms = terms.told();
        Self { mode: terms.mode, block_min: terms.block.min }
    }

    /// How replies look.
    #[inline]
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// The head of a whole, successful READ: exactly `len` bytes of data must follow, and no error is possible any
    /// more. For 0 bytes the reply is complete.
    #[inline]
    pub fn read_head(&self, out: &mut impl Put, cookie: Cookie, at: u64, len: u32) {
        match self.mode {
            Mode::Simple => simple(out, cookie, 0),
            _ if len == 0 => self.chunk(out, ChunkFlags::DONE, ChunkKind::NONE, cookie, at, 0),
            _ => self.data_chunk(out, cookie, at, at, len, true),
        }
    }

    /// The head of a part of a READ, at `part`: exactly `len` bytes must follow, more than 0. `last` closes the reply.
    ///
    /// # Panics
    ///
    /// In simple mode, which has no parts; and when `len` is 0.
    #[inline]
    pub fn data_chunk(&self, out: &mut impl Put, cookie: Cookie, at: u64, part: u64, len: u32, last: bool) {
        assert!(len > 0, "a data chunk has data");
        // One piece of bytes for the head, as this is where every READ passes.
        let flags = done_if(last);
        let len = u64::from(len) + 8;
        match self.mode {
            Mode::Simple => panic!("simple replies have no chunks"),
            Mode::Structured => {
                // The receiver hands out no READ that would not fit.
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

    /// A part of a READ that is all zeroes: `len` bytes at `part`, more than 0. `last` closes the reply.
    ///
    /// # Panics
    ///
    /// In simple mode, which has no parts; and when `len` is 0.
    pub fn hole_chunk(&self, out: &mut impl Put, cookie: Cookie, at: u64, part: u64, len: u32, last: bool) {
        assert!(len > 0, "a hole has a length");
        self.chunk(out, done_if(last), ChunkKind::OFFSET_HOLE, cookie, at, 12);
        out.put(&part.to_be_bytes());
        out.put(&len.to_be_bytes());
    }

    /// A request is done, with nothing (more) to tell: any command but a READ or a BLOCK_STATUS, those when their last
    /// chunk was not marked as such, and a READ of 0 bytes.
    #[inline]
    pub fn done(&self, out: &mut impl Put, cookie: Cookie, at: u64, kind: CommandKind) {
        match self.mode {
            Mode::Simple => simple(out, cookie, 0),
            // READ and BLOCK_STATUS must be answered in chunks; for the others the simple reply is the shorter one.
            Mode::Structured if kind != CommandKind::READ && kind != CommandKind::BLOCK_STATUS => {
                simple(out, cookie, 0);
            }
            _ => self.chunk(out, ChunkFlags::DONE, ChunkKind::NONE, cookie, at, 0),
        }
    }

    /// A request failed. The text is for people, cut at 4096 bytes; simple replies have no room for it.
    pub fn error(&self, out: &mut impl Put, cookie: Cookie, at: u64, error: WireError, text: &str) {
        if self.mode == Mode::Simple {
            return simple(out, cookie, error.code());
        }
        self.error_chunk(out, ChunkKind::ERROR, cookie, at, error, text, &[]);
    }

    /// A READ failed at offset `part`, after chunks for what comes before it.
    ///
    /// # Panics
    ///
    /// In simple mode, which has no parts.
    pub fn error_offset(&self, out: &mut impl Put, cookie: Cookie, at: u64, part: u64, error: WireError, text: &str) {
        self.error_chunk(out, ChunkKind::ERROR_OFFSET, cookie, at, error, text, &part.to_be_bytes());
    }

    /// The status of one context, from the start of the request on. `last` closes the reply: there must be one such
    /// chunk for each context of the [`Command::Status`](crate::Command::Status). Empty extents are left out, those
    /// after the 2²⁰th too. In structured mode an extent of 4 GiB or more is cut below that, to a multiple of the
    /// minimum block, and is the last one.
    ///
    /// # Panics
    ///
    /// In simple mode, and when there is no extent that is not empty.
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

    /// The header of a chunk with `len` bytes after it.
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
        // What comes after a cut extent would be taken to begin where it was cut.
        let fits = u32::try_from(len).ok().filter(|&len| len <= longest);
        let past_cut = std::mem::replace(&mut cut, fits.is_none());
        // A context that needs more than 32 bits of status is not offered without extended headers.
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
