//! Encodes the replies to one option.

use crate::reader::cut;
use crate::terms::{BlockSizes, Refusal};
use crate::wire::{InfoKind, OPTION_REPLY_MAGIC, Opt, Rep, TransmissionFlags};

/// Appends the replies to one option to `out`.
pub(super) struct Replies<'a> {
    opt: Opt,
    out: &'a mut Vec<u8>,
    start: usize,
}

impl<'a> Replies<'a> {
    pub(super) fn new(opt: Opt, out: &'a mut Vec<u8>) -> Self {
        let start = out.len();
        Self { opt, out, start }
    }

    /// Bytes of replies so far.
    pub(super) fn len(&self) -> usize {
        self.out.len() - self.start
    }

    /// Whether the replies so far are shorter than `budget`.
    pub(super) fn within(&self, budget: usize) -> bool {
        self.len() < budget
    }

    /// Writes the last reply: ACK, or the error.
    pub(super) fn finish(&mut self, answer: Result<(), Refusal>) {
        match answer {
            Ok(()) => self.reply(Rep::ACK, &[]),
            Err(Refusal { code, text }) => self.reply(code, &[cut(&text).as_bytes()]),
        }
    }

    pub(super) fn server(&mut self, name: &str, description: &str) {
        let len = u32::try_from(name.len()).expect("the name is a string of the protocol");
        self.reply(Rep::SERVER, &[&len.to_be_bytes(), name.as_bytes(), cut(description).as_bytes()]);
    }

    pub(super) fn context(&mut self, id: u32, name: &str) {
        self.reply(Rep::META_CONTEXT, &[&id.to_be_bytes(), name.as_bytes()]);
    }

    pub(super) fn export(&mut self, size: u64, flags: TransmissionFlags) {
        self.info(InfoKind::EXPORT, &[&size.to_be_bytes(), &flags.0.to_be_bytes()]);
    }

    pub(super) fn text(&mut self, kind: InfoKind, text: &str) {
        self.info(kind, &[cut(text).as_bytes()]);
    }

    pub(super) fn block_size(&mut self, block: BlockSizes) {
        let BlockSizes { min, preferred, payload_max } = block;
        self.info(InfoKind::BLOCK_SIZE, &[&min.to_be_bytes(), &preferred.to_be_bytes(), &payload_max.to_be_bytes()]);
    }

    fn info(&mut self, kind: InfoKind, parts: &[&[u8]]) {
        let kind = kind.0.to_be_bytes();
        let mut all: Vec<&[u8]> = vec![&kind];
        all.extend_from_slice(parts);
        self.reply(Rep::INFO, &all);
    }

    fn reply(&mut self, rep: Rep, parts: &[&[u8]]) {
        let len: usize = parts.iter().map(|part| part.len()).sum();
        let len = u32::try_from(len).expect("a reply is made of strings of the protocol");
        self.out.extend_from_slice(&OPTION_REPLY_MAGIC.to_be_bytes());
        self.out.extend_from_slice(&self.opt.0.to_be_bytes());
        self.out.extend_from_slice(&rep.0.to_be_bytes());
        self.out.extend_from_slice(&len.to_be_bytes());
        for part in parts {
            self.out.extend_from_slice(part);
        }
    }
}
