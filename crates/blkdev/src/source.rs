//! [`Source`]: the file that a driver opens, or one that is open already.

use std::{os::fd::OwnedFd, path::PathBuf};

/// Where a driver's file or character device comes from.
#[derive(Debug)]
pub enum Source {
    /// The driver opens it.
    Path(PathBuf),
    /// It is open already, in a mode that the driver's options must fit.
    Fd(OwnedFd),
}
