//! [`Context`]: an error whose text names the object and the remedy, and that keeps its cause.

use std::{error, fmt, io};

/// What is inside an [`io::Error`] with a text of its own: the text, and the error that caused it.
///
/// The text contains that of the cause. So [`source`](error::Error::source) returns none, and a report of the whole chain, such
/// as anyhow's `{:#}`, repeats nothing. [`os_error`](Self::os_error) leads to the errno, also where [`io::ErrorKind`] has no
/// stable name for it:
///
/// ```
/// use std::io;
///
/// use blkdev::Context;
///
/// let cause = io::Error::from_raw_os_error(24);
/// let error = Context::wrap(format!("cannot open disk.img: {cause}"), cause);
/// assert_eq!(error.to_string(), "cannot open disk.img: Too many open files (os error 24)");
/// assert_eq!(Context::os_error(&error), Some(24));
/// ```
#[derive(Debug)]
pub struct Context {
    text: String,
    cause: io::Error,
}

impl Context {
    /// Returns an error with the text `text`, which contains that of `cause`. It has the kind of `cause`. `ENODEV` and `ENXIO`,
    /// for which there is no kind, become [`NotFound`](io::ErrorKind::NotFound).
    pub fn wrap(text: impl Into<String>, cause: io::Error) -> io::Error {
        let kind = match cause.raw_os_error() {
            Some(libc::ENODEV | libc::ENXIO) => io::ErrorKind::NotFound,
            _ => cause.kind(),
        };
        Self::with_kind(kind, text, cause)
    }

    /// As [`wrap`](Self::wrap), for a cause that means something else here than its kind says.
    pub fn with_kind(kind: io::ErrorKind, text: impl Into<String>, cause: io::Error) -> io::Error {
        io::Error::new(kind, Self { text: text.into(), cause })
    }

    /// The errno of the system call that failed, behind any number of texts.
    pub fn os_error(error: &io::Error) -> Option<i32> {
        let inner = || error.get_ref()?.downcast_ref::<Self>();
        error.raw_os_error().or_else(|| Self::os_error(&inner()?.cause))
    }

    /// The error that caused this one.
    pub fn cause(&self) -> &io::Error {
        &self.cause
    }
}

impl fmt::Display for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl error::Error for Context {}

#[cfg(test)]
mod tests {
    use std::error::Error;

    use super::*;

    #[test]
    fn an_error_keeps_its_kind_and_errno_behind_two_texts() {
        let check = |errno, kind| {
            let cause = io::Error::from_raw_os_error(errno);
            let inner = Context::wrap(format!("open: {cause}"), cause);
            let outer = Context::wrap(format!("disk: {inner}"), inner);
            assert!(outer.to_string().starts_with("disk: open: "), "{outer}");
            assert_eq!((outer.kind(), Context::os_error(&outer)), (kind, Some(errno)));
            assert!(outer.source().is_none(), "its text is in the text of {outer}");
        };
        check(libc::EBUSY, io::ErrorKind::ResourceBusy);
        check(libc::ENODEV, io::ErrorKind::NotFound);
        check(libc::EMFILE, io::Error::from_raw_os_error(libc::EMFILE).kind());
        assert_eq!(Context::os_error(&io::Error::other("no errno")), None);
    }
}
