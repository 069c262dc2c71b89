//! [`Spec`]: an export in one word of the command line.

use std::str::FromStr;

use crate::{Error, Settings, find};

/// `[NAME:]DRIVER[=VALUE][,PROPERTY=VALUE]...`, parsed and checked, nothing opened. The grammar is in the
/// [crate's documentation](crate#the-words).
#[derive(Clone, Debug)]
pub struct Spec {
    /// What comes before the colon; empty when there is none.
    pub name: String,
    /// The driver and what is set on it.
    pub settings: Settings,
}

impl FromStr for Spec {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let equals = text.find('=').unwrap_or(text.len());
        let (name, words) = text[..equals].find(':').map_or(("", text), |at| (&text[..at], &text[at + 1..]));
        let mut words = split(words).into_iter();
        let first = words.next().unwrap_or_default();
        let (driver, value) = pair(&first);
        if driver.is_empty() {
            return Err(Error::invalid(format!(
                "\"{text}\" names no driver: expected [NAME:]DRIVER=VALUE[,PROPERTY=VALUE]..."
            )));
        }
        let mut settings = Settings::new(find(driver)?);
        if let Some(value) = value {
            settings.set(settings.driver().value, value)?;
        }
        for word in words {
            match pair(&word) {
                (name, Some(value)) => settings.set(name, value)?,
                ("", None) => {
                    return Err(Error::invalid(format!(
                        "\"{text}\": empty property (a comma in a value is written \",,\")"
                    )));
                }
                (name, None) => {
                    return Err(Error::invalid(format!(
                        "\"{name}\" needs a value: {name}=VALUE (a comma in a value is written \",,\")"
                    )));
                }
            }
        }
        Ok(Self { name: name.into(), settings })
    }
}

fn pair(word: &str) -> (&str, Option<&str>) {
    word.split_once('=').map_or((word, None), |(name, value)| (name, Some(value)))
}

/// Cuts at commas; two of them are one that stays.
fn split(text: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        if c == ',' && chars.next_if_eq(&',').is_none() {
            words.push(String::new());
        } else {
            words.last_mut().expect("there is a first word").push(c);
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
        refuse("disk.img", libc::ENOENT, &format!("unknown driver \"disk.img\"; {known}"));
        refuse("io_urnig=a", libc::ENOENT, "unknown driver \"io_urnig\"; did you mean io_uring?");
        refuse(
            "io_uring=a,num-queue=1",
            libc::ENOENT,
            "io_uring has no property \"num-queue\"; did you mean num-queues?",
        );
        refuse("io_uring=a,colour=red", libc::ENOENT, "io_uring has no property \"colour\"");
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
            "\"direct\" needs a value: direct=VALUE (a comma in a value is written \",,\")",
        );
        refuse("io_uring=a,", libc::EINVAL, "\"io_uring=a,\": empty property (a comma in a value is written \",,\")");
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
