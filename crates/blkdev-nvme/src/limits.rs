//! From the Identify data of a namespace to the device's limits, and from requests to commands. Common to both drivers.

use std::{io, time::Duration};

use blkdev::{Error, Info, Op};

use crate::spec::{self, BLOCKS_MAX, Command, Controller, Limits, Namespace, RANGES_MAX, Status};

/// The Identify data.
#[derive(Debug)]
pub(crate) struct IdentifyData {
    pub(crate) controller: Controller,
    pub(crate) limits: Limits,
    pub(crate) nsid: u32,
    pub(crate) namespace: Namespace,
}

/// The driver's own limits.
#[derive(Debug)]
pub(crate) struct Shape {
    pub(crate) driver: &'static str,
    pub(crate) target: String,
    /// The controller's smallest memory page, in bytes.
    pub(crate) page: u64,
    pub(crate) transfer_max: u32,
    /// Most ranges in one Dataset Management command.
    pub(crate) ranges: usize,
    pub(crate) queues: u16,
    pub(crate) depth: u16,
    pub(crate) read_only: bool,
    pub(crate) timeout: Option<Duration>,
}

/// The properties of the namespace that its queues need.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Disk {
    pub(crate) nsid: u32,
    pub(crate) block_shift: u8,
    /// Write Zeroes can deallocate.
    deallocate: bool,
    /// Most blocks in one range of Dataset Management.
    range_max: u32,
}

/// The length of `2^power` pages in bytes. A power of 0 means no limit.
fn pages(power: u8, page: u64) -> u64 {
    if power == 0 { u64::MAX } else { 1u64.checked_shl(power.into()).map_or(u64::MAX, |n| n.saturating_mul(page)) }
}

/// For fields in which 0 means no limit.
fn or_max(limit: u64) -> u64 {
    if limit == 0 { u64::MAX } else { limit }
}

impl IdentifyData {
    /// Returns the longest transfer in bytes, within the limits of the controller and of the driver (`most`, less than 2^32).
    ///
    /// # Errors
    /// The controller cannot transfer a single block.
    pub(crate) fn transfer_max(&self, page: u64, most: u64) -> io::Result<u32> {
        let block = 1 << self.namespace.block_shift;
        let told = pages(self.controller.mdts, page);
        if told < block {
            let nsid = self.nsid;
            return Err(unusable(format!(
                "namespace {nsid} has blocks of {block} bytes, but the controller transfers at most {told} (MDTS)"
            )));
        }
        let max = told.min(most).min(BLOCKS_MAX * block);
        Ok((max / block * block).max(page).max(block) as u32)
    }

    /// Returns the device's limits and capabilities, and the properties that its queues need.
    pub(crate) fn describe(&self, shape: Shape) -> (Info, Disk) {
        let Self { controller, limits, nsid, namespace } = self;
        let block = 1u64 << namespace.block_shift;
        let zero_max = (pages(limits.wzsl, shape.page) / block).clamp(1, BLOCKS_MAX) * block;

        let range_max = or_max(limits.dmrsl.into()).min(u32::MAX.into());
        let ranges = or_max(limits.dmrl.into()).min(shape.ranges.min(RANGES_MAX) as u64);
        let unit = namespace.npdg.map_or(1, u64::from) * block;
        // Larger units are implausible; the value is only a hint, so it is ignored.
        let unit = if unit > 1 << 30 { block } else { unit };
        let discard_max = or_max(limits.dmsl).min(ranges * range_max).saturating_mul(block) / unit * unit;

        let preferred = namespace.npwg.map_or(block, |blocks| u64::from(blocks) * block);
        let read_only = shape.read_only || namespace.write_protected;
        let mut info = Info::new(shape.driver, shape.target);
        info.serial = controller.serial.clone();
        info.queues_max = shape.queues;
        info.depth_max = shape.depth;
        info.block_size = block as u32;
        // The preferred size, rounded down to a power of two.
        info.preferred_block_size = 1 << preferred.clamp(block, 1 << 30).ilog2();
        info.transfer_max = shape.transfer_max;
        info.zero_max = zero_max;
        info.discard_max = discard_max.max(unit);
        info.discard_alignment = unit as u32;
        info.timeout = shape.timeout;
        info.caps.read_only = read_only;
        info.caps.flush = controller.vwc & 1 != 0;
        info.caps.fua = true;
        info.caps.zero = controller.oncs & 1 << 3 != 0 && !read_only;
        info.caps.discard = controller.oncs & 1 << 2 != 0 && !read_only && discard_max > 0;
        let disk = Disk {
            nsid: *nsid,
            block_shift: namespace.block_shift,
            deallocate: namespace.zeroes_deallocate,
            range_max: range_max as u32,
        };
        (info, disk)
    }
}

impl Disk {
    #[inline]
    fn blocks(&self, bytes: u64) -> u64 {
        bytes >> self.block_shift
    }

    /// Builds the command for a supported request, without its memory addresses.
    #[inline]
    pub(crate) fn command(&self, op: &Op) -> Command {
        let transfer = |opcode, at: u64, len: usize, fua| {
            Command::transfer(opcode, self.nsid, self.blocks(at), self.blocks(len as u64), fua)
        };
        match op {
            Op::Read { at, buf } => transfer(spec::io::READ, *at, buf.len(), false),
            Op::Write { at, buf, fua } => transfer(spec::io::WRITE, *at, buf.len(), *fua),
            Op::Zero { at, len, unmap } => {
                Command::write_zeroes(self.nsid, self.blocks(*at), self.blocks(*len), *unmap && self.deallocate)
            }
            Op::Discard { at, len } => Command::deallocate(self.nsid, self.ranges(*at, *len).count()),
            Op::Flush => Command::new(spec::io::FLUSH, self.nsid),
            Op::Status { .. } | Op::Prefetch { .. } => unreachable!("unsupported requests were refused before"),
        }
    }

    /// The ranges of a discard.
    pub(crate) fn ranges(&self, at: u64, len: u64) -> impl Iterator<Item = [u64; 2]> {
        let (mut block, end, max) = (self.blocks(at), self.blocks(at + len), u64::from(self.range_max));
        std::iter::from_fn(move || {
            let now = (end - block).min(max);
            block += now;
            (now > 0).then(|| spec::range(block - now, now as u32))
        })
    }
}

/// Translates the status of a request's command into its result.
#[inline]
pub(crate) fn settle(op: &Op, status: Status) -> Result<(), Error> {
    match (op, status.result()) {
        (_, Ok(())) => Ok(()),
        // The command is well-formed. So an invalid field is one that this controller does not support.
        (Op::Zero { .. } | Op::Discard { .. }, Err(Error::Invalid)) => Err(Error::NotSupported),
        (_, Err(error)) => {
            log::debug!("{op:?}: {status}");
            Err(error)
        }
    }
}

/// Whether a number is a valid namespace identifier. The highest number means all namespaces.
pub(crate) fn is_nsid(nsid: u32) -> bool {
    (1..u32::MAX).contains(&nsid)
}

/// # Errors
/// The namespace does not exist, or its format is not supported.
pub(crate) fn check(namespace: &Namespace, nsid: u32) -> io::Result<()> {
    if namespace.blocks == 0 {
        return Err(absent(format!("there is no namespace {nsid}")));
    }
    if namespace.metadata != 0 || namespace.protection != 0 {
        return Err(unusable(format!(
            "namespace {nsid} has {} bytes of metadata with each block, which is not supported; nvme format can select a \
             format without metadata (it erases the namespace)",
            namespace.metadata
        )));
    }
    let shift = namespace.block_shift;
    if !(9..=16).contains(&shift) || namespace.blocks.checked_mul(1 << shift).is_none_or(|len| len > i64::MAX as u64) {
        return Err(unusable(format!(
            "namespace {nsid} has {} blocks of 2^{shift} bytes, which is not supported",
            namespace.blocks
        )));
    }
    Ok(())
}

pub(crate) fn invalid(why: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, why)
}

/// The controller has no such namespace.
pub(crate) fn absent(why: String) -> io::Error {
    io::Error::new(io::ErrorKind::NotFound, why)
}

pub(crate) fn unusable(why: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::Unsupported, why.into())
}
