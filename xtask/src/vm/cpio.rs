//! Archives that the kernel unpacks as its first root (cpio, "newc" format; initramfs-buffer-format of the kernel).

/// An archive in the making.
#[derive(Debug, Default)]
pub(crate) struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    /// Adds a directory; its parents come before it.
    pub(crate) fn dir(&mut self, path: &str) {
        self.entry(path, 0o040_755, &[]);
    }

    /// Adds a file that may be executed.
    pub(crate) fn file(&mut self, path: &str, data: &[u8]) {
        self.entry(path, 0o100_755, data);
    }

    /// The whole archive.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        self.bytes
    }

    fn entry(&mut self, path: &str, mode: u32, data: &[u8]) {
        self.entries += 1;
        let len = u32::try_from(data.len()).expect("what starts a machine is small");
        let name_len = path.len() as u32 + 1;
        // Inode, mode, uid, gid, links, mtime, size, device (2), special file's device (2), length of the name, checksum.
        let fields = [self.entries, mode, 0, 0, 1, 0, len, 0, 0, 0, 0, name_len, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(data);
        self.pad();
    }

    /// Names and data end at multiples of four bytes.
    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_laid_out_as_the_kernel_reads_it() {
        let mut archive = Archive::default();
        archive.dir("d");
        archive.file("d/abc", b"hello");
        let bytes = archive.finish();
        assert_eq!(bytes.len() % 4, 0);
        // A head has 110 bytes; "d" and its zero bring it to 112.
        assert_eq!(&bytes[..22], b"07070100000001000041ed");
        let file = &bytes[112..];
        assert_eq!(&file[14..22], b"000081ed");
        assert_eq!(&file[54..62], b"00000005");
        assert_eq!(&file[94..102], b"00000006");
        assert_eq!(&file[110..116], b"d/abc\0");
        assert_eq!(&file[116..124], b"hello\0\0\0");
        assert!(file[124..].starts_with(b"070701"));
    }
}
