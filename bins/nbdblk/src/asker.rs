//! [`Asker`]: a client of the control socket that waits for the answer to its request.

use std::{io::Write, os::unix::net::UnixStream, time::Duration};

/// Time for a client to read a long answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// The result of a reload: the changes, or the reason of the failure.
pub(crate) type Answer = Result<String, String>;

/// A client of the control socket that waits for an [`Answer`].
#[derive(Debug)]
pub(crate) struct Asker(pub(crate) UnixStream);

impl Asker {
    /// Sends the answer. Never waits: the part that does not fit the socket's buffer is lost.
    pub(crate) fn tell(mut self, answer: &Answer) {
        // A client that has disconnected does not need it.
        let _ = self.0.write_all(words(answer).as_bytes());
    }

    /// Sends an answer of any length, and waits for the client to read it, but not for long.
    pub(crate) fn tell_all(mut self, answer: &Answer) {
        let wait = self.0.set_nonblocking(false).and_then(|()| self.0.set_write_timeout(Some(PATIENCE)));
        if wait.is_ok() {
            let _ = self.0.write_all(words(answer).as_bytes());
        }
    }
}

fn words(answer: &Answer) -> String {
    match answer {
        Ok(changes) => format!("ok {changes}\n"),
        Err(error) => format!("error {}\n", error.replace('\n', "; ")),
    }
}
