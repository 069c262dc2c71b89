//! Stand-ins for TLS in a build without the feature `tls`: types without values, so the compiler removes the code that uses them.

use std::{io, os::fd::BorrowedFd};

use crate::{peer::Identity, received::Received};

/// The TLS configuration of a server. Without the feature `tls`, none can be created.
#[derive(Clone, Debug)]
pub enum Tls {}

impl Tls {
    /// Whether clients must use TLS.
    #[must_use]
    pub fn required(self, _: bool) -> Self {
        match self {}
    }

    pub(crate) fn policy(&self) -> nbd_proto::Tls {
        match *self {}
    }

    pub(crate) fn begin(&self) -> io::Result<Shaking> {
        match *self {}
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

/// The directions of a connection that the kernel handles.
#[derive(Debug)]
pub(crate) struct Kernel {
    pub(crate) receives: bool,
    pub(crate) sends: bool,
}

impl Secure {
    pub(crate) fn kernel(&self) -> Kernel {
        match *self {}
    }

    pub(crate) fn part(&self) -> usize {
        match *self {}
    }

    pub(crate) fn shrink(&mut self) {
        match *self {}
    }

    pub(crate) fn offload(&mut self, _: BorrowedFd<'_>) -> io::Result<()> {
        match *self {}
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

    pub(crate) fn close(&mut self, _: BorrowedFd<'_>, _: &mut [u8]) {
        match *self {}
    }
}
