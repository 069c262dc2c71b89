//! What a file looks like that is served byte for byte: an image in a format, perhaps by mistake.

use std::{
    fs::File,
    io,
    os::unix::fs::{FileExt, OpenOptionsExt},
};

use blkdev::Source;

/// How an image of a format starts.
const MAGICS: &[(usize, &[u8], &str)] = &[
    (0, b"QFI\xfb\0\0\0\x01", "qcow"),
    (0, b"QFI\xfb", "qcow2"),
    (0, b"QED\0", "qed"),
    (0, b"KDMV", "vmdk"),
    (0, b"COWD", "vmdk"),
    (0, b"# Disk DescriptorFile", "vmdk"),
    (0, b"vhdxfile", "vhdx"),
    (0, b"conectix", "vhd (vpc)"),
    (64, b"\x7f\x10\xda\xbe", "vdi"),
    (0, b"LUKS\xba\xbe", "luks"),
    (0, b"WithoutFreeSpace", "parallels"),
    (0, b"WithouFreSpacExt", "parallels"),
];

/// Warns if the file is an image in a format: its clients see the format, and not the disk in it.
pub(crate) fn warn(source: &Source) {
    if let Some((name, format)) = look(source) {
        log::warn!(
            "{name} is a {format} image, and is served byte for byte, as raw; to serve the disk in it, open it with \
             qemu-storage-daemon (--blockdev driver=..., --export type=vhost-user-blk) and serve vhost-user=SOCKET"
        );
    }
}

/// Reads the first bytes of a regular file. What goes wrong is reported by the driver, which opens it next.
fn look(source: &Source) -> Option<(String, &'static str)> {
    let (name, file) = match source {
        Source::Path(path) => {
            // Nothing but a regular file is waited for.
            let file = File::options().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path).ok()?;
            (path.display().to_string(), file)
        }
        Source::Fd(fd) => ("the file".into(), File::from(fd.try_clone().ok()?)),
    };
    if !file.metadata().ok()?.is_file() {
        return None;
    }
    let mut start = [0; 128];
    let len = read_start(&file, &mut start).ok()?;
    Some((name, format_of(&start[..len])?))
}

fn read_start(file: &File, start: &mut [u8]) -> io::Result<usize> {
    loop {
        match file.read_at(start, 0) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            read => return read,
        }
    }
}

fn format_of(start: &[u8]) -> Option<&'static str> {
    let is_there = |at: usize, magic: &[u8]| start.get(at..).is_some_and(|rest| rest.starts_with(magic));
    MAGICS.iter().find(|(at, magic, _)| is_there(*at, magic)).map(|(.., format)| *format)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_are_known_by_their_first_bytes() {
        assert_eq!(format_of(b"QFI\xfb\0\0\0\x03"), Some("qcow2"));
        assert_eq!(format_of(b"QFI\xfb\0\0\0\x01"), Some("qcow"));
        assert_eq!(format_of(&[&[b'<'; 64][..], b"\x7f\x10\xda\xbe"].concat()), Some("vdi"));
        assert_eq!(format_of(&[0; 128]), None);
        assert_eq!(format_of(b"QFI"), None);
        assert_eq!(format_of(b""), None);
    }
}
