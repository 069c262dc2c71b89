//! [`Export`]: a device under a name, and the properties that clients see.

use std::{cell::Cell, collections::HashSet, io, sync::Arc};

use crate::{access::Access, peer::Peer};
use blkdev::{Device, State};
use nbd_proto::{
    BlockSizes, Catalog, Refusal, limits,
    wire::{BASE_ALLOCATION, Rep, TransmissionFlags as Flag},
};

/// A device that clients may open by name.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Export {
    /// The name in the NBD protocol: at most 4096 bytes, may be empty.
    pub name: String,
    /// A text for people, sent with NBD_REP_SERVER and NBD_INFO_DESCRIPTION: at most 4096 bytes, may be empty.
    pub description: String,
    /// The device that is served.
    pub device: Arc<dyn Device>,
    /// Refuse requests that change the device, even if the device supports them.
    pub read_only: bool,
    /// The rules for clients that may open it.
    pub access: Access,
    /// Serve this export under TLS only, even if other exports are also served without TLS.
    pub tls_only: bool,
    /// Refuse clients that do not request block sizes, if the smallest block is larger than a byte:
    /// [`Limits::block_size_required`](crate::Limits::block_size_required) for this export only.
    pub block_size_required: bool,
}

impl Export {
    /// Returns an export that every client may open, for reading and writing, with or without TLS. Change the fields to restrict
    /// it.
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

    /// Returns the properties that the handshake reports. Does not block on the device for more than a moment.
    fn told(&self, payload_max: u32, multi_conn: bool) -> nbd_proto::Export {
        // Some devices do not report a change of size. Ask for it, so that a new client gets the present size.
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

/// The exports of a server. The first one is the default export, which also has the empty name.
#[derive(Clone, Debug)]
pub struct Exports {
    list: Arc<[Export]>,
    /// Longest READ or WRITE payload, in bytes.
    payload_max: u32,
    /// Advertise NBD_FLAG_CAN_MULTI_CONN.
    multi_conn: bool,
}

impl Exports {
    /// # Errors
    /// The list is empty, a name occurs twice, or a name or description is longer than 4096 bytes or contains NUL.
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

    /// An empty list, for a server that has no exports yet.
    pub(crate) fn none(payload_max: u32, multi_conn: bool) -> Self {
        Self { list: Arc::new([]), payload_max, multi_conn }
    }

    /// Returns the same settings with other exports; the list may be empty.
    ///
    /// # Errors
    /// As [`new`](Self::new), except for the empty list.
    pub(crate) fn with(&self, list: Vec<Export>) -> io::Result<Self> {
        let Self { payload_max, multi_conn, .. } = *self;
        if list.is_empty() {
            return Ok(Self::none(payload_max, multi_conn));
        }
        Ok(Self { multi_conn, ..Self::new(list, payload_max)? })
    }

    /// All exports, the default one first.
    pub fn list(&self) -> &[Export] {
        &self.list
    }

    /// The exports that `peer` may open. `secure`: its connection uses TLS.
    pub fn seen_by<'a>(&'a self, peer: &'a Peer, secure: bool) -> Seen<'a> {
        Seen { exports: self, peer, secure, is_awaited: Cell::new(false) }
    }

    /// Returns the index of the export with this name.
    fn position(&self, name: &str) -> Option<usize> {
        // An export other than the first may have the empty name.
        let default = name.is_empty() && !self.list.is_empty();
        self.list.iter().position(|e| e.name == name).or(default.then_some(0))
    }
}

/// The exports that one client may open. For the handshake of this client, no others exist.
#[derive(Debug)]
pub struct Seen<'a> {
    exports: &'a Exports,
    peer: &'a Peer,
    secure: bool,
    /// The client has asked for an export whose device is dead.
    is_awaited: Cell<bool>,
}

impl Seen<'_> {
    /// Returns the index of the export that the client names; `None`: it has no such export.
    pub fn position(&self, name: &str) -> Option<usize> {
        self.exports.position(name).filter(|&n| self.may_open(&self.exports.list[n]))
    }

    /// Whether the device of some export is dead, perhaps for a moment only.
    pub(crate) fn may_wait(&self) -> bool {
        self.exports.list.iter().any(|export| export.device.state() != State::Working)
    }

    /// Whether the client has asked for such an export.
    pub(crate) fn is_awaited(&self) -> bool {
        self.is_awaited.get()
    }

    fn may_open(&self, export: &Export) -> bool {
        (self.secure || !export.tls_only) && export.access.admits(self.peer)
    }

    /// Refuses a name. If any export requires TLS, an export with this name might: a client without TLS gets ERR_TLS_REQD, and so
    /// cannot probe for names (proto.md, "SELECTIVETLS mode").
    fn refuse(&self, name: &str) -> Refusal {
        if !self.secure && self.exports.list.iter().any(|export| export.tls_only) {
            return Refusal::new(Rep::ERR_TLS_REQD, "TLS is required");
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
        if self.exports.list[position].device.state() != State::Working {
            self.is_awaited.set(true);
            return Err(Refusal::new(Rep::ERR_SHUTDOWN, "the device of this export does not answer; try again later"));
        }
        Ok(self.exports.list[position].told(self.exports.payload_max, self.exports.multi_conn))
    }
}
