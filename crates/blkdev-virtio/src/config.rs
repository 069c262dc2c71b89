//! A device's configuration space (virtio 1.2, 5.2.4), parsed into valid limits.

use std::io;

use blkdev::PAGE;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ,
    VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};

/// Bytes in a sector, the unit of virtio-blk, independent of the block size.
pub(crate) const SECTOR: u64 = 512;

/// Longest transfer offered, in bytes. One descriptor of this length is enough for NBD clients.
pub(crate) const TRANSFER_MAX: u64 = 32 << 20;

/// Length of `struct virtio_blk_config` up to `write_zeroes_may_unmap`, padding included.
pub(crate) const LEN: usize = 60;

/// Offset of `writeback`, the byte that switches the write cache.
pub(crate) const WRITEBACK: usize = 32;

/// The virtio-blk features of this driver, each with the end of its part of the configuration space.
const FEATURES: [(u32, usize); 10] = [
    (VIRTIO_BLK_F_SIZE_MAX, 12),
    (VIRTIO_BLK_F_SEG_MAX, 16),
    (VIRTIO_BLK_F_RO, 0),
    (VIRTIO_BLK_F_BLK_SIZE, 24),
    (VIRTIO_BLK_F_FLUSH, 0),
    (VIRTIO_BLK_F_TOPOLOGY, 32),
    (VIRTIO_BLK_F_CONFIG_WCE, 33),
    (VIRTIO_BLK_F_MQ, 36),
    (VIRTIO_BLK_F_DISCARD, 48),
    (VIRTIO_BLK_F_WRITE_ZEROES, 57),
];

/// Bytes of the configuration space that the offered features cover.
pub(crate) fn needed(offered: u64) -> usize {
    FEATURES.iter().filter(|(bit, _)| has(offered, *bit)).map(|(_, end)| *end).max().unwrap_or(0).max(8)
}

/// The offered features that this driver uses and whose part of the configuration space was readable.
pub(crate) fn usable(offered: u64, config_len: usize) -> u64 {
    FEATURES
        .iter()
        .filter(|(bit, end)| has(offered, *bit) && *end <= config_len)
        .fold(0, |all, (bit, _)| all | 1 << bit)
}

pub(crate) fn has(features: u64, bit: u32) -> bool {
    features & (1 << bit) != 0
}

/// Checked limits: they keep the promises of [`blkdev::Info`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Config {
    /// In bytes, a multiple of `block_size`.
    pub(crate) capacity: u64,
    pub(crate) block_size: u32,
    /// Whether the configuration has a block size.
    pub(crate) tells_block_size: bool,
    pub(crate) preferred_block_size: u32,
    /// Longest piece in one descriptor, in bytes.
    pub(crate) segment_max: u32,
    /// Most data descriptors of a transfer.
    pub(crate) segments: u16,
    pub(crate) transfer_max: u32,
    pub(crate) zero_max: Option<u64>,
    pub(crate) zero_may_unmap: bool,
    pub(crate) discard_max: Option<u64>,
    pub(crate) discard_alignment: u32,
    pub(crate) queues: u16,
    pub(crate) read_only: bool,
    pub(crate) flush: bool,
}

impl Config {
    /// Limits transfers to `max` bytes, a multiple of every block size.
    pub(crate) fn limit(&mut self, max: u32) {
        self.transfer_max = self.transfer_max.min(max);
        self.segments = self.transfer_max.div_ceil(self.segment_max) as u16;
    }

    /// Reads the fields of `features` (see [`usable`]). `chain_max` is the longest descriptor chain, header and status
    /// included.
    pub(crate) fn parse(bytes: &[u8], features: u64, chain_max: u16) -> io::Result<Self> {
        let has = |bit| has(features, bit);
        let block_size = if has(VIRTIO_BLK_F_BLK_SIZE) { number(bytes, 20, 4) as u32 } else { SECTOR as u32 };
        if !block_size.is_power_of_two() || !(512..=65536).contains(&block_size) {
            return Err(invalid(format!("block size {block_size} is not a power of two from 512 to 65536")));
        }
        let capacity = capacity(bytes, block_size)?;
        let (segment_max, transfer_max) = transfers(bytes, features, block_size, chain_max)?;
        let zero_max = Some(range_max(bytes, 48, block_size)).filter(|max| has(VIRTIO_BLK_F_WRITE_ZEROES) && *max > 0);
        let (discard_max, discard_alignment) = discards(bytes, features, block_size);
        Ok(Self {
            capacity,
            block_size,
            tells_block_size: has(VIRTIO_BLK_F_BLK_SIZE),
            preferred_block_size: preferred_block_size(bytes, features, block_size),
            segment_max,
            segments: transfer_max.div_ceil(segment_max) as u16,
            transfer_max,
            zero_max,
            zero_may_unmap: zero_max.is_some() && bytes[56] != 0,
            discard_max,
            discard_alignment,
            queues: if has(VIRTIO_BLK_F_MQ) { (number(bytes, 34, 2) as u16).max(1) } else { 1 },
            read_only: has(VIRTIO_BLK_F_RO),
            // The value of `writeback` is ignored (5.2.6.2): qemu-storage-daemon leaves it at 0, write-through, while its cache
            // writes back. An unnecessary flush costs little; a missing one loses data.
            flush: has(VIRTIO_BLK_F_FLUSH),
        })
    }
}

/// The longest segment and the longest transfer, in bytes.
fn transfers(bytes: &[u8], features: u64, block_size: u32, chain_max: u16) -> io::Result<(u32, u32)> {
    let block = u64::from(block_size);
    // A segment limit of 0 would forbid all data. Devices with that value mean no limit.
    let size_max = if has(features, VIRTIO_BLK_F_SIZE_MAX) { number(bytes, 8, 4) } else { 0 };
    let size_max = if size_max == 0 { TRANSFER_MAX } else { size_max.min(TRANSFER_MAX) };
    let segment_max = if size_max >= block { size_max / block * block } else { size_max };
    let seg_max = if has(features, VIRTIO_BLK_F_SEG_MAX) { number(bytes, 12, 4).max(1) } else { 1 };
    let seg_max = seg_max.min(u64::from(chain_max.saturating_sub(2)));
    let transfer_max = (segment_max * seg_max).min(TRANSFER_MAX) / block * block;
    let needed = block.max(PAGE as u64);
    if transfer_max < needed {
        return Err(invalid(format!(
            "{seg_max} segments of {size_max} bytes, in chains of at most {chain_max} descriptors, are too little for \
             {needed} bytes"
        )));
    }
    Ok((segment_max as u32, transfer_max as u32))
}

/// The limit in the four bytes from `at` on, of a request without data: in bytes, in whole blocks.
fn range_max(bytes: &[u8], at: usize, block_size: u32) -> u64 {
    // 0 means no limit here, as in Linux's driver.
    let sectors = match number(bytes, at, 4) {
        0 => u64::from(u32::MAX),
        sectors => sectors,
    };
    let block = u64::from(block_size);
    sectors * SECTOR / block * block
}

/// The longest discard, if the device supports discards, and their alignment, in bytes.
fn discards(bytes: &[u8], features: u64, block_size: u32) -> (Option<u64>, u32) {
    let supported = has(features, VIRTIO_BLK_F_DISCARD);
    let alignment = (number(bytes, 44, 4) as u32)
        .checked_mul(SECTOR as u32)
        .filter(|a| supported && *a > 0 && a.is_multiple_of(block_size))
        .unwrap_or(block_size);
    let unit = u64::from(alignment);
    let max = Some(range_max(bytes, 36, block_size) / unit * unit).filter(|max| supported && *max > 0);
    (max, alignment)
}

/// The best block size in bytes: that of the topology, if it is plausible, but at least a page.
fn preferred_block_size(bytes: &[u8], features: u64, block_size: u32) -> u32 {
    let block = u64::from(block_size);
    let size = if has(features, VIRTIO_BLK_F_TOPOLOGY) {
        let physical = block.checked_shl(u32::from(bytes[24])).unwrap_or(0);
        let least = number(bytes, 26, 2) * block;
        [physical, least].into_iter().filter(|b| b.is_power_of_two() && *b <= 1 << 20).fold(block, u64::max) as u32
    } else {
        block_size
    };
    // No device is faster below a page, and most back ends have a page cache.
    size.max(PAGE as u32)
}

/// The error of an invalid configuration.
fn invalid(why: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

/// The capacity in bytes, rounded down to whole blocks.
pub(crate) fn capacity(bytes: &[u8], block_size: u32) -> io::Result<u64> {
    if bytes.len() < 8 {
        return Err(invalid(format!("the configuration space has only {} bytes, too few for a capacity", bytes.len())));
    }
    let sectors = number(bytes, 0, 8);
    let capacity = sectors.checked_mul(SECTOR).filter(|bytes| i64::try_from(*bytes).is_ok());
    let capacity =
        capacity.ok_or_else(|| invalid(format!("a capacity of {sectors} sectors is more than 2^63 bytes")))?;
    Ok(capacity / u64::from(block_size) * u64::from(block_size))
}

/// The block size in bytes, if the configuration has the field.
pub(crate) fn block_size(bytes: &[u8]) -> Option<u32> {
    (bytes.len() >= 24).then(|| number(bytes, 20, 4) as u32)
}

/// The little-endian number in the `len` bytes from `at` on. Missing bytes count as zero.
fn number(bytes: &[u8], at: usize, len: usize) -> u64 {
    (0..len).map(|n| u64::from(bytes.get(at + n).copied().unwrap_or(0)) << (8 * n)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: u64 = 1 << VIRTIO_BLK_F_SIZE_MAX
        | 1 << VIRTIO_BLK_F_SEG_MAX
        | 1 << VIRTIO_BLK_F_BLK_SIZE
        | 1 << VIRTIO_BLK_F_TOPOLOGY
        | 1 << VIRTIO_BLK_F_FLUSH
        | 1 << VIRTIO_BLK_F_CONFIG_WCE
        | 1 << VIRTIO_BLK_F_MQ
        | 1 << VIRTIO_BLK_F_DISCARD
        | 1 << VIRTIO_BLK_F_WRITE_ZEROES;

    fn bytes(fields: &[(usize, &[u8])]) -> [u8; LEN] {
        let mut bytes = [0; LEN];
        bytes[..8].copy_from_slice(&2048u64.to_le_bytes());
        bytes[20..24].copy_from_slice(&512u32.to_le_bytes());
        for (at, value) in fields {
            bytes[*at..at + value.len()].copy_from_slice(value);
        }
        bytes
    }

    fn parse(features: u64, fields: &[(usize, &[u8])]) -> Config {
        Config::parse(&bytes(fields), features, 256).unwrap()
    }

    fn refuse(features: u64, fields: &[(usize, &[u8])], part: &str) {
        let e = Config::parse(&bytes(fields), features, 256).unwrap_err().to_string();
        assert!(e.contains(part), "{e}");
    }

    #[test]
    fn a_device_without_features_is_plain() {
        let c = Config::parse(&bytes(&[])[..8], 0, 256).unwrap();
        assert_eq!((c.capacity, c.block_size, c.segments, c.queues), (1 << 20, 512, 1, 1));
        assert_eq!((c.transfer_max, c.zero_max, c.discard_max, c.flush), (32 << 20, None, None, false));
    }

    #[test]
    fn transfers_are_cut_into_segments_that_fit() {
        let limits = |size: u32, seg: u32| {
            let c = parse(ALL, &[(8, &size.to_le_bytes()), (12, &seg.to_le_bytes())]);
            (c.segment_max, c.segments, c.transfer_max)
        };
        assert_eq!(limits(0, 0), (32 << 20, 1, 32 << 20));
        assert_eq!(limits(4096, 126), (4096, 126, 126 * 4096));
        assert_eq!(limits(4096, u32::MAX), (4096, 254, 254 * 4096));
        assert_eq!(limits(u32::MAX, u32::MAX), (32 << 20, 1, 32 << 20));
        assert_eq!(limits(1000, 100), (512, 100, 51200));
        assert_eq!(limits(100, 100), (100, 98, 9728));
        refuse(ALL, &[(8, &1u32.to_le_bytes())], "too little");
        refuse(ALL, &[(8, &512u32.to_le_bytes()), (12, &7u32.to_le_bytes())], "too little for 4096");
    }

    #[test]
    fn nonsense_is_refused_or_does_no_harm() {
        for size in [0u32, 1, 511, 513, 131072, u32::MAX] {
            refuse(ALL, &[(20, &size.to_le_bytes())], "block size");
        }
        refuse(ALL, &[(0, &[0xff; 8])], "2^63");
        let c = parse(ALL, &[(20, &4096u32.to_le_bytes()), (36, &1u32.to_le_bytes()), (44, &[0xff; 4]), (48, &[1])]);
        assert_eq!((c.zero_max, c.discard_max, c.discard_alignment), (None, None, 4096));
        let c = parse(ALL, &[(24, &[200]), (26, &[3, 0]), (44, &[3])]);
        assert_eq!((c.preferred_block_size, c.discard_alignment), (4096, 1536));
        assert_eq!(
            (c.zero_max, c.discard_max),
            (Some(u64::from(u32::MAX) * 512), Some(u64::from(u32::MAX) * 512 / 1536 * 1536))
        );
    }

    /// For every configuration, the limits keep the promises of [`blkdev::Info`], and nothing overflows.
    #[test]
    fn extremes_are_refused_or_keep_the_promises() {
        let mut random = 1_u64;
        let mut next = || {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random
        };
        let words =
            [0, 1, 2, 3, 511, 512, 513, 4096, 65535, 65536, 131_072, 1 << 31, (1 << 31) - 1, u32::MAX - 1, u32::MAX];
        let mut good = 0;
        for _ in 0..200_000 {
            let mut bytes = [0; LEN];
            for word in bytes.chunks_exact_mut(4) {
                word.copy_from_slice(&words[(next() % words.len() as u64) as usize].to_le_bytes());
            }
            bytes[7] &= next() as u8;
            let chain_max = words[(next() % words.len() as u64) as usize] as u16;
            let (features, len) = (next() & next(), (next() % (LEN as u64 + 1)) as usize);
            let Ok(mut c) = Config::parse(&bytes[..len.max(8)], usable(features, len.max(8)), chain_max) else {
                continue;
            };
            good += 1;
            c.limit(2 << 20);
            let block = u64::from(c.block_size);
            assert!(c.block_size.is_power_of_two() && c.preferred_block_size.is_power_of_two(), "{c:?}");
            assert!(c.capacity.is_multiple_of(block) && i64::try_from(c.capacity).is_ok(), "{c:?}");
            assert!(c.transfer_max >= PAGE as u32 && u64::from(c.transfer_max).is_multiple_of(block), "{c:?}");
            assert!(c.segments >= 1 && c.segments + 2 <= chain_max && c.queues >= 1, "{c:?} in {chain_max}");
            assert!(u64::from(c.segments) * u64::from(c.segment_max) >= u64::from(c.transfer_max), "{c:?}");
            assert!(c.zero_max.is_none_or(|max| max > 0 && max.is_multiple_of(block)), "{c:?}");
            let alignment = u64::from(c.discard_alignment);
            assert!(alignment.is_multiple_of(block), "{c:?}");
            assert!(c.discard_max.is_none_or(|max| max > 0 && max.is_multiple_of(alignment)), "{c:?}");
        }
        assert!(good > 1000, "{good}");
    }

    #[test]
    fn a_short_configuration_costs_only_the_features_it_lacks() {
        assert_eq!(needed(ALL), 57);
        assert_eq!(needed(0), 8);
        assert_eq!(usable(ALL, 36) & (1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES), 0);
        assert!(has(usable(ALL, 36), VIRTIO_BLK_F_MQ));
        assert_eq!(usable(u64::MAX, LEN) & !ALL, 1 << VIRTIO_BLK_F_RO);
    }

    #[test]
    fn a_device_that_can_flush_is_flushed_whatever_it_says_of_its_cache() {
        assert!(parse(ALL, &[(32, &[0])]).flush);
        assert!(parse(ALL, &[(32, &[1])]).flush);
        assert!(parse(1 << VIRTIO_BLK_F_FLUSH, &[(32, &[0])]).flush);
        assert!(!parse(ALL & !(1 << VIRTIO_BLK_F_FLUSH), &[(32, &[1])]).flush);
    }
}
