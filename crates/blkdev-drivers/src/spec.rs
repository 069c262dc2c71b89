//! [`Spec`]: an export in one word of the command line.

use std::{ffi::OsStr, os::unix::ffi::OsStrExt, str::FromStr};

use crate::{
    drivers::{find, meant},
    error::Error,
    property::Access,
    settings::Settings,
};

/// `[NAME:]DRIVER[=VALUE][,PROPERTY=VALUE]...`, parsed and checked, nothing opened. The grammar is in the
/// [crate's documentation](crate#the-words).
#[derive(Clone, Debug)]
pub struct Spec {
    /// What comes before the colon; empty when there is none.
    pub name: String,
    /// The driver and what is set on it.
    pub settings: Settings,
}

impl Spec {
    /// From one argument. Paths in it need not be UTF-8.
    ///
    /// # Errors
    /// The arguments are invalid; the error is one line.
    pub fn parse(text: &OsStr) -> Result<Self, Error> {
        let (bytes, shown) = (text.as_bytes(), text.display());
        let equals = bytes.iter().position(|byte| *byte == b'=').unwrap_or(bytes.len());
        let colon = bytes[..equals].iter().position(|byte| *byte == b':');
        let (name, words) = colon.map_or((&bytes[..0], bytes), |at| (&bytes[..at], &bytes[at + 1..]));
        let utf8 = |name: &[u8]| {
            let invalid = |_| Error::invalid(format!("\"{shown}\": names must be UTF-8"));
            String::from_utf8(name.to_vec()).map_err(invalid)
        };
        let mut words = split(words).into_iter();
        let first = words.next().unwrap_or_default();
        let (driver, value) = pair(&first);
        let driver = utf8(driver)?;
        if driver.is_empty() {
            return Err(Error::invalid(format!(
                "\"{shown}\" names no driver: expected [NAME:]DRIVER=VALUE[,PROPERTY=VALUE]..."
            )));
        }
        let found = find(&driver).map_err(|error| match (meant(&driver), value) {
            (Some(meant), Some(value)) => {
                Error::unknown_driver(&driver, &format!("did you mean {meant}={}?", value.display()))
            }
            // A path without its driver.
            (_, None) if driver.contains(['/', '.']) => {
                Error::unknown_driver(&driver, &format!("did you mean io_uring={driver}?"))
            }
            _ => error,
        })?;
        let mut settings = Settings::new(found);
        if let Some(value) = value {
            settings.set_os(settings.driver().value, value)?;
        }
        // What a comma cut off.
        let mut before = first.clone();
        for word in words {
            match pair(&word) {
                (name, Some(value)) => {
                    let name = utf8(name)?;
                    settings.set_os(&name, value).map_err(|error| match settings.property(&name) {
                        Err(_) if error.to_string().contains("did you mean") => error,
                        Err(_) if is_name(&name) => error.with(&known(&settings)).with(&comma(&before, &word)),
                        Err(_) => error.with(&comma(&before, &word)),
                        Ok(_) => error,
                    })?;
                }
                (b"", None) => {
                    return Err(Error::invalid(format!(
                        "\"{shown}\": empty property (write \",,\" for a comma in a value)"
                    )));
                }
                (name, None) => {
                    let name = OsStr::from_bytes(name).display();
                    let comma = comma(&before, &word);
                    return Err(Error::invalid(format!("\"{name}\" needs a value: {name}=VALUE{comma}")));
                }
            }
            before = word;
        }
        Ok(Self { name: utf8(name)?, settings })
    }
}

impl FromStr for Spec {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        Self::parse(OsStr::new(text))
    }
}

/// Whether it looks like the name of a property, and not like a part of a path.
fn is_name(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte))
}

/// The properties that can be set.
fn known(settings: &Settings) -> String {
    let properties = settings.driver().properties().filter(|property| property.access != Access::ReadOnly);
    let names: Vec<&str> = properties.map(|property| property.name).collect();
    format!("; it has {}", names.join(", "))
}

/// The corrected argument, if two arguments were meant as one.
fn comma(before: &[u8], word: &[u8]) -> String {
    let twice = |word: &[u8]| OsStr::from_bytes(word).display().to_string().replace(',', ",,");
    format!("; write \",,\" for a comma in a value: {},,{}", twice(before), twice(word))
}

fn pair(word: &[u8]) -> (&[u8], Option<&OsStr>) {
    match word.iter().position(|byte| *byte == b'=') {
        Some(at) => (&word[..at], Some(OsStr::from_bytes(&word[at + 1..]))),
        None => (word, None),
    }
}

/// Cuts at commas; two of them are one that stays.
fn split(text: &[u8]) -> Vec<Vec<u8>> {
    let mut words = vec![Vec::new()];
    let mut bytes = text.iter().copied().peekable();
    while let Some(byte) = bytes.next() {
        if byte == b',' && bytes.next_if_eq(&b',').is_none() {
            words.push(Vec::new());
        } else {
            words.last_mut().expect("there is a first word").push(byte);
        }
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, name: &str, driver: &str, values: &[(&str, &str)]) {
        let spec: Spec = text.parse().unwrap_or_else(|error| panic!("{text}: {error}"));
        assert_eq!((spec.name.as_str(), spec.settings.driver().name), (name, driver), "{text}");
        for (property, value) in values {
            assert_eq!(spec.settings.get(property).as_deref(), Ok(*value), "{text}: {property}");
        }
    }

    fn refuse(text: &str, errno: i32, line: &str) {
        let error = text.parse::<Spec>().expect_err(text);
        assert_eq!((error.errno(), error.to_string().as_str()), (errno, line), "{text}");
    }

    #[test]
    fn the_short_form_is_the_long_form() {
        check(
            "io_uring=disk.img",
            "",
            "io_uring",
            &[("path", "disk.img"), ("direct", "false"), ("num-entries", "128")],
        );
        check("io_uring,path=disk.img", "", "io_uring", &[("path", "disk.img")]);
        check("io-uring=disk.img,num_entries=64", "", "io_uring", &[("num-entries", "64")]);
        check("vhost-user=/s,num-queues=2", "", "vhost-user", &[("path", "/s"), ("num-queues", "2")]);
        check("virtio-blk-vhost-user,path=/s", "", "vhost-user", &[("path", "/s"), ("queue-size", "256")]);
        check("memory=1.5G", "", "memory", &[("size", "1610612736")]);
        check("null,size=512", "", "null", &[("size", "512")]);
    }

    #[test]
    fn a_name_ends_at_a_colon_before_the_first_equals_sign() {
        check("disk:io_uring=a", "disk", "io_uring", &[("path", "a")]);
        check("a b/c:memory=1M", "a b/c", "memory", &[]);
        check(":memory=1M", "", "memory", &[]);
        check("disk:io_uring,path=x:y", "disk", "io_uring", &[("path", "x:y")]);
        check("io_uring=x:y=z", "", "io_uring", &[("path", "x:y=z")]);
        check(
            "io_uring,path=/dev/disk/by-path/pci-0000:00",
            "",
            "io_uring",
            &[("path", "/dev/disk/by-path/pci-0000:00")],
        );
    }

    #[test]
    fn two_commas_are_a_comma() {
        check("io_uring=a,,b,read-only=true", "", "io_uring", &[("path", "a,b"), ("read-only", "true")]);
        check("io_uring=a,,,direct=true", "", "io_uring", &[("path", "a,"), ("direct", "true")]);
        check("io_uring=,,,,", "", "io_uring", &[("path", ",,")]);
    }

    #[test]
    fn paths_need_not_be_utf_8() {
        let parse = |bytes: &[u8]| Spec::parse(OsStr::from_bytes(bytes));
        let spec = parse(b"a:io_uring=/x\xff,,y,direct=true").expect("a path has any bytes");
        assert_eq!(spec.settings.path("path").expect("it is set").as_os_str().as_bytes(), b"/x\xff,y");
        assert_eq!((spec.name.as_str(), spec.settings.get("direct").as_deref()), ("a", Ok("true")));
        let spec = parse(b"vhost-user,path=\xff").expect("a path has any bytes");
        assert_eq!(spec.settings.get("path").as_deref(), Ok("\u{fffd}"));
        for (words, line) in [
            (&b"\xff:io_uring=x"[..], "\"\u{fffd}:io_uring=x\": names must be UTF-8"),
            (b"\xff=x", "\"\u{fffd}=x\": names must be UTF-8"),
            (b"io_uring=x,direct=\xff", "io_uring: direct=\u{fffd}: value must be UTF-8"),
        ] {
            assert_eq!(parse(words).expect_err(line).to_string(), line);
        }
    }

    #[test]
    fn the_later_value_wins() {
        check(
            "io_uring=a,path=b,direct=true,path=c,direct=false",
            "",
            "io_uring",
            &[("path", "c"), ("direct", "false")],
        );
    }

    #[test]
    fn what_is_wrong_is_said_in_one_line() {
        let known = "known drivers: io_uring, vhost-user, nvme, nvme-io_uring, vdpa, virtio-pci, memory, null";
        let known = if cfg!(feature = "libblkio") { format!("{known}, libblkio") } else { known.into() };
        refuse("diskimg", libc::ENOENT, &format!("unknown driver \"diskimg\"; {known}"));
        refuse("disk.img", libc::ENOENT, "unknown driver \"disk.img\"; did you mean io_uring=disk.img?");
        refuse("/dev/sdb", libc::ENOENT, "unknown driver \"/dev/sdb\"; did you mean io_uring=/dev/sdb?");
        refuse("file=x", libc::ENOENT, "unknown driver \"file\"; did you mean io_uring=x?");
        refuse("a:path=/x=y", libc::ENOENT, "unknown driver \"path\"; did you mean io_uring=/x=y?");
        refuse("ram", libc::ENOENT, "unknown driver \"ram\"; did you mean memory?");
        refuse("io_urnig=a", libc::ENOENT, "unknown driver \"io_urnig\"; did you mean io_uring?");
        refuse(
            "io_uring=a,num-queue=1",
            libc::ENOENT,
            "io_uring has no property \"num-queue\"; did you mean num-queues?",
        );
        refuse(
            "io_uring=a,colour=red",
            libc::ENOENT,
            "io_uring has no property \"colour\"; it has path, fd, read-only, direct, force-share, num-queues, num-poll-queues, num-entries; write \",,\" for a comma in a value: io_uring=a,,colour=red",
        );
        refuse(
            "io_uring=a,,b,c.img",
            libc::EINVAL,
            "\"c.img\" needs a value: c.img=VALUE; write \",,\" for a comma in a value: io_uring=a,,b,,c.img",
        );
        refuse("io_uring=a,direct=yes", libc::EINVAL, "io_uring: direct=yes: value must be \"true\" or \"false\"");
        refuse(
            "io_uring=a,num-entries=x",
            libc::EINVAL,
            "io_uring: num-entries=x: value must be a signed 32-bit integer",
        );
        refuse("io_uring=a,capacity=1", libc::EACCES, "io_uring: capacity can only be read");
        refuse(
            "io_uring=a,direct",
            libc::EINVAL,
            "\"direct\" needs a value: direct=VALUE; write \",,\" for a comma in a value: io_uring=a,,direct",
        );
        refuse("io_uring=a,", libc::EINVAL, "\"io_uring=a,\": empty property (write \",,\" for a comma in a value)");
        refuse(
            "memory=1Q",
            libc::EINVAL,
            "memory: size=1Q: value must be a size in whole bytes, such as 512, 64K or 1.5T",
        );
        for text in ["", "=", ":", "disk:", "=x", ",path=x"] {
            refuse(
                text,
                libc::EINVAL,
                &format!("\"{text}\" names no driver: expected [NAME:]DRIVER=VALUE[,PROPERTY=VALUE]..."),
            );
        }
    }
}
