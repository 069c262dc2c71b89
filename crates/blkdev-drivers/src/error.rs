//! Why a word on the command line was refused, for people and for libblkio's interface.

use std::{borrow::Cow, error, fmt, io};

/// A name or a value that cannot be.
///
/// [`Display`](fmt::Display) is one line for people, with names, values and a suggestion in it; [`errno`](Self::errno) and
/// [`message`](Self::message) are what libblkio answers in the same case.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    errno: i32,
    message: Cow<'static, str>,
    text: String,
}

impl Error {
    /// A positive errno: `ENOENT` for unknown names, `EINVAL` for values, `EACCES` for what cannot be set, `ENODEV` for
    /// what is not known before the device is open.
    pub fn errno(&self) -> i32 {
        self.errno
    }

    /// libblkio's words for it: `Unknown property name`.
    pub fn message(&self) -> &str {
        &self.message
    }

    pub(crate) fn unknown_driver(name: &str, hint: &str) -> Self {
        let text = format!("unknown driver \"{name}\"; {hint}");
        Self { errno: libc::ENOENT, message: "Unknown driver name".into(), text }
    }

    pub(crate) fn unknown_property(driver: &str, name: &str, near: Option<&str>) -> Self {
        let hint = near.map(|near| format!("; did you mean {near}?")).unwrap_or_default();
        let text = format!("{driver} has no property \"{name}\"{hint}");
        Self { errno: libc::ENOENT, message: "Unknown property name".into(), text }
    }

    /// The same with more advice for people.
    pub(crate) fn with(mut self, advice: &str) -> Self {
        self.text.push_str(advice);
        self
    }

    pub(crate) fn read_only(driver: &str, name: &str) -> Self {
        let text = format!("{driver}: {name} can only be read");
        Self { errno: libc::EACCES, message: "Property is read-only".into(), text }
    }

    pub(crate) fn not_open(driver: &str, name: &str) -> Self {
        let text = format!("{driver}: {name} is not known before the device is open");
        Self { errno: libc::ENODEV, message: "Device must be connected".into(), text }
    }

    /// `why` is a sentence in libblkio's style: capital letter, no full stop.
    pub(crate) fn value(driver: &str, name: &str, value: &str, why: Cow<'static, str>) -> Self {
        let (first, rest) = why.split_at(1);
        let text = format!("{driver}: {name}={value}: {}{rest}", first.to_ascii_lowercase());
        Self { errno: libc::EINVAL, message: why, text }
    }

    pub(crate) fn invalid(text: String) -> Self {
        Self { errno: libc::EINVAL, message: text.clone().into(), text }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl error::Error for Error {}

impl From<Error> for io::Error {
    fn from(error: Error) -> Self {
        let kind = match error.errno {
            libc::ENODEV => io::ErrorKind::NotConnected,
            errno => Self::from_raw_os_error(errno).kind(),
        };
        Self::new(kind, error)
    }
}
