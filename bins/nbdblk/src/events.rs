//! [`Event`]: what a running server has to react to.

use nix::sys::signal::Signal;

use crate::{asker::Asker, plan::Plan, ready::Ready};

/// A plan that is served now and what has changed, or why nothing has.
pub(crate) type Outcome = Result<(Plan, String), String>;

/// Something to react to.
#[derive(Debug)]
pub(crate) enum Event {
    /// A signal asks to stop.
    Stop(Signal),
    /// The command of `--run`, or the client of `--single`, ended with this status.
    Ended(u8),
    /// The server has failed: a thread of it has ended, or it has nothing left to listen on.
    Failed(String),
    /// It was announced that the server is ready, or that failed.
    Announced(anyhow::Result<Ready>),
    /// The file is to be read again, and a client of the control socket perhaps waits for the result.
    Reload(Option<Asker>),
    /// The file was read again.
    Reloaded(Outcome),
}
