//! [`Target`]: the properties of an open file or block device, read once.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::PathBuf,
};

use blkdev::Context;
use nix::{
    errno::Errno,
    fcntl::{FallocateFlags, fallocate},
    sys::statfs::{EXT4_SUPER_MAGIC, F2FS_SUPER_MAGIC, FUSE_SUPER_MAGIC, TMPFS_MAGIC, fstatfs},
    unistd::{Whence, lseek},
};

use crate::sys;

/// `FALLOC_FL_*` modes for `fallocate`.
pub(crate) const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
/// As [`PUNCH`], but the range stays allocated.
pub(crate) const ZERO: i32 = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;
/// Allocates the unallocated parts of the range, as zeroes.
pub(crate) const FILL: i32 = libc::FALLOC_FL_KEEP_SIZE;

/// Properties of a file, and how operations on it are done.
#[derive(Clone, Debug)]
pub(crate) struct Target {
    pub(crate) is_disk: bool,
    /// A power of two: the alignment that `O_DIRECT` requires of memory, offsets and lengths, or that `fallocate` requires on a
    /// block device.
    pub(crate) block_size: u32,
    pub(crate) preferred_block_size: u32,
    pub(crate) discard_alignment: u32,
    pub(crate) serial: String,
    pub(crate) rotational: bool,
    /// A completed write survives a power failure: neither the kernel nor the disk caches it.
    pub(crate) write_through: bool,
    pub(crate) zero: bool,
    /// Mode of `fallocate` for zeroes that may be deallocated.
    pub(crate) zero_mode: i32,
    pub(crate) discard: bool,
    pub(crate) status: bool,
    /// The file lives in the page cache only: no access waits for a disk.
    pub(crate) in_memory: bool,
    /// Short writes are cheaper inline.
    pub(crate) inline_writes: bool,
}

/// Checks that it is a regular file or a block device.
pub(crate) fn check_type(meta: &fs::Metadata, name: &str) -> io::Result<()> {
    let kind = meta.file_type();
    let what = match () {
        () if kind.is_file() || kind.is_block_device() => return Ok(()),
        () if kind.is_dir() => "a directory",
        () if kind.is_char_device() => "a character device",
        () if kind.is_socket() => "a socket",
        () if kind.is_fifo() => "a pipe",
        () => "neither",
    };
    let text = format!("{name} is {what}; use a regular file or a block device");
    Err(io::Error::new(io::ErrorKind::InvalidInput, text))
}

impl Target {
    /// Reads the properties of `file`; `name` is for messages.
    pub(crate) fn new(file: &File, name: &str, direct: bool, read_only: bool) -> io::Result<Self> {
        let meta = file.metadata()?;
        check_type(&meta, name)?;
        if meta.file_type().is_block_device() {
            Self::disk(file, &meta, name, direct, read_only)
        } else {
            Self::regular(file, &meta, name, direct, read_only)
        }
    }

    fn regular(file: &File, meta: &fs::Metadata, name: &str, direct: bool, read_only: bool) -> io::Result<Self> {
        let queue = Sysfs::of(meta.dev());
        let block_size = if direct { direct_block_size(file, name, queue.number("logical_block_size"))? } else { 1 };
        let magic = fstatfs(file).map(|fs| fs.filesystem_type()).ok();
        let preferred = u32::try_from(meta.blksize()).ok().filter(|n| n.is_power_of_two()).unwrap_or(0);
        // Past the end and with KEEP_SIZE: this checks for support of holes without punching one.
        let end = meta.len().checked_next_multiple_of(1 << 20).and_then(|end| end.try_into().ok()).unwrap_or(i64::MAX);
        let punch = !read_only
            && match fallocate(file, FallocateFlags::from_bits_retain(PUNCH), end, 4096) {
                // No space, or an invalid offset: this does not mean that holes are unsupported.
                Ok(()) | Err(Errno::EFBIG | Errno::ENOSPC | Errno::EDQUOT | Errno::EINTR) => true,
                Err(_) => false,
            };
        Ok(Self {
            is_disk: false,
            block_size,
            preferred_block_size: preferred.clamp(4096, 1 << 20).max(block_size),
            discard_alignment: block_size,
            serial: String::new(),
            rotational: queue.number("rotational") == Some(1),
            write_through: false,
            zero: punch,
            zero_mode: PUNCH,
            discard: punch,
            // Not for FUSE: a query needs a descriptor, and this process could not exit while the FUSE server does not respond.
            status: magic != Some(FUSE_SUPER_MAGIC)
                && !matches!(lseek(file, 0, Whence::SeekData), Err(e) if e != Errno::ENXIO),
            in_memory: !direct && magic == Some(TMPFS_MAGIC),
            inline_writes: !direct
                && [EXT4_SUPER_MAGIC, F2FS_SUPER_MAGIC, TMPFS_MAGIC].into_iter().any(|m| magic == Some(m)),
        })
    }

    fn disk(file: &File, meta: &fs::Metadata, name: &str, direct: bool, read_only: bool) -> io::Result<Self> {
        let context = |e: io::Error| Context::wrap(format!("cannot get the block size of {name}: {e}"), e);
        let logical = sys::logical_block_size(file).map_err(context)?;
        let physical = sys::physical_block_size(file).map_err(context)?;
        // Through the page cache only fallocate needs alignment. But the block size of a device must hold for all requests.
        let block_size = if direct { direct_block_size(file, name, Some(logical.into()))? } else { logical };
        if !read_only && sys::is_read_only(file).map_err(context)? {
            let text = format!("{name} is a read-only block device; use read-only=true");
            return Err(io::Error::new(io::ErrorKind::ReadOnlyFilesystem, text));
        }
        let queue = Sysfs::of(meta.rdev());
        let write_zeroes = queue.number("write_zeroes_max_bytes").is_some_and(|n| n > 0);
        let discard = queue.number("discard_max_bytes").is_some_and(|n| n > 0);
        let granularity = queue.number("discard_granularity").and_then(|n| u32::try_from(n).ok()).unwrap_or(0);
        Ok(Self {
            is_disk: true,
            block_size,
            preferred_block_size: physical.clamp(4096, 1 << 20).max(block_size),
            discard_alignment: granularity.max(1).next_multiple_of(block_size),
            serial: queue.serial(),
            rotational: queue.number("rotational") == Some(1),
            write_through: direct && queue.text("write_cache").as_deref() == Some("write through"),
            // Without hardware support the kernel writes the zeroes itself, which needs no data from us. But not for
            // PUNCH_HOLE.
            zero: !read_only,
            zero_mode: if write_zeroes { PUNCH } else { ZERO },
            discard: !read_only && discard,
            status: false,
            in_memory: false,
            inline_writes: !direct,
        })
    }
}

/// The alignment that `O_DIRECT` requires of offsets, lengths and memory, as one number: a `Buf` can start at any multiple of
/// the block size.
fn direct_block_size(file: &File, name: &str, logical: Option<u64>) -> io::Result<u32> {
    let fallback = logical.and_then(|n| u32::try_from(n).ok()).unwrap_or(4096);
    let size = match sys::direct_alignment(file) {
        Some((0, _) | (_, 0)) => {
            let text = format!("{name} does not support direct access (O_DIRECT); leave out direct=true");
            return Err(io::Error::new(io::ErrorKind::Unsupported, text));
        }
        Some((memory, offset)) => memory.max(offset),
        None => fallback,
    };
    if size.is_power_of_two() && size <= 65536 {
        return Ok(size);
    }
    let text = format!(
        "{name} needs direct transfers in units of {size} bytes, which is not supported; leave out direct=true"
    );
    Err(io::Error::new(io::ErrorKind::Unsupported, text))
}

/// A block device's directory in sysfs, which may be absent.
struct Sysfs(PathBuf);

impl Sysfs {
    /// For a partition, the directory of its disk.
    fn of(dev: u64) -> Self {
        let own = PathBuf::from(format!("/sys/dev/block/{}:{}", libc::major(dev), libc::minor(dev)));
        Self(if own.join("partition").exists() { own.join("..") } else { own })
    }

    fn text(&self, attribute: &str) -> Option<String> {
        Some(fs::read_to_string(self.0.join("queue").join(attribute)).ok()?.trim().to_owned())
    }

    fn number(&self, attribute: &str) -> Option<u64> {
        self.text(attribute)?.parse().ok()
    }

    fn serial(&self) -> String {
        let read = |at: &str| fs::read_to_string(self.0.join(at)).ok();
        read("serial").or_else(|| read("device/serial")).unwrap_or_default().trim().to_owned()
    }
}
