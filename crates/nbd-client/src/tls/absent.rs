//! TLS in a build without the feature `tls`: types without values, so the code that uses them vanishes.

use std::{
    io::{self, IoSlice},
    os::fd::BorrowedFd,
    path::Path,
};

use crate::error::Error;

/// How to use TLS. Without the feature `tls` there is no value of this type.
#[derive(Clone, Debug)]
pub enum Tls {}

impl Tls {
    pub(crate) fn within(dir: &Path) -> Result<Self, Error> {
        let text = format!("TLS with {}: this program was built without TLS (cargo feature tls)", dir.display());
        Err(Error::Invalid(text))
    }
}

#[derive(Debug)]
pub(crate) enum Session {}

impl Session {
    pub(crate) fn new(tls: &Tls, _: &str) -> Result<Self, Error> {
        match *tls {}
    }

    pub(crate) fn shake(&mut self, _: BorrowedFd<'_>) -> io::Result<bool> {
        match *self {}
    }

    pub(crate) fn receive(&mut self, _: BorrowedFd<'_>, _: &mut [u8]) -> io::Result<usize> {
        match *self {}
    }

    pub(crate) fn send(&mut self, _: BorrowedFd<'_>, _: &[IoSlice<'_>]) -> io::Result<usize> {
        match *self {}
    }

    pub(crate) fn flush(&mut self, _: BorrowedFd<'_>) -> io::Result<()> {
        match *self {}
    }

    pub(crate) fn is_flushed(&self) -> bool {
        match *self {}
    }

    pub(crate) fn close(&mut self, _: BorrowedFd<'_>) {
        match *self {}
    }
}
