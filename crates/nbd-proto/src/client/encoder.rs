//! Encodes requests, compact and extended.

use crate::replier::Put;
use crate::wire::{CommandFlags, CommandKind, Cookie, EXTENDED_REQUEST_MAGIC, Mode, REQUEST_MAGIC};

/// The encoder of one connection's requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Encoder {
    mode: Mode,
}

impl Encoder {
    /// The encoder for this mode.
    pub fn new(mode: Mode) -> Self {
        Self { mode }
    }

    /// Any request, as it is told: no flag is added, no length is judged. `len` bytes of payload must follow where the
    /// request has one.
    ///
    /// # Panics
    ///
    /// When a compact request has a length of 2³² and more.
    #[inline]
    pub fn request(
        &self,
        out: &mut impl Put,
        cookie: Cookie,
        kind: CommandKind,
        flags: CommandFlags,
        at: u64,
        len: u64,
    ) {
        let mut head = [0; 32];
        head[4..6].copy_from_slice(&flags.0.to_be_bytes());
        head[6..8].copy_from_slice(&kind.0.to_be_bytes());
        head[8..16].copy_from_slice(&cookie.0.to_be_bytes());
        head[16..24].copy_from_slice(&at.to_be_bytes());
        if self.mode == Mode::Extended {
            head[..4].copy_from_slice(&EXTENDED_REQUEST_MAGIC.to_be_bytes());
            head[24..].copy_from_slice(&len.to_be_bytes());
            out.put(&head);
        } else {
            let len = u32::try_from(len).expect("the length of a compact request has 32 bits");
            head[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
            head[24..28].copy_from_slice(&len.to_be_bytes());
            out.put(&head[..28]);
        }
    }

    /// A READ.
    #[inline]
    pub fn read(&self, out: &mut impl Put, cookie: Cookie, at: u64, len: u32) {
        self.request(out, cookie, CommandKind::READ, CommandFlags::NONE, at, len.into());
    }

    /// The head of a WRITE; exactly `len` bytes must follow.
    #[inline]
    pub fn write_head(&self, out: &mut impl Put, cookie: Cookie, at: u64, len: u32, fua: bool) {
        let flags = fua_if(fua).with_if(self.mode == Mode::Extended, CommandFlags::PAYLOAD_LEN);
        self.request(out, cookie, CommandKind::WRITE, flags, at, len.into());
    }

    /// A FLUSH.
    pub fn flush(&self, out: &mut impl Put, cookie: Cookie) {
        self.request(out, cookie, CommandKind::FLUSH, CommandFlags::NONE, 0, 0);
    }

    /// A TRIM.
    pub fn trim(&self, out: &mut impl Put, cookie: Cookie, at: u64, len: u64, fua: bool) {
        self.request(out, cookie, CommandKind::TRIM, fua_if(fua), at, len);
    }

    /// A CACHE.
    pub fn cache(&self, out: &mut impl Put, cookie: Cookie, at: u64, len: u64) {
        self.request(out, cookie, CommandKind::CACHE, CommandFlags::NONE, at, len);
    }

    /// A WRITE_ZEROES; with FUA, NO_HOLE and FAST_ZERO as `flags` say.
    pub fn zero(&self, out: &mut impl Put, cookie: Cookie, at: u64, len: u64, flags: CommandFlags) {
        self.request(out, cookie, CommandKind::WRITE_ZEROES, flags, at, len);
    }

    /// A BLOCK_STATUS in every selected context.
    pub fn status(&self, out: &mut impl Put, cookie: Cookie, at: u64, len: u64, one: bool) {
        let flags = CommandFlags::NONE.with_if(one, CommandFlags::REQ_ONE);
        self.request(out, cookie, CommandKind::BLOCK_STATUS, flags, at, len);
    }

    /// A BLOCK_STATUS in the contexts of these ids, with its payload. Only with extended headers.
    pub fn status_of(&self, out: &mut impl Put, cookie: Cookie, at: u64, len: u64, one: bool, ids: &[u32]) {
        let flags = CommandFlags::PAYLOAD_LEN.with_if(one, CommandFlags::REQ_ONE);
        self.request(out, cookie, CommandKind::BLOCK_STATUS, flags, at, 8 + 4 * ids.len() as u64);
        out.put(&len.to_be_bytes());
        for id in ids {
            out.put(&id.to_be_bytes());
        }
    }

    /// A DISC: the last request.
    pub fn disconnect(&self, out: &mut impl Put, cookie: Cookie) {
        self.request(out, cookie, CommandKind::DISC, CommandFlags::NONE, 0, 0);
    }
}

fn fua_if(fua: bool) -> CommandFlags {
    CommandFlags::NONE.with_if(fua, CommandFlags::FUA)
}
