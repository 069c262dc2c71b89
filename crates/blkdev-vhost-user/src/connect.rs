//! Connects to a Unix socket, in bounded time and with an error that says what is wrong with it.

use std::{
    fs, io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::{fs::FileTypeExt, net::UnixStream},
    },
    path::Path,
    time::Duration,
};

use nix::{
    errno::Errno,
    sys::{
        socket::{AddressFamily, SockFlag, SockType, UnixAddr, setsockopt, socket, sockopt},
        time::{TimeVal, TimeValLike},
    },
};

pub(crate) fn connect(path: &Path, timeout: Duration) -> io::Result<UnixStream> {
    let fail = |kind, why: &str| Err(io::Error::new(kind, why.to_owned()));
    let address = match UnixAddr::new(path) {
        Ok(address) => address,
        Err(Errno::ENAMETOOLONG) => {
            let why = format!("a socket's path has at most 107 bytes, this one {}", path.as_os_str().len());
            return fail(io::ErrorKind::InvalidInput, &why);
        }
        Err(e) => return Err(e.into()),
    };
    // A socket that was removed while its back end lives and one that is left over look the same to connect(2).
    match fs::metadata(path) {
        Ok(file) if !file.file_type().is_socket() => return fail(io::ErrorKind::InvalidInput, "not a socket"),
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            return fail(io::ErrorKind::NotFound, "no such socket; is the back end running?");
        }
        _ => {}
    }
    let fd: OwnedFd = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    // connect(2) waits while the listener's backlog is full, and honours this. 0 would mean to wait for ever.
    let micros = i64::try_from(timeout.as_micros()).unwrap_or(i64::MAX).max(1);
    setsockopt(&fd, sockopt::SendTimeout, &TimeVal::microseconds(micros))?;
    match nix::sys::socket::connect(fd.as_raw_fd(), &address) {
        Ok(()) => Ok(UnixStream::from(fd)),
        Err(Errno::EAGAIN) => fail(
            io::ErrorKind::TimedOut,
            &format!("not accepted within {timeout:?}; is the back end busy with another front end?"),
        ),
        Err(Errno::ECONNREFUSED) => {
            fail(io::ErrorKind::ConnectionRefused, "nobody listens at this socket; is the back end running?")
        }
        Err(e) => Err(e.into()),
    }
}
