//! TLS in a build without the feature `tls`. The public types and functions are the same, but each attempt to create a [`Tls`] is an
//! error. The other types have no values, so the compiler removes the code that uses them.

mod files;

use std::{io, os::fd::BorrowedFd, path::Path};

use blkdev::Buf;

use crate::{handover::KernelTls, outbox::Outbox, peer::Identity, received::Received};
pub use files::Certificates;

/// The TLS configuration of a server. Without the feature `tls`, none can be created.
#[derive(Clone, Debug)]
pub struct Tls(Never);

/// Private, so the compiler does not warn callers about code that this build cannot reach.
#[derive(Clone, Debug)]
enum Never {}

impl Tls {
    /// TLS 1.2 and 1.3 with certificates.
    ///
    /// # Errors
    /// Always [`Unsupported`](io::ErrorKind::Unsupported): this build has no feature `tls`.
    pub fn with_certificates(files: &Certificates) -> io::Result<Self> {
        Err(files::unsupported(&files.certificate, "tls"))
    }

    /// TLS 1.2 and 1.3 with pre-shared keys.
    ///
    /// # Errors
    /// Always [`Unsupported`](io::ErrorKind::Unsupported): this build has no feature `tls-psk`.
    pub fn with_keys(file: &Path) -> io::Result<Self> {
        Err(files::unsupported(file, "tls-psk"))
    }

    /// Whether TLS is required for all exports, or only for those with [`Export::tls_only`](crate::Export::tls_only).
    #[must_use]
    pub fn required(self, _: bool) -> Self {
        match self.0 {}
    }

    pub(crate) fn policy(&self) -> nbd_proto::Tls {
        match self.0 {}
    }

    pub(crate) fn begin(&self) -> io::Result<Shaking> {
        match self.0 {}
    }
}

pub(crate) enum Shaking {}

impl Shaking {
    pub(crate) fn go(&mut self, _: BorrowedFd<'_>, _: &mut [u8]) -> io::Result<bool> {
        match *self {}
    }

    pub(crate) fn agree(self) -> io::Result<(Secure, Option<Identity>)> {
        match self {}
    }
}

#[derive(Debug)]
pub(crate) enum Secure {}

impl Secure {
    pub(crate) fn rest(&self) -> usize {
        match *self {}
    }

    pub(crate) fn shrink(&mut self) {
        match *self {}
    }

    pub(crate) fn suits_kernel(&self, _: BorrowedFd<'_>) -> bool {
        match *self {}
    }

    pub(crate) fn into_kernel(self, _: BorrowedFd<'_>) -> io::Result<Kernel> {
        match self {}
    }

    pub(crate) fn receive(&mut self, _: BorrowedFd<'_>, _: &mut [u8]) -> io::Result<Option<Received>> {
        match *self {}
    }

    pub(crate) fn send(
        &mut self,
        _: BorrowedFd<'_>,
        _: &mut [u8],
        _: impl FnMut(&mut [u8]) -> usize,
    ) -> io::Result<bool> {
        match *self {}
    }

    pub(crate) fn close(&mut self, _: BorrowedFd<'_>) {
        match *self {}
    }
}

#[derive(Debug)]
pub(crate) enum Kernel {}

impl Kernel {
    pub(crate) fn suspend(&self) -> Option<KernelTls> {
        match *self {}
    }

    pub(crate) fn resume(_: &KernelTls) -> io::Result<Self> {
        Err(io::Error::new(io::ErrorKind::Unsupported, "this build has no feature `tls`"))
    }

    pub(crate) fn receive(
        &mut self,
        _: BorrowedFd<'_>,
        _: Option<(&mut Buf, usize)>,
        _: &mut [u8],
    ) -> io::Result<Option<Received>> {
        match *self {}
    }

    pub(crate) fn send(&mut self, _: BorrowedFd<'_>, _: &mut Outbox) -> io::Result<bool> {
        match *self {}
    }

    pub(crate) fn close(&mut self, _: BorrowedFd<'_>) {
        match *self {}
    }
}
