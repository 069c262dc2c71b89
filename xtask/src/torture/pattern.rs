//! The content of blocks: it follows from region, block and version, so that a wrong sector shows where it comes from.

use std::ops::RangeInclusive;

use super::rng::Rng;

/// Bytes of a block, the unit of requests and of the journal.
pub(crate) const BLOCK: usize = 4096;

/// Bytes of a sector, the smallest part that a device writes as a whole.
const SECTOR: usize = 512;

/// What a block may have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Permitted {
    pub(crate) versions: RangeInclusive<u32>,
    /// One of these versions that was sent for this block has zeroes.
    pub(crate) zeroes: bool,
    /// The block was discarded.
    pub(crate) anything: bool,
}

/// How a version comes to a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// WRITE.
    Data,
    /// WRITE_ZEROES. Version 0 is the new image.
    Zero,
    /// TRIM: any content.
    Trim,
}

pub(crate) fn kind(version: u32) -> Kind {
    match Rng::new(version.into()).below(16) {
        _ if version == 0 => Kind::Zero,
        0 | 1 => Kind::Zero,
        2 => Kind::Trim,
        _ => Kind::Data,
    }
}

/// Whether the request of this version has the flag FUA.
pub(crate) fn is_fua(version: u32) -> bool {
    Rng::new(!u64::from(version)).chance(10)
}

/// Writes the data of a version of a block.
pub(crate) fn fill(region: u32, block: u32, version: u32, bytes: &mut [u8]) {
    for (n, sector) in bytes.chunks_exact_mut(SECTOR).enumerate() {
        let head = [region, block, n as u32, version];
        let mut rng = Rng::of(u64::from(region) << 32 | u64::from(block), u64::from(version) << 8 | n as u64);
        for (part, word) in sector.chunks_exact_mut(4).zip(head) {
            part.copy_from_slice(&word.to_le_bytes());
        }
        sector[16..].chunks_exact_mut(8).for_each(|part| part.copy_from_slice(&rng.next().to_le_bytes()));
    }
}

/// Checks a block that was read: each sector must be of a permitted version.
///
/// # Errors
/// Describes the first sector that is not.
pub(crate) fn check(region: u32, block: u32, permitted: &Permitted, bytes: &[u8]) -> Result<(), String> {
    let mut expected = [0; BLOCK];
    let mut filled = None;
    for (n, sector) in bytes.chunks_exact(SECTOR).enumerate() {
        if permitted.anything || (permitted.zeroes && sector.iter().all(|byte| *byte == 0)) {
            continue;
        }
        let version = word(sector, 3);
        let is_permitted = permitted.versions.contains(&version) && kind(version) == Kind::Data;
        if is_permitted && filled != Some(version) {
            fill(region, block, version, &mut expected);
            filled = Some(version);
        }
        if !is_permitted || sector != &expected[n * SECTOR..][..SECTOR] {
            let Permitted { versions, zeroes, .. } = permitted;
            let or = if *zeroes { " or zeroes" } else { "" };
            return Err(format!("sector {n} must have a version in {versions:?}{or}, and has {}", describe(sector)));
        }
    }
    Ok(())
}

fn word(sector: &[u8], n: usize) -> u32 {
    u32::from_le_bytes(sector[n * 4..][..4].try_into().expect("a word has four bytes"))
}

fn describe(sector: &[u8]) -> String {
    if sector.iter().all(|byte| *byte == 0) {
        return "zeroes".into();
    }
    let [region, block, n, version] = [0, 1, 2, 3].map(|n| word(sector, n));
    let mut expected = [0; BLOCK];
    fill(region, block, version, &mut expected);
    match expected.get(n as usize * SECTOR..).and_then(|rest| rest.get(..SECTOR)) {
        Some(data) if data == sector => format!("version {version} of sector {n} of block {block} of region {region}"),
        _ => format!("damaged data, which begins with {:02x?}", &sector[..32]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The first version of this kind from `from` on.
    fn version(wanted: Kind, from: u32) -> u32 {
        (from..).find(|version| kind(*version) == wanted).expect("each kind is frequent")
    }

    fn data(versions: RangeInclusive<u32>) -> Permitted {
        Permitted { versions, zeroes: false, anything: false }
    }

    #[test]
    fn only_permitted_versions_pass() {
        let (old, new) = (version(Kind::Data, 1), version(Kind::Data, 100));
        let mut block = [0; BLOCK];
        fill(3, 5, old, &mut block);
        check(3, 5, &data(old..=old), &block).unwrap();
        let lost = check(3, 5, &data(new..=new), &block).unwrap_err();
        assert!(lost.contains(&format!("has version {old} of sector 0 of block 5 of region 3")), "{lost}");
        check(3, 6, &data(old..=old), &block).unwrap_err();
        check(4, 5, &data(old..=old), &block).unwrap_err();
        // A torn block is of two versions, and both must be permitted.
        let mut other = [0; BLOCK];
        fill(3, 5, new, &mut other);
        block[SECTOR..].copy_from_slice(&other[SECTOR..]);
        check(3, 5, &data(old..=new), &block).unwrap();
        check(3, 5, &data(new..=new), &block).unwrap_err();
        block[700] ^= 1;
        assert!(check(3, 5, &data(old..=new), &block).unwrap_err().contains("damaged"));
        check(3, 5, &Permitted { anything: true, ..data(new..=new) }, &block).unwrap();
    }

    #[test]
    fn zeroes_must_be_permitted() {
        assert!(check(1, 1, &data(1..=9), &[0; BLOCK]).unwrap_err().ends_with("has zeroes"));
        let zeroes = Permitted { zeroes: true, ..data(1..=9) };
        check(1, 1, &zeroes, &[0; BLOCK]).unwrap();
        check(1, 1, &zeroes, &[0xab; BLOCK]).unwrap_err();
    }
}
