//! The system calls of a server that need `unsafe`: payload moves between a socket and a [`Buf`] without a Rust reference to
//! memory that a device may write.
#![allow(unsafe_code)]

use std::{
    io,
    marker::PhantomData,
    mem::MaybeUninit,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    ptr,
};

use nix::{
    errno::Errno,
    sys::socket::{SockFlag, accept4},
};

use crate::arena::Buf;

/// Most pieces of one [`Gather`]. It fits the stack; more than a few hundred gain nothing.
pub const PIECES: usize = 256;

/// A list of pieces that one system call sends.
pub struct Gather<'a> {
    list: [MaybeUninit<libc::iovec>; PIECES],
    count: usize,
    borrowed: PhantomData<&'a Buf>,
}

impl<'a> Gather<'a> {
    /// Returns an empty list.
    #[expect(clippy::new_without_default, reason = "an empty list is made to be filled, never asked for by default")]
    pub fn new() -> Self {
        Self { list: [const { MaybeUninit::uninit() }; PIECES], count: 0, borrowed: PhantomData }
    }

    /// Whether no more pieces fit.
    #[inline]
    pub fn is_full(&self) -> bool {
        self.count == PIECES
    }

    /// Whether the list has no pieces.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Adds bytes. Ignored if the list is full.
    #[inline]
    pub fn bytes(&mut self, bytes: &'a [u8]) {
        self.add(bytes.as_ptr(), bytes.len());
    }

    /// Adds the content of `buf` from byte `at` on. Ignored if the list is full.
    ///
    /// # Panics
    /// If `at` lies past the end.
    #[inline]
    pub fn buf(&mut self, buf: &'a Buf, at: usize) {
        assert!(at <= buf.len(), "a piece starts within its Buf");
        self.add(buf.as_ptr().wrapping_add(at), buf.len() - at);
    }

    #[inline]
    fn add(&mut self, base: *const u8, len: usize) {
        if let Some(slot) = self.list.get_mut(self.count) {
            slot.write(libc::iovec { iov_base: base.cast_mut().cast(), iov_len: len });
            self.count += 1;
        }
    }

    /// Sends as much as the socket takes now. Returns the number of bytes. Never raises SIGPIPE, never waits.
    ///
    /// # Errors
    /// `WouldBlock` if the socket is full; otherwise the kernel's error.
    pub fn send(&mut self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        let mut message = empty_message();
        message.msg_iov = self.list.as_mut_ptr().cast();
        message.msg_iovlen = self.count;
        // SAFETY: the first `count` entries are initialised. Each points at bytes or a Buf borrowed for 'a, which outlives this
        // call. The kernel only reads from them.
        let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), &message, libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT) };
        usize::try_from(sent).map_err(|_| io::Error::last_os_error())
    }
}

impl std::fmt::Debug for Gather<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gather").field("count", &self.count).finish()
    }
}

/// Receives available data: first into `buf` from byte `at` on, the rest into `staging`. Returns the total number of bytes; 0:
/// the peer has closed. Never waits.
///
/// # Errors
/// `WouldBlock` if nothing is available; otherwise the kernel's error.
///
/// # Panics
/// If `at` lies past the end of `buf`.
pub fn receive(socket: BorrowedFd<'_>, buf: Option<(&mut Buf, usize)>, staging: &mut [u8]) -> io::Result<usize> {
    let tail = libc::iovec { iov_base: staging.as_mut_ptr().cast(), iov_len: staging.len() };
    let mut list = [tail, tail];
    let mut count = 1;
    if let Some((buf, at)) = buf {
        assert!(at <= buf.len(), "a payload lies within its Buf");
        list[0] = libc::iovec { iov_base: buf.as_ptr().wrapping_add(at).cast(), iov_len: buf.len() - at };
        count = 2;
    }
    let mut message = empty_message();
    message.msg_iov = list.as_mut_ptr();
    message.msg_iovlen = count;
    // SAFETY: one entry is `staging`, borrowed for the call. The other is the rest of a Buf, whose pages are ours and mapped
    // while it lives; it is borrowed for the call too.
    let got = unsafe { libc::recvmsg(socket.as_raw_fd(), &mut message, libc::MSG_DONTWAIT) };
    usize::try_from(got).map_err(|_| io::Error::last_os_error())
}

/// Sends a TLS record of the type `kind` on a socket whose records the kernel seals (Documentation/networking/tls.rst). Never waits.
///
/// # Errors
/// `WouldBlock` if the socket is full; otherwise the kernel's error.
pub fn send_record(socket: BorrowedFd<'_>, kind: u8, bytes: &[u8]) -> io::Result<()> {
    const TLS_SET_RECORD_TYPE: libc::c_int = 1;
    let mut piece = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    // SAFETY: computes a length.
    let space = unsafe { libc::CMSG_SPACE(1) } as usize;
    let mut control = [0_u64; 4];
    assert!(space <= size_of_val(&control), "the control data fits");
    let mut message = empty_message();
    message.msg_iov = &raw mut piece;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = space;
    // SAFETY: the control buffer is aligned, and long enough for one header and one byte, so CMSG_FIRSTHDR returns its start. The
    // kernel only reads from it and from `bytes`; both outlive the call.
    let sent = unsafe {
        let header = libc::CMSG_FIRSTHDR(&raw const message);
        (*header).cmsg_level = libc::SOL_TLS;
        (*header).cmsg_type = TLS_SET_RECORD_TYPE;
        (*header).cmsg_len = libc::CMSG_LEN(1) as usize;
        libc::CMSG_DATA(header).write(kind);
        libc::sendmsg(socket.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT)
    };
    if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Memory of sent data that the peer has not read, in bytes. For a TCP socket: data that the peer has not acknowledged.
pub fn unread(socket: BorrowedFd<'_>) -> usize {
    let mut bytes: libc::c_int = 0;
    // SAFETY: the request writes one int, to a local variable.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) };
    if result < 0 { 0 } else { bytes.max(0) as usize }
}

/// Sets SO_RCVLOWAT: the socket becomes readable only once `bytes` have arrived or the peer has closed. So the peer must be
/// certain to send them. A socket without this option (a unix socket) wakes for every byte.
pub fn wake_at(socket: BorrowedFd<'_>, bytes: usize) {
    let bytes = libc::c_int::try_from(bytes).unwrap_or(libc::c_int::MAX);
    let (value, len) = ((&raw const bytes).cast(), size_of_val(&bytes) as libc::socklen_t);
    // SAFETY: the value is one int, a local variable, which is only read. A failure has no other effect.
    unsafe { libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_RCVLOWAT, value, len) };
}

fn empty_message() -> libc::msghdr {
    // SAFETY: all fields are integers or pointers, for which zero is valid: no name, no pieces, no control data.
    let mut message: libc::msghdr = unsafe { MaybeUninit::zeroed().assume_init() };
    message.msg_name = ptr::null_mut();
    message
}

/// Takes the next connection of a listening socket of any address family, close-on-exec.
///
/// # Errors
/// See accept(2).
pub fn accept(listening: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    let fd = accept4(listening.as_raw_fd(), SockFlag::SOCK_CLOEXEC)?;
    // SAFETY: the kernel has just opened this descriptor for us, and nothing else knows its number.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    use std::os::{fd::AsFd, unix::net::UnixStream};

    use super::*;
    use crate::Mapping;

    #[test]
    fn bytes_and_bufs_cross_a_socket() {
        let mut arena = Mapping::new(1).unwrap().arenas(1).remove(0);
        let (a, b) = UnixStream::pair().unwrap();
        let mut buf = arena.alloc(5000).unwrap();
        buf.copy_from(0, &[9; 5000]);
        let mut list = Gather::new();
        list.bytes(b"head");
        list.buf(&buf, 1);
        assert_eq!(list.send(a.as_fd()).unwrap(), 4 + 4999);

        let (mut into, mut staging) = (arena.alloc(10).unwrap(), [0; 8192]);
        assert_eq!(receive(b.as_fd(), Some((&mut into, 6)), &mut staging).unwrap(), 4 + 4999);
        assert_eq!(into.to_vec()[6..], *b"head");
        assert_eq!(staging[..4999], [9; 4999]);
        let again = receive(b.as_fd(), None, &mut staging).unwrap_err();
        assert_eq!(again.kind(), io::ErrorKind::WouldBlock);
        drop(a);
        assert_eq!(receive(b.as_fd(), None, &mut staging).unwrap(), 0);
    }
}
