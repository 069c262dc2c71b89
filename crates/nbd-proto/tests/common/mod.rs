//! Shared by the tests: a catalog, a small server around the codec, golden conversations, and a seeded stream of numbers.
#![allow(dead_code, missing_docs, unreachable_pub)]

pub mod bodies;
pub mod golden;

use std::sync::OnceLock;

use nbd_proto::wire::{AllocationFlags, BASE_ALLOCATION, Rep, TransmissionFlags};
use nbd_proto::{
    BlockSizes, Catalog, Command, Cookie, Event, Export, Extent, Handshake, Mode, Negotiated, Offer, Receiver, Refusal,
    Replier, Step, WireError, Write,
};

/// Size of the test's exports.
pub const SIZE: u64 = 1 << 20;

/// All flags that an owner can set.
pub const ALL: TransmissionFlags = TransmissionFlags(0x1fff).without(TransmissionFlags::READ_ONLY);

/// Exports by name: the default one and `disk` are the same, `ro` is read-only, `tls` requires TLS, `late` is shutting down,
/// `huge` is too large, `odd` violates the rules for owners.
pub struct Exports;

impl Catalog for Exports {
    fn list(&self, each: &mut dyn FnMut(&str, &str)) -> Result<(), Refusal> {
        each("disk", "a RAM disk");
        each("ro", "");
        Ok(())
    }

    fn find(&self, name: &str) -> Result<Export, Refusal> {
        let contexts = vec![BASE_ALLOCATION.to_owned(), "qemu:dirty-bitmap:b0".to_owned(), "x-test:depth".to_owned()];
        let disk = Export {
            name: "disk".into(),
            description: "a RAM disk".into(),
            size: SIZE,
            flags: ALL,
            block: BlockSizes { min: 512, preferred: 4096, payload_max: 1 << 16 },
            contexts,
            block_size_required: false,
        };
        match name {
            "" | "disk" => Ok(disk),
            "ro" => Ok(Export {
                name: "ro".into(),
                flags: ALL.with(TransmissionFlags::READ_ONLY),
                description: String::new(),
                ..disk
            }),
            "tls" => Err(Refusal::new(Rep::ERR_TLS_REQD, "this export is only served over TLS")),
            "late" => Err(Refusal::new(Rep::ERR_SHUTDOWN, "going away")),
            "huge" => Ok(Export { size: 1 << 63, ..disk }),
            "odd" => Err(Refusal::new(Rep::ACK, "x".repeat(5000))),
            _ => Err(Refusal::unknown(name)),
        }
    }
}

/// A server in memory: handshake, then a RAM disk. It replies at once and in order.
pub struct Server {
    phase: Phase,
    offer: Offer,
    /// The events, one line each.
    pub log: Vec<String>,
    pub out: Vec<u8>,
    /// Bytes of payload and header that the receiver took.
    pub taken: usize,
}

enum Phase {
    Handshake(Box<Handshake>),
    /// STARTTLS has its reply; [`Server::secure`] continues.
    Tls(Box<Handshake>),
    Live(Box<Live>),
    Over,
}

pub struct Live {
    receiver: Receiver,
    replier: Replier,
    negotiated: Negotiated,
    disk: Vec<u8>,
    write: Option<(Cookie, Write, Vec<u8>)>,
}

impl Server {
    pub fn new(offer: Offer) -> Self {
        let mut out = Vec::new();
        let handshake = Handshake::new(offer, &mut out);
        Self { phase: Phase::Handshake(Box::new(handshake)), offer, log: Vec::new(), out, taken: 0 }
    }

    /// TLS has begun: the following input is decrypted data.
    pub fn secure(&mut self) {
        match std::mem::replace(&mut self.phase, Phase::Over) {
            Phase::Tls(handshake) => self.phase = Phase::Handshake(handshake),
            _ => panic!("no TLS was agreed"),
        }
    }

    pub fn is_over(&self) -> bool {
        matches!(self.phase, Phase::Over)
    }

    pub fn mode(&self) -> Option<Mode> {
        match &self.phase {
            Phase::Live(live) => Some(live.negotiated.terms.mode),
            _ => None,
        }
    }

    pub fn feed(&mut self, mut input: &[u8]) {
        loop {
            match &mut self.phase {
                Phase::Handshake(handshake) => match handshake.next(&mut input, &Exports, &mut self.out) {
                    Ok(Step::More) => {
                        assert!(input.is_empty(), "More takes everything");
                        return;
                    }
                    Ok(Step::StartTls) => {
                        self.log.push("StartTls".into());
                        let Phase::Handshake(handshake) = std::mem::replace(&mut self.phase, Phase::Over) else {
                            unreachable!()
                        };
                        self.phase = Phase::Tls(handshake);
                    }
                    Ok(Step::Done(negotiated)) => {
                        let n = &negotiated;
                        self.log.push(format!(
                            "Done {:?} {:?} flags={:04x} contexts={:?} asked={} secure={}",
                            n.name, n.terms.mode, n.terms.flags.0, n.contexts, n.block_size_asked, n.secure
                        ));
                        self.phase = Phase::Live(Box::new(Live::new(*negotiated)));
                    }
                    Ok(Step::Closed) => {
                        self.log.push("Closed".into());
                        self.phase = Phase::Over;
                    }
                    Err(fatal) => {
                        self.log.push(format!("Fatal {fatal}"));
                        self.phase = Phase::Over;
                    }
                },
                Phase::Live(live) => {
                    let before = input.len();
                    let event = live.receiver.next(&mut input);
                    self.taken += before - input.len();
                    match event {
                        Ok(None) => return,
                        Ok(Some(Event::Disconnect)) => {
                            self.log.push("Disconnect".into());
                            self.phase = Phase::Over;
                        }
                        Ok(Some(event)) => live.take(event, &mut self.log, &mut self.out),
                        Err(fatal) => {
                            self.log.push(format!("Fatal {fatal}"));
                            self.phase = Phase::Over;
                        }
                    }
                }
                Phase::Tls(_) => {
                    if !input.is_empty() {
                        self.log.push("plain text after STARTTLS".into());
                        self.phase = Phase::Over;
                    }
                    return;
                }
                Phase::Over => return,
            }
        }
    }
}

impl Live {
    pub fn new(negotiated: Negotiated) -> Self {
        static DISK: OnceLock<Vec<u8>> = OnceLock::new();
        let disk = DISK.get_or_init(|| (0..SIZE).map(|i| (i / 512) as u8).collect()).clone();
        let terms = negotiated.terms;
        Self { receiver: Receiver::new(terms), replier: Replier::new(terms), negotiated, disk, write: None }
    }

    fn take(&mut self, event: Event<'_>, log: &mut Vec<String>, out: &mut Vec<u8>) {
        match event {
            Event::Command(cookie, command) => {
                log.push(format!("{} {command:?}", cookie.0));
                self.command(cookie, command, out);
            }
            Event::Write(cookie, write) => {
                self.write = Some((cookie, write, Vec::new()));
                self.written(log, out);
            }
            Event::Payload(bytes) => {
                assert!(!bytes.is_empty(), "a payload event has bytes");
                self.write.as_mut().expect("payload belongs to a write").2.extend_from_slice(bytes);
                self.written(log, out);
            }
            Event::Reject(cookie, rejection) => {
                log.push(format!("{} {rejection:?}", cookie.0));
                self.replier.error(out, cookie, rejection.at, rejection.error, rejection.text);
            }
            Event::Disconnect => unreachable!("taken above"),
        }
    }

    fn written(&mut self, log: &mut Vec<String>, out: &mut Vec<u8>) {
        let (cookie, write, data) = self.write.as_ref().expect("a write is on");
        let left = self.receiver.payload_left() as usize;
        assert_eq!(data.len() + left, write.len as usize, "the receiver's count is the payload's");
        if left > 0 {
            return;
        }
        log.push(format!("{} {write:?} sum={}", cookie.0, data.iter().map(|&b| u64::from(b)).sum::<u64>()));
        let at = write.at as usize;
        self.disk[at..at + data.len()].copy_from_slice(data);
        self.replier.done(out, *cookie, write.at, nbd_proto::wire::CommandKind::WRITE);
        self.write = None;
    }

    fn command(&mut self, cookie: Cookie, command: Command, out: &mut Vec<u8>) {
        let replier = self.replier;
        match command {
            Command::Read { at, len, .. } => {
                replier.read_head(out, cookie, at, len);
                out.extend_from_slice(&self.disk[at as usize..][..len as usize]);
            }
            Command::Zero { at, fast: true, .. } => replier.error(out, cookie, at, WireError::NotSup, "not fast"),
            Command::Zero { at, len, .. } => {
                self.disk[at as usize..][..len as usize].fill(0);
                replier.done(out, cookie, at, command.kind());
            }
            Command::Trim { at, .. } | Command::Cache { at, .. } => replier.done(out, cookie, at, command.kind()),
            Command::Flush { at } => replier.done(out, cookie, at, command.kind()),
            Command::Status { at, len, one, contexts } => {
                let hole = AllocationFlags::HOLE.with(AllocationFlags::ZERO).0;
                let all = [Extent { len: len.min(4096), flags: 0 }, Extent { len: len - len.min(4096), flags: hole }];
                for (i, id) in contexts.iter().enumerate() {
                    let last = i + 1 == contexts.len() as usize;
                    let count = if one { 1 } else { 2 };
                    replier.status(out, cookie, at, id, all[..count].iter().copied(), last);
                }
            }
        }
    }
}

/// A seeded stream of numbers (SplitMix64): the tests need variety, and must be repeatable.
#[derive(Clone, Debug)]
pub struct Seed(pub u64);

impl Seed {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    pub fn chance(&mut self, one_in: u64) -> bool {
        self.below(one_in) == 0
    }

    pub fn pick<'a, T>(&mut self, all: &'a [T]) -> &'a T {
        &all[self.below(all.len() as u64) as usize]
    }
}

pub fn option(opt: u32, data: &[u8]) -> Vec<u8> {
    option_of(opt, u32::try_from(data.len()).unwrap(), data)
}

/// An option with a false length.
pub fn option_of(opt: u32, len: u32, data: &[u8]) -> Vec<u8> {
    [b"IHAVEOPT".as_slice(), &opt.to_be_bytes(), &len.to_be_bytes(), data].concat()
}
