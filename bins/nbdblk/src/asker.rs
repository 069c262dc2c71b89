//! [`Asker`]: a client of the control socket that waits for the result of its reload.

use std::{io::Write, os::unix::net::UnixStream};

/// The result of a reload: the changes, or the reason of the failure.
pub(crate) type Answer = Result<String, String>;

/// A client of the control socket that waits for an [`Answer`].
#[derive(Debug)]
pub(crate) struct Asker(pub(crate) UnixStream);

impl Asker {
    /// Sends the answer. Never waits: the part that does not fit the socket's buffer is lost.
    pub(crate) fn tell(mut self, answer: &Answer) {
        let text = match answer {
            Ok(changes) => format!("ok {changes}\n"),
            Err(error) => format!("error {}\n", error.replace('\n', "; ")),
        };
        // A client that has disconnected does not need it.
        let _ = self.0.write_all(text.as_bytes());
    }
}
