//! [`Asker`]: a client of the control socket that waits for what becomes of its reload.

use std::{io::Write, os::unix::net::UnixStream};

/// What became of it: what has changed, or what is wrong with the file.
pub(crate) type Answer = Result<String, String>;

/// A client of the control socket that waits for an [`Answer`].
#[derive(Debug)]
pub(crate) struct Asker(pub(crate) UnixStream);

impl Asker {
    /// Answers. It never waits: what does not fit the socket's buffer is cut off.
    pub(crate) fn tell(mut self, answer: &Answer) {
        let text = match answer {
            Ok(changes) => format!("ok {changes}\n"),
            Err(error) => format!("error {}\n", error.replace('\n', "; ")),
        };
        // A client that has left does not want it.
        let _ = self.0.write_all(text.as_bytes());
    }
}
