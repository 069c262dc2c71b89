//! Connects to a Unix socket and checks for a vhost-user back end behind it, in bounded time and with precise errors.

use std::{
    fs,
    io::{self, Read, Write},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::{
            fs::{FileTypeExt, MetadataExt},
            net::UnixStream,
        },
    },
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use blkdev::Context;
use nix::{
    errno::Errno,
    sys::{
        socket::{AddressFamily, SockFlag, SockType, UnixAddr, setsockopt, socket, sockopt},
        time::{TimeVal, TimeValLike},
    },
};

pub(crate) fn connect(path: &Path, timeout: Duration) -> io::Result<UnixStream> {
    let address = match UnixAddr::new(path) {
        Ok(address) => address,
        Err(e @ Errno::ENAMETOOLONG) => {
            let why = format!("the path has {} bytes, a socket path at most 107 bytes", path.as_os_str().len());
            return Err(Context::with_kind(io::ErrorKind::InvalidInput, why, e.into()));
        }
        Err(e) => return Err(e.into()),
    };
    // connect(2) cannot distinguish a removed socket of a live back end from a stale socket.
    match fs::metadata(path) {
        Ok(file) if !file.file_type().is_socket() => {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a socket"));
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            return Err(Context::wrap("no such socket; is the back end running?", e));
        }
        _ => {}
    }
    let fd: OwnedFd = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    let deadline = Instant::now() + timeout;
    loop {
        // connect(2) blocks while the listener's backlog is full, and honours this time-out. 0 would mean no time-out.
        let left = deadline.saturating_duration_since(Instant::now());
        let micros = i64::try_from(left.as_micros()).unwrap_or(i64::MAX).max(1);
        setsockopt(&fd, sockopt::SendTimeout, &TimeVal::microseconds(micros))?;
        match nix::sys::socket::connect(fd.as_raw_fd(), &address) {
            Ok(()) => return Ok(UnixStream::from(fd)),
            Err(Errno::EINTR) => {}
            Err(e @ Errno::EAGAIN) => {
                let why = format!("not accepted within {timeout:?}; is the back end busy with another front end?");
                return Err(Context::with_kind(io::ErrorKind::TimedOut, why, e.into()));
            }
            Err(e @ Errno::ECONNREFUSED) => {
                return Err(Context::wrap("no process listens on this socket; is the back end running?", e.into()));
            }
            Err(e) => return Err(e.into()),
        }
    }
}

/// Message ids.
const GET_FEATURES: u32 = 1;
const SET_OWNER: u32 = 3;

/// Sends the first message and checks the reply. `vhost`'s front end would wait for the rest of an invalid reply.
pub(crate) fn greet(mut stream: &UnixStream) -> io::Result<()> {
    let stranger =
        |what: &str| io::Error::new(io::ErrorKind::InvalidData, format!("not a vhost-user back end: {what}"));
    let closed = |have: usize| {
        let when = if have == 0 { "without a reply" } else { "in the middle of its first reply" };
        let text = format!("not a vhost-user back end: it closed the connection {when}");
        io::Error::new(io::ErrorKind::ConnectionReset, text)
    };
    let reset = |e: io::Error, have: usize| match e.kind() {
        io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => closed(have),
        _ => e,
    };
    let words = [SET_OWNER, 1, 0, GET_FEATURES, 1, 0].map(u32::to_ne_bytes).concat();
    let sent = stream.write_all(&words);
    // Request, flags, size; then 64 feature bits.
    let mut answer = [0; 20];
    let mut have = 0;
    while have < answer.len() {
        match stream.read(&mut answer[have..]) {
            Ok(0) => return Err(closed(have)),
            Ok(more) => have += more,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(reset(e, have)),
        }
        let word =
            |n: usize| u32::from_ne_bytes([answer[4 * n], answer[4 * n + 1], answer[4 * n + 2], answer[4 * n + 3]]);
        if answer.starts_with(b"NBDMAGIC") {
            return Err(stranger("it is an NBD server"));
        }
        if have >= 4 && word(0) != GET_FEATURES || have >= 12 && (word(1) & 0b111 != 0b101 || word(2) != 8) {
            return Err(stranger(&format!("it sent \"{}\"", answer[..have].escape_ascii())));
        }
    }
    sent.map_err(|e| reset(e, have))
}

/// A socket's path, and the identity of the socket at connect.
#[derive(Debug)]
pub(crate) struct Name {
    path: PathBuf,
    was: Option<Identity>,
}

/// File system, inode and birth time. The birth time, because inode numbers of removed files are reused.
type Identity = (u64, u64, i64, i64);

impl Name {
    pub(crate) fn new(path: &Path) -> Self {
        Self { path: path.to_owned(), was: identity(path) }
    }

    /// Whether the path names another socket now: its back end was restarted. A missing path names no socket.
    pub(crate) fn is_of_another(&self) -> bool {
        identity(&self.path).zip(self.was).is_some_and(|(now, was)| now != was)
    }
}

fn identity(path: &Path) -> Option<Identity> {
    let file = fs::metadata(path).ok()?;
    // Only a newer file has another birth time. The change time moves with each chmod(2).
    let born = file.created().ok().and_then(|t| t.duration_since(std::time::UNIX_EPOCH).ok()).unwrap_or_default();
    Some((file.dev(), file.ino(), born.as_secs() as i64, i64::from(born.subsec_nanos())))
}
