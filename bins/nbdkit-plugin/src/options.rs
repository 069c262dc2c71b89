//! Options of nbdkit's command line that plugins need but get too late or never: `-r`, which decides how the device is opened,
//! and `--run`, with which nbdkit forks to serve.

/// Whether the command line of this process has `-r`. `false` if it cannot be read; nbdkit itself still refuses writes.
pub(crate) fn read_only() -> bool {
    is_given(&READ_ONLY)
}

/// Whether nbdkit runs a command (`--run`): in this process, while a child process serves.
pub(crate) fn runs_command() -> bool {
    is_given(&RUN)
}

/// An option of nbdkit.
struct NbdkitOption {
    letter: Option<u8>,
    /// Long names, with the shortest abbreviation of each.
    names: &'static [(&'static [u8], usize)],
}

/// `--re` is the shortest: there is `--run`, too.
const READ_ONLY: NbdkitOption = NbdkitOption { letter: Some(b'r'), names: &[(b"readonly", 2), (b"read-only", 2)] };
const RUN: NbdkitOption = NbdkitOption { letter: None, names: &[(b"run", 2)] };

/// Parses by nbdkit's rules (getopt_long): options may follow the plugin's name, and long ones may be abbreviated.
fn is_given(option: &NbdkitOption) -> bool {
    let line = std::fs::read("/proc/self/cmdline").unwrap_or_default();
    has(option, line.split(|&byte| byte == 0).skip(1))
}

/// nbdkit's short options with a value: the rest of the argument is that value.
const VALUED: &[u8] = b"DegiPptuU";

fn has<'a>(option: &NbdkitOption, words: impl Iterator<Item = &'a [u8]>) -> bool {
    let mut words = words.take_while(|word| *word != b"--");
    while let Some(word) = words.next() {
        if let Some(name) = word.strip_prefix(b"--") {
            let mut parts = name.split(|byte| *byte == b'=');
            let (name, value) = (parts.next().unwrap_or_default(), parts.next());
            if option.names.iter().any(|(whole, least)| name.len() >= *least && whole.starts_with(name)) {
                return true;
            }
            if name == b"run" && value.is_none() {
                // Its value is the next argument, which may begin with a dash. Values of other long options hardly do.
                words.next();
            }
        } else if let Some(letters) = word.strip_prefix(b"-") {
            let wanted = |letter: u8| option.letter == Some(letter);
            match letters.iter().position(|letter| VALUED.contains(letter) || wanted(*letter)) {
                Some(at) if wanted(letters[at]) => return true,
                // Its value is the next argument.
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
            assert_eq!(has(&READ_ONLY, line.split(' ').map(str::as_bytes)), expected, "{line}");
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

    #[test]
    fn run_is_found() {
        let check = |line: &str, expected| {
            assert_eq!(has(&RUN, line.split(' ').map(str::as_bytes)), expected, "{line}");
        };
        check("nbdblk io_uring path=/f --run cmd", true);
        check("--run=cmd nbdblk", true);
        check("--ru cmd nbdblk", true);
        check("-f --readonly nbdblk", false);
        check("-U --run nbdblk", false);
        check("nbdblk run=x -- --run x", false);
        assert!(!runs_command());
    }
}
