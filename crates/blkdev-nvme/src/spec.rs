//! NVMe data formats: commands, completions, status codes and Identify structures (NVM Express base specification 2.0 and NVM
//! command set specification 1.0). Pure data: no memory, no device.

use std::fmt;

use blkdev::Error;

/// Opcodes of admin commands (base, figure 138).
pub mod admin {
    #![allow(missing_docs, reason = "the names are the specification's")]
    pub const DELETE_SQ: u8 = 0x00;
    pub const CREATE_SQ: u8 = 0x01;
    pub const GET_LOG_PAGE: u8 = 0x02;
    pub const DELETE_CQ: u8 = 0x04;
    pub const CREATE_CQ: u8 = 0x05;
    pub const IDENTIFY: u8 = 0x06;
    pub const ABORT: u8 = 0x08;
    pub const SET_FEATURES: u8 = 0x09;
    pub const ASYNC_EVENT_REQUEST: u8 = 0x0c;
}

/// Opcodes of I/O commands (NVM command set, figure 16).
pub mod io {
    #![allow(missing_docs, reason = "the names are the specification's")]
    pub const FLUSH: u8 = 0x00;
    pub const WRITE: u8 = 0x01;
    pub const READ: u8 = 0x02;
    pub const WRITE_ZEROES: u8 = 0x08;
    pub const DATASET_MANAGEMENT: u8 = 0x09;
}

/// Data structures that Identify returns (base, figure 273): CNS values.
pub mod cns {
    #![allow(missing_docs, reason = "the names are the specification's")]
    pub const NAMESPACE: u8 = 0x00;
    pub const CONTROLLER: u8 = 0x01;
    pub const ACTIVE_NAMESPACES: u8 = 0x02;
    pub const CONTROLLER_OF_COMMAND_SET: u8 = 0x06;
}

/// Length of a submission queue entry in bytes.
pub const COMMAND_LEN: usize = 64;

/// Length of a completion queue entry in bytes.
pub const COMPLETION_LEN: usize = 16;

/// Length of every Identify data structure, in bytes.
pub const IDENTIFY_LEN: usize = 4096;

/// Most logical blocks in one command: the count has 16 bits and is one less.
pub const BLOCKS_MAX: u64 = 1 << 16;

/// A submission queue entry, as 16 little-endian words. Word 0 has no command identifier yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Command(pub [u32; 16]);

impl Command {
    /// A command without data.
    pub fn new(opcode: u8, nsid: u32) -> Self {
        let mut words = [0; 16];
        (words[0], words[1]) = (opcode.into(), nsid);
        Self(words)
    }

    /// Sets command-specific words, from word 10 on.
    #[must_use]
    pub fn words(mut self, words: &[u32]) -> Self {
        self.0[10..10 + words.len()].copy_from_slice(words);
        self
    }

    /// Sets the PRP entries: up to two memory pages, or one page and a list of the others.
    #[must_use]
    pub fn prps(mut self, prp1: u64, prp2: u64) -> Self {
        (self.0[6], self.0[7]) = halves(prp1);
        (self.0[8], self.0[9]) = halves(prp2);
        self
    }

    /// Sets an SGL data block descriptor (base, 4.1.2.1) for one contiguous piece of memory.
    #[must_use]
    pub fn sgl(mut self, address: u64, len: u32) -> Self {
        self.0[0] |= 1 << 14;
        (self.0[6], self.0[7]) = halves(address);
        (self.0[8], self.0[9]) = (len, 0);
        self
    }

    /// Sets the command identifier, which its completion returns.
    #[must_use]
    pub fn id(mut self, id: u16) -> Self {
        self.0[0] = self.0[0] & 0xffff | u32::from(id) << 16;
        self
    }

    /// Identify.
    pub fn identify(cns: u8, nsid: u32) -> Self {
        Self::new(admin::IDENTIFY, nsid).words(&[cns.into()])
    }

    /// Read or Write of `blocks` blocks (at least 1) from `block` on.
    pub fn transfer(opcode: u8, nsid: u32, block: u64, blocks: u64, fua: bool) -> Self {
        let (low, high) = halves(block);
        Self::new(opcode, nsid).words(&[low, high, count(blocks) | u32::from(fua) << 30])
    }

    /// Write Zeroes.
    pub fn write_zeroes(nsid: u32, block: u64, blocks: u64, deallocate: bool) -> Self {
        let (low, high) = halves(block);
        Self::new(io::WRITE_ZEROES, nsid).words(&[low, high, count(blocks) | u32::from(deallocate) << 25])
    }

    /// Dataset Management that deallocates `ranges` ranges (1 to 256), which the data lists.
    pub fn deallocate(nsid: u32, ranges: usize) -> Self {
        assert!((1..=RANGES_MAX).contains(&ranges), "{ranges} ranges are not in 1 to 256");
        Self::new(io::DATASET_MANAGEMENT, nsid).words(&[ranges as u32 - 1, 1 << 2])
    }

    /// Create I/O Completion Queue: physically contiguous, with interrupts.
    pub fn create_cq(id: u16, size: u16, vector: u16, address: u64) -> Self {
        let words = [u32::from(id) | u32::from(size - 1) << 16, 3 | u32::from(vector) << 16];
        Self::new(admin::CREATE_CQ, 0).prps(address, 0).words(&words)
    }

    /// Create I/O Submission Queue: physically contiguous, of medium priority, with the completion queue of the same
    /// identifier.
    pub fn create_sq(id: u16, size: u16, address: u64) -> Self {
        let words = [u32::from(id) | u32::from(size - 1) << 16, 1 | 2 << 1 | u32::from(id) << 16];
        Self::new(admin::CREATE_SQ, 0).prps(address, 0).words(&words)
    }

    /// Delete I/O Submission or Completion Queue.
    pub fn delete_queue(opcode: u8, id: u16) -> Self {
        Self::new(opcode, 0).words(&[id.into()])
    }

    /// Abort, for the command with this identifier in this submission queue.
    pub fn abort(queue: u16, id: u16) -> Self {
        Self::new(admin::ABORT, 0).words(&[u32::from(queue) | u32::from(id) << 16])
    }

    /// Set Features.
    pub fn set_features(feature: u8, value: u32) -> Self {
        Self::new(admin::SET_FEATURES, 0).words(&[feature.into(), value])
    }

    /// Get Log Page, the first `len` bytes. It re-enables the asynchronous events of this page.
    pub fn log_page(page: u8, len: u32) -> Self {
        Self::new(admin::GET_LOG_PAGE, u32::MAX).words(&[u32::from(page) | (len / 4 - 1) << 16])
    }
}

/// Most ranges in one Dataset Management command.
pub const RANGES_MAX: usize = 256;

/// Length of one range of Dataset Management, in bytes.
pub const RANGE_LEN: usize = 16;

/// One range of Dataset Management (NVM command set, figure 45), as little-endian words.
pub fn range(block: u64, blocks: u32) -> [u64; 2] {
    [u64::from(blocks) << 32, block]
}

fn halves(value: u64) -> (u32, u32) {
    (value as u32, (value >> 32) as u32)
}

fn count(blocks: u64) -> u32 {
    assert!((1..=BLOCKS_MAX).contains(&blocks), "{blocks} blocks are not in 1 to 65536");
    blocks as u32 - 1
}

/// A completion queue entry (base, 3.3.3.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// Word 0: the command-specific result.
    pub result: u32,
    /// The controller's position in the submission queue.
    pub sq_head: u16,
    /// Submission queue identifier.
    pub sq: u16,
    /// Command identifier.
    pub id: u16,
    /// Status of the command.
    pub status: Status,
}

impl Completion {
    /// Parses the two little-endian halves.
    pub fn parse(low: u64, high: u64) -> Self {
        Self {
            result: low as u32,
            sq_head: high as u16,
            sq: (high >> 16) as u16,
            id: (high >> 32) as u16,
            status: Status((high >> 49) as u16),
        }
    }

    /// The two little-endian halves, with the phase tag.
    pub fn halves(&self, phase: bool) -> (u64, u64) {
        let words = [self.sq_head, self.sq, self.id, self.status.0 << 1 | u16::from(phase)];
        (self.result.into(), words.iter().rev().fold(0, |all, word| all << 16 | u64::from(*word)))
    }

    /// The phase tag in the second half.
    pub fn phase(high: u64) -> bool {
        high >> 48 & 1 == 1
    }
}

/// Status of a command (base, 3.3.3.2.1): status code, status code type and flags, without the phase tag.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Status(pub u16);

impl Status {
    /// Successful completion.
    pub const SUCCESS: Self = Self(0);

    /// A status with this status code type and status code.
    pub const fn new(kind: u8, code: u8) -> Self {
        Self((kind as u16) << 8 | code as u16)
    }

    /// Status code type and status code, without flags.
    pub fn code(self) -> (u8, u8) {
        ((self.0 >> 8) as u8 & 7, self.0 as u8)
    }

    /// Whether the command succeeded.
    #[inline]
    pub fn is_success(self) -> bool {
        self.0 & 0x7ff == 0
    }

    /// The result of a request whose command ended with this status.
    pub fn result(self) -> Result<(), Error> {
        Err(match self.code() {
            (0, 0x00) => return Ok(()),
            (0, 0x01) => Error::NotSupported,
            // Invalid fields, PRPs and SGLs, and exceeded limits.
            (0, 0x02 | 0x0d..=0x13 | 0x16) | (1, 0x80 | 0x83) => Error::Invalid,
            (0, 0x0b) => Error::Gone,
            (0, 0x20) | (1, 0x82) => Error::ReadOnly,
            (0, 0x80) => Error::OutOfRange,
            (0, 0x81) => Error::NoSpace,
            _ => Error::Io,
        })
    }

    fn name(self) -> &'static str {
        match self.code() {
            (0, 0x00) => "success",
            (0, 0x01) => "invalid opcode",
            (0, 0x02) => "invalid field",
            (0, 0x04) => "data transfer error",
            (0, 0x06) => "internal error",
            (0, 0x07) => "aborted by request",
            (0, 0x0b) => "invalid namespace or format",
            (0, 0x20) => "namespace is write protected",
            (0, 0x80) => "LBA out of range",
            (0, 0x81) => "capacity exceeded",
            (0, 0x82) => "namespace not ready",
            (0, 0x83) => "reservation conflict",
            (1, 0x82) => "write to a read-only range",
            (2, 0x80) => "write fault",
            (2, 0x81) => "unrecovered read error",
            (2, 0x86) => "access denied",
            (2, 0x87) => "deallocated or unwritten block",
            (2, _) => "media error",
            (3, _) => "path error",
            _ => "error",
        }
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (kind, code) = self.code();
        write!(f, "{} (NVMe status {kind:x}/{code:02x})", self.name())
    }
}

impl fmt::Debug for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(bytes[at..at + 2].try_into().expect("two bytes"))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

/// The Identify Controller data structure (base, figure 275), as far as this driver uses it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Controller {
    /// Serial number, trimmed.
    pub serial: String,
    /// Model number, trimmed.
    pub model: String,
    /// Longest transfer (MDTS), as a power of two of the smallest memory page; 0: no limit.
    pub mdts: u8,
    /// Longest shutdown (RTD3E), in microseconds; 0: not reported.
    pub shutdown_us: u32,
    /// Supported events (OAES): bit 8 is a change of a namespace's attributes.
    pub oaes: u32,
    /// Supported optional commands (ONCS): bit 2 is Dataset Management, bit 3 Write Zeroes.
    pub oncs: u16,
    /// Bit 0: the controller has a volatile write cache.
    pub vwc: u8,
    /// SGL support: if bits 1:0 are not 0, I/O commands support SGLs; if they are 2, address and length must be multiples of 4.
    pub sgls: u32,
    /// The highest namespace identifier (NN).
    pub namespaces: u32,
}

impl Controller {
    /// Parses the data structure.
    pub fn parse(bytes: &[u8; IDENTIFY_LEN]) -> Self {
        Self {
            serial: text(&bytes[4..24]),
            model: text(&bytes[24..64]),
            mdts: bytes[77],
            shutdown_us: u32_at(bytes, 88),
            oaes: u32_at(bytes, 92),
            oncs: u16_at(bytes, 520),
            vwc: bytes[525],
            sgls: u32_at(bytes, 536),
            namespaces: u32_at(bytes, 516),
        }
    }
}

/// Command limits of the NVM command set (NVM command set, figure 118). 0: no limit reported.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Longest Write Zeroes, as a power of two of the smallest memory page.
    pub wzsl: u8,
    /// Most ranges in one Dataset Management command.
    pub dmrl: u8,
    /// Most blocks in one range.
    pub dmrsl: u32,
    /// Most blocks in all ranges of a command.
    pub dmsl: u64,
}

impl Limits {
    /// Parses the data structure.
    pub fn parse(bytes: &[u8; IDENTIFY_LEN]) -> Self {
        Self { wzsl: bytes[1], dmrl: bytes[3], dmrsl: u32_at(bytes, 4), dmsl: u64_at(bytes, 8) }
    }
}

/// The Identify Namespace data structure (NVM command set, figure 97), as far as this driver uses it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Namespace {
    /// Size in blocks; 0: the namespace does not exist or is inactive.
    pub blocks: u64,
    /// Block size as a power of two.
    pub block_shift: u8,
    /// Bytes of metadata for each block.
    pub metadata: u16,
    /// Type of end-to-end protection; 0: none.
    pub protection: u8,
    /// Write Zeroes can deallocate (`DLFEAT`, bit 3).
    pub zeroes_deallocate: bool,
    /// Preferred granularity of writes in blocks; `None`: not reported.
    pub npwg: Option<u32>,
    /// Preferred granularity of deallocations in blocks; `None`: not reported.
    pub npdg: Option<u32>,
    /// Currently write protected (`NSATTR`, bit 0).
    pub write_protected: bool,
}

impl Namespace {
    /// Parses the data structure.
    pub fn parse(bytes: &[u8; IDENTIFY_LEN]) -> Self {
        let (features, formats, current) = (bytes[24], bytes[25], bytes[26]);
        let high = if formats > 15 { current >> 5 & 3 } else { 0 };
        let format = 128 + 4 * usize::from(current & 15 | high << 4);
        let told = |at: usize| (features & 1 << 4 != 0).then(|| u32::from(u16_at(bytes, at)) + 1);
        Self {
            blocks: u64_at(bytes, 0),
            block_shift: bytes[format + 2],
            metadata: u16_at(bytes, format),
            protection: bytes[29] & 7,
            zeroes_deallocate: bytes[33] & 1 << 3 != 0,
            npwg: told(64),
            npdg: told(68),
            write_protected: bytes[99] & 1 != 0,
        }
    }
}

/// ASCII text padded with blanks.
fn text(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    text.trim_matches(|c: char| c == ' ' || c == '\0').chars().filter(|c| !c.is_control()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_as_specified() {
        let read = Command::transfer(io::READ, 7, 0x1_2345_6789, 8, false).prps(0x1000, 0x2000).id(0xabcd).0;
        assert_eq!(read[..10], [0xabcd_0002, 7, 0, 0, 0, 0, 0x1000, 0, 0x2000, 0]);
        assert_eq!(read[10..], [0x2345_6789, 1, 7, 0, 0, 0]);
        let write = Command::transfer(io::WRITE, 1, 0, BLOCKS_MAX, true).sgl(0xf_0000_0000, 512).0;
        assert_eq!((write[0], write[6], write[7], write[8], write[9]), (0x4001, 0, 0xf, 512, 0));
        assert_eq!(write[12], 0x4000_ffff);
        assert_eq!(Command::write_zeroes(1, 5, 1, true).0[10..13], [5, 0, 1 << 25]);
        assert_eq!(Command::deallocate(1, 256).0[10..12], [255, 4]);
        assert_eq!(Command::create_cq(3, 256, 4, 0x5000).0[10..12], [0x00ff_0003, 0x0004_0003]);
        assert_eq!(Command::create_sq(3, 256, 0x5000).0[10..12], [0x00ff_0003, 0x0003_0005]);
        assert_eq!(Command::log_page(4, 4096).0[10], 0x03ff_0004);
    }

    #[test]
    fn completions_go_to_bytes_and_back() {
        let one = Completion { result: 0x1234_5678, sq_head: 9, sq: 3, id: 0xfffe, status: Status::new(2, 0x81) };
        for phase in [false, true] {
            let (low, high) = one.halves(phase);
            assert_eq!((Completion::parse(low, high), Completion::phase(high)), (one, phase));
        }
    }

    #[test]
    fn status_codes_keep_errors_apart() {
        let check = |kind, code, error| {
            for flags in [0, 1 << 14, 3 << 11] {
                let status = Status(Status::new(kind, code).0 | flags);
                assert_eq!(status.result(), error, "{status}");
                assert_eq!(status.is_success(), error.is_ok());
            }
        };
        check(0, 0, Ok(()));
        check(0, 0x01, Err(Error::NotSupported));
        check(0, 0x02, Err(Error::Invalid));
        check(0, 0x0b, Err(Error::Gone));
        check(0, 0x20, Err(Error::ReadOnly));
        check(1, 0x82, Err(Error::ReadOnly));
        check(0, 0x80, Err(Error::OutOfRange));
        check(0, 0x81, Err(Error::NoSpace));
        check(0, 0x07, Err(Error::Io));
        check(2, 0x81, Err(Error::Io));
        check(2, 0x86, Err(Error::Io));
        check(3, 0x00, Err(Error::Io));
        assert_eq!(Status::new(2, 0x81).to_string(), "unrecovered read error (NVMe status 2/81)");
    }

    #[test]
    fn identify_is_read_where_it_stands() {
        let mut bytes = [0; IDENTIFY_LEN];
        bytes[..8].copy_from_slice(&1000u64.to_le_bytes());
        bytes[24] = 1 << 4;
        bytes[25] = 20;
        bytes[26] = 1 << 5 | 2;
        bytes[64] = 7;
        bytes[68] = 15;
        bytes[99] = 1;
        bytes[128 + 4 * 18..][..4].copy_from_slice(&[8, 0, 12, 0]);
        let ns = Namespace::parse(&bytes);
        assert_eq!((ns.blocks, ns.block_shift, ns.metadata), (1000, 12, 8));
        assert_eq!((ns.npwg, ns.npdg, ns.write_protected), (Some(8), Some(16), true));

        let mut bytes = [b' '; IDENTIFY_LEN];
        bytes[4..9].copy_from_slice(b"S1 42");
        bytes[77] = 5;
        let controller = Controller::parse(&bytes);
        assert_eq!((controller.serial.as_str(), controller.mdts), ("S1 42", 5));
    }
}
