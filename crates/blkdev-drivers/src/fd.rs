//! `fd=N`: a file descriptor that this process inherited from the one that started it.
#![allow(unsafe_code)]

use std::{
    io,
    os::fd::{FromRawFd, OwnedFd, RawFd},
};

use blkdev::Context;

/// Another descriptor of the same open file. The inherited one stays open: the command line may name it again.
///
/// # Errors
/// `fd` is not open, or was opened by this process.
pub fn inherited(fd: RawFd) -> io::Result<OwnedFd> {
    let describe = |error: io::Error| Context::wrap(format!("fd={fd}: {error}"), error);
    // SAFETY: F_GETFD takes any number and touches no memory.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFD) };
    if flags < 0 {
        let error = io::Error::last_os_error();
        return Err(Context::with_kind(io::ErrorKind::InvalidInput, format!("fd={fd}: {error}"), error));
    }
    // Descriptors that this process opens are closed on exec; an inherited one was not. So only an inherited one is accepted.
    if flags & libc::FD_CLOEXEC != 0 {
        return Err(describe(io::Error::new(io::ErrorKind::InvalidInput, "not inherited")));
    }
    // SAFETY: F_DUPFD_CLOEXEC takes any number and touches no memory.
    let copy = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3) };
    if copy < 0 {
        return Err(describe(io::Error::last_os_error()));
    }
    // SAFETY: the kernel has just made `copy`, so no other code knows it, and only this value closes it.
    Ok(unsafe { OwnedFd::from_raw_fd(copy) })
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use super::*;

    #[test]
    fn only_inherited_descriptors_are_taken() {
        let own = std::fs::File::open("/dev/null").unwrap();
        assert!(inherited(own.as_raw_fd()).unwrap_err().to_string().ends_with("not inherited"));
        assert_eq!(inherited(i32::MAX).unwrap_err().to_string(), "fd=2147483647: Bad file descriptor (os error 9)");
        let copy = inherited(libc::STDERR_FILENO).unwrap();
        assert!(copy.as_raw_fd() > 2);
    }
}
