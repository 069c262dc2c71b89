//! [`Export`]: a device under a name, and what clients are told about it.

use std::{collections::HashSet, io, sync::Arc};

use crate::{access::Access, peer::Peer};
use blkdev::Device;
use nbd_proto::{
    BlockSizes, Catalog, Refusal, limits,
    wire::{BASE_ALLOCATION, Rep, TransmissionFlags as Flag},
};

/// A device that clients may open by name.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Export {
    /// At most 4096 bytes; may be empty.
    pub name: String,
    /// For people; may be empty.
    pub description: String,
    /// What is served.
    pub device: Arc<dyn Device>,
    /// Refuse what would change the device, even where the device would allow it.
    pub read_only: bool,
    /// Who may open it.
    pub access: Access,
    /// Serve it under TLS only, on a server where other exports can do without.
    pub tls_only: bool,
    /// Refuse clients that do not ask for block sizes, if the smallest is more than a byte: as
    /// [`Limits::block_size_required`](crate::Limits::block_size_required), for this export.
    pub block_size_required: bool,
}

impl Export {
    /// An export that every client may open, for reading and writing. Its fields change that.
    pub fn new(name: impl Into<String>, device: Arc<dyn Device>) -> Self {
        Self {
            name: name.into(),
            description: String::new(),
            device,
            read_only: false,
            access: Access::default(),
            tls_only: false,
            block_size_required: false,
        }
    }

    /// What the handshake reports about it. Asks the device nothing that takes more than a moment.
    fn told(&self, payload_max: u32, multi_conn: bool) -> nbd_proto::Export {
        // A device that does not report a change of its size must be asked, or a new client would get the old one.
        self.device.refresh();
        let info = self.device.info();
        let writable = !(self.read_only || info.caps.read_only);
        // All connections reach the same open device, so a flush on one covers the writes of all.
        let flags = (Flag::HAS_FLAGS.with(Flag::SEND_FLUSH).with(Flag::SEND_FUA))
            .with(Flag::SEND_DF)
            .with(Flag::BLOCK_STATUS_PAYLOAD)
            .with_if(multi_conn, Flag::CAN_MULTI_CONN)
            .with_if(!writable, Flag::READ_ONLY)
            .with_if(writable, Flag::SEND_WRITE_ZEROES.with(Flag::SEND_FAST_ZERO))
            .with_if(writable && info.caps.discard, Flag::SEND_TRIM)
            .with_if(info.caps.prefetch, Flag::SEND_CACHE)
            .with_if(info.caps.rotational, Flag::ROTATIONAL);
        nbd_proto::Export {
            name: self.name.clone(),
            description: self.description.clone(),
            size: self.device.capacity(),
            flags,
            block: BlockSizes::nearest(info.block_size, info.preferred_block_size, payload_max),
            contexts: vec![BASE_ALLOCATION.to_owned()],
            block_size_required: self.block_size_required,
        }
    }
}

/// The exports of a server; the first is the default one, served under the empty name too.
#[derive(Clone, Debug)]
pub struct Exports {
    list: Arc<[Export]>,
    /// Longest READ or WRITE, in bytes.
    payload_max: u32,
    /// A client may connect more than once.
    multi_conn: bool,
}

impl Exports {
    /// # Errors
    /// No export at all, a name twice, or a name or description that no client could be told.
    pub fn new(list: Vec<Export>, payload_max: u32) -> io::Result<Self> {
        let refuse = |text: String| Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        if list.is_empty() {
            return refuse("nothing to serve: no export given".into());
        }
        let mut names = HashSet::new();
        for Export { name, description, .. } in &list {
            if !names.insert(name.as_str()) {
                return refuse(format!("two exports are named {name:?}"));
            }
            for text in [name, description] {
                if text.len() > limits::NAME_MAX || text.contains('\0') {
                    return refuse(format!(
                        "export {name:.40?}: name and description have at most 4096 bytes and no NUL"
                    ));
                }
            }
        }
        Ok(Self { list: list.into(), payload_max, multi_conn: true })
    }

    /// Those of a server that has none yet.
    pub(crate) fn none(payload_max: u32, multi_conn: bool) -> Self {
        Self { list: Arc::new([]), payload_max, multi_conn }
    }

    /// Others in their place; there may be none.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub(crate) fn with(&self, list: Vec<Export>) -> io::Result<Self> {
        let Self { payload_max, multi_conn, .. } = *self;
        if list.is_empty() {
            return Ok(Self::none(payload_max, multi_conn));
        }
        Ok(Self { multi_conn, ..Self::new(list, payload_max)? })
    }

    /// All of them, the default one first.
    pub fn list(&self) -> &[Export] {
        &self.list
    }

    /// Those that a client may open; `secure`: it is under TLS.
    pub fn seen_by<'a>(&'a self, peer: &'a Peer, secure: bool) -> Seen<'a> {
        Seen { exports: self, peer, secure }
    }

    /// Which export is meant by a name.
    fn position(&self, name: &str) -> Option<usize> {
        // Somebody may have named an export other than the first "".
        let default = name.is_empty() && !self.list.is_empty();
        self.list.iter().position(|e| e.name == name).or(default.then_some(0))
    }
}

/// The exports that a client may open, as the handshake asks for them. All others are, in every way, not there.
#[derive(Debug)]
pub struct Seen<'a> {
    exports: &'a Exports,
    peer: &'a Peer,
    secure: bool,
}

impl Seen<'_> {
    /// Which export the client means by a name.
    pub fn position(&self, name: &str) -> Option<usize> {
        self.exports.position(name).filter(|&n| self.may_open(&self.exports.list[n]))
    }

    fn may_open(&self, export: &Export) -> bool {
        (self.secure || !export.tls_only) && export.access.admits(self.peer)
    }

    /// Why there is no such export. Where any of them needs TLS, so may one of this name: without TLS nobody learns more
    /// (proto.md, "SELECTIVETLS mode").
    fn refuse(&self, name: &str) -> Refusal {
        if !self.secure && self.exports.list.iter().any(|export| export.tls_only) {
            return Refusal::new(Rep::ERR_TLS_REQD, "not without TLS");
        }
        Refusal::unknown(name)
    }
}

impl Catalog for Seen<'_> {
    fn list(&self, each: &mut dyn FnMut(&str, &str)) -> Result<(), Refusal> {
        let seen = self.exports.list.iter().filter(|e| self.may_open(e));
        seen.for_each(|e| each(&e.name, &e.description));
        Ok(())
    }

    fn find(&self, name: &str) -> Result<nbd_proto::Export, Refusal> {
        let position = self.position(name).ok_or_else(|| self.refuse(name))?;
        Ok(self.exports.list[position].told(self.exports.payload_max, self.exports.multi_conn))
    }
}
