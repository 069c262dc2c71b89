//! [`Export`]: what the server reports about an export.

use std::sync::Arc;

use nbd_proto::{BlockSizes, Mode, Terms, limits::SIZE_MAX, wire::TransmissionFlags as Flag};

use crate::error::Error;

/// What the server reports about an export. The server has chosen all of it: texts are for people, and sizes are only
/// checked for what the protocol allows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Export {
    terms: Terms,
    name: Option<String>,
    description: Option<String>,
    contexts: Vec<Arc<str>>,
}

impl Export {
    /// # Errors
    /// Numbers that the protocol does not allow.
    pub(crate) fn new(
        terms: Terms,
        name: Option<String>,
        description: Option<String>,
        contexts: Vec<Arc<str>>,
    ) -> Result<Self, Error> {
        let BlockSizes { min, preferred, payload_max } = terms.block;
        let is_allowed = min.is_power_of_two() && min <= 1 << 16 && preferred.is_power_of_two() && preferred >= min;
        if !is_allowed || payload_max < min {
            let text = format!("server sent impossible block sizes: {min}, {preferred}, {payload_max}");
            return Err(Error::Protocol(text));
        }
        if terms.size > SIZE_MAX {
            return Err(Error::Protocol(format!("server sent a size of {} bytes: 2^63 and more", terms.size)));
        }
        // Servers that know no flags leave out the one that says so.
        let terms = if terms.flags.contains(Flag::HAS_FLAGS) { terms } else { Terms { flags: Flag::NONE, ..terms } };
        Ok(Self { terms: terms.told(), name, description, contexts })
    }

    /// Bytes of the export.
    pub fn size(&self) -> u64 {
        self.terms.size
    }

    /// Block sizes, in bytes: `min` divides every offset and length, requests of `preferred` are fast, and `payload_max` is
    /// the longest READ and WRITE.
    pub fn block_sizes(&self) -> BlockSizes {
        self.terms.block
    }

    /// The protocol that was agreed on.
    pub fn mode(&self) -> Mode {
        self.terms.mode
    }

    /// The canonical name, if the server reported one.
    pub fn name(&self) -> Option<&str> {
        self.name.as_deref()
    }

    /// The description for people, if the server reported one. It is the server's text, control characters included.
    pub fn description(&self) -> Option<&str> {
        self.description.as_deref()
    }

    /// Metadata contexts: those selected for a connection; with [`info`](crate::info), all that the server has.
    pub fn contexts(&self) -> &[Arc<str>] {
        &self.contexts
    }

    /// Whether WRITE may be sent: the export is not read-only.
    pub fn can_write(&self) -> bool {
        !self.has(Flag::READ_ONLY)
    }

    /// Whether FLUSH may be sent.
    pub fn can_flush(&self) -> bool {
        self.has(Flag::SEND_FLUSH)
    }

    /// Whether FUA may be set: a request is durable when it completes.
    pub fn can_fua(&self) -> bool {
        self.has(Flag::SEND_FUA)
    }

    /// Whether TRIM may be sent.
    pub fn can_trim(&self) -> bool {
        self.can_write() && self.has(Flag::SEND_TRIM)
    }

    /// Whether WRITE_ZEROES may be sent.
    pub fn can_zero(&self) -> bool {
        self.can_write() && self.has(Flag::SEND_WRITE_ZEROES)
    }

    /// Whether WRITE_ZEROES may have to be fast, or fail.
    pub fn can_fast_zero(&self) -> bool {
        self.can_zero() && self.has(Flag::SEND_FAST_ZERO)
    }

    /// Whether a READ may have to be answered in one piece.
    pub fn can_df(&self) -> bool {
        self.has(Flag::SEND_DF)
    }

    /// Whether CACHE may be sent.
    pub fn can_cache(&self) -> bool {
        self.has(Flag::SEND_CACHE)
    }

    /// Whether FLUSH and FUA on one connection hold for the writes of all connections.
    pub fn can_multi_conn(&self) -> bool {
        self.has(Flag::CAN_MULTI_CONN)
    }

    /// Whether seeks cost, as on a disk that turns.
    pub fn is_rotational(&self) -> bool {
        self.has(Flag::ROTATIONAL)
    }

    fn has(&self, flag: Flag) -> bool {
        self.terms.flags.contains(flag)
    }
}
