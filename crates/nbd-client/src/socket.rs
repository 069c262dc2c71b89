//! Sends and receives on a socket without blocking, whatever the mode of the socket is.

use std::{
    io::{self, IoSlice, Read, Write},
    os::fd::{AsRawFd, BorrowedFd},
};

use nix::{
    errno::Errno,
    sys::socket::{MsgFlags, recv, sendmsg},
};

/// A connected socket. Its reads and writes fail with `WouldBlock` where a blocking socket would wait.
#[derive(Clone, Copy)]
pub(crate) struct Nonblocking<'a>(pub(crate) BorrowedFd<'a>);

impl Read for Nonblocking<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        retry(|| recv(self.0.as_raw_fd(), buf, MsgFlags::MSG_DONTWAIT))
    }
}

impl Write for Nonblocking<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(bytes)])
    }

    fn write_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        retry(|| sendmsg::<()>(self.0.as_raw_fd(), slices, &[], flags, None))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn retry(mut call: impl FnMut() -> nix::Result<usize>) -> io::Result<usize> {
    loop {
        match call() {
            Err(Errno::EINTR) => {}
            other => return Ok(other?),
        }
    }
}
