//! The reason why a request failed: small, `Copy`, and convertible to an errno or to a protocol's error in one `match`.

use std::{fmt, io};

/// The result of a request that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Error {
    /// The device reported that the transfer failed, or violated its protocol.
    Io,
    /// The request is malformed: a length of zero where that has no meaning, or a buffer that does not fit.
    Invalid,
    /// The range ends past the end of the device.
    OutOfRange,
    /// The device has no space left for the data.
    NoSpace,
    /// A write to a read-only device.
    ReadOnly,
    /// The device does not support this operation; nothing was changed.
    NotSupported,
    /// The device is dead, was removed or did not answer in time. It may or may not have executed the request.
    Gone,
    /// The request was cancelled before it reached the device ([`Channel::cancel`](crate::Channel::cancel)).
    Cancelled,
}

impl Error {
    /// All of them, in the order in which [`Counts`](crate::Counts) has them.
    pub const ALL: [Self; 8] = [
        Self::Io,
        Self::Invalid,
        Self::OutOfRange,
        Self::NoSpace,
        Self::ReadOnly,
        Self::NotSupported,
        Self::Gone,
        Self::Cancelled,
    ];

    /// The corresponding errno of Linux, a positive number.
    pub fn errno(self) -> i32 {
        match self {
            Self::Io | Self::Gone => libc::EIO,
            Self::Invalid | Self::OutOfRange => libc::EINVAL,
            Self::NoSpace => libc::ENOSPC,
            Self::ReadOnly => libc::EROFS,
            Self::NotSupported => libc::EOPNOTSUPP,
            Self::Cancelled => libc::ECANCELED,
        }
    }

    /// Converts an errno, a positive number. Without a better match, it is [`Error::Io`].
    pub fn from_errno(errno: i32) -> Self {
        match errno {
            libc::EINVAL => Self::Invalid,
            libc::ENOSPC | libc::EDQUOT | libc::EFBIG => Self::NoSpace,
            libc::EROFS | libc::EPERM | libc::EACCES | libc::EBADF => Self::ReadOnly,
            libc::EOPNOTSUPP | libc::ENOSYS | libc::ENOTTY => Self::NotSupported,
            libc::ENODEV | libc::ENXIO | libc::ESHUTDOWN | libc::ENOTCONN => Self::Gone,
            libc::ECANCELED => Self::Cancelled,
            _ => Self::Io,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Io => "input/output error",
            Self::Invalid => "invalid request",
            Self::OutOfRange => "range ends past the end of the device",
            Self::NoSpace => "no space left on the device",
            Self::ReadOnly => "the device is read-only",
            Self::NotSupported => "the device does not support this operation",
            Self::Gone => "the device is gone or does not answer",
            Self::Cancelled => "request cancelled",
        })
    }
}

impl std::error::Error for Error {}

impl From<Error> for io::Error {
    /// Keeps the error, so that [`io::Error::get_ref`] returns it.
    fn from(error: Error) -> Self {
        let kind = match error {
            Error::Io | Error::Cancelled => io::ErrorKind::Other,
            Error::Invalid | Error::OutOfRange => io::ErrorKind::InvalidInput,
            Error::NoSpace => io::ErrorKind::StorageFull,
            Error::ReadOnly => io::ErrorKind::ReadOnlyFilesystem,
            Error::NotSupported => io::ErrorKind::Unsupported,
            Error::Gone => io::ErrorKind::NotConnected,
        };
        Self::new(kind, error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errno_and_back_keeps_the_meaning() {
        for e in [Error::Io, Error::Invalid, Error::NoSpace, Error::ReadOnly, Error::NotSupported, Error::Cancelled] {
            assert_eq!(Error::from_errno(e.errno()), e);
        }
    }
}
