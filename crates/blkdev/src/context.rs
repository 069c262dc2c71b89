//! [`Context`]: an error whose text names the object and the remedy, and that keeps its cause.

use std::{error, fmt, io};

/// What is inside an [`io::Error`] with a text of its own: the text, and the error that caused it.
///
/// [`source`](error::Error::source) returns the cause, so a program can follow it to the kind and the errno of the system call
/// that failed. [`os_error`](Self::os_error) returns that errno directly:
///
/// ```
/// use std::{error::Error, io};
///
/// use blkdev::Context;
///
/// let cause = io::Error::from_raw_os_error(24);
/// let error = Context::wrap(format!("cannot open disk.img: {cause}; raise ulimit -n"), cause);
/// assert_eq!(error.to_string(), "cannot open disk.img: Too many open files (os error 24); raise ulimit -n");
/// assert_eq!(Context::os_error(&error), Some(24));
///
/// let source: &io::Error = error.source().unwrap().downcast_ref().unwrap();
/// assert_eq!(source.raw_os_error(), Some(24));
/// ```
///
/// # The text contains that of the cause
/// By convention an error either prints its cause or returns it as its source. This one does both, on purpose. The remedy must
/// come after the cause, and a log line or an `eprintln!("{error}")` must have all of it: `{}` of an [`io::Error`] would
/// otherwise end before the reason. So a report of the whole chain, such as anyhow's `{:#}`, repeats the cause.
/// [`report`](Self::report) does not: it prints any error with its causes, and stops at one whose text is complete.
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

    /// The text of an error and its causes on one line, without repetition.
    ///
    /// ```
    /// # use std::io;
    /// # use blkdev::Context;
    /// let cause = io::Error::from_raw_os_error(2);
    /// let error = Context::wrap(format!("cannot open disk.img: {cause}"), cause);
    /// assert_eq!(Context::report(&error), "cannot open disk.img: No such file or directory (os error 2)");
    /// ```
    pub fn report(error: &(dyn error::Error + 'static)) -> String {
        let mut text = error.to_string();
        let mut last = error;
        while !Self::is_complete(last)
            && let Some(cause) = last.source()
        {
            text = format!("{text}: {cause}");
            last = cause;
        }
        text
    }

    /// Whether the text of an error contains those of its causes.
    fn is_complete(error: &(dyn error::Error + 'static)) -> bool {
        let inner = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
        error.is::<Self>() || inner.is_some_and(|inner| inner.is::<Self>())
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

impl error::Error for Context {
    fn source(&self) -> Option<&(dyn error::Error + 'static)> {
        Some(&self.cause)
    }
}

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
            let inner: &io::Error = outer.source().unwrap().downcast_ref().unwrap();
            assert!(inner.to_string().starts_with("open: "), "{inner}");
            let root: &io::Error = inner.source().unwrap().downcast_ref().unwrap();
            assert_eq!(root.raw_os_error(), Some(errno));
            assert!(root.source().is_none());
        };
        check(libc::EBUSY, io::ErrorKind::ResourceBusy);
        check(libc::ENODEV, io::ErrorKind::NotFound);
        check(libc::EMFILE, io::Error::from_raw_os_error(libc::EMFILE).kind());
        assert_eq!(Context::os_error(&io::Error::other("no errno")), None);
    }

    /// An error of a program that leads to `cause`.
    #[derive(Debug)]
    struct Outer(io::Error);

    impl fmt::Display for Outer {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("starting")
        }
    }

    impl Error for Outer {
        fn source(&self) -> Option<&(dyn Error + 'static)> {
            Some(&self.0)
        }
    }

    #[test]
    fn a_report_says_each_cause_once() {
        let cause = || io::Error::from_raw_os_error(libc::EBUSY);
        let inner = || Context::wrap(format!("disk: {}; close it", cause()), cause());
        let text = format!("disk: {}; close it", cause());
        assert_eq!(Context::report(&inner()), text);
        // Also behind an error that prints no cause, and behind a second text.
        assert_eq!(Context::report(&Outer(inner())), format!("starting: {text}"));
        assert_eq!(Context::report(&Outer(cause())), format!("starting: {}", cause()));
        assert_eq!(Context::report(&Outer(io::Error::other(Outer(inner())))), format!("starting: starting: {text}"));
        assert_eq!(Context::report(&Context::wrap(format!("open {}", inner()), inner())), format!("open {text}"));
        // A text may leave out its cause.
        let other = Context::with_kind(io::ErrorKind::Unsupported, "the kernel is too old", cause());
        assert_eq!(Context::report(&other), "the kernel is too old");
    }
}
