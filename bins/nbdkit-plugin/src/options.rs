//! Whether nbdkit was given `-r`: it tells plugins only when a client comes, which is too late to open a device so.

/// Whether the command line of this process asks for read-only service, by nbdkit's rules: getopt_long's, options also after
/// the plugin's name, long ones cut short. Where it cannot be read the answer is no; nbdkit itself still refuses writes.
pub(crate) fn read_only() -> bool {
    let line = std::fs::read("/proc/self/cmdline").unwrap_or_default();
    asks(line.split(|&byte| byte == 0).skip(1))
}

/// nbdkit's short options that take a value: what follows in the same word is that value.
const VALUED: &[u8] = b"DegiPptuU";

fn asks<'a>(words: impl Iterator<Item = &'a [u8]>) -> bool {
    let mut words = words.take_while(|word| *word != b"--");
    while let Some(word) = words.next() {
        if let Some(name) = word.strip_prefix(b"--") {
            // `--re` is as short as it gets: there is `--run`, too.
            if name.starts_with(b"re") && (b"readonly".starts_with(name) || b"read-only".starts_with(name)) {
                return true;
            }
        } else if let Some(letters) = word.strip_prefix(b"-") {
            match letters.iter().position(|letter| VALUED.contains(letter) || *letter == b'r') {
                Some(at) if letters[at] == b'r' => return true,
                // Its value is the next word.
                Some(at) if at + 1 == letters.len() => drop(words.next()),
                _ => {}
            }
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn read_only_is_found_where_getopt_finds_it() {
        let check = |line: &str, expected| {
            assert_eq!(asks(line.split(' ').map(str::as_bytes)), expected, "{line}");
        };
        check("-r nbdblk io_uring path=/f", true);
        check("nbdblk io_uring path=/f -r", true);
        check("-fr nbdblk", true);
        check("-frU /sock nbdblk", true);
        check("-f --readonly nbdblk", true);
        check("--read-only nbdblk", true);
        check("--read nbdblk", true);
        check("--run cmd nbdblk", false);
        check("-f nbdblk io_uring path=r", false);
        check("-Ur nbdblk", false);
        check("-U -r nbdblk", false);
        check("-U - -r nbdblk", true);
        check("nbdblk -- -r", false);
        check("--readonlyx nbdblk", false);
        assert!(!read_only());
    }
}
