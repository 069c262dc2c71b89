//! [`Source`]: the file that a driver opens, or one that is already open.

use std::{os::fd::OwnedFd, path::PathBuf};

/// The source of a driver's file or character device.
#[derive(Debug)]
pub enum Source {
    /// The driver opens it.
    Path(PathBuf),
    /// It is already open, in a mode that fits the driver's options.
    Fd(OwnedFd),
}
