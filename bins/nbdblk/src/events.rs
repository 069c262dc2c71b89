//! [`Event`]: an event that a running server handles.

use std::path::PathBuf;

use nix::sys::signal::Signal;

use crate::{asker::Asker, plan::Plan, ready::Ready, replace::Prepared, requests::Target};

/// The result of a reload: the plan that is served now and the changes, or the reason of the failure.
pub(crate) type Outcome = Result<(Plan, String), String>;

/// An event to handle.
#[derive(Debug)]
pub(crate) enum Event {
    /// A signal that stops the server.
    Stop(Signal),
    /// The command of `--run`, or the client of `--single`, ended with this status.
    Ended(u8),
    /// The server has failed: a thread has ended, or no listening socket is left.
    Failed(String),
    /// Readiness was announced, or the announcement failed.
    Announced(anyhow::Result<Ready>),
    /// Read the file again. A client of the control socket may wait for the result.
    Reload(Option<Asker>),
    /// The file was read again.
    Reloaded(Outcome),
    /// Replace the program, by another one if it is named. A client of the control socket may wait for the result.
    Upgrade(Option<Asker>, Option<PathBuf>),
    /// A client of the control socket asks for the status.
    Status(Asker),
    /// Disconnect clients. A client of the control socket waits for the result.
    Disconnect(Asker, Target),
    /// The server is paused and can be replaced, or the reason why not.
    Prepared(Result<Box<Prepared>, String>),
}

impl Event {
    /// The client of the control socket that waits for an answer.
    pub(crate) fn into_asker(self) -> Option<Asker> {
        match self {
            Self::Reload(asker) | Self::Upgrade(asker, _) => asker,
            Self::Status(asker) | Self::Disconnect(asker, _) => Some(asker),
            _ => None,
        }
    }
}
